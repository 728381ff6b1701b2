"""Rank by counting: similarities of positive pairs, then the negatives that reach them.

    s_ij = q_i · g_j − ½‖g_j‖²   (without half squares: q_i · g_j)
    n_ip = #{ j of another identity : s_ij ≥ t_ip }

Queries and gallery are sorted by identity, so the gallery rows of query i's identity are the range
first_i … last_i: the first kernel multiplies the tiles that hold such pairs and no others. The second takes all
tiles; of a row's ascending thresholds it walks only those that the tile's best negative reaches. Both get s from the
same function with the same tile, so a pair has the same bits in both, and equal gallery rows tie exactly. The counts
are added with integer atomics, whose order does not matter.

A tile walks as long as its longest row. So thresholds are cut into lists of LIST: a query with more of them stands in
several rows, and the rows are ordered by the length of their lists. No tile walks longer than LIST, and tiles whose
queries have few positives do not wait for one that has thousands.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels.evaluation.retrieval_metrics import tiles_of_pairs
from apd_kernels.kernels import prepared
from apd_kernels.kernels._launch import launch
from apd_kernels.kernels._split import split_product, unscaled

GROUP = 8  # row blocks that walk the gallery together, so that a gallery tile is read from L2
# An estimate: a product of 2048 dimensions takes an H100's multiprocessor as long as some fifty thresholds.
LIST = 128


@triton.jit
def _similarity(
    q, g, q_root, g_root, half, row, column, Q, G, D, one,
    FORM: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    s = split_product(q, g, row, column, Q - 1, G - 1, D, one, FORM, TMA, SEPARATE, BM, BN, BK)
    if FORM == "split":
        x = tl.load(q_root + rows, mask=rows < Q, other=0.0)
        y = tl.load(g_root + columns, mask=columns < G, other=0.0)
        s = unscaled(s, x, y)
    if half is not None:
        s -= tl.load(half + columns, mask=columns < G, other=0.0)[None, :]
    return tl.maximum(s, -3.4028234663852886e38)  # infinitely far, but there


@triton.jit(do_not_specialize=["Q", "G"])
def _same_identity(
    q, g, q_root, g_root, half, first, last, starts, tiles, out, Q, G, D, one,
    FORM: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.load(tiles + tl.program_id(0))
    across = tl.cdiv(G, BN)
    row = (tile // across).to(tl.int32) * BM
    column = (tile % across).to(tl.int32) * BN
    s = _similarity(q, g, q_root, g_root, half, row, column, Q, G, D, one,
                    FORM, TMA, SEPARATE, BM, BN, BK)  # fmt: skip
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    row_mask = rows < Q
    begin = tl.load(first + rows, mask=row_mask, other=0)
    end = tl.load(last + rows, mask=row_mask, other=0)
    # Column by column: a tile of scattered addresses does not fit the registers.
    place = tl.load(starts + rows, mask=row_mask, other=0) - begin
    own = tl.maximum(begin, column)
    end = tl.minimum(end, column + BN)
    for _ in range(0, tl.max(end - own, 0)):
        value = tl.max(tl.where(columns[None, :] == own[:, None], s, float("-inf")), 1)
        tl.store(out + place + own, value, mask=own < end)
        own += 1


@triton.jit(do_not_specialize=["Q", "G"])
def _count_negatives(
    q, g, q_root, g_root, half, first, last, thresholds, starts, stops, count, Q, G, D, one,
    FORM: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BM)
    group = tl.program_id(0) // (GROUP * tl.cdiv(G, BN))
    within = tl.program_id(0) % (GROUP * tl.cdiv(G, BN))
    height = min(blocks - group * GROUP, GROUP)
    row = (group * GROUP + within % height) * BM
    column = within // height * BN
    s = _similarity(q, g, q_root, g_root, half, row, column, Q, G, D, one,
                    FORM, TMA, SEPARATE, BM, BN, BK)  # fmt: skip
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    row_mask = rows < Q
    begin = tl.load(first + rows, mask=row_mask, other=0)
    end = tl.load(last + rows, mask=row_mask, other=0)
    same = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
    s = tl.where(same | (columns >= G)[None, :], float("-inf"), s)

    # How many thresholds the best negative reaches, by binary search: all below `low`, none from `high` on.
    best = tl.max(s, 1)
    start = tl.load(starts + rows, mask=row_mask, other=0)
    low = tl.zeros((BM,), tl.int64)
    high = tl.load(stops + rows, mask=row_mask, other=0) - start
    left = tl.max(high, 0)
    while left > 0:
        middle = (low + high) // 2
        open = low < high
        reached = open & (tl.load(thresholds + start + middle, mask=open, other=float("inf")) <= best)
        low = tl.where(reached, middle + 1, low)
        high = tl.where(open & (reached == 0), middle, high)
        left = left // 2
    for p in range(0, tl.max(low, 0)):
        walked = p < low
        t = tl.load(thresholds + start + p, mask=walked, other=float("inf"))
        n = tl.sum((s >= t[:, None]).to(tl.int32), 1)
        tl.atomic_add(count + start + p, n, mask=walked, sem="relaxed")


def prepared_rows(rows: Tensor, half_squares: Tensor | None, precision: str) -> Operands:
    """Rows ready for the products: of float32 grade their float16 parts and scales, otherwise converted."""
    operands = prepared.prepare_rows(rows, False, precision)
    assert operands.parts is not None
    root = None if operands.root is None else operands.root[0]
    return Operands(operands.parts[0], half_squares, root=root)


def same_identity_similarities(
    query: Operands, gallery: Operands, first: Tensor, last: Tensor, starts: Tensor, pairs: int
) -> Tensor:
    """As the PyTorch path, from the tiles that hold pairs of one identity."""
    assert gallery.parts is not None
    options = _options(gallery)
    tiles = tiles_of_pairs(first, last, gallery.parts.shape[0], options["BM"], options["BN"])
    return similarities_of_tiles(query, gallery, first, last, starts, tiles, pairs)


def similarities_of_tiles(
    query: Operands, gallery: Operands, first: Tensor, last: Tensor, starts: Tensor, tiles: Tensor, pairs: int
) -> Tensor:
    """Launch `_same_identity`: one program for each of `tiles`."""
    operands, sizes, options = _arguments(query, gallery)
    similarity = torch.empty(pairs, dtype=torch.float32, device=tiles.device)
    launch(
        _same_identity, (tiles.numel(),),
        *operands, first, last, starts, tiles, similarity, *sizes, 1.0,
        **options,
    )  # fmt: skip
    return similarity


def count_negatives(
    query: Operands, gallery: Operands, first: Tensor, last: Tensor, thresholds: Tensor, starts: Tensor
) -> Tensor:
    """As the PyTorch path, from lists of LIST thresholds at most, each a row of its own."""
    row, begin, end = lists_of(starts)
    return count_of_lists(query.of_rows(row), gallery, first[row], last[row], thresholds, begin, end)


def lists_of(starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The query of each list, and where in the thresholds it begins and ends; the longest first."""
    count = (starts.diff() + LIST - 1) // LIST
    row = torch.repeat_interleave(count)
    place = torch.arange(row.numel(), device=row.device) - (count.cumsum(0) - count)[row]
    begin = starts[row] + LIST * place
    end = torch.minimum(begin + LIST, starts[row + 1])
    order = (begin - end).argsort(stable=True)
    return row[order], begin[order], end[order]


