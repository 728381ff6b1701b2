"""Pairwise distances from one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype


def pairwise_distance(x: Tensor, y: Tensor | None, metric: str, precision: str) -> Tensor:
    """d(x_i, y_j) for all i, j. For "cosine" the rows have length 1 or 0."""
    dtype = internal_dtype(x)
    a = x.to(dtype)
    b = a if y is None else y.to(dtype)
    if 0 in (a.shape[-2], b.shape[-2]):
        return a.new_zeros((*a.shape[:-1], b.shape[-2]))
    if metric == "dot":
        return -(a @ b.mT)
    if metric == "cosine":
        return (1 - a @ b.mT).clamp_(min=0)
    # ‖a−b‖² does not change with a common shift; centred rows lose fewer digits in a² + b² − 2ab.
    centre = _centre(a)
    a = a - centre
    b = a if y is None else b - centre
    squared = torch.baddbmm(
        (b * b).sum(-1)[..., None, :].expand(*a.shape[:-1], b.shape[-2]).reshape(-1, a.shape[-2], b.shape[-2]),
        a.reshape(-1, *a.shape[-2:]),
        b.reshape(-1, *b.shape[-2:]).mT,
        alpha=-2,
    ).reshape(*a.shape[:-1], b.shape[-2])
    squared.add_((a * a).sum(-1)[..., None]).clamp_(min=0)
    if y is None:
        diagonal = squared.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(diagonal.isnan(), diagonal, 0))
    return squared if metric == "sqeuclidean" else squared.sqrt_()


def _centre(a: Tensor) -> Tensor:
    """The mean row, 0 where it is not finite (or there is none)."""
    return a.mean(-2, keepdim=True).nan_to_num(0, 0, 0)


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

    For "dot" and "cosine" (of unit rows): ∂x_i = −Σ_j g_ij y_j, ∂y_j = −Σ_i g_ij x_i.
    """
    dtype = internal_dtype(x)
    a = x.to(dtype)
    b = a if y is None else y.to(dtype)
    linear = metric in ("dot", "cosine")
    if metric == "euclidean":
        weights = torch.where(distance == 0, 0, gradient / distance)
    else:
        weights = gradient if linear else 2 * gradient
    if y is None:
        weights = weights + weights.mT
    if not linear:
        centre = _centre(a)
        a = a - centre
        b = a if y is None else b - centre
    for_x, for_y = x.new_empty(0), x.new_empty(0)
    if needs_x:
        for_x = -(weights @ b) if linear else a * weights.sum(-1, keepdim=True) - weights @ b
    if y is not None and needs_y:
        for_y = -(weights.mT @ a) if linear else b * weights.sum(-2)[..., None] - weights.mT @ a
    return for_x.to(x.dtype).contiguous(), for_y.to(x.dtype).contiguous()
