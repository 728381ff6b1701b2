"""The k most similar rows by a threshold: bound the k-th similarity, then gather what reaches the bound.

    s_ij = q_i · g_j − ½‖g_j‖²   (without half squares: q_i · g_j),   −∞ where query i leaves out row j

1. `_group_maxima`: the columns are divided into at least 2k groups, and m_ig is the best of group g. The k-th largest
   of the m_ig is at most the k-th largest s_ij: the bound t_i. The columns of a tile are spaced over the whole gallery,
   so that neighbouring rows (images of one identity) are in different groups. For large galleries every second to
   fourth tile is enough: fewer columns only make the bound lower.
2. `_collect`: every pair with (s_ij, −j) ≥ (t_i, −c_i), at first c_i = ∞, goes to a buffer of its query, as one integer
   that orders like (s_ij, −j). The first k of the buffer are the answer. The order in which programs reach the buffer
   plays no part: the integers are all different.
3. Where a buffer was too small, its k-th integer is a better bound, and 2 is done again for these queries.

The memory is a few numbers a query for each of its k neighbors, the same code serves every k, and the result is the
same in every run. Both kernels get s from the same function with the same tile, so a pair has the same bits in both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._pairs import GROUP, Reduction, grouped_place, grouped_tile, sides_of_rows, visit_tiles

# Both kernels: other sizes in one of them would take the same pair another way.
TILE = {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
LAST_COLUMN = 2**31 - 1
NOTHING = -(2**63)  # below the integer of every pair
MAX_SAMPLING = 4  # at most so many column tiles for one that the bound is taken from
WORKING_BYTES = 1 << 27


@triton.jit
def _allowed(s, rows, columns, given, Q, G):
    """The similarities of a tile, −∞ where query i leaves out row j."""
    query_codes, gallery_codes, own, mask = given[0], given[1], given[2], given[3]
    row_mask, column_mask = rows < Q, columns < G
    allowed = row_mask[:, None] & column_mask[None, :]
    if query_codes is not None:
        code = tl.load(query_codes + rows, mask=row_mask, other=0)
        allowed = allowed & (code[:, None] != tl.load(gallery_codes + columns, mask=column_mask, other=0)[None, :])
    if own is not None:
        allowed = allowed & (columns[None, :] != tl.load(own + rows, mask=row_mask, other=-1)[:, None])
    if mask is not None:
        at = rows.to(tl.int64)[:, None] * G + columns[None, :]
        allowed = allowed & (tl.load(mask + at, mask=allowed, other=0) != 0)
    return tl.where(allowed, s, float("-inf"))


@triton.jit
def _sampled_tile(given, Q, G, sampling, BM: tl.constexpr, BN: tl.constexpr):
    """Tile t of all T is made of columns t, t + T, t + 2T, …"""
    tiles = tl.cdiv(G, BN)
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(Q, BM), tl.cdiv(tiles, sampling), GROUP)
    return row * BM, column * sampling, tiles


@triton.jit
def _store_maxima(
    s, row, column, rows, columns, given, out, Q, G, sampling, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr
):
    """Of groups of WIDTH columns."""
    s = _allowed(s, rows, columns, given, Q, G)
    best = tl.max(tl.reshape(s, (BM, BN // WIDTH, WIDTH)), 2)
    at = (rows.to(tl.int64) * tl.cdiv(tl.cdiv(G, BN), sampling) + column // sampling) * (BN // WIDTH)
    tl.store(out + at[:, None] + tl.arange(0, BN // WIDTH)[None, :], best, mask=(rows < Q)[:, None])


@triton.jit
def _store_maxima_of_32(
    s, row, column, rows, columns, given, out, Q, G, sampling, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    _store_maxima(s, row, column, rows, columns, given, out, Q, G, sampling, BM, BN, 32)


@triton.jit
def _store_maxima_of_4(
    s, row, column, rows, columns, given, out, Q, G, sampling, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    _store_maxima(s, row, column, rows, columns, given, out, Q, G, sampling, BM, BN, 4)


@triton.jit
def _store_reaching(
    s, row, column, rows, columns, given, out, Q, G, capacity, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    nowhere: tl.constexpr = 2147483647
    keys, count = out
    row_mask = rows < Q
    s = _allowed(s, rows, columns, given, Q, G)
    t = tl.load(given[4] + rows, mask=row_mask, other=float("inf"))[:, None]
    c = tl.load(given[5] + rows, mask=row_mask, other=0)[:, None]
    reached = ((s > t) | ((s == t) & (columns[None, :] <= c))) & (s > float("-inf"))
    n = tl.sum(reached.to(tl.int32), 1)
    most = tl.max(n, 0)
    if most > 0:
        slot = tl.atomic_add(count + rows, n, mask=row_mask & (n > 0), sem="relaxed")
        row_keys = keys + rows.to(tl.int64) * capacity
        # Column by column: a tile of scattered addresses does not fit the registers.
        at = tl.full((BM,), -1, tl.int32)
        for i in range(0, most):
            later = reached & (columns[None, :] > at[:, None])
            at = tl.min(tl.where(later, columns[None, :], nowhere), 1)
            value = tl.max(tl.where(columns[None, :] == at[:, None], s, float("-inf")), 1)
            bits = value.to(tl.int32, bitcast=True)
            order = tl.where(bits < 0, bits ^ nowhere, bits)  # an integer that orders like the float
            key = (order.to(tl.int64) << 32) | (nowhere - at).to(tl.int64)
            tl.store(row_keys + slot + i, key, mask=(i < n) & (slot + i < capacity))


_GROUP_MAXIMA = {
    width: Reduction("_group_maxima", place=_sampled_tile, visit=visit)
    for width, visit in ((32, _store_maxima_of_32), (4, _store_maxima_of_4))
}
_COLLECT = Reduction("_collect", place=grouped_place, visit=_store_reaching)


@triton.jit(do_not_specialize=["k"])
def _pair_sums(
    x, y, scale, indices, out, k, D, x_stride, y_stride, DOT: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program for BJ rows of one query; each row is summed in the same order, wherever it stands."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    row = tl.load(indices + i * k + j, mask=j < k, other=0)
    total = tl.zeros((BJ, BD), tl.float32)
    factor = tl.load(scale) if scale is not None else 1.0
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        a = tl.load(x + i * x_stride + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        b = tl.load(y + row[:, None] * y_stride + d[None, :], mask=(j < k)[:, None] & (d < D)[None, :], other=0.0)
        b = b.to(tl.float32)
        if DOT:
            total += a * b
        else:
            difference = a * factor - b * factor
            total += difference * difference
    tl.store(out + i * k + j, tl.sum(total, 1), mask=j < k)


def nearest(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    own: Tensor | None,
    mask: Tensor | None,
    k: int,
    precision: str,
) -> Tensor:
    """As the PyTorch path, in blocks of queries whose groups and buffers stay within WORKING_BYTES."""
    images = gallery.shape[0]
    found = torch.empty(query.shape[0], k, dtype=torch.int64, device=query.device)
    sampling = min(MAX_SAMPLING, max(1, images // (16 * k)))
    # Where rows are shuffled 1.1 to 1.4 · k · sampling of them reach the bound.
    capacity = images if images <= 8 * k else 2 * k * sampling + TILE["BN"]
    size = max(1, WORKING_BYTES // (16 * k + 8 * capacity) // TILE["BM"]) * TILE["BM"]
    for rows in torch.arange(query.shape[0], device=query.device).split(size):
        bound = last = None
        while rows.numel():
            operands = (
                query[rows], gallery, half_squares, None if query_codes is None else query_codes[rows], gallery_codes,
                None if own is None else own[rows], None if mask is None else mask[rows],
            )  # fmt: skip
            if bound is None or last is None:
                bound = torch.full(rows.shape, -torch.inf, device=query.device)
                if capacity < images:
                    bound = group_maxima(*operands, k, sampling, precision).topk(k, 1).values[:, -1].contiguous()
                last = torch.full_like(rows, LAST_COLUMN, dtype=torch.int32)
            keys, count = collect(*operands, bound, last, capacity, precision)
            best = keys.topk(k, 1).values
            # Fewer than k, although k rows reach the bound: only if the two kernels differed in a pair's bits.
            settled = (count <= capacity) & ((count >= k) | (bound == -torch.inf))
            found[rows[settled]] = _columns(best[settled], images).sort(1).values
            rows, lowest = rows[~settled], best[~settled, -1]
            bound, last = _similarities(lowest), _columns(lowest, LAST_COLUMN).int()
    return found


def _similarities(keys: Tensor) -> Tensor:
    """s of the integers that `_collect` stores, −∞ for NOTHING."""
    order = keys >> 32
    bits = torch.where(order < 0, order ^ LAST_COLUMN, order).int()
    return torch.where(keys == NOTHING, -torch.inf, bits.view(torch.float32))


def _columns(keys: Tensor, of_nothing: int) -> Tensor:
    return torch.where(keys == NOTHING, of_nothing, LAST_COLUMN - (keys & (2**32 - 1)))


def group_maxima(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    own: Tensor | None,
    mask: Tensor | None,
    k: int,
    sampling: int,
    precision: str,
) -> Tensor:
    """Launch `_group_maxima`: the best of each group, (Q, groups)."""
    queries, images = len(query), len(gallery)
    sampled = triton.cdiv(triton.cdiv(images, TILE["BN"]), sampling)
    width = 32 if images >= 128 * k * sampling else 4
    maxima = torch.empty(queries, sampled * (TILE["BN"] // width), dtype=torch.float32, device=query.device)
    given = query_codes, gallery_codes, own, None if mask is None else mask.contiguous()
    programs = triton.cdiv(queries, TILE["BM"]) * sampled
    _visit(_GROUP_MAXIMA[width], programs, query, gallery, half_squares, given, maxima, sampling, precision)
    return maxima


def collect(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    query_codes: Tensor | None,
    gallery_codes: Tensor | None,
    own: Tensor | None,
    mask: Tensor | None,
    bound: Tensor,
    last: Tensor,
    capacity: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Launch `_collect`, one program a tile: (Q, capacity) integers in no order, and how many each query would have."""
    queries, images = len(query), len(gallery)
    keys = torch.full((queries, capacity), NOTHING, dtype=torch.int64, device=query.device)
    count = torch.zeros(queries, dtype=torch.int32, device=query.device)
    given = query_codes, gallery_codes, own, None if mask is None else mask.contiguous(), bound, last
    programs = triton.cdiv(queries, TILE["BM"]) * triton.cdiv(images, TILE["BN"])
    _visit(_COLLECT, programs, query, gallery, half_squares, given, (keys, count), capacity, precision)
    return keys, count


def _visit(
    reduction: Reduction, programs: int, query: Tensor, gallery: Tensor, half: Tensor | None, given: tuple[Any, ...],
    out: Any, number: int, precision: str,
) -> None:  # fmt: skip
    sides = sides_of_rows(query[None], gallery[None], dot_precision(query, precision), TILE, half)
    launch(
        visit_tiles, (programs,),
        query, gallery, sides.terms, given, out, len(query), len(gallery), sides.dimension, number, 1.0,
        REDUCTION=reduction, PRODUCT=sides.product, **TILE,
    )  # fmt: skip


def pair_sums(x: Tensor, y: Tensor, scale: Tensor | None, indices: Tensor, dot: bool) -> Tensor:
    """As the PyTorch path, from one launch of `_pair_sums`."""
    x, y = sets_of_rows(x), sets_of_rows(y)
    queries, k = indices.shape
    sums = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    BJ = 8
    launch(
        _pair_sums, (queries, triton.cdiv(k, BJ)),
        x, y, scale, indices.contiguous(), sums, k, x.shape[2], row_stride(x), row_stride(y),
        DOT=dot, BJ=BJ, BD=512, num_warps=4,
    )  # fmt: skip
    return sums
