"""Distances row by row, in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import per_difference, row_blocks, scaled_rows, unit_rows
from apd_kernels.reference.mining import row_distance


def paired_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """d(x_i, y_i)."""
    distance = x.new_empty(x.shape[:-1], dtype=internal_dtype(x))
    for block in row_blocks(x.shape[-2], x.shape[-1], max(1, x.shape[:-2].numel())):
        a, b = (rows[..., block, :].to(distance.dtype) for rows in (x, y))
        if metric == "cosine":
            a, b = unit_rows(a), unit_rows(b)
        distance[..., block] = row_distance(a, b, metric)
    return distance


def paired_distance_backward(
    gradient: Tensor, distance: Tensor, x: Tensor, y: Tensor, metric: str, for_x: bool, for_y: bool
) -> tuple[Tensor, Tensor]:
    """∂x = w (x − y) = −∂y;  dot: ∂x = −g y, ∂y = −g x;  cosine: ∂x = g ((x̂ − ŷ) − d x̂) / ‖x‖, and so for y."""
    x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format) if for_x else x.new_empty(0)
    y_gradient = torch.empty_like(y, memory_format=torch.contiguous_format) if for_y else y.new_empty(0)
    for block in row_blocks(x.shape[-2], x.shape[-1], max(1, x.shape[:-2].numel())):
        a, b = (rows[..., block, :].to(distance.dtype) for rows in (x, y))
        g, d = (values[..., block, None] for values in (gradient, distance))
        for wanted, result, own, other in ((for_x, x_gradient, a, b), (for_y, y_gradient, b, a)):
            if not wanted:
                continue
            if metric == "dot":
                change = -g * other
            elif metric == "cosine":
                scaled, largest, norm = scaled_rows(own)
                zero = (norm == 0) | (other == 0).all(-1, keepdim=True)
                unit = scaled / norm
                change = (g * (unit - unit_rows(other) - d * unit) / norm / largest).masked_fill_(zero, 0)
            else:
                change = per_difference(g, d, metric) * (own - other)
            result[..., block, :] = change
    return x_gradient, y_gradient
