"""Reductions over pairs that users write, in blocks of rows; the gradient from distances that are computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.reducer import REDUCERS
from apd_kernels._core.rows import per_difference, row_blocks
from apd_kernels.reference.logsumexp import add_weighted_rows, chunks
from apd_kernels.reference.pairing import pair_masks
from apd_kernels.reference.prepared import operands
from apd_kernels.reference.weighting import block_distances


def pair_reduce(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    values: Tensor,
    parameters: list[float],
    reducer: str,
    metric: str,
    precision: str,
) -> Tensor:
    """The results (K, …, N) of a `PairReducer`, with the values (V, …, N) of the anchors."""
    function = REDUCERS[reducer]
    a, b, half = operands(x, y, prepared, metric in ("euclidean", "sqeuclidean"))
    rows, columns, sets = a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())
    out = a.new_empty((function.results(len(values), len(parameters)), *a.shape[:-1]))
    for block in row_blocks(rows, columns, sets):
        d_block = block_distances(a[..., block, :], b, half, metric)
        for chunk in chunks(block, columns, sets):
            d = d_block[..., chunk.start - block.start : chunk.stop - block.start, :]
            own = (*values[..., chunk, None], *parameters)
            state = function.started(a.new_empty(*d.shape[:-1], 1))
            if columns:
                met = function.in_torch["tile"](d, *pair_masks(pairing, chunk), own)
                state = function.in_torch["combine"](state, tuple(part[..., None] for part in met))
            for into, result in zip(out, function.finished(state, own), strict=True):
                into[..., chunk] = result[..., 0]
    return out


def pair_reduce_backward(
    gradients: Tensor,
    results: Tensor,
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    values: Tensor,
    parameters: list[float],
    reducer: str,
    metric: str,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor]:
    """∂x_i = Σ_j w_ij (x_i − y_j), for "cosine" and "dot" −Σ_j w_ij y_j, from the reducer's weights."""
    euclidean = metric in ("euclidean", "sqeuclidean")
    a, b, half = operands(x, y, prepared, euclidean)
    rows, columns, sets = a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())
    for_x = a.new_zeros(a.shape if needs_x else 0)
    for_y = for_x if y is None else a.new_zeros(b.shape if needs_y else 0)
    for block in row_blocks(rows, columns, sets) if columns else ():
        d_block = block_distances(a[..., block, :], b, half, metric)
        for chunk in chunks(block, columns, sets):
            d = d_block[..., chunk.start - block.start : chunk.stop - block.start, :]
            positive, negative = pair_masks(pairing, chunk)
            at = (..., chunk, None)
            own = (*values[at], *parameters)
            slope = REDUCERS[reducer].in_torch["weights"](
                d, positive, negative, own, tuple(results[at]), tuple(gradients[at])
            )
            d.copy_(per_difference(torch.where(positive | negative, slope, 0), d, metric))
        add_weighted_rows(for_x, for_y, d_block, a, b, block, y is None, less_own=euclidean)
    return for_x.neg_().to(x.dtype), x.new_empty(0) if y is None else for_y.neg_().to(y.dtype)
