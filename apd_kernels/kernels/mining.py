"""Hard pairs and their gradient.

    key_ij = ½‖y_j‖² − x_i·y_j   (euclidean: orders like d for a fixed anchor i)   or   −x_i·y_j   (cosine, dot)
    p_i    = argmax_j {key_ij : same identity, j ≠ i},   n_i = argmin_j {key_ij : other identity}
    d_p, d_n from the differences x_i − y_p, x_i − y_n: no cancellation, whatever the precision of the keys

    ∂x_i   = w_p,i (x_i − y_p) + w_n,i (x_i − y_n)  +  Σ_{j chose i} w_j (x_i − x_j)   (the sum if y is x)
    ∂y_m   = Σ_{j chose m} w_j (y_m − x_j)

The columns are divided among several programs per row tile; each leaves its winner, and the next kernel, which has to
visit the winners' rows anyway, picks the best of them. Many rows against themselves: a tile above the diagonal serves
its rows and its columns, and a row's splits are the tiles it meets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._pairing import pairing_arguments
from apd_kernels.kernels._pairs import (
    Reduction,
    column_splits,
    reduce_rows,
    reduce_triangle,
    sides_of_parts,
    sides_of_rows,
)
from apd_kernels.kernels._tiles import MAX_SPLITS, add_chosen, nan_as, row_distance
from apd_kernels.kernels._tuning import tile
from apd_kernels.kernels.distance import METRIC_NUMBER
from apd_kernels.kernels.prepared import operands, pays_to_split, product_options, rows_kernel

# x against itself by tiles above the diagonal: below, there are too few tiles to fill a GPU twice; above, a row would
# have more splits than `best_of_splits` reads. An estimate: no GPU has run it.
TRIANGLE_ROWS = (1024, 16384)
# Up to here a row finds the anchors that chose it by scanning all of them, N² index reads; beyond, winners are sorted.
SCANNED_ANCHORS = 1024
# Sorted winners are summed in slabs, so that a row that everybody chose is not one program's work.
SLAB = 256


@triton.jit
def _no_winners(BM: tl.constexpr):
    nobody = tl.full((BM,), -1, tl.int32)
    return tl.full((BM,), float("-inf"), tl.float32), nobody, tl.full((BM,), float("inf"), tl.float32), nobody


@triton.jit
def best_pairs(key, positive, negative, first, AXIS: tl.constexpr):
    """Along AXIS of a tile of keys: the largest of the positives and the smallest of the negatives, with their places.

    A NaN wins on either side; a finite floor keeps "nothing here" (∓inf) apart from an overflowed key.
    """
    infinity: tl.constexpr = float("inf")
    limit: tl.constexpr = 3.4028234663852886e38
    high = tl.where(positive, tl.maximum(nan_as(key, infinity), -limit), -infinity)
    low = tl.where(negative, tl.minimum(nan_as(key, -infinity), limit), infinity)
    farthest, p = tl.max(high, AXIS, return_indices=True)
    nearest, n = tl.min(low, AXIS, return_indices=True)
    return (
        farthest,
        tl.where(farthest == -infinity, -1, first + p),
        nearest,
        tl.where(nearest == infinity, -1, first + n),
    )


@triton.jit
def _better(state, later):
    farthest, p, nearest, n = state
    high, high_at, low, low_at = later
    farther, nearer = high > farthest, low < nearest  # strictly: among equals the lowest index stays
    return (
        tl.where(farther, high, farthest),
        tl.where(farther, high_at, p),
        tl.where(nearer, low, nearest),
        tl.where(nearer, low_at, n),
    )


@triton.jit
def _store_winners(state, out, s, sets, rows, row_mask, N, split, splits):
    """Keys and indices to [side, set, row, split]; `ticket`, of each set, is what the programs of the next kernel draw
    (or None)."""
    key_out, index_out, ticket = out
    if ticket is not None and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(ticket + s, 0)
    farthest, p, nearest, n = state
    positive_at = (s * N + rows) * splits + split
    negative_at = ((sets + s) * N + rows) * splits + split
    tl.store(key_out + positive_at, farthest, mask=row_mask)
    tl.store(key_out + negative_at, nearest, mask=row_mask)
    tl.store(index_out + positive_at, p, mask=row_mask)
    tl.store(index_out + negative_at, n, mask=row_mask)


_MINE = Reduction("_mine", init=_no_winners, tile=best_pairs, combine=_better, store=_store_winners)
_MINE_TRIANGLE = Reduction("_mine_triangle", tile=best_pairs, store=_store_winners)


@triton.jit
def best_of_splits(key, index, splits, FARTHEST: tl.constexpr, SPLITS: tl.constexpr):
    """The winner's index among one row's splits; on equal keys the first split, which has the lower columns."""
    t = tl.arange(0, SPLITS)
    if FARTHEST:
        _, at = tl.max(tl.load(key + t, mask=t < splits, other=float("-inf")), 0, return_indices=True)
    else:
        _, at = tl.min(tl.load(key + t, mask=t < splits, other=float("inf")), 0, return_indices=True)
    return tl.load(index + at).to(tl.int64)


@triton.jit
def winner_distances(
    x, y, key, index, positive_index, negative_index, s, i, sets, N, M, D, x_stride, y_stride, splits,
    METRIC: tl.constexpr, MINED: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """An anchor's winners (MINED: the best of the splits, which are stored) and its distances from them."""
    at = s * N + i
    if MINED:
        negative_at = (sets + s) * N + i
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
    return tl.where(p < 0, 0.0, tl.where(p < M, d_p, float("nan"))), tl.where(
        n < 0, 0.0, tl.where(n < M, d_n, float("nan"))
    )


