"""Triplet loss.

    L = mean over valid anchors of φ(±(d_p − d_n)),   φ = softplus or max(0, · + margin)

A loss is summed by one program per set in a fixed order, the same sum in every run; atomics only count who is last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels import mining
from apd_kernels.kernels._launch import launch, row_stride, sets_of_rows
from apd_kernels.kernels._tiles import per_difference
from apd_kernels.kernels.distance import METRIC_NUMBER
from apd_kernels.kernels.mining import winner_distances


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
def _term_and_slope(d_p, d_n, margin, SOFT: tl.constexpr, REVERSE: tl.constexpr):
    """φ(±(d_p − d_n)) and its derivative by what is in the bracket. The hinge at 0 has slope 0; NaN stays NaN."""
    gap = d_n - d_p if REVERSE else d_p - d_n
    if SOFT:
        term, slope = softplus(gap), sigmoid(gap)
    else:
        term = tl.where(gap + margin < 0, 0.0, gap + margin)
        slope = tl.where(gap + margin <= 0, 0.0, 1.0)
    return term, slope


@triton.jit(do_not_specialize=["N", "M", "splits", "margin"])
def _triplet(
    x, y, key, index, positive_index, negative_index, loss, positive_weights, negative_weights, ticket,
    N, M, D, x_stride, y_stride, splits, margin,
    SOFT: tl.constexpr, REVERSE: tl.constexpr, METRIC: tl.constexpr, MINED: tl.constexpr,
    SPLITS: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an anchor takes its distances. The last one of a set to draw its ticket, which sees what all have
    written, takes the mean, in index order whoever is last: first the sum and the count, then the weights, which need
    the count. Until then the weights hold the distances."""
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    d_p, d_n = winner_distances(x, y, key, index, positive_index, negative_index, s, i, tl.num_programs(1),
                                N, M, D, x_stride, y_stride, splits, METRIC, MINED, SPLITS, BD)  # fmt: skip
    tl.store(positive_weights + s * N + i, d_p)
    tl.store(negative_weights + s * N + i, d_n)
    tl.debug_barrier()  # every thread's stores lie before the ticket's release
    if tl.atomic_add(ticket + s, 1, sem="acq_rel") == N - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.int32)
        for i0 in range(0, N, BLOCK):
            j = i0 + tl.arange(0, BLOCK)
            at, mask = s * N + j, j < N
            # .cg: from the L2 cache, where other multiprocessors' stores are.
            valid = (tl.load(positive_index + at, mask=mask, other=-1, cache_modifier=".cg") >= 0) & (
                tl.load(negative_index + at, mask=mask, other=-1, cache_modifier=".cg") >= 0
            )
            p = tl.load(positive_weights + at, mask=valid, other=0.0, cache_modifier=".cg")
            n = tl.load(negative_weights + at, mask=valid, other=0.0, cache_modifier=".cg")
            term, _ = _term_and_slope(p, n, margin, SOFT, REVERSE)
            total += tl.where(valid, term, 0.0)
            count += valid.to(tl.int32)
        mean = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        tl.store(loss + s, tl.sum(total, 0) * mean)
        for i0 in range(0, N, BLOCK):
            j = i0 + tl.arange(0, BLOCK)
            at, mask = s * N + j, j < N
            valid = (tl.load(positive_index + at, mask=mask, other=-1, cache_modifier=".cg") >= 0) & (
                tl.load(negative_index + at, mask=mask, other=-1, cache_modifier=".cg") >= 0
            )
            p = tl.load(positive_weights + at, mask=valid, other=0.0, cache_modifier=".cg")
            n = tl.load(negative_weights + at, mask=valid, other=0.0, cache_modifier=".cg")
            _, slope = _term_and_slope(p, n, margin, SOFT, REVERSE)
            slope = tl.where(valid, slope * mean, 0.0)
            if REVERSE:
                slope = -slope
            tl.store(positive_weights + at, per_difference(slope, p, METRIC), mask=mask)
            tl.store(negative_weights + at, per_difference(-slope, n, METRIC), mask=mask)


def triplet_loss(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    margin: float | None,
    reverse: bool,
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches: mining, which also resets the tickets, and `_triplet`."""
    if 0 in (*x.shape[:-1], (x if y is None else y).shape[-2]):
        winners = [torch.full(x.shape[:-1], -1, dtype=torch.int64, device=x.device) for _ in range(2)]
        return *_nothing(x), *winners
    a = sets_of_rows(x)
    b = None if y is None else sets_of_rows(y)
    ticket = torch.empty(a.shape[0], dtype=torch.int32, device=x.device)
    mined = mining.mine(a, b, pairing, metric, precision, prepared=prepared, ticket=ticket)
    winners = [torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device) for _ in range(2)]
    return *_loss(a, a if b is None else b, mined, winners, ticket, x.shape, margin, reverse, metric), *winners


def triplet_loss_indexed(
    x: Tensor,
    y: Tensor | None,
    positive_index: Tensor,
    negative_index: Tensor,
    margin: float | None,
    reverse: bool,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch, `_triplet`, after that which zeroes the tickets."""
    if 0 in (*x.shape[:-1], (x if y is None else y).shape[-2]):
        return _nothing(x)
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    winners = [positive_index.contiguous(), negative_index.contiguous()]
    ticket = torch.zeros(a.shape[0], dtype=torch.int32, device=x.device)
    return _loss(a, b, None, winners, ticket, x.shape, margin, reverse, metric)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the weights where no anchor has a pair."""
    loss = torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
    weights = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    return loss, weights, weights.clone()


def _loss(
    a: Tensor,
    b: Tensor,
    mined: mining.Mined | None,
    winners: list[Tensor],
    ticket: Tensor,
    shape: torch.Size,
    margin: float | None,
    reverse: bool,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sets, n, dimension = a.shape
    loss = torch.empty(shape[:-2], dtype=torch.float32, device=a.device)
    weights = [torch.empty(shape[:-1], dtype=torch.float32, device=a.device) for _ in range(2)]
    key, index, splits = mined or (None, None, 0)
    launch(
        _triplet, (n, sets),
        a, b, key, index, *winners, loss, *weights, ticket,
        n, b.shape[1], dimension, row_stride(a), row_stride(b), splits, 0.0 if margin is None else margin,
        SOFT=margin is None, REVERSE=reverse, METRIC=METRIC_NUMBER[metric], MINED=mined is not None,
        SPLITS=mining.MAX_SPLITS, BD=1024, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return loss, weights[0], weights[1]
