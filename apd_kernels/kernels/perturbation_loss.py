"""Metric-perturbation loss (APD, eq. 3).

    L = mean_ij softplus(d(p_i, n_ij) − d(p_i, o_i)),   s_ij = σ(d(p_i, n_ij) − d(p_i, o_i)) · ∂L · share
    ∂n_ij = s_ij (n_ij − p_i)/d(p_i, n_ij),  ∂o_i = −Σ_j s_ij (o_i − p_i)/d(p_i, o_i),  ∂p_i = −∂o_i − Σ_j ∂n_ij

share = 1 / number of pairs. Negatives lie in (N, M, D) with any strides, or are rows of a bank named by indices.

One program has a sample's rows in registers, each read once, and writes Σ_j of the loss and, on request, ∂p_i without
share and ∂L. In elements of D a sample, M negatives: M + 2 read and 1 written forward, 1 read and 1 written backward;
with the gradient taken from the rows again M + 2 forward, and M + 2 read and 1 written backward.
A sum over programs needs a second launch, or a counter that somebody has set to zero, which is a launch as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import launch
from apd_kernels.kernels.losses import per_difference, sigmoid, softplus

WHOLE_ROW = 8192  # features up to which a row stays in registers: 16 to a thread, four rows of them, 16 warps


@triton.jit
def _negative(negatives, indices, i, j, K, steps, indices_row, indices_column):
    """The row of n_ij, whether it may be read, and whether there is none (−1). No index is trusted."""
    if indices is None:
        row = negatives + i * steps[0] + tl.cast(j, tl.int64) * steps[1]
        inside = tl.full((), 1, tl.int1)
        missing = tl.full((), 0, tl.int1)
    else:
        index = tl.load(indices + i * indices_row + j * indices_column)
        inside = (index >= 0) & (index < K)
        missing = index == -1
        row = negatives + tl.where(inside, index, 0) * steps[1]
    return row, inside, missing


@triton.jit
def _columns(row, step, k, mask):
    return tl.load(row + k.to(tl.int64) * step, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _distance(x, x_step, y, y_step, inside, D, BD: tl.constexpr):
    total = tl.zeros((BD,), tl.float32)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        mask = (k < D) & inside
        difference = _columns(y, y_step, k, mask) - _columns(x, x_step, k, mask)
        total += difference * difference
    return tl.sqrt_rn(tl.sum(total, 0))


@triton.jit(do_not_specialize=["M", "K", "indices_row", "indices_column"])
def _perturbation(
    perturbed, negatives, original, indices, sums, counts, to_negatives, to_original, for_perturbed, M, K, D,
    indices_row, indices_column, perturbed_steps, negatives_steps, original_steps,
    WHOLE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a sample. WHOLE: BD covers a row, which stays in registers; only then may ∂p_i be asked for."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    mask = k < D
    own = perturbed + i * perturbed_steps[0]
    source = original + i * original_steps[0]
    moved = tl.zeros((BD,), tl.float32)
    if WHOLE:
        point = _columns(own, perturbed_steps[1], k, mask)
        away = _columns(source, original_steps[1], k, mask) - point
        d_o = tl.sqrt_rn(tl.sum(away * away, 0))
    else:
        d_o = _distance(own, perturbed_steps[1], source, original_steps[1], True, D, BD)
    total = 0.0
    slopes = 0.0
    count = 0
    for j in range(0, M):
        row, inside, missing = _negative(negatives, indices, i, j, K, negatives_steps, indices_row, indices_column)
        if WHOLE:
            toward = _columns(row, negatives_steps[2], k, mask & inside) - point
            d = tl.sqrt_rn(tl.sum(toward * toward, 0))
        else:
            d = _distance(own, perturbed_steps[1], row, negatives_steps[2], inside, D, BD)
        d = tl.where(inside, d, tl.where(missing, 0.0, float("nan")))
        tl.store(to_negatives + i * M + j, d)
        total += tl.where(missing, 0.0, softplus(d - d_o))
        count += tl.where(missing, 0, 1)
        if for_perturbed is not None:
            slope = tl.where(missing, 0.0, sigmoid(d - d_o))
            slopes += slope
            moved += per_difference(slope, d, 0) * toward
    tl.store(sums + i, total)
    tl.store(counts + i, count)
    tl.store(to_original + i, d_o)
    if for_perturbed is not None:
        moved = per_difference(slopes, d_o, 0) * away - moved
        tl.store(for_perturbed + i * D + k, moved.to(for_perturbed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _mean(sums, counts, loss, share, N, BLOCK: tl.constexpr):
    """One program, in a fixed order: the same sum in every run."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(sums + i, mask=i < N, other=0.0)
        count += tl.load(counts + i, mask=i < N, other=0)
    part = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(loss, tl.sum(total, 0) * part)
    tl.store(share, part)


