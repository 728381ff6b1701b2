"""Hard pairs and their gradient.

    key_ij = ½‖y_j‖² − x_i·y_j   (euclidean: orders like d for a fixed anchor i)   or   −x_i·y_j   (cosine, dot)
    p_i    = argmax_j {key_ij : same identity, j ≠ i},   n_i = argmin_j {key_ij : other identity}
    d_p, d_n from the differences x_i − y_p, x_i − y_n: no cancellation, whatever the precision of the keys

    ∂x_i   = w_p,i (x_i − y_p) + w_n,i (x_i − y_n)  +  Σ_{j chose i} w_j (x_i − x_j)   (the sum if y is x)
    ∂y_m   = Σ_{j chose m} w_j (y_m − x_j)

The columns are divided among several programs per row tile; each leaves its winner, and the next kernel, which has to
visit the winners' rows anyway, picks the best of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._tiles import add_chosen, nan_as, product, row_distance
from apd_kernels.kernels.distance import METRIC_NUMBER

# Programs in flight that fill the largest GPUs twice (132 multiprocessors on an H100); also the most splits of one row.
MAX_SPLITS = 256


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split", "splits"])
def _mine(
    x, labels, y, y_labels, key_out, index_out, N, M, D, x_stride, y_stride, tiles_per_split, splits, one,
    EUCLIDEAN: tl.constexpr, SELF: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each row's best positive and negative among one split's columns, written to [side, set, row, split]."""
    infinity: tl.constexpr = float("inf")
    limit: tl.constexpr = 3.4028234663852886e38
    split = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < N
    x += s * N * x_stride
    y += s * M * y_stride
    label = tl.load(labels + rows, mask=row_mask, other=0).to(tl.int64)  # so that int8 −1 is not uint8 255
    farthest = tl.full((BM,), -infinity, tl.float32)
    nearest = tl.full((BM,), infinity, tl.float32)
    farthest_index = tl.full((BM,), -1, tl.int32)
    nearest_index = tl.full((BM,), -1, tl.int32)
    first = split * tiles_per_split * BN
    for n0 in range(first, tl.minimum(first + tiles_per_split * BN, M), BN):
        columns = n0 + tl.arange(0, BN)
        column_mask = columns < M
        acc, _, yy = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                             BM, BN, BK, PRECISION, EUCLIDEAN)  # fmt: skip
        key = 0.5 * yy[None, :] - acc if EUCLIDEAN else -acc
        same = label[:, None] == tl.load(y_labels + columns, mask=column_mask, other=0).to(tl.int64)[None, :]
        positive = same & column_mask[None, :]
        if SELF:
            positive = positive & (rows[:, None] != columns[None, :])
        negative = (same == 0) & column_mask[None, :]
        # A NaN wins on either side; a finite floor keeps "nothing here" (∓inf) apart from an overflowed key.
        high = tl.where(positive, tl.maximum(nan_as(key, infinity), -limit), -infinity)
        low = tl.where(negative, tl.minimum(nan_as(key, -infinity), limit), infinity)
        best, at = tl.max(high, 1, return_indices=True)
        better = best > farthest  # strictly: among equals the lowest index stays
        farthest = tl.where(better, best, farthest)
        farthest_index = tl.where(better, n0 + at, farthest_index)
        best, at = tl.min(low, 1, return_indices=True)
        better = best < nearest
        nearest = tl.where(better, best, nearest)
        nearest_index = tl.where(better, n0 + at, nearest_index)
    sets = tl.num_programs(2)
    positive_at = (s * N + rows) * splits + split
    negative_at = ((sets + s) * N + rows) * splits + split
    tl.store(key_out + positive_at, farthest, mask=row_mask)
    tl.store(key_out + negative_at, nearest, mask=row_mask)
    tl.store(index_out + positive_at, farthest_index, mask=row_mask)
    tl.store(index_out + negative_at, nearest_index, mask=row_mask)


@triton.jit
def best_of_splits(key, index, splits, FARTHEST: tl.constexpr, SPLITS: tl.constexpr):
    """The winner's index among one row's splits; on equal keys the first split, which has the lower columns."""
    t = tl.arange(0, SPLITS)
    if FARTHEST:
        _, at = tl.max(tl.load(key + t, mask=t < splits, other=float("-inf")), 0, return_indices=True)
    else:
        _, at = tl.min(tl.load(key + t, mask=t < splits, other=float("inf")), 0, return_indices=True)
    return tl.load(index + at).to(tl.int64)


