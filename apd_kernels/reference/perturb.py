"""Projected gradient ascent with the gradient written out: no autograd graph."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import unit_rows
from apd_kernels.reference.losses import per_difference
from apd_kernels.reference.mining import batch_hard, pair_gradient


def metric_perturb(
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
    precision: str,
) -> Tensor:
    """z ← project(z + α · direction(∂/∂z Σ_a softplus(d_p − d_n))), `steps` times."""
    start = x.to(internal_dtype(x))
    order = 2 if norm == "l2" else float("inf")
    scale = torch.linalg.vector_norm(start, ord=order, dim=-1, keepdim=True) if relative else start.new_ones(1)
    radius, step = epsilon * scale, step_size * scale
    moved = start.clone()
    for _ in range(steps):
        positive, negative, positive_index, negative_index = batch_hard(
            moved, labels, None, None, "euclidean", precision
        )
        slope = torch.sigmoid(positive - negative)
        slope = torch.where((positive_index >= 0) & (negative_index >= 0), slope, 0)
        gradient, _ = pair_gradient(
            moved,
            None,
            per_difference(slope, positive, "euclidean"),
            per_difference(-slope, negative, "euclidean"),
            positive_index,
            negative_index,
            "euclidean",
            True,
            False,
        )
        if norm == "l2":
            offset = moved + step * unit_rows(gradient) - start
            length = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
            # A ball of radius 0 (a zero row, "relative") gives 0/0; a NaN length is not above the radius and stays.
            offset = offset * (radius / torch.where(length > radius, length, radius)).nan_to_num(0)
        else:
            direction = torch.where(gradient.isnan(), gradient, gradient.sign())
            offset = moved + step * direction - start
            offset = offset.clamp(-radius, radius)
        moved = start + offset
    return moved.to(x.dtype, copy=True)
