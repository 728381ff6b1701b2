"""Triplet and metric-perturbation losses.

    L = mean over valid anchors of φ(±(d_p − d_n)),   φ = softplus or max(0, · + margin)
    L = mean_ij softplus(d(p_i, n_ij) − d(p_i, o_i))   (APD, eq. 3)

A loss is summed by one program per set in a fixed order: no atomics, the same sum in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels import mining
from apd_kernels.kernels._launch import launch, sets_of_rows
from apd_kernels.kernels._tiles import row_distance
from apd_kernels.kernels.distance import METRIC_NUMBER


@triton.jit
def softplus(t):
    """ln(1 + e^t) without overflow; NaN stays NaN."""
    positive = tl.where(t < 0, 0.0, t)
    small = tl.exp(-tl.abs(t))
    # ln(1 + e) loses the digits of a small e; from 1e-4 down its series to second order is exact in float32.
    return positive + tl.where(small < 1e-4, small * (1 - 0.5 * small), tl.log(1 + small))


@triton.jit
def sigmoid(t):
    """1 / (1 + e^−t) without overflow."""
    small = tl.exp(-tl.abs(t))
    return tl.where(t < 0, small / (1 + small), 1 / (1 + small))


@triton.jit
def per_difference(slope, d, METRIC: tl.constexpr):
    """Weight of a row difference: slope/d (euclidean, 0 at d = 0), 2·slope (sqeuclidean), slope."""
    if METRIC == 0:
        weight = tl.where((d == 0) | (slope == 0), 0.0, slope / tl.where(d == 0, 1.0, d))
    elif METRIC == 1:
        weight = 2 * slope
    else:
        weight = slope
    return weight


@triton.jit(do_not_specialize=["N", "margin"])
def _triplet_mean(
    positive, negative, positive_index, negative_index, loss, positive_weights, negative_weights, N, margin,
    SOFT: tl.constexpr, REVERSE: tl.constexpr, METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a set: first the sum and the count, then the weights, which need the count."""
    s = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at, mask = s * N + i, i < N
        valid = (tl.load(positive_index + at, mask=mask, other=-1) >= 0) & (
            tl.load(negative_index + at, mask=mask, other=-1) >= 0
        )
        gap = tl.load(positive + at, mask=valid, other=0.0) - tl.load(negative + at, mask=valid, other=0.0)
        if REVERSE:
            gap = -gap
        if SOFT:
            term = softplus(gap)
        else:
            term = tl.where(gap + margin < 0, 0.0, gap + margin)  # not maximum(): NaN stays NaN
        total += tl.where(valid, term, 0.0)
        count += valid.to(tl.int32)
    scale = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(loss + s, tl.sum(total, 0) * scale)
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        at, mask = s * N + i, i < N
        valid = (tl.load(positive_index + at, mask=mask, other=-1) >= 0) & (
            tl.load(negative_index + at, mask=mask, other=-1) >= 0
        )
        d_p = tl.load(positive + at, mask=valid, other=0.0)
        d_n = tl.load(negative + at, mask=valid, other=0.0)
        gap = d_p - d_n
        if REVERSE:
            gap = -gap
        if SOFT:
            slope = sigmoid(gap) * scale
        else:
            slope = tl.where(gap + margin <= 0, 0.0, scale)
        slope = tl.where(valid, slope, 0.0)
        if REVERSE:
            slope = -slope
        tl.store(positive_weights + at, per_difference(slope, d_p, METRIC), mask=mask)
        tl.store(negative_weights + at, per_difference(-slope, d_n, METRIC), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _perturbation_distance(
    perturbed, negatives, original, to_negatives, to_original, M, D,
    perturbed_stride, sample_stride, negative_stride, original_stride, BD: tl.constexpr,
):  # fmt: skip
    """One program a pair (i, j): d(p_i, n_ij); j = M stands for the original."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64)
    row = perturbed + i * perturbed_stride
    if j < M:
        d = row_distance(row, negatives + i * sample_stride + j * negative_stride, D, 0, BD)
        tl.store(to_negatives + i * M + j, d)
    else:
        d = row_distance(row, original + i * original_stride, D, 0, BD)
        tl.store(to_original + i, d)


@triton.jit(do_not_specialize=["pairs", "M"])
def _perturbation_mean(to_negatives, to_original, loss, pairs, M, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for t0 in range(0, pairs, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        mask = t < pairs
        gap = tl.load(to_negatives + t, mask=mask, other=0.0) - tl.load(to_original + t // M, mask=mask, other=0.0)
        total += tl.where(mask, softplus(gap), 0.0)
    tl.store(loss, tl.sum(total, 0) / tl.maximum(pairs, 1).to(tl.float32))


@triton.jit(do_not_specialize=["N", "M"])
def _perturbation_gradient(
    gradient, perturbed, negatives, original, to_negatives, to_original,
    for_perturbed, for_negatives, for_original, N, M, D,
    perturbed_stride, sample_stride, negative_stride, original_stride,
    NEGATIVES: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a sample and BD columns: s_ij = σ(gap_ij)·g/(NM), ∂n_ij = s_ij (n_ij − p_i)/d(p_i, n_ij),
    ∂o_i = −Σ_j s_ij (o_i − p_i)/d(p_i, o_i), ∂p_i = −∂o_i − Σ_j ∂n_ij."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = k < D
    scale = tl.load(gradient) / tl.maximum(N * M, 1).to(tl.float32)
    point = tl.load(perturbed + i * perturbed_stride + k, mask=mask, other=0.0).to(tl.float32)
    source = tl.load(original + i * original_stride + k, mask=mask, other=0.0).to(tl.float32)
    d_o = tl.load(to_original + i)
    slopes = 0.0
    moved = tl.zeros((BD,), tl.float32)
    for j in range(0, M):
        d = tl.load(to_negatives + i * M + j)
        slope = sigmoid(d - d_o) * scale
        slopes += slope
        negative = tl.load(negatives + i * sample_stride + j * negative_stride + k, mask=mask, other=0.0)
        part = per_difference(slope, d, 0) * (negative.to(tl.float32) - point)
        moved += part
        if NEGATIVES:
            tl.store(for_negatives + (i * M + j) * D + k, part.to(for_negatives.dtype.element_ty), mask=mask)
    part = per_difference(-slopes, d_o, 0) * (source - point)
    tl.store(for_original + i * D + k, part.to(for_original.dtype.element_ty), mask=mask)
    tl.store(for_perturbed + i * D + k, (-part - moved).to(for_perturbed.dtype.element_ty), mask=mask)


def triplet_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None,
    y_labels: Tensor | None,
    margin: float | None,
    reverse: bool,
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three launches: `_mine`, `_pair_distance`, `_triplet_mean`."""
    positive, negative, *winners = mining.batch_hard(x, labels, y, y_labels, metric, precision)
    loss, *weights = _mean(positive, negative, winners[0], winners[1], margin, reverse, metric)
    return loss, weights[0], weights[1], winners[0], winners[1]


def triplet_loss_indexed(
    x: Tensor,
    y: Tensor | None,
    positive_index: Tensor,
    negative_index: Tensor,
    margin: float | None,
    reverse: bool,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: `_pair_distance`, `_triplet_mean`."""
    positive_index, negative_index = positive_index.contiguous(), negative_index.contiguous()
    positive, negative = mining.pair_distances(x, y, positive_index, negative_index, metric)
    return _mean(positive, negative, positive_index, negative_index, margin, reverse, metric)


def _mean(
    positive: Tensor,
    negative: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    margin: float | None,
    reverse: bool,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n = positive.shape[-1]
    loss = torch.empty(positive.shape[:-1], dtype=torch.float32, device=positive.device)
    weights = torch.empty_like(positive), torch.empty_like(positive)
    launch(
        _triplet_mean, (loss.numel(),),
        positive, negative, positive_index, negative_index, loss, *weights, n, 0.0 if margin is None else margin,
        SOFT=margin is None, REVERSE=reverse, METRIC=METRIC_NUMBER[metric], BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return loss, *weights


def metric_perturbation_loss(perturbed: Tensor, negatives: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: all distances, then their mean."""
    point, source, others = _rows(perturbed), _rows(original), _last_contiguous(negatives)
    n, m, dimension = others.shape
    loss = torch.empty((), dtype=torch.float32, device=point.device)
    to_negatives = torch.empty(n, m, dtype=torch.float32, device=point.device)
    to_original = torch.empty(n, dtype=torch.float32, device=point.device)
    launch(
        _perturbation_distance, (n, m + 1),
        point, others, source, to_negatives, to_original, m, dimension,
        point.stride(0), others.stride(0), others.stride(1), source.stride(0), BD=1024, num_warps=4,
    )  # fmt: skip
    launch(
        _perturbation_mean, (1,), to_negatives, to_original, loss, n * m, m, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return loss, to_negatives, to_original


def metric_perturbation_loss_backward(
    gradient: Tensor,
    perturbed: Tensor,
    negatives: Tensor,
    original: Tensor,
    to_negatives: Tensor,
    to_original: Tensor,
    for_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: every program has one sample's rows in hand once and writes all their gradients."""
    point, source, others = _rows(perturbed), _rows(original), _last_contiguous(negatives)
    n, m, dimension = others.shape
    dtype, device = point.dtype, point.device
    outputs = (
        torch.empty(n, dimension, dtype=dtype, device=device),
        torch.empty(others.shape if for_negatives else 0, dtype=dtype, device=device),
        torch.empty(n, dimension, dtype=dtype, device=device),
    )
    BD = 256
    launch(
        _perturbation_gradient, (n, triton.cdiv(dimension, BD)),
        gradient, point, others, source, to_negatives, to_original, *outputs, n, m, dimension,
        point.stride(0), others.stride(0), others.stride(1), source.stride(0),
        NEGATIVES=for_negatives, BD=BD, num_warps=4,
    )  # fmt: skip
    return outputs


def _rows(x: Tensor) -> Tensor:
    return sets_of_rows(x)[0]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
