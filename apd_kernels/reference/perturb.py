"""Projected gradient ascent with the gradient written out: no autograd graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.rows import per_difference, unit_rows
from apd_kernels.prepared import Operands
from apd_kernels.reference.mining import batch_hard, pair_gradient
from apd_kernels.reference.prepared import prepare_rows

# Up to this share of D the N×N form pays. 10 steps on 2 CPU cores, N×N against direct, ms: 64×2048 3.8 and 21,
# 256×2048 37 and 144, 512×2048 172 and 268, 64×512 3.3 and 7.8, 128×512 10.8 and 10.9, 256×512 32 and 24.
SOLVER_SHARE = 0.25


def metric_perturb(
    x: Tensor,
    labels: Tensor,
    begin: Tensor | None,
    memory: Tensor | None,
    memory_labels: Tensor | None,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
    precision: str,
) -> Tensor:
    """z ← project(z + α · direction(∂/∂z Σ_a softplus(d_p − d_n))), `steps` times."""
    # float64 inputs are the oracle's: they take the form that is written like the formula.
    plain = norm == "l2" and begin is None and memory is None and x.dim() == 2 and x.dtype != torch.float64
    if plain and x.shape[0] <= SOLVER_SHARE * x.shape[1]:
        return solve(x, labels, epsilon, step_size, steps, relative)

    bank = _as(memory, x.to(internal_dtype(x)))
    prepared = Operands() if bank is None else prepare_rows(bank, True, precision)

    def gradient(z: Tensor) -> Tensor:
        positive, negative, positive_index, negative_index = batch_hard(
            z, bank, prepared, Pairing(labels, memory_labels), "euclidean", precision
        )
        slope = torch.sigmoid(positive - negative)
        slope = torch.where((positive_index >= 0) & (negative_index >= 0), slope, 0)
        weights = per_difference(slope, positive, "euclidean"), per_difference(-slope, negative, "euclidean")
        winners = positive_index, negative_index
        return pair_gradient(z, bank, *weights, *winners, None, "euclidean", True, False)[0]

    return _ascend(x, begin, gradient, epsilon, step_size, steps, relative, norm)


def negative_perturb(
    x: Tensor,
    negatives: Tensor,
    valid: Tensor,
    begin: Tensor | None,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
) -> Tensor:
    """z ← project(z − α · direction(∂/∂z mean_j softplus(d(z, n_j) − d(z, x)))), `steps` times."""
    start, others = x.to(internal_dtype(x)), negatives.to(internal_dtype(x))

    def gradient(z: Tensor) -> Tensor:
        toward, away = z[..., None, :] - others, z - start
        to_negatives = torch.linalg.vector_norm(toward, dim=-1)
        to_start = torch.linalg.vector_norm(away, dim=-1)
        slope = torch.sigmoid(to_negatives - to_start[..., None])
        pull = (per_difference(slope, to_negatives, "euclidean")[..., None] * toward).sum(-2)
        push = per_difference(slope.sum(-1), to_start, "euclidean")[..., None] * away
        return torch.where(valid[..., None], push - pull, 0)

    return _ascend(x, begin, gradient, epsilon, step_size, steps, relative, norm)


def _as(memory: Tensor | None, z: Tensor) -> Tensor | None:
    return None if memory is None else memory.to(z.dtype)


def _sizes(start: Tensor, relative: bool, norm: str) -> Tensor:
    """What epsilon and step are multiplied by: each row's norm, or 1."""
    if not relative:
        return start.new_ones(1)
    return torch.linalg.vector_norm(start, ord=2 if norm == "l2" else float("inf"), dim=-1, keepdim=True)


def _ascend(
    x: Tensor,
    begin: Tensor | None,
    gradient: Callable[[Tensor], Tensor],
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
) -> Tensor:
    start = x.to(internal_dtype(x))
    size = _sizes(start, relative, norm)
    radius, step = epsilon * size, step_size * size
    moved = start.clone() if begin is None else begin.to(start.dtype, copy=True)
    for _ in range(steps):
        slope = gradient(moved)
        if norm == "l2":
            offset = moved + step * unit_rows(slope) - start
            length = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
            # A ball of radius 0 (a zero row, "relative") gives 0/0; a NaN length is not above the radius and stays.
            offset = offset * (radius / torch.where(length > radius, length, radius)).nan_to_num(0)
        else:
            direction = torch.where(slope.isnan(), slope, slope.sign())
            offset = (moved + step * direction - start).clamp(-radius, radius)
        moved = start + offset
    return moved.to(x.dtype, copy=True).contiguous()


