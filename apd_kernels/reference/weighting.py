"""Softmax-weighted distances in blocks of rows; the gradient from distances that are computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.rows import per_difference, row_blocks
from apd_kernels.reference.logsumexp import add_weighted_rows, chunks, exponentials
from apd_kernels.reference.pairing import pair_masks
from apd_kernels.reference.prepared import column_keys, half_squares, operands


def weighted_pairs(
    x: Tensor, y: Tensor | None, prepared: Operands, pairing: Pairing, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_p = Σ softmax_p(d) d and d_n = Σ softmax_n(−d) d, and the log-sum-exps of both softmaxes."""
    a, b, half = operands(x, y, prepared, metric in ("euclidean", "sqeuclidean"))
    rows, columns, sets = a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())
    distances = [a.new_zeros(a.shape[:-1]) for _ in range(2)]
    sums = [a.new_full(a.shape[:-1], -float("inf")) for _ in range(2)]
    for block in row_blocks(rows, columns, sets) if columns else ():
        d_block = block_distances(a[..., block, :], b, half, metric)
        for chunk in chunks(block, columns, sets):
            d = d_block[..., chunk.start - block.start : chunk.stop - block.start, :]
            for side, mask in enumerate(pair_masks(pairing, chunk)):
                e, total, sums[side][..., chunk] = exponentials(-d if side else d, mask)
                weighted = torch.linalg.vecdot(e, d if _finite(d) else d.masked_fill(~mask, 0))
                distances[side][..., chunk] = torch.where(total == 0, 0, weighted / total)
    return distances[0], distances[1], sums[0], sums[1]


def weighted_pairs_backward(
    for_positive: Tensor,
    for_negative: Tensor,
    positive: Tensor,
    negative: Tensor,
    of_positives: Tensor,
    of_negatives: Tensor,
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    metric: str,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor]:
    """∂d_p/∂d_ij = softmax_p,ij (1 + d_ij − d_p), ∂d_n/∂d_ij = softmax_n,ij (1 − d_ij + d_n)."""
    euclidean = metric in ("euclidean", "sqeuclidean")
    a, b, half = operands(x, y, prepared, euclidean)
    rows, columns, sets = a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())
    for_x = a.new_zeros(a.shape if needs_x else 0)
    for_y = for_x if y is None else a.new_zeros(b.shape if needs_y else 0)
    for block in row_blocks(rows, columns, sets) if columns else ():
        d_block = block_distances(a[..., block, :], b, half, metric)
        for chunk in chunks(block, columns, sets):
            d = d_block[..., chunk.start - block.start : chunk.stop - block.start, :]
            at = (..., chunk, None)
            slopes = []
            for sign, mask, g, distance, log_sum in zip(
                (1, -1),
                pair_masks(pairing, chunk),
                (for_positive[at], for_negative[at]),
                (positive[at], negative[at]),
                (of_positives[at], of_negatives[at]),
                strict=True,
            ):
                softmax = torch.sub(d, log_sum, alpha=sign).mul_(sign).exp_()
                by_d = torch.addcmul(g * (1 - sign * distance), d, sign * g)  # g (1 ± (d_ij − d_i))
                slopes.append(softmax.mul_(by_d).masked_fill_(~(mask & (g != 0)), 0))  # a NaN without a weight
            slope = slopes[0].add_(slopes[1])
            if metric == "euclidean" and _finite(d):
                at_zero = d == 0
                torch.div(slope, d, out=d).masked_fill_(at_zero, 0)
            else:
                d.copy_(per_difference(slope, d, metric))
        add_weighted_rows(for_x, for_y, d_block, a, b, block, y is None, less_own=euclidean)
    return for_x.neg_().to(x.dtype), x.new_empty(0) if y is None else for_y.neg_().to(y.dtype)


def _finite(d: Tensor) -> bool:
    """Whether that is known; elsewhere than on the CPU looking would wait for the device."""
    return d.device.type == "cpu" and bool(d.sum().isfinite())


def block_distances(a: Tensor, b: Tensor, half: Tensor | None, metric: str) -> Tensor:
    """d(a_i, b_j); for "cosine" rows have length 1 or 0."""
    keys = column_keys(a, b, half, 2)
    if half is None:
        return keys.add_(1).clamp_(min=0) if metric == "cosine" else keys
    squared = keys.add_(2 * half_squares(a)[..., None]).clamp_(min=0)
    return squared if metric == "sqeuclidean" else squared.sqrt_()
