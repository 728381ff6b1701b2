"""Softmax-weighted distances.

d_p,i = Σ_p softmax_p(d_ip) d_ip,   d_n,i = Σ_n softmax_n(−d_in) d_in
∂d_p/∂d_ij = softmax_p (1 + d_ij − d_p),   ∂d_n/∂d_ij = softmax_n (1 − d_ij + d_n)
∂x_i = Σ_j w_ij (x_i − y_j)   with w the slope/d (euclidean), 2·slope (sqeuclidean),
∂x_i = −Σ_j w_ij y_j          with w the slope (dot, and cosine of unit rows)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._logsumexp import (
    MAX_SPLITS,
    add_logits,
    add_weighted_rows,
    column_splits,
    merged,
    split_values,
    weight_blocks,
)
from apd_kernels.kernels._pairing import anchor_values, pair_masks, pairing_arguments
from apd_kernels.kernels._tiles import product
from apd_kernels.kernels.distance import METRIC_NUMBER
from apd_kernels.kernels.losses import per_difference


@triton.jit
def distance_tile(acc, xx, yy, METRIC: tl.constexpr):
    """Distances from products and squares; NaN stays NaN."""
    if METRIC < 2:
        d = xx[:, None] + yy[None, :] - 2 * acc
        d = tl.where(d < 0, 0.0, d)
        if METRIC == 0:
            d = tl.sqrt_rn(d)
    elif METRIC == 2:
        d = 1 - acc
        d = tl.where(d < 0, 0.0, d)
    else:
        d = -acc
    return d


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split", "splits"])
def _weigh(
    x, y, labels, y_labels, own, domains, y_domains, y_valid, sums, N, M, D, x_stride, y_stride,
    tiles_per_split, splits, one,
    METRIC: tl.constexpr, SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Largest logit, total of the exponentials and sum of the distances times them, of the positives and of the
    negatives among one split's columns, written to [which, set, split, row]."""
    split = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < N
    x += s * N * x_stride
    y += s * M * y_stride
    label, own_row, domain = anchor_values(labels, own, domains, rows, row_mask)
    farthest = tl.full((BM,), -float("inf"), tl.float32)
    nearest = tl.full((BM,), -float("inf"), tl.float32)
    of_positives = tl.zeros((BM,), tl.float32)
    of_negatives = tl.zeros((BM,), tl.float32)
    d_p = tl.zeros((BM,), tl.float32)
    d_n = tl.zeros((BM,), tl.float32)
    first = split * tiles_per_split * BN
    for n0 in range(first, tl.minimum(first + tiles_per_split * BN, M), BN):
        columns = n0 + tl.arange(0, BN)
        column_mask = columns < M
        acc, xx, yy = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                              BM, BN, BK, PRECISION, METRIC < 2)  # fmt: skip
        d = distance_tile(acc, xx, yy, METRIC)
        positive, negative = pair_masks(label, own_row, domain, y_labels, own, y_domains, y_valid, rows, columns,
                                        row_mask, column_mask, SELF, POSITIVES, NEGATIVES)  # fmt: skip
        farthest, of_positives, e, shrink = add_logits(farthest, of_positives, d, positive)
        d_p = d_p * shrink + tl.sum(tl.where(positive, e * d, 0.0), 1)
        nearest, of_negatives, e, shrink = add_logits(nearest, of_negatives, -d, negative)
        d_n = d_n * shrink + tl.sum(tl.where(negative, e * d, 0.0), 1)
    at = (s * splits + split) * N + rows
    step = tl.num_programs(2).to(tl.int64) * splits * N
    tl.store(sums + at, farthest, mask=row_mask)
    tl.store(sums + step + at, of_positives, mask=row_mask)
    tl.store(sums + 2 * step + at, d_p, mask=row_mask)
    tl.store(sums + 3 * step + at, nearest, mask=row_mask)
    tl.store(sums + 4 * step + at, of_negatives, mask=row_mask)
    tl.store(sums + 5 * step + at, d_n, mask=row_mask)


