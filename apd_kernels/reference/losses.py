"""Triplet and metric-perturbation losses from row differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
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


def per_difference(slope: Tensor, distance: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return torch.where((distance == 0) | (slope == 0), 0, slope / distance)
    return 2 * slope if metric == "sqeuclidean" else slope


def metric_perturbation_loss(perturbed: Tensor, negatives: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean_ij softplus(d(p_i, n_ij) − d(p_i, o_i)), and the two distances."""
    dtype = internal_dtype(perturbed)
    point = perturbed.to(dtype)
    to_negatives = torch.linalg.vector_norm(point[:, None] - negatives.to(dtype), dim=-1)
    to_original = torch.linalg.vector_norm(point - original.to(dtype), dim=-1)
    terms = F.softplus(to_negatives - to_original[:, None])
    return terms.sum() / max(1, terms.numel()), to_negatives, to_original


def metric_perturbation_loss_backward(
    gradient: Tensor,
    perturbed: Tensor,
    negatives: Tensor,
    original: Tensor,
    to_negatives: Tensor,
    to_original: Tensor,
    for_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With s_ij the slope: ∂n_ij = s_ij (n_ij − p_i)/d, ∂o_i = −Σ_j s_ij (o_i − p_i)/d, ∂p = −∂o − Σ_j ∂n."""
    dtype = internal_dtype(perturbed)
    point = perturbed.to(dtype)
    slope = torch.sigmoid(to_negatives - to_original[:, None]) * (gradient / max(1, to_negatives.numel()))
    weight = torch.where(to_negatives == 0, 0, slope / to_negatives)
    from_negatives = weight[..., None] * (negatives.to(dtype) - point[:, None])
    from_original = torch.where(to_original == 0, 0, -slope.sum(1) / to_original)[:, None] * (
        original.to(dtype) - point
    )
    for_perturbed = -from_negatives.sum(1) - from_original
    return (
        for_perturbed.to(perturbed.dtype),
        from_negatives.to(negatives.dtype) if for_negatives else negatives.new_empty(0),
        from_original.to(original.dtype),
    )