@triton.jit(do_not_specialize=["N", "M", "splits"])
def _pair_distance(
    x, y, key, index, positive_index, negative_index, positive, negative, N, M, D, x_stride, y_stride, splits,
    METRIC: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program an anchor."""
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    d_p, d_n = winner_distances(x, y, key, index, positive_index, negative_index, s, i, tl.num_programs(1),
                                N, M, D, x_stride, y_stride, splits, METRIC, True, SPLITS, BD)  # fmt: skip
    tl.store(positive + s * N + i, d_p)
    tl.store(negative + s * N + i, d_n)


@triton.jit
def _to_winner(values, other, weight, DOT: tl.constexpr):
    """weight · (values − other), for DOT −weight · other. A weight of 0 drops a pair whose rows are not finite, too."""
    return tl.where(weight == 0, 0.0, -weight * other if DOT else weight * (values - other))


@triton.jit(do_not_specialize=["N", "M"])
def _pair_gradient(
    x, y, positive_weights, negative_weights, positive_index, negative_index, scale, order, starts, slabs, out,
    N, M, D, x_stride, y_stride,
    DOT: tl.constexpr, ANCHORS: tl.constexpr, CHOSEN: tl.constexpr, SORTED: tl.constexpr,
    SCAN: tl.constexpr, SLAB: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a row and BD columns of the gradient. ANCHORS: the row is an anchor and moves with its two winners;
    CHOSEN: it may have been chosen, and moves with those that chose it. Both when y is x. SORTED: those lie together in
    `order`, from `starts`, with sums over whole slabs; else they are looked for."""
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
        # -1, whose weight is 0, reads row 0; a given index beyond the rows, whose weight is NaN, the last one.
        farthest = tl.load(y + tl.minimum(tl.maximum(p, 0), M - 1) * y_stride + k, mask=mask, other=0.0)
        nearest = tl.load(y + tl.minimum(tl.maximum(n, 0), M - 1) * y_stride + k, mask=mask, other=0.0)
        acc += _to_winner(values, farthest.to(tl.float32), tl.where(p < 0, 0.0, tl.load(positive_weights + row)), DOT)
        acc += _to_winner(values, nearest.to(tl.float32), tl.where(n < 0, 0.0, tl.load(negative_weights + row)), DOT)
    else:
        values = tl.load(y + row * y_stride + k, mask=mask, other=0.0).to(tl.float32)
    if SORTED:
        first, last = tl.load(starts + s * (M + 1) + row), tl.load(starts + s * (M + 1) + row + 1)
        order += s * 2 * N
        slabs += s * tl.cdiv(2 * N, SLAB) * D
        at = first
        while at < last:
            if (at % SLAB == 0) & (at + SLAB <= last):
                acc += tl.load(slabs + at // SLAB * D + k, mask=mask, other=0.0)
                at += SLAB
            else:
                end = tl.minimum(last, (at // BJ + 1) * BJ)  # BJ divides SLAB
                acc = _add_entries(acc, values, order, at, end, x, positive_weights, negative_weights, x_stride, N,
                                   k, mask, DOT, BJ)  # fmt: skip
                at = end
    elif CHOSEN:
        acc = add_chosen(acc, values, row, positive_index, negative_index, positive_weights, negative_weights,
                         x, x_stride, N, D, k, DOT, SCAN, BJ)  # fmt: skip
    if scale is not None:
        acc *= tl.load(scale + s)
    tl.store(out + (s * rows + row) * D + k, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_entries(
    acc, values, order, first, last, x, positive_weights, negative_weights, x_stride, N, k, mask,
    DOT: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """acc + what the entries [first, last) of the sorted winners, at most BJ, bring to the row `values`."""
    e = first + tl.arange(0, BJ)
    entry = tl.load(order + e, mask=e < last, other=0)
    anchor = tl.where(entry < N, entry, entry - N)
    w = tl.load(positive_weights + anchor, mask=(e < last) & (entry < N), other=0.0)
    w += tl.load(negative_weights + anchor, mask=(e < last) & (entry >= N), other=0.0)
    rows = tl.load(x + anchor[:, None] * x_stride + k[None, :], mask=(w != 0)[:, None] & mask[None, :], other=0.0)
    return acc + tl.sum(_to_winner(values[None, :], rows.to(tl.float32), w[:, None], DOT), 0)


@triton.jit(do_not_specialize=["N", "M"])
def _slab_sums(
    x, y, positive_weights, negative_weights, order, winners, slabs, N, M, D, x_stride, y_stride,
    DOT: tl.constexpr, SLAB: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a slab of the sorted winners and BD columns: its sum where it is all one row's, else nothing."""
    slab = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    s = tl.program_id(2).to(tl.int64)
    first = slab * SLAB
    winners += s * 2 * N
    row = tl.load(winners + first)
    last = tl.load(winners + tl.minimum(first + SLAB, 2 * N) - 1)
    if (first + SLAB <= 2 * N) & (row >= 0) & (row < M) & (last == row):
        mask = k < D
        values = tl.load(y + (s * M + row) * y_stride + k, mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros((BD,), tl.float32)
        for at in range(first, first + SLAB, BJ):
            acc = _add_entries(acc, values, order + s * 2 * N, at, at + BJ, x + s * N * x_stride,
                               positive_weights + s * N, negative_weights + s * N, x_stride, N, k, mask,
                               DOT, BJ)  # fmt: skip
        tl.store(slabs + (s * tl.cdiv(2 * N, SLAB) + slab) * D + k, acc, mask=mask)


class Mined(NamedTuple):
    """What one launch of mining leaves: winners of each split of the columns, [side, set, row, split]."""

    key: Tensor
    index: Tensor
    splits: int


def mine(
    x: Tensor,
    y: Tensor | None,
    pairing: Pairing,
    metric: str,
    precision: str,
    *,
    prepared: Operands | None = None,
    most_splits: int = MAX_SPLITS,
    ticket: Tensor | None = None,
) -> Mined:
    """Launch `_mine` or `_mine_triangle`, of rows or of prepared rows; `ticket`, (S,) int32, is zeroed on the way."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, _ = a.shape
    m = b.shape[1]
    euclidean = metric in ("euclidean", "sqeuclidean")
    triangle = y is None and TRIANGLE_ROWS[0] <= n <= TRIANGLE_ROWS[1] and most_splits == MAX_SPLITS
    kernel = "triangle" if triangle else "mine"
    if prepared is not None and (prepared.parts is not None or pays_to_split(x, y, precision)):
        own, others = operands(x, y, prepared, euclidean, precision)
        largest = others.largest
        if euclidean and y is not None and own.largest is not None and largest is not None:
            largest = torch.maximum(own.largest, largest)  # half squares of both sides are in its unit
        sides = sides_of_parts(own, others, _capped(product_options(kernel, x, precision), pairing), largest)
    else:
        form = dot_precision(x, precision)
        kernel = "triangle.rows" if triangle else rows_kernel("mine", x, y, form)
        sides = sides_of_rows(a, b, form, _capped(tile(kernel, x), pairing))
    options = sides.options
    row_tiles = triton.cdiv(n, options["BM"])
    splits, tiles_per_split = row_tiles, 0
    if not triangle:
        splits, tiles_per_split = column_splits(row_tiles, triton.cdiv(m, options["BN"]), sets, most_splits)
    key = torch.empty(2, sets, n, splits, dtype=torch.float32, device=x.device)
    index = torch.empty(2, sets, n, splits, dtype=torch.int32, device=x.device)
    tensors, rules = pairing_arguments(pairing)
    constants = {"METRIC": METRIC_NUMBER[metric], "RULES": rules, "PRODUCT": sides.product}
    out = (key, index, ticket)
    if triangle:
        launch(
            reduce_triangle, (row_tiles, row_tiles, sets),
            sides.x, sides.y, sides.terms, tensors, out, n, sides.dimension, 1.0,
            REDUCTION=_MINE_TRIANGLE, **constants, BLOCK=options.pop("BM"), **options,
        )  # fmt: skip
    else:
        launch(
            reduce_rows, (row_tiles, splits, sets),
            sides.x, sides.y, sides.terms, tensors, (), out, n, m, sides.dimension, tiles_per_split, 1.0,
            REDUCTION=_MINE, **constants, **options,
        )  # fmt: skip
    return Mined(key, index, splits)


def _capped(options: dict[str, Any], pairing: Pairing) -> dict[str, Any]:
    """Other masks than those of labels take registers: wider tiles would spill on sm_90."""
    if not pairing.of_labels_only():
        options["BN" if "BN" in options else "BM"] = min(64, options.get("BN", options["BM"]))
    return options


def batch_hard(
    x: Tensor, y: Tensor | None, prepared: Operands, pairing: Pairing, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches: `mine`, then `_pair_distance` on what it found."""
    shape = x.shape[:-1]
    if 0 in (*shape, (x if y is None else y).shape[-2]):
        distance = torch.zeros(shape, dtype=torch.float32, device=x.device)
        index = torch.full(shape, -1, dtype=torch.int64, device=x.device)
        return distance, distance.clone(), index, index.clone()
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    mined = mine(a, None if y is None else b, pairing, metric, precision, prepared=prepared)
    winners = [torch.empty(shape, dtype=torch.int64, device=x.device) for _ in range(2)]
    positive, negative = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    sets, n, dimension = a.shape
    launch(
        _pair_distance, (n, sets),
        a, b, mined.key, mined.index, *winners, positive, negative,
        n, b.shape[1], dimension, row_stride(a), row_stride(b), mined.splits,
        METRIC=METRIC_NUMBER[metric], SPLITS=MAX_SPLITS, BD=1024, num_warps=4,
    )  # fmt: skip
    return positive, negative, winners[0], winners[1]


def pair_gradient(
    x: Tensor,
    y: Tensor | None,
    positive_weights: Tensor,
    negative_weights: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    scale: Tensor | None,
    metric: str,
    for_x: bool,
    for_y: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `_pair_gradient` for the anchors, and for y where it is another set and wants a gradient.

    Many anchors: their winners are sorted first, stably, so that a row's sum has one order in every run, and
    `_slab_sums` is launched.
    """
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    if n == 0 or m == 0:  # nothing was chosen, and there is no row to read
        return (
            torch.zeros(x.shape if for_x else 0, dtype=x.dtype, device=x.device),
            torch.zeros(0 if y is None or not for_y else y.shape, dtype=x.dtype, device=x.device),
        )
    x_gradient = torch.empty(x.shape if for_x else 0, dtype=x.dtype, device=x.device)
    y_gradient = torch.empty(0 if y is None or not for_y else y.shape, dtype=x.dtype, device=x.device)
    weights = (positive_weights.contiguous(), negative_weights.contiguous())
    indices = (positive_index.contiguous(), negative_index.contiguous())
    scale = None if scale is None else scale.contiguous()
    BD, BJ = 128, 8
    sides = [(x_gradient, n, True, y is None)] if for_x else []
    if y is not None and for_y:
        sides.append((y_gradient, m, False, True))
    order = starts = slabs = None
    if n > SCANNED_ANCHORS and any(chosen for *_, chosen in sides):
        winners, order = torch.cat([index.view(sets, n) for index in indices], 1).sort(dim=1, stable=True)
        starts = torch.searchsorted(winners, torch.arange(m + 1, device=x.device).expand(sets, -1).contiguous())
        slabs = torch.empty(sets, triton.cdiv(2 * n, SLAB), dimension, dtype=torch.float32, device=x.device)
        launch(
            _slab_sums, (slabs.shape[1], triton.cdiv(dimension, BD), sets),
            a, b, *weights, order, winners, slabs, n, m, dimension, row_stride(a), row_stride(b),
            DOT=metric == "dot", SLAB=SLAB, BJ=BJ, BD=BD, num_warps=4,
        )  # fmt: skip
    for out, rows, anchors, chosen in sides:
        is_sorted = chosen and order is not None
        launch(
            _pair_gradient, (rows, triton.cdiv(dimension, BD), sets),
            a, b, *weights, *indices, scale, *((order, starts, slabs) if is_sorted else (None, None, None)), out,
            n, m, dimension, row_stride(a), row_stride(b),
            DOT=metric == "dot", ANCHORS=anchors, CHOSEN=chosen, SORTED=is_sorted,
            SCAN=128, SLAB=SLAB, BJ=BJ, BD=BD, num_warps=4,
        )  # fmt: skip
    return x_gradient, y_gradient