def count_of_lists(
    query: Operands, gallery: Operands, first: Tensor, last: Tensor, thresholds: Tensor, begin: Tensor, end: Tensor
) -> Tensor:
    """Launch `_count_negatives`, one program a tile: query row i counts for thresholds begin[i] … end[i]."""
    operands, sizes, options = _arguments(query, gallery)
    count = torch.zeros(thresholds.shape, dtype=torch.int32, device=thresholds.device)
    rows, columns, _ = sizes
    launch(
        _count_negatives, (triton.cdiv(rows, options["BM"]) * triton.cdiv(columns, options["BN"]),),
        *operands, first, last, thresholds, begin, end, count, *sizes, 1.0,
        GROUP=GROUP, **options,
    )  # fmt: skip
    return count


def _options(gallery: Operands) -> dict[str, Any]:
    assert gallery.parts is not None
    return prepared.options_of_parts("rank", gallery.parts, gallery.root is not None)


def _arguments(query: Operands, gallery: Operands) -> tuple[tuple[Any, ...], tuple[int, int, int], dict[str, Any]]:
    """Both kernels': operands, sizes, constants and options."""
    options = _options(gallery)
    assert query.parts is not None
    assert gallery.parts is not None
    (rows, dimension), columns = query.parts.shape, gallery.parts.shape[0]
    operands = (
        prepared.tiles_of(query.parts, options["BM"], options["BK"], options),
        prepared.tiles_of(gallery.parts, options["BN"], options["BK"], options),
        query.root, gallery.root, gallery.half,
    )  # fmt: skip
    return operands, (rows, columns, dimension if gallery.root is None else dimension // 2), options