@triton.jit(do_not_specialize=["M", "K", "indices_row", "indices_column"])
def _perturbation_gradient(
    gradient, share, perturbed, negatives, original, indices, to_negatives, to_original,
    for_perturbed, for_negatives, for_original, M, K, D,
    indices_row, indices_column, perturbed_steps, negatives_steps, original_steps, BD: tl.constexpr,
):  # fmt: skip
    """One program a sample and BD columns, from the rows and distances; without `gradient`, of the sum over pairs."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = k < D
    scale = 1.0
    if gradient is not None:
        scale = tl.load(gradient) * tl.load(share)
    point = _columns(perturbed + i * perturbed_steps[0], perturbed_steps[1], k, mask)
    away = _columns(original + i * original_steps[0], original_steps[1], k, mask) - point
    d_o = tl.load(to_original + i)
    slopes = 0.0
    moved = tl.zeros((BD,), tl.float32)
    for j in range(0, M):
        row, inside, missing = _negative(negatives, indices, i, j, K, negatives_steps, indices_row, indices_column)
        toward = _columns(row, negatives_steps[2], k, mask & inside) - point
        d = tl.load(to_negatives + i * M + j)
        slope = tl.where(missing, 0.0, sigmoid(d - d_o) * scale)
        slopes += slope
        part = per_difference(slope, d, 0) * toward
        moved += part
        if for_negatives is not None:
            at = for_negatives + (i * M + j) * D + k
            tl.store(at, part.to(for_negatives.dtype.element_ty), mask=mask)
    part = per_difference(slopes, d_o, 0) * away
    tl.store(for_perturbed + i * D + k, (part - moved).to(for_perturbed.dtype.element_ty), mask=mask)
    if for_original is not None:
        tl.store(for_original + i * D + k, (-part).to(for_original.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _scaled(gradient, share, total, result, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(total + at, mask=at < size, other=0.0).to(tl.float32) * (tl.load(gradient) * tl.load(share))
    tl.store(result + at, value.to(result.dtype.element_ty), mask=at < size)


def _steps(perturbed: Tensor, negatives: Tensor, original: Tensor, indices: Tensor | None) -> tuple[object, ...]:
    """Elements from row to row and column to column; for negatives from sample to sample first (a bank: 0)."""
    if indices is None:
        return 0, 0, perturbed.stride(), negatives.stride(), original.stride()
    return *indices.stride(), perturbed.stride(), (0, *negatives.stride()), original.stride()


def metric_perturbation_loss(
    perturbed: Tensor, negatives: Tensor, original: Tensor, indices: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches, `_perturbation` and `_mean`; a third for the gradient of rows too long for registers."""
    count, dimension = perturbed.shape
    each = (negatives if indices is None else indices).shape[1]
    whole = dimension <= WHOLE_ROW
    steps = _steps(perturbed, negatives, original, indices)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=perturbed.device)

    loss, share, to_negatives, to_original = new(), new(), new(count, each), new(count)
    total = new(count, dimension, dtype=perturbed.dtype) if with_gradient else None
    sums, counts = new(count), new(count, dtype=torch.int32)
    BD = triton.next_power_of_2(dimension) if whole else 1024
    launch(
        _perturbation, (count,),
        perturbed, negatives, original, indices, sums, counts, to_negatives, to_original, total if whole else None,
        each, len(negatives), dimension, *steps, WHOLE=whole, BD=BD, num_warps=min(16, max(1, BD // 512)),
    )  # fmt: skip
    launch(_mean, (1,), sums, counts, loss, share, count, BLOCK=1024, num_warps=4)
    if total is None:
        return loss, share, to_negatives, to_original, new(0, dtype=perturbed.dtype)
    if not whole:
        _launch_gradient(None, None, perturbed, negatives, original, indices, to_negatives, to_original, total)
    return loss, share, to_negatives, to_original, total


def metric_perturbation_loss_backward(
    gradient: Tensor,
    share: Tensor,
    perturbed: Tensor,
    negatives: Tensor,
    original: Tensor,
    indices: Tensor | None,
    to_negatives: Tensor,
    to_original: Tensor,
    for_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: every program has one sample's rows in hand once and writes all their gradients."""
    to_perturbed, to_each, to_source = (
        torch.empty(shape, dtype=perturbed.dtype, device=perturbed.device)
        for shape in (perturbed.shape, negatives.shape if for_negatives else (0,), original.shape)
    )
    _launch_gradient(
        gradient, share, perturbed, negatives, original, indices, to_negatives, to_original,
        to_perturbed, to_each if for_negatives else None, to_source,
    )  # fmt: skip
    return to_perturbed, to_each, to_source


def _launch_gradient(
    gradient: Tensor | None,
    share: Tensor | None,
    perturbed: Tensor,
    negatives: Tensor,
    original: Tensor,
    indices: Tensor | None,
    to_negatives: Tensor,
    to_original: Tensor,
    for_perturbed: Tensor,
    for_negatives: Tensor | None = None,
    for_original: Tensor | None = None,
) -> None:
    count, dimension = perturbed.shape
    BD = 256
    launch(
        _perturbation_gradient, (count, triton.cdiv(dimension, BD)),
        gradient, share, perturbed, negatives, original, indices, to_negatives, to_original,
        for_perturbed, for_negatives, for_original, to_negatives.shape[1], len(negatives), dimension,
        *_steps(perturbed, negatives, original, indices), BD=BD, num_warps=4,
    )  # fmt: skip


def metric_perturbation_loss_scaled(gradient: Tensor, share: Tensor, total: Tensor) -> Tensor:
    """One launch: g · share · total."""
    result = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    launch(
        _scaled, (triton.cdiv(total.numel(), 1024),), gradient, share, total, result, total.numel(),
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return result
