"""Pairwise distances from one matrix product, their gradient in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import row_blocks
from apd_kernels.reference.prepared import column_keys, common_offset, half_squares, operands


def pairwise_distance(x: Tensor, y: Tensor | None, prepared: Operands, metric: str, precision: str) -> Tensor:
    """d(x_i, y_j) for all i, j. For "cosine" the rows have length 1 or 0."""
    a, b, half = operands(x, y, prepared, metric in ("euclidean", "sqeuclidean"))
    if 0 in (a.shape[-2], b.shape[-2]):
        return a.new_zeros((*a.shape[:-1], b.shape[-2]))
    keys = column_keys(a, b, half, 2)
    if half is None:
        return keys if metric == "dot" else keys.add_(1).clamp_(min=0)
    of_a = half if y is None else half_squares(a)
    squared = keys.add_(2 * of_a[..., None]).clamp_(min=0)
    if y is None:
        diagonal = squared.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(diagonal.isnan(), diagonal, 0))
    return squared if metric == "sqeuclidean" else squared.sqrt_()


def pairwise_distance_backward(
    gradient: Tensor,
    distance: Tensor,
    x: Tensor,
    y: Tensor | None,
    metric: str,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor]:
    """With w_ij = g_ij ∂d_ij/∂(½‖x_i − y_j‖²): ∂x_i = Σ_j w_ij (x_i − y_j), ∂y_j = Σ_i w_ij (y_j − x_i).

    For "dot" and "cosine" (of unit rows): ∂x_i = −Σ_j g_ij y_j, ∂y_j = −Σ_i g_ij x_i. Without y the weights of both
    sides are added.
    """
    linear = metric in ("dot", "cosine")
    a = x.to(internal_dtype(x))
    b = a if y is None else y.to(a.dtype)
    centre = None if linear else common_offset(a, half_squares(a))
    if centre is not None:  # differences do not change, and sums of large equal parts do not cancel
        a = a - centre
        b = a if y is None else b - centre
    needs_y = y is not None and needs_y
    for_x = torch.empty_like(a, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    for_y = torch.zeros_like(b, memory_format=torch.contiguous_format) if needs_y else x.new_empty(0)
    for block in row_blocks(a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())):
        weights, rows = gradient[..., block, :], a[..., block, :]
        if y is None:
            weights = weights + gradient[..., :, block].mT
        if metric == "euclidean":
            near = distance[..., block, :]
            weights = (weights / near).masked_fill_(near == 0, 0)
        elif metric == "sqeuclidean":
            weights = 2 * weights
        if needs_x:
            pulled = weights @ b
            for_x[..., block, :] = pulled.neg_() if linear else (rows * weights.sum(-1, keepdim=True)).sub_(pulled)
        if needs_y:
            for_y.sub_(weights.mT @ rows)
            if not linear:
                for_y.addcmul_(b, weights.sum(-2)[..., None])
    return for_x.to(x.dtype), for_y.to(x.dtype)
