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
from apd_kernels.kernels._pairs import Reduction, grouped_place, sides_of_parts, visit_tiles

# An estimate: a product of 2048 dimensions takes an H100's multiprocessor as long as some fifty thresholds.
LIST = 128


@triton.jit
def _listed_tile(given, Q, G, _, BM: tl.constexpr, BN: tl.constexpr):
    tile = tl.load(given[3] + tl.program_id(0))
    across = tl.cdiv(G, BN)
    return (tile // across).to(tl.int32) * BM, (tile % across).to(tl.int32) * BN, 1


@triton.jit
def _store_same_identity(s, row, column, rows, columns, given, out, Q, G, _, BM: tl.constexpr, BN: tl.constexpr):
    first, last, starts, _ = given
    s = tl.maximum(s, -3.4028234663852886e38)  # infinitely far, but there
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


@triton.jit
def _count_reaching(s, row, column, rows, columns, given, out, Q, G, _, BM: tl.constexpr, BN: tl.constexpr):
    first, last, thresholds, starts, stops = given
    s = tl.maximum(s, -3.4028234663852886e38)  # infinitely far, but there
    row_mask = rows < Q
    begin = tl.load(first + rows, mask=row_mask, other=0)
    end = tl.load(last + rows, mask=row_mask, other=0)
    same = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
    s = tl.where(same | (columns >= G)[None, :], float("-inf"), s)

    # How many thresholds the best negative reaches, by binary search: all below `low`, none from `high` on.
    best = tl.max(s, 1)
    start = tl.load(starts + rows, mask=row_mask, other=0)
    low = tl.zeros_like(start)
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
        tl.atomic_add(out + start + p, n, mask=walked, sem="relaxed")


_SAME_IDENTITY = Reduction("_same_identity", place=_listed_tile, visit=_store_same_identity)
_COUNT_NEGATIVES = Reduction("_count_negatives", place=grouped_place, visit=_count_reaching)


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
    similarity = torch.empty(pairs, dtype=torch.float32, device=tiles.device)
    _visit(_SAME_IDENTITY, tiles.numel(), query, gallery, (first, last, starts, tiles), similarity)
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
    options = _options(gallery)
    count = torch.zeros(thresholds.shape, dtype=torch.int32, device=thresholds.device)
    assert query.parts is not None
    assert gallery.parts is not None
    tiles = triton.cdiv(query.parts.shape[0], options["BM"]) * triton.cdiv(gallery.parts.shape[0], options["BN"])
    _visit(_COUNT_NEGATIVES, tiles, query, gallery, (first, last, thresholds, begin, end), count)
    return count


def _options(gallery: Operands) -> dict[str, Any]:
    assert gallery.parts is not None
    return prepared.options_of_parts("rank", gallery.parts, gallery.root is not None)


def _visit(
    reduction: Reduction, programs: int, query: Operands, gallery: Operands, given: tuple[Tensor, ...], out: Tensor
) -> None:
    sides = sides_of_parts(query, gallery, _options(gallery))
    assert query.parts is not None
    assert gallery.parts is not None
    rows, columns = query.parts.shape[0], gallery.parts.shape[0]
    launch(
        visit_tiles, (programs,),
        sides.x, sides.y, sides.terms, given, out, rows, columns, sides.dimension, 0, 1.0,
        REDUCTION=reduction, PRODUCT=sides.product, **sides.options,
    )  # fmt: skip
