"""Triplet loss from row differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.rows import per_difference
from apd_kernels.reference.mining import mine, pair_distance


def triplet_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None,
    y_labels: Tensor | None,
    margin: float | None,
    reverse: bool,
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mine, then the loss over the winners."""
    positive_index, negative_index = mine(x, labels, y, y_labels, metric)
    loss, positive, negative = triplet_loss_indexed(x, y, positive_index, negative_index, margin, reverse, metric)
    return loss, positive, negative, positive_index, negative_index


def triplet_loss_indexed(
    x: Tensor,
    y: Tensor | None,
    positive_index: Tensor,
    negative_index: Tensor,
    margin: float | None,
    reverse: bool,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """L = mean over valid anchors of φ(±(d_p − d_n)), and ∂L/∂d_p, ∂L/∂d_n per row difference."""
    other = x if y is None else y
    positive = pair_distance(x, other, positive_index, metric)
    negative = pair_distance(x, other, negative_index, metric)
    valid = (positive_index >= 0) & (negative_index >= 0)
    gap = negative - positive if reverse else positive - negative
    if margin is None:
        term, slope = F.softplus(gap), torch.sigmoid(gap)
    else:
        # The hinge at 0 has slope 0. NaN stays NaN: neither clamp nor the comparison may hide it.
        term, slope = (gap + margin).clamp(min=0), torch.where(gap + margin <= 0, 0, torch.ones_like(gap))
    count = valid.sum(-1).clamp(min=1)
    loss = torch.where(valid, term, 0).sum(-1) / count
    slope = torch.where(valid, slope, 0) / count[..., None]
    if reverse:
        slope = -slope
    return loss, per_difference(slope, positive, metric), per_difference(-slope, negative, metric)
