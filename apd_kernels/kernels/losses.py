"""Triplet loss.

    L = mean over valid anchors of φ(±(d_p − d_n)),   φ = softplus or max(0, · + margin)

A loss is summed by one program per set in a fixed order: no atomics, the same sum in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels import mining
from apd_kernels.kernels._launch import launch
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