@triton.jit(do_not_specialize=["N", "splits"])
def _weigh_merge(
    sums, positive, negative, of_positives, of_negatives, N, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Distances of a block of anchors, 0 for a missing side, and log-sum-exps, −inf for it."""
    s = tl.program_id(1).to(tl.int64)
    sets = tl.num_programs(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, mask = s * N + rows, rows < N
    for side in tl.static_range(2):
        total, log_sum, factors = merged(sums, 3 * side, s, sets, rows, N, splits, SPLITS)
        d = tl.sum(split_values(sums, 3 * side + 2, s, sets, rows, N, splits, 0.0, SPLITS) * factors, 1)
        d = tl.where(total == 0, 0.0, d / tl.where(total == 0, 1.0, total))
        if side == 0:
            tl.store(positive + at, d, mask=mask)
            tl.store(of_positives + at, log_sum, mask=mask)
        else:
            tl.store(negative + at, d, mask=mask)
            tl.store(of_negatives + at, log_sum, mask=mask)


@triton.jit(do_not_specialize=["start", "stop", "N", "M", "height"])
def _weigh_weights(
    x, y, labels, y_labels, own, domains, y_domains, y_valid,
    for_positive, for_negative, positive_distance, negative_distance, of_positives, of_negatives, weights,
    start, stop, N, M, D, width, height, x_stride, y_stride, one,
    METRIC: tl.constexpr, SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """−w_ij of the anchors from `start` to `stop`; 0 in the padding. A NaN without a weight stays out."""
    s = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = start + place
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < stop, columns < M
    x += s * N * x_stride
    y += s * M * y_stride
    acc, xx, yy = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                          BM, BN, BK, PRECISION, METRIC < 2)  # fmt: skip
    d = distance_tile(acc, xx, yy, METRIC)
    label, own_row, domain = anchor_values(labels, own, domains, rows, row_mask)
    positive, negative = pair_masks(label, own_row, domain, y_labels, own, y_domains, y_valid, rows, columns,
                                    row_mask, column_mask, SELF, POSITIVES, NEGATIVES)  # fmt: skip
    at = s * N + rows
    g_p = tl.load(for_positive + at, mask=row_mask, other=0.0)[:, None]
    g_n = tl.load(for_negative + at, mask=row_mask, other=0.0)[:, None]
    d_p = tl.load(positive_distance + at, mask=row_mask, other=0.0)[:, None]
    d_n = tl.load(negative_distance + at, mask=row_mask, other=0.0)[:, None]
    lse_p = tl.load(of_positives + at, mask=row_mask, other=0.0)[:, None]
    lse_n = tl.load(of_negatives + at, mask=row_mask, other=0.0)[:, None]
    g = tl.where(positive, g_p, g_n)
    paired = (positive | negative) & (g != 0)
    softmax = tl.exp(tl.where(paired, tl.where(positive, d - lse_p, -d - lse_n), 0.0))
    above = tl.where(positive, d - d_p, d_n - d)
    slope = tl.where(paired, g * softmax * (1 + above), 0.0)
    w = tl.where(slope == 0, 0.0, per_difference(slope, d, METRIC))
    weights += (s * height + place)[:, None] * width + columns[None, :]
    tl.store(weights, -w, mask=row_mask[:, None] & (columns < width)[None, :])


def weighted_pairs(
    x: Tensor, y: Tensor | None, prepared: Operands, pairing: Pairing, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_weigh`, then `_weigh_merge`."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    positive, negative, of_positives, of_negatives = (
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(4)
    )
    if m == 0:
        missing = torch.full_like(positive, -float("inf"))
        return torch.zeros_like(positive), torch.zeros_like(positive), missing, missing.clone()
    tensors, rules = pairing_arguments(pairing)
    constants: dict[str, Any] = dict(zip(("SELF", "POSITIVES", "NEGATIVES"), rules, strict=True))
    BM, BN, BK = 64, 32, 32
    row_tiles = triton.cdiv(n, BM)
    splits, tiles_per_split = column_splits(row_tiles, triton.cdiv(m, BN), sets)
    sums = torch.empty(6, sets, splits, n, dtype=torch.float32, device=x.device)
    launch(
        _weigh, (row_tiles, splits, sets),
        a, b, *tensors, sums, n, m, dimension, row_stride(a), row_stride(b), tiles_per_split, splits, 1.0,
        **constants, METRIC=METRIC_NUMBER[metric], PRECISION=dot_precision(a, precision),
        BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3,
    )  # fmt: skip
    BLOCK = 16
    launch(
        _weigh_merge, (triton.cdiv(n, BLOCK), sets), sums, positive, negative, of_positives, of_negatives, n, splits,
        SPLITS=MAX_SPLITS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return positive, negative, of_positives, of_negatives


def weighted_pairs_backward(
    for_positive: Tensor,
    for_negative: Tensor,
    positive: Tensor,
    negative: Tensor,
    of_positives: Tensor,
    of_negatives: Tensor,
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    metric: str,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor]:
    """Blocks of `_weigh_weights`, each with its sums of rows."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    for_x = torch.zeros(x.shape if needs_x else 0, dtype=torch.float32, device=x.device)
    for_y = torch.zeros(0 if y is None or not needs_y else y.shape, dtype=torch.float32, device=x.device)
    tensors, rules = pairing_arguments(pairing)
    constants: dict[str, Any] = dict(zip(("SELF", "POSITIVES", "NEGATIVES"), rules, strict=True))
    saved = [value.contiguous() for value in (for_positive, for_negative, positive, negative)]
    BM, BN, BK = 64, 64, 32
    for block, weights in weight_blocks(n, m, sets, x.device) if m else ():
        _, height, width = weights.shape
        launch(
            _weigh_weights, (triton.cdiv(width, BN), triton.cdiv(block.stop - block.start, BM), sets),
            a, b, *tensors, *saved, of_positives, of_negatives, weights,
            block.start, block.stop, n, m, dimension, width, height, row_stride(a), row_stride(b), 1.0,
            **constants, METRIC=METRIC_NUMBER[metric], PRECISION=dot_precision(a, precision),
            BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3,
        )  # fmt: skip
        less_own = metric in ("euclidean", "sqeuclidean")
        add_weighted_rows(for_x, for_x if y is None else for_y, weights, a, b, block, precision, less_own)
    return for_x.to(x.dtype), for_y.to(x.dtype if y is None else y.dtype)
