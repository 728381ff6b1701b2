"""Projected gradient ascent with the gradient written out: no autograd graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.rows import per_difference, row_blocks, unit_rows
from apd_kernels.reference.adversarial_solver import solve
from apd_kernels.reference.mining import batch_hard, pair_gradient
from apd_kernels.reference.prepared import prepare_rows

# Up to so many rows, and this share of D, the N×N form pays. 10 steps on 2 CPU cores, N×N against direct, ms:
# 64×2048 1.9 and 10.7, 256×2048 34 and 44, 512×2048 180 and 123, 64×512 1.5 and 6.0, 128×512 7.9 and 9.2,
# 256×512 25 and 16.
SOLVER_ROWS = 256
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
    if norm == "l2" and begin is None and memory is None and _worth_solving(x):
        moved = solve(x, labels, epsilon, step_size, steps, relative)
        if moved is not None:
            return moved

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
    count, dimension = x.shape[-2:]
    each = negatives.shape[-2]
    blocks = list(row_blocks(count, max(1, each) * dimension, x.shape[:-2].numel()))
    if len(blocks) > 1:  # rows do not meet
        parts = [
            negative_perturb(
                x[..., rows, :],
                negatives[..., rows, :, :],
                valid[..., rows],
                None if begin is None else begin[..., rows, :],
                epsilon,
                step_size,
                steps,
                relative,
                norm,
            )
            for rows in blocks
        ]
        return torch.cat(parts, -2)
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


def _worth_solving(x: Tensor) -> bool:
    """float64 inputs are the oracle's: they take the form that is written like the formula."""
    small = x.dim() == 2 and 0 < x.shape[0] <= min(SOLVER_ROWS, SOLVER_SHARE * x.shape[1])
    return small and x.device.type == "cpu" and x.dtype != torch.float64


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
