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
from apd_kernels.kernels._pairing import anchor_values, pair_masks, pairing_arguments
from apd_kernels.kernels._split import column_key, in_units_of, split_product
from apd_kernels.kernels._tiles import MAX_SPLITS, add_chosen, nan_as, product, row_distance
from apd_kernels.kernels._tuning import tile
from apd_kernels.kernels.distance import METRIC_NUMBER
from apd_kernels.kernels.prepared import PADDED, operands, pays_to_split, product_options, rows_kernel, tiles_of

# x against itself by tiles above the diagonal: below, there are too few tiles to fill a GPU twice; above, a row would
# have more splits than `best_of_splits` reads. An estimate: no GPU has run it.
TRIANGLE_ROWS = (1024, 16384)
# Up to here a row finds the anchors that chose it by scanning all of them, N² index reads; beyond, winners are sorted.
SCANNED_ANCHORS = 1024
# Sorted winners are summed in slabs, so that a row that everybody chose is not one program's work.
SLAB = 256


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
def store_winners(key_out, index_out, s, sets, rows, row_mask, N, split, splits, farthest, p, nearest, n):
    """To [side, set, row, split]."""
    positive_at = (s * N + rows) * splits + split
    negative_at = ((sets + s) * N + rows) * splits + split
    tl.store(key_out + positive_at, farthest, mask=row_mask)
    tl.store(key_out + negative_at, nearest, mask=row_mask)
    tl.store(index_out + positive_at, p, mask=row_mask)
    tl.store(index_out + negative_at, n, mask=row_mask)


@triton.jit
def row_terms(half, root, largest, first, rows, mask, EUCLIDEAN: tl.constexpr, FORM: tl.constexpr):
    """Factor and half square of prepared rows of one set, whose first is the `first` of all."""
    terms = tl.where(mask, 0.0, 0.0)
    factor = terms + 1.0
    if EUCLIDEAN:
        terms = tl.load(half + first + rows, mask=mask, other=0.0)
    if FORM == "split":
        factor, terms = in_units_of(largest, tl.load(root + first + rows, mask=mask, other=largest), terms)
    return factor, terms