def solve(x: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int, relative: bool) -> Tensor:
    """The same ascent on N×N matrices: two products with x, and steps whose cost does not depend on D.

    Every point is Z = X + C X, where the rows of C sum to 0: steps add multiples of differences of rows. For such
    coefficient rows u, v the product (uX)·(vX) is u B vᵀ with B = −½ D∘D, D the distances of X. With R = C B and
    A = I + C the current distances are those of Q = A B Aᵀ = B + R + Rᵀ + R Cᵀ, and a step adds γ_i (L A)_i to C and
    γ_i (L A B)_i to R, L the Laplacian of the weights between anchors and their winners. In float64: that costs little
    at this size, and the differences between near-duplicates keep their digits.
    """
    n = x.shape[0]
    rows = x.double()
    rows -= rows.mean(0)
    products = rows @ rows.T
    squares = products.diagonal().clone()
    b = products.sub_(0.5 * (squares[:, None] + squares)).fill_diagonal_(0)
    # A quadratic form below the rounding of its largest terms is 0, as between bit-identical rows; its edge is dropped.
    nothing = 32 * torch.finfo(torch.float64).eps * squares.max()
    size = _sizes(x.double(), relative, "l2")
    radius, step = (epsilon * size).squeeze(-1), step_size * size

    same = labels[:, None] == labels
    farthest_of = torch.zeros_like(b).masked_fill_(~same, -torch.inf).fill_diagonal_(-torch.inf)
    nearest_of = torch.zeros_like(b).masked_fill_(same, torch.inf)
    valid = (farthest_of.amax(1) == 0) & (nearest_of.amin(1) == 0)

    points = torch.cat([torch.eye(n, dtype=b.dtype, device=b.device), b], 1)  # [A | A B] at the start
    moved = torch.zeros_like(points)  # [C | R]
    c, r = moved[:, :n], moved[:, n:]
    weights = torch.empty_like(b)
    squared = -2 * b
    for taken in range(steps):
        farthest, positive = (squared + farthest_of).max(1)
        nearest, negative = (squared + nearest_of).min(1)
        pairs = torch.stack([farthest, nearest], 1)
        distance = pairs.clamp(min=0).sqrt()
        slope = torch.where(valid, torch.sigmoid(distance[:, 0] - distance[:, 1]), 0)[:, None]
        weight = torch.where((pairs <= nothing) | (slope == 0), 0, slope / distance)
        weight[:, 0].neg_()
        weights.zero_().scatter_(1, torch.stack([positive, negative], 1), weight)  # never the same column twice
        laplacian = weights + weights.T
        laplacian.diagonal().sub_(laplacian.sum(1))
        gradient = laplacian @ (moved + points)  # [L A | L A B]
        # The slope of a saturated loss may be 1e-30: a row is divided by its largest coefficient before squaring.
        largest = laplacian.abs().amax(1, keepdim=True)
        gradient /= torch.where(largest == 0, 1, largest)
        length = (gradient[:, :n] * gradient[:, n:]).sum(1, keepdim=True)
        still = (largest == 0) | (length <= 0)
        moved.addcmul_(gradient, torch.where(still, 0, step / length.clamp(min=0).sqrt()))
        length = (c * r).sum(1).clamp(min=0).sqrt()
        moved.mul_(torch.where(length > radius, radius / length, 1)[:, None])
        if taken < steps - 1:
            q = torch.addmm(b, r, c.T).add_(r).add_(r.T)
            diagonal = q.diagonal().clone()
            squared = q.mul_(-2).add_(diagonal[:, None]).add_(diagonal)
    return (x.double() + c @ rows).to(x.dtype).contiguous()
