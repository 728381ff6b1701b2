"""Similarities of positive pairs, and negatives counted against them, from products of one fixed shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.rows import BLOCK_ELEMENTS
from apd_kernels._core.threads import in_threads
from apd_kernels.evaluation.retrieval_metrics import add_reached, tiles_of_pairs

# Equal columns must give equal bits wherever they lie, and a BLAS library does not promise that: at the edge of its
# kernels it may add the terms of a product in another order. With MKL (1 to 16 threads, float32 and float64) it holds
# for 384 columns, whole kernels of every width, and not for 256 columns of float64; with OpenBLAS's float32 kernels
# for Haswell and Zen it never holds. One shape also makes a pair's bits independent of the sizes of both sets.
# Such tiles are as fast as one product of everything (Market-1501 size, 2 cores).
TILE_ROWS, TILE_COLUMNS = 256, 384
# Blocks of all threads together stay within BLOCK_ELEMENTS.
CHUNK_COLUMNS = BLOCK_ELEMENTS // TILE_ROWS // TILE_COLUMNS * TILE_COLUMNS


def prepared_rows(rows: Tensor, half_squares: Tensor | None, precision: str) -> Operands:
    """Rows ready for the products: as they are."""
    return Operands(rows, half_squares)


def same_identity_similarities(
    query: Operands, gallery: Operands, first: Tensor, last: Tensor, starts: Tensor, pairs: int
) -> Tensor:
    """s(query_i, gallery_j) for j in first[i] … last[i], at starts[i] + j − first[i]. Rows are sorted by identity."""
    x, y = query.parts, gallery.parts
    assert x is not None
    assert y is not None
    similarity = torch.empty(pairs, dtype=x.dtype, device=x.device)

    def work(tile: int) -> None:
        block, across = divmod(tile, -(-y.shape[0] // TILE_COLUMNS))
        rows, columns = _part(x, block, TILE_ROWS), _part(y, across, TILE_COLUMNS)
        values = _similarities(x, y, gallery.half, rows, columns)
        column = torch.arange(columns.start, columns.stop, device=x.device)
        same = (first[rows, None] <= column) & (column < last[rows, None])
        place = (starts[:-1] - first)[rows, None] + column
        similarity[place[same]] = values[same]

    in_threads(work, tiles_of_pairs(first, last, y.shape[0], TILE_ROWS, TILE_COLUMNS).tolist())
    return similarity


def count_negatives(
    query: Operands, gallery: Operands, first: Tensor, last: Tensor, thresholds: Tensor, starts: Tensor
) -> Tensor:
    """How many gallery rows outside first[i] … last[i] have s ≥ t, for each threshold t of query i, ascending."""
    x, y = query.parts, gallery.parts
    assert x is not None
    assert y is not None
    count = np.zeros(thresholds.shape, dtype=np.int64)
    edges, bounds = thresholds.cpu().numpy(), starts.tolist()
    same = torch.stack([first, last], 1).tolist()
    width = max(TILE_COLUMNS, CHUNK_COLUMNS // torch.get_num_threads() // TILE_COLUMNS * TILE_COLUMNS)

    def work(rows: slice) -> None:
        for columns in _slices(0, y.shape[0], width):
            block = _similarities(x, y, gallery.half, rows, columns).cpu().numpy()
            for row, (begin, end) in zip(block, same[rows], strict=True):
                row[max(0, begin - columns.start) : max(0, end - columns.start)] = np.nan
            add_reached(count, block, edges, bounds[rows.start : rows.stop + 1])

    in_threads(work, _slices(0, x.shape[0], TILE_ROWS))
    return torch.from_numpy(count).to(x.device)


def _part(rows: Tensor, number: int, size: int) -> slice:
    return slice(number * size, min((number + 1) * size, rows.shape[0]))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _similarities(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    rows: slice,
    columns: slice,
    height: int = TILE_ROWS,
) -> Tensor:
    """x·y − ½‖y‖² (without half_squares: x·y) of a block of pairs, in tiles that are filled up with zero rows."""
    x = _filled(query[rows], height)
    width = columns.stop - columns.start
    block = torch.empty(height, -(-width // TILE_COLUMNS) * TILE_COLUMNS, dtype=query.dtype, device=query.device)
    for y, tile in zip(gallery[columns].split(TILE_COLUMNS), block.split(TILE_COLUMNS, 1), strict=True):
        torch.mm(x, _filled(y, TILE_COLUMNS).T, out=tile)
    block = block[: rows.stop - rows.start, :width]
    return block if half_squares is None else block.sub_(half_squares[columns])


def _filled(rows: Tensor, size: int) -> Tensor:
    return rows if rows.shape[0] == size else torch.nn.functional.pad(rows, (0, 0, 0, size - rows.shape[0]))