@triton.jit
def add_columns(
    farthest, p, nearest, n, key, column, columns, label, own_row, domain, y_labels, own, y_domains, y_valid,
    rows, row_mask, M,
    SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
):  # fmt: skip
    """The winners so far or those of a tile of keys whose first column is `column`."""
    positive, negative = pair_masks(label, own_row, domain, y_labels, own, y_domains, y_valid, rows, columns,
                                    row_mask, columns < M, SELF, POSITIVES, NEGATIVES)  # fmt: skip
    high, high_at, low, low_at = best_pairs(key, positive, negative, column, 1)
    better = high > farthest  # strictly: among equals the lowest index stays
    farthest = tl.where(better, high, farthest)
    p = tl.where(better, high_at, p)
    better = low < nearest
    return farthest, p, tl.where(better, low, nearest), tl.where(better, low_at, n)


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split", "splits"])
def _mine(
    x, y, x_half, y_half, x_root, y_root, largest, labels, y_labels, own, domains, y_domains, y_valid,
    key_out, index_out, ticket, N, M, D, x_stride, y_stride, tiles_per_split, splits, one,
    EUCLIDEAN: tl.constexpr, SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
    FORM: tl.constexpr, PREPARED: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each row's best positive and negative among one split's columns, written to [side, set, row, split].

    `ticket`, of each set, is what the programs of the next kernel draw (or None)."""
    infinity: tl.constexpr = float("inf")
    split = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    if ticket is not None and tl.program_id(0) + split == 0:
        tl.store(ticket + s, 0)
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    row_mask = rows < N
    label, own_row, domain = anchor_values(labels, own, domains, rows, row_mask)
    farthest = tl.full((BM,), -infinity, tl.float32)
    nearest = tl.full((BM,), infinity, tl.float32)
    p = tl.full((BM,), -1, tl.int32)
    n = tl.full((BM,), -1, tl.int32)
    first = split * tiles_per_split * BN
    last = tl.minimum(first + tiles_per_split * BN, M)
    if PREPARED:
        unit = tl.load(largest + s) if FORM == "split" else 1.0
        # A factor of the anchor changes no order, and might underflow: only half squares have to be in its unit.
        x_factor, _ = row_terms(x_half, x_root, unit, s * N, rows, row_mask, EUCLIDEAN, FORM if EUCLIDEAN else "")
        first_row, first_column = (s * N).to(tl.int32), (s * M).to(tl.int32)
        for n0 in range(first, last, BN):
            acc = split_product(x, y, first_row + row, first_column + n0, first_row + N - 1, first_column + M - 1, D,
                                one, FORM, TMA, SEPARATE, BM, BN, BK)  # fmt: skip
            # In halves: the masks and keys of a whole tile leave the registers on sm_90.
            left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            for side in tl.static_range(2):
                column = n0 + side * (BN // 2)
                columns = column + tl.arange(0, BN // 2)
                y_factor, terms = row_terms(y_half, y_root, unit, s * M, columns, columns < M, EUCLIDEAN, FORM)
                key = column_key(left if side == 0 else right, x_factor, y_factor, terms)
                farthest, p, nearest, n = add_columns(
                    farthest, p, nearest, n, key, column, columns, label, own_row, domain, y_labels, own, y_domains,
                    y_valid, rows, row_mask, M, SELF, POSITIVES, NEGATIVES,
                )  # fmt: skip
    else:
        x += s * N * x_stride
        y += s * M * y_stride
        for n0 in range(first, last, BN):
            columns = n0 + tl.arange(0, BN)
            acc, _, yy = product(x, y, rows, columns, row_mask, columns < M, D, x_stride, y_stride, one,
                                 BM, BN, BK, FORM, EUCLIDEAN)  # fmt: skip
            key = 0.5 * yy[None, :] - acc if EUCLIDEAN else -acc
            farthest, p, nearest, n = add_columns(
                farthest, p, nearest, n, key, n0, columns, label, own_row, domain, y_labels, own, y_domains,
                y_valid, rows, row_mask, M, SELF, POSITIVES, NEGATIVES,
            )  # fmt: skip
    store_winners(key_out, index_out, s, tl.num_programs(2), rows, row_mask, N, split, splits, farthest, p, nearest, n)


@triton.jit(do_not_specialize=["N", "splits"])
def _mine_triangle(
    x, y, half, root, largest, labels, domains, key_out, index_out, ticket, N, D, x_stride, splits, one,
    EUCLIDEAN: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
    FORM: tl.constexpr, PREPARED: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile on or above the diagonal: its rows' winners are its column tile's split, its columns' its row tile's."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    if column_tile < row_tile:
        return
    s = tl.program_id(2).to(tl.int64)
    sets = tl.num_programs(2)
    if ticket is not None and row_tile + column_tile == 0:
        tl.store(ticket + s, 0)
    row, column = row_tile * BLOCK, column_tile * BLOCK
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    row_mask, column_mask = rows < N, columns < N
    label, own_row, domain = anchor_values(labels, None, domains, rows, row_mask)
    if PREPARED:
        first = (s * N).to(tl.int32)
        acc = split_product(x, y, first + row, first + column, first + N - 1, first + N - 1, D, one,
                            FORM, TMA, SEPARATE, BLOCK, BLOCK, BK)  # fmt: skip
        unit = tl.load(largest + s) if FORM == "split" else 1.0
        x_factor, xx = row_terms(half, root, unit, s * N, rows, row_mask, EUCLIDEAN, FORM)
        y_factor, yy = row_terms(half, root, unit, s * N, columns, column_mask, EUCLIDEAN, FORM)
    else:
        x_factor, y_factor = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
        acc, xx, yy = product(x + s * N * x_stride, y + s * N * x_stride, rows, columns, row_mask, column_mask, D,
                              x_stride, x_stride, one, BLOCK, BLOCK, BK, FORM, EUCLIDEAN)  # fmt: skip
        xx, yy = 0.5 * xx, 0.5 * yy
    positive, negative = pair_masks(label, own_row, domain, labels, None, domains, None, rows, columns,
                                    row_mask, column_mask, True, POSITIVES, NEGATIVES)  # fmt: skip
    # Only half squares have to be in the anchor's unit: its factor changes no order, and might underflow.
    key = column_key(acc, x_factor if EUCLIDEAN else 0 * x_factor + 1, y_factor, yy)
    farthest, p, nearest, n = best_pairs(key, positive, negative, column, 1)
    store_winners(key_out, index_out, s, sets, rows, row_mask, N, column_tile, splits, farthest, p, nearest, n)
    if row_tile < column_tile:
        y_factor = y_factor if EUCLIDEAN else 0 * y_factor + 1
        key = xx[:, None] - y_factor[None, :] * (x_factor[:, None] * acc)
        farthest, p, nearest, n = best_pairs(key, positive, negative, row, 0)
        store_winners(key_out, index_out, s, sets, columns, column_mask, N, row_tile, splits, farthest, p, nearest, n)


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
    sets, n, dimension = a.shape
    m = b.shape[1]
    euclidean = metric in ("euclidean", "sqeuclidean")
    tensors, constants = pairing_arguments(pairing)
    triangle = y is None and TRIANGLE_ROWS[0] <= n <= TRIANGLE_ROWS[1] and most_splits == MAX_SPLITS
    kernel = "triangle" if triangle else "mine"
    options: dict[str, Any]
    x_stride, y_stride = row_stride(a), row_stride(b)
    half = root = y_half = y_root = largest = None
    if prepared is not None and (prepared.parts is not None or pays_to_split(x, y, precision)):
        own, others = operands(x, y, prepared, euclidean, precision)
        assert own.parts is not None
        assert others.parts is not None
        options = _capped({"PREPARED": True, **product_options(kernel, x, precision)}, pairing)
        a = tiles_of(own.parts, options["BM"], options["BK"], options)
        b = tiles_of(others.parts, options["BM" if triangle else "BN"], options["BK"], options)
        half, root, y_half, y_root = own.half, own.root, others.half, others.root
        largest = others.largest
        if euclidean and y is not None and own.largest is not None and largest is not None:
            largest = torch.maximum(own.largest, largest)  # half squares of both sides are in its unit
        dimension = triton.cdiv(dimension, PADDED) * PADDED
        x_stride = y_stride = 0
    else:
        form = dot_precision(x, precision)
        kernel = "triangle.rows" if triangle else rows_kernel("mine", x, y, form)
        options = {"PREPARED": False, "FORM": form, "TMA": False, "SEPARATE": False, **tile(kernel, x)}
        options = _capped(options, pairing)
    row_tiles = triton.cdiv(n, options["BM"])
    if triangle:
        splits = row_tiles
    else:
        column_tiles = triton.cdiv(m, options["BN"])
        splits = max(1, min(column_tiles, most_splits, MAX_SPLITS // max(1, row_tiles * sets)))
        tiles_per_split = triton.cdiv(column_tiles, splits)
        splits = triton.cdiv(column_tiles, max(1, tiles_per_split))
    key = torch.empty(2, sets, n, splits, dtype=torch.float32, device=x.device)
    index = torch.empty(2, sets, n, splits, dtype=torch.int32, device=x.device)
    if triangle:
        labels, _, _, domains, _, _ = tensors
        rules = {name: constants[name] for name in ("POSITIVES", "NEGATIVES")}
        BLOCK = options.pop("BM")
        launch(
            _mine_triangle, (row_tiles, row_tiles, sets),
            a, b, half, root, largest, labels, domains, key, index, ticket, n, dimension, x_stride, splits, 1.0,
            EUCLIDEAN=euclidean, **rules, BLOCK=BLOCK, **options,
        )  # fmt: skip
    else:
        launch(
            _mine, (row_tiles, splits, sets),
            a, b, half, y_half, root, y_root, largest, *tensors, key, index, ticket,
            n, m, dimension, x_stride, y_stride, tiles_per_split, splits, 1.0,
            EUCLIDEAN=euclidean, **constants, **options,
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