@triton.jit(do_not_specialize=["N", "M", "splits"])
def _pair_distance(
    x, y, key, index, positive_index, negative_index, positive, negative, N, M, D, x_stride, y_stride, splits,
    METRIC: tl.constexpr, MINED: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program an anchor: its winners (MINED: the best of the splits, which are stored) and their distances."""
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    at = s * N + i
    if MINED:
        negative_at = (tl.num_programs(1) + s) * N + i
        p = best_of_splits(key + at * splits, index + at * splits, splits, True, SPLITS)
        n = best_of_splits(key + negative_at * splits, index + negative_at * splits, splits, False, SPLITS)
        tl.store(positive_index + at, p)
        tl.store(negative_index + at, n)
    else:
        p = tl.load(positive_index + at)
        n = tl.load(negative_index + at)
    # A given index beyond the rows reads the last one, and its distance is NaN.
    x_row = x + at * x_stride
    d_p = row_distance(x_row, y + (s * M + tl.minimum(tl.maximum(p, 0), M - 1)) * y_stride, D, METRIC, BD)
    d_n = row_distance(x_row, y + (s * M + tl.minimum(tl.maximum(n, 0), M - 1)) * y_stride, D, METRIC, BD)
    tl.store(positive + at, tl.where(p < 0, 0.0, tl.where(p < M, d_p, float("nan"))))
    tl.store(negative + at, tl.where(n < 0, 0.0, tl.where(n < M, d_n, float("nan"))))


@triton.jit(do_not_specialize=["N", "M"])
def _pair_gradient(
    x, y, positive_weights, negative_weights, positive_index, negative_index, out, N, M, D, x_stride, y_stride,
    DOT: tl.constexpr, ANCHORS: tl.constexpr, CHOSEN: tl.constexpr,
    SCAN: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a row and BD columns of the gradient. ANCHORS: the row is an anchor and moves with its two winners;
    CHOSEN: it may have been chosen, and moves with those that chose it. Both when y is x."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    s = tl.program_id(2).to(tl.int64)
    rows = N if ANCHORS else M
    positive_weights += s * N
    negative_weights += s * N
    positive_index += s * N
    negative_index += s * N
    x += s * N * x_stride
    y += s * M * y_stride
    mask = k < D
    acc = tl.zeros((BD,), tl.float32)
    if ANCHORS:
        values = tl.load(x + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
        p, n = tl.load(positive_index + row), tl.load(negative_index + row)
        w_p, w_n = tl.load(positive_weights + row), tl.load(negative_weights + row)
        # A weight of 0 drops its pair even when the row is not finite (and -1, which has no weight, reads row 0).
        w_p, w_n = tl.where(p < 0, 0.0, w_p), tl.where(n < 0, 0.0, w_n)
        p, n = tl.minimum(tl.maximum(p, 0), M - 1), tl.minimum(tl.maximum(n, 0), M - 1)
        farthest = tl.load(y + p * y_stride + k, mask=mask, other=0.0).to(tl.float32)
        nearest = tl.load(y + n * y_stride + k, mask=mask, other=0.0).to(tl.float32)
        if DOT:
            acc += tl.where(w_p == 0, 0.0, -w_p * farthest)
            acc += tl.where(w_n == 0, 0.0, -w_n * nearest)
        else:
            acc += tl.where(w_p == 0, 0.0, w_p * (values - farthest))
            acc += tl.where(w_n == 0, 0.0, w_n * (values - nearest))
    else:
        values = tl.load(y + row * y_stride + k, mask=mask, other=0.0).to(tl.float32)
    if CHOSEN:
        acc = add_chosen(acc, values, row, positive_index, negative_index, positive_weights, negative_weights,
                         x, x_stride, N, D, k, DOT, SCAN, BJ)  # fmt: skip
    tl.store(out + (s * rows + row) * D + k, acc.to(out.dtype.element_ty), mask=mask)


def mine(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None,
    y_labels: Tensor | None,
    metric: str,
    precision: str,
    most_splits: int = MAX_SPLITS,
) -> tuple[Tensor, Tensor, int]:
    """Launch `_mine`: keys and indices of the winners, [side, set, row, split], and the number of splits."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    labels = labels.contiguous()
    y_labels = labels if y_labels is None else y_labels.contiguous()
    BM, BN, BK = 64, 32, 32
    row_tiles, column_tiles = triton.cdiv(n, BM), triton.cdiv(m, BN)
    splits = max(1, min(column_tiles, most_splits, MAX_SPLITS // max(1, row_tiles * sets)))
    tiles_per_split = triton.cdiv(column_tiles, splits)
    splits = triton.cdiv(column_tiles, max(1, tiles_per_split))
    key = torch.empty(2, sets, n, splits, dtype=torch.float32, device=x.device)
    index = torch.empty(2, sets, n, splits, dtype=torch.int32, device=x.device)
    launch(
        _mine, (row_tiles, splits, sets),
        a, labels, b, y_labels, key, index,
        n, m, dimension, row_stride(a), row_stride(b), tiles_per_split, splits, 1.0,
        EUCLIDEAN=metric in ("euclidean", "sqeuclidean"), SELF=y is None, PRECISION=dot_precision(x, precision),
        BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return key, index, splits


def batch_hard(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_mine`, then `_pair_distance` on what it found."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    m = b.shape[1]
    shape = x.shape[:-1]
    if m == 0:
        distance = torch.zeros(shape, dtype=torch.float32, device=x.device)
        index = torch.full(shape, -1, dtype=torch.int64, device=x.device)
        return distance, distance.clone(), index, index.clone()
    key, index, splits = mine(x, labels, y, y_labels, metric, precision)
    positive_index = torch.empty(shape, dtype=torch.int64, device=x.device)
    negative_index = torch.empty(shape, dtype=torch.int64, device=x.device)
    positive, negative = _distances(a, b, (key, index, splits), positive_index, negative_index, metric, shape)
    return positive, negative, positive_index, negative_index


def pair_distances(
    x: Tensor, y: Tensor | None, positive_index: Tensor, negative_index: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Launch `_pair_distance` for given winners."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    if b.shape[1] == 0:
        distance = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
        return distance, distance.clone()
    return _distances(a, b, None, positive_index.contiguous(), negative_index.contiguous(), metric, x.shape[:-1])


def _distances(
    a: Tensor,
    b: Tensor,
    mined: tuple[Tensor, Tensor, int] | None,
    positive_index: Tensor,
    negative_index: Tensor,
    metric: str,
    shape: torch.Size,
) -> tuple[Tensor, Tensor]:
    sets, n, dimension = a.shape
    key, index, splits = mined or (None, None, 0)
    positive = torch.empty(shape, dtype=torch.float32, device=a.device)
    negative = torch.empty(shape, dtype=torch.float32, device=a.device)
    launch(
        _pair_distance, (n, sets),
        a, b, key, index, positive_index, negative_index, positive, negative,
        n, b.shape[1], dimension, row_stride(a), row_stride(b), splits,
        METRIC=METRIC_NUMBER[metric], MINED=mined is not None, SPLITS=MAX_SPLITS, BD=1024, num_warps=4,
    )  # fmt: skip
    return positive, negative


def pair_gradient(
    x: Tensor,
    y: Tensor | None,
    positive_weights: Tensor,
    negative_weights: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    metric: str,
    for_x: bool,
    for_y: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `_pair_gradient` for the anchors, and for y where it is another set and wants a gradient."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    if b.shape[1] == 0:  # nothing was chosen, and there is no row to read
        return (
            torch.zeros(x.shape if for_x else 0, dtype=x.dtype, device=x.device),
            torch.zeros(0 if y is None or not for_y else y.shape, dtype=x.dtype, device=x.device),
        )
    x_gradient = torch.empty(x.shape if for_x else 0, dtype=x.dtype, device=x.device)
    y_gradient = torch.empty(0 if y is None or not for_y else y.shape, dtype=x.dtype, device=x.device)
    weights = (positive_weights.contiguous(), negative_weights.contiguous())
    winners = (positive_index.contiguous(), negative_index.contiguous())
    sides = [(x_gradient, n, True, y is None)] if for_x else []
    if y is not None and for_y:
        sides.append((y_gradient, b.shape[1], False, True))
    BD = 128
    for out, rows, anchors, chosen in sides:
        launch(
            _pair_gradient, (rows, triton.cdiv(dimension, BD), sets),
            a, b, *weights, *winners, out, n, b.shape[1], dimension, row_stride(a), row_stride(b),
            DOT=metric == "dot", ANCHORS=anchors, CHOSEN=chosen, SCAN=128, BJ=8, BD=BD, num_warps=4,
        )  # fmt: skip
    return x_gradient, y_gradient
