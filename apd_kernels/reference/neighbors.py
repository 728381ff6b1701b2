"""The k most similar rows from products of one fixed shape, and sums over the pairs that they make."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.threads import in_threads
from apd_kernels.evaluation.rows import padded
from apd_kernels.reference.ranking import CHUNK_COLUMNS, TILE_COLUMNS, TILE_ROWS, _similarities, _slices

# Elements of a block of pairs, which stays in the cache (1 MB).
PAIR_ELEMENTS = 1 << 18
PAIR_BLOCKS = 16  # that a thread takes at a time


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
    """The k gallery rows of largest x·y − ½‖y‖² (without half_squares: x·y), of equal ones the first; (Q, k) ascending.

    Query i leaves out the rows of its code, the row own[i] and those that its mask does not name. Where fewer than k
    are left, the number of gallery rows stands for each missing one, behind the others.
    """
    queries, images = query.shape[0], gallery.shape[0]
    found = torch.empty(queries, k, dtype=torch.int64, device=query.device)
    width = max(TILE_COLUMNS, CHUNK_COLUMNS // torch.get_num_threads() // TILE_COLUMNS * TILE_COLUMNS)
    height = _even_height(queries)

    def work(rows: slice) -> None:
        best = query.new_empty(rows.stop - rows.start, 0)
        index = found.new_empty(rows.stop - rows.start, 0)
        for columns in _slices(0, images, width):
            block = _similarities(query, gallery, half_squares, rows, columns, height)
            if query_codes is not None and gallery_codes is not None:
                block.masked_fill_(query_codes[rows, None] == gallery_codes[columns], -torch.inf)
            if own is not None:
                at = own[rows] - columns.start
                inside = ((at >= 0) & (at < block.shape[1])).nonzero()[:, 0]
                block[inside, at[inside]] = -torch.inf
            if mask is not None:
                block.masked_fill_(~mask[rows, columns], -torch.inf)
            place = _largest(block, k)
            best = torch.cat([best, block.gather(1, place)], 1)
            index = torch.cat([index, place + columns.start], 1)
            if index.shape[1] > k:
                place = _largest(best, k)
                best, index = best.gather(1, place), index.gather(1, place)
        missing = best == -torch.inf
        found[rows] = _ascending(index.masked_fill_(missing, images)) if missing.any() else index

    in_threads(work, _slices(0, queries, height))
    return found


def _even_height(queries: int) -> int:
    """Rows of a tile, at most TILE_ROWS, that fill the last tile about as well as the others: 560 queries are three of
    192, and not two of 256 and one of 48, filled up. Any multiple of 16 leaves equal columns equal, as TILE_ROWS."""
    tiles = max(1, -(-queries // TILE_ROWS))
    return max(1, -(-queries // (16 * tiles))) * 16


def _largest(block: Tensor, k: int) -> Tensor:
    """Columns of the k largest values of every row, ascending; of equal values the first columns."""
    if k >= block.shape[1]:
        return torch.arange(block.shape[1], device=block.device).expand(block.shape)
    # One more than are wanted; unsorted, which takes half the time for k = 1000.
    value, column = block.topk(k + 1, 1, sorted=False)
    smallest, place = value.min(1, keepdim=True)
    column = column.scatter(1, place, column[:, k:])[:, :k]
    # Which of several equal values topk takes is not defined: rows with more of them than places are taken again.
    tied = ((value == smallest).sum(1) > 1) & (smallest[:, 0] > -torch.inf)
    for row in tied.nonzero()[:, 0].tolist():
        larger, equal = (block[row] > smallest[row]).nonzero()[:, 0], (block[row] == smallest[row]).nonzero()[:, 0]
        column[row] = torch.cat([larger, equal[: k - larger.numel()]])
    return _ascending(column)


def _ascending(columns: Tensor) -> Tensor:
    """Each row sorted: NumPy takes a third of PyTorch's time (560 × 1000: 7 ms of one core)."""
    return torch.from_numpy(np.sort(columns.cpu().numpy(), 1)).to(columns.device)


def pair_sums(x: Tensor, y: Tensor, scale: Tensor | None, indices: Tensor, dot: bool) -> Tensor:
    """Σ (scale·x_i − scale·y_j)² for each j of indices[i], or with `dot` Σ x_i y_j; equal rows give equal bits."""
    dtype, dimension, (queries, k) = internal_dtype(x), x.shape[1], indices.shape
    # A block is some queries with all their rows, or one query with a part of them.
    parts = -(-k * padded(dimension) // PAIR_ELEMENTS)
    width = -(-k // parts)
    height = max(1, PAIR_ELEMENTS // (k * padded(dimension)))
    factor = 1.0 if scale is None else float(scale)
    sums = torch.empty(queries, k, dtype=dtype, device=x.device)

    def work(run: slice) -> None:
        # One shape for all blocks and aligned rows: a reduction may take another order otherwise.
        pairs = torch.zeros(height * width, padded(dimension), dtype=dtype, device=x.device)
        in_place = y.dtype == dtype and pairs.shape[1] == dimension  # half of the cache: 1.2 times as fast
        taken = pairs if in_place else torch.empty(len(pairs), dimension, dtype=y.dtype, device=y.device)
        for rows in _slices(run.start, run.stop, height):
            a = x[rows, None].to(dtype) * factor
            for columns in _slices(0, k, width):
                chosen = indices[rows, columns]
                count, shape = chosen.numel(), (*chosen.shape, dimension)
                b, combined = taken[:count].view(shape), pairs[:count, :dimension].unflatten(0, chosen.shape)
                torch.index_select(y, 0, chosen.reshape(-1), out=taken[:count])
                if dot:
                    torch.mul(b, a, out=combined)
                else:
                    torch.sub(a, b, alpha=factor, out=combined)
                    pairs.square_()
                sums[rows, columns] = pairs.sum(1)[:count].view(chosen.shape)

    in_threads(work, _slices(0, queries, height * PAIR_BLOCKS))
    return sums
