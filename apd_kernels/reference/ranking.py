"""Similarities of positive pairs, and negatives counted against them, from products of one fixed shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.ranks import add_reached
from apd_kernels._core.rows import BLOCK_ELEMENTS
from apd_kernels._core.threads import in_threads

# Equal columns must give equal bits wherever they lie, and a BLAS library does not promise that: at the edge of its
# kernels it may add the terms of a product in another order. With MKL (1 to 16 threads, float32 and float64) it holds
# for 384 columns, whole kernels of every width, and not for 256 columns of float64; with OpenBLAS's float32 kernels
# for Haswell and Zen it never holds. One shape also makes a pair's bits independent of the sizes of both sets.
# Such tiles are as fast as one product of everything (Market-1501 size, 2 cores).
TILE_ROWS, TILE_COLUMNS = 256, 384
# Blocks of all threads together stay within BLOCK_ELEMENTS.
CHUNK_COLUMNS = BLOCK_ELEMENTS // TILE_ROWS // TILE_COLUMNS * TILE_COLUMNS


def same_identity_similarities(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    first: Tensor,
    last: Tensor,
    starts: Tensor,
    pairs: int,
    precision: str,
) -> Tensor:
    """s(query_i, gallery_j) for j in first[i] … last[i], at starts[i] + j − first[i]. Rows are sorted by identity."""
    similarity = torch.empty(pairs, dtype=query.dtype, device=query.device)

    def work(rows: slice) -> None:
        start = int(first[rows][0]) // TILE_COLUMNS * TILE_COLUMNS
        for columns in _slices(start, int(last[rows][-1]), TILE_COLUMNS):
            tile = _similarities(query, gallery, half_squares, rows, columns)
            column = torch.arange(columns.start, columns.stop, device=query.device)
            same = (first[rows, None] <= column) & (column < last[rows, None])
            place = (starts[:-1] - first)[rows, None] + column
            similarity[place[same]] = tile[same]

    in_threads(work, _slices(0, query.shape[0], TILE_ROWS))
    return similarity


def count_negatives(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    first: Tensor,
    last: Tensor,
    thresholds: Tensor,
    starts: Tensor,
    precision: str,
) -> Tensor:
    """How many gallery rows outside first[i] … last[i] have s ≥ t, for each threshold t of query i, ascending."""
    count = np.zeros(thresholds.shape, dtype=np.int64)
    edges, bounds = thresholds.cpu().numpy(), starts.tolist()
    same = torch.stack([first, last], 1).tolist()
    width = max(TILE_COLUMNS, CHUNK_COLUMNS // torch.get_num_threads() // TILE_COLUMNS * TILE_COLUMNS)

    def work(rows: slice) -> None:
        for columns in _slices(0, gallery.shape[0], width):
            block = _similarities(query, gallery, half_squares, rows, columns).cpu().numpy()
            for row, (begin, end) in zip(block, same[rows], strict=True):
                row[max(0, begin - columns.start) : max(0, end - columns.start)] = np.nan
            add_reached(count, block, edges, bounds[rows.start : rows.stop + 1])

    in_threads(work, _slices(0, query.shape[0], TILE_ROWS))
    return torch.from_numpy(count).to(query.device)


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
