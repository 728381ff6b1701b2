"""The k most similar rows from products of one fixed shape, and sums over the pairs that they make."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.threads import in_threads
from apd_kernels.reference.ranking import CHUNK_COLUMNS, TILE_COLUMNS, TILE_ROWS, _similarities, _slices

# Elements of a block of pairs: its temporaries stay in the cache (1 MB).
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

    def work(rows: slice) -> None:
        height = rows.stop - rows.start
        best = query.new_empty(height, 0)
        index = found.new_empty(height, 0)
        for columns in _slices(0, images, width):
            block = _similarities(query, gallery, half_squares, rows, columns)
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
        found[rows] = index.masked_fill_(best == -torch.inf, images).sort(1).values

    in_threads(work, _slices(0, queries, TILE_ROWS))
    return found


def _largest(block: Tensor, k: int) -> Tensor:
    """Columns of the k largest values of every row, ascending; of equal values the first columns."""
    k = min(k, block.shape[1])
    value, column = block.topk(min(k + 1, block.shape[1]), 1)
    smallest, column = value[:, k - 1], column[:, :k].contiguous()
    # Which of several equal values topk takes is not defined: rows with more of them than places are taken again.
    tied = (value[:, -1:] == smallest[:, None]) & (smallest[:, None] > -torch.inf) & (value.shape[1] > k)
    for row in tied.nonzero()[:, 0].tolist():
        larger, equal = (block[row] > smallest[row]).nonzero()[:, 0], (block[row] == smallest[row]).nonzero()[:, 0]
        column[row] = torch.cat([larger, equal[: column.shape[1] - larger.numel()]])
    return column.sort(1).values


def pair_sums(x: Tensor, y: Tensor, scale: Tensor | None, indices: Tensor, dot: bool) -> Tensor:
    """Σ (scale·x_i − scale·y_j)² for each j of indices[i], or with `dot` Σ x_i y_j; equal rows give equal bits."""
    dtype = internal_dtype(x)
    dimension = x.shape[1]
    # One shape for all blocks and aligned rows: a reduction may take another order otherwise.
    padded = -(-dimension // 16) * 16
    size = max(1, PAIR_ELEMENTS // padded)
    row, column = torch.arange(len(x), device=x.device).repeat_interleave(indices.shape[1]), indices.reshape(-1)
    sums = torch.empty(column.numel(), dtype=dtype, device=x.device)

    def work(run: slice) -> None:
        pairs = torch.zeros(size, padded, dtype=dtype, device=x.device)
        for chosen in _slices(run.start, run.stop, size):
            count = chosen.stop - chosen.start
            a, b = x[row[chosen]].to(dtype), y[column[chosen]].to(dtype)
            if scale is not None:
                a, b = a.mul_(scale), b.mul_(scale)
            if dot:
                torch.mul(a, b, out=pairs[:count, :dimension])
            else:
                torch.sub(a, b, out=pairs[:count, :dimension])
                pairs.square_()
            sums[chosen] = pairs.sum(1)[:count]

    in_threads(work, _slices(0, column.numel(), size * PAIR_BLOCKS))
    return sums.reshape(indices.shape)
