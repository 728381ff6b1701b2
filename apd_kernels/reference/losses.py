"""Triplet loss from row differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.rows import per_difference
from apd_kernels.reference.mining import mine, stacked_distances

# softplus(t) − t is e^−t, which float64 does not see beyond; PyTorch's own threshold of 20 leaves 2e-9.
EXACT = 40.0


def triplet_loss(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    margin: float | None,
    reverse: bool,
    metric: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mine, then the loss over the winners."""
    positive_index, negative_index = mine(x, y, prepared, pairing, metric)
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
    indices = torch.stack([positive_index, negative_index])
    distances = stacked_distances(x, y, indices, metric)
    missing = (indices < 0).any(0)
    gap = distances[1] - distances[0] if reverse else distances[0] - distances[1]
    gap.masked_fill_(missing, -float("inf"))  # where term and slope are 0, also if the other distance is NaN
    # The hinge at 0 has slope 0. NaN stays NaN: neither clamp nor the comparison hides it.
    if margin is None:
        term, slope = F.softplus(gap, threshold=EXACT), torch.sigmoid(gap)
    else:
        term = gap.add_(margin).clamp(min=0)
        slope = (gap <= 0).logical_not_().to(gap.dtype)
    count = missing.logical_not().sum(-1, keepdim=True).clamp_(min=1)
    loss = term.sum(-1, keepdim=True).div_(count).squeeze(-1)
    positive, negative = per_difference(slope.div_(count), distances, metric).expand_as(distances)
    return (loss, -positive, negative.clone()) if reverse else (loss, positive.clone(), -negative)
