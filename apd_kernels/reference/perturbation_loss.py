"""Metric-perturbation loss from row differences, as many samples at a time as fit a bounded temporary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import per_difference, row_blocks


def metric_perturbation_loss(
    perturbed: Tensor, negatives: Tensor, original: Tensor, indices: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean_ij softplus(d(p_i, n_ij) − d(p_i, o_i)), 1 / number of pairs, the two distances, and ∂sum/∂p."""
    _check_indices(indices, len(negatives))
    dtype = internal_dtype(perturbed)
    count, dimension = perturbed.shape
    each = (negatives if indices is None else indices).shape[1]
    to_negatives = torch.empty((count, each), dtype=dtype, device=perturbed.device)
    to_original = torch.empty(count, dtype=dtype, device=perturbed.device)
    total = perturbed.new_empty(perturbed.shape if with_gradient else 0)
    for block in row_blocks(count, each * dimension):
        toward, away = _differences(perturbed, negatives, original, indices, block)
        to_negatives[block] = _distance(toward, indices, len(negatives), block)
        to_original[block] = torch.linalg.vector_norm(away, dim=-1)
        if with_gradient:
            slope = _slope(to_negatives[block], to_original[block], indices, block)
            total[block] = _for_perturbed(slope, to_negatives[block], to_original[block], toward, away)
    terms = F.softplus(to_negatives - to_original[:, None])
    paired = torch.ones_like(terms, dtype=torch.bool) if indices is None else indices != -1
    share = 1 / paired.sum().clamp(min=1).to(dtype)
    return torch.where(paired, terms, 0).sum() * share, share, to_negatives, to_original, total


def metric_perturbation_loss_backward(
    gradient: Tensor,
    share: Tensor,
    perturbed: Tensor,
    negatives: Tensor,
    original: Tensor,
    indices: Tensor | None,
    to_negatives: Tensor,
    to_original: Tensor,
    for_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With s_ij the slope: ∂n_ij = s_ij (n_ij − p_i)/d, ∂o_i = −Σ_j s_ij (o_i − p_i)/d, ∂p = −∂o − Σ_j ∂n."""
    to_perturbed = perturbed.new_empty(perturbed.shape)
    to_each = negatives.new_empty(negatives.shape if for_negatives else 0)
    to_source = original.new_empty(original.shape)
    for block in row_blocks(len(perturbed), to_negatives.shape[1] * perturbed.shape[1]):
        toward, away = _differences(perturbed, negatives, original, indices, block)
        d_n, d_o = to_negatives[block], to_original[block]
        slope = _slope(d_n, d_o, indices, block) * (gradient * share)
        to_perturbed[block] = _for_perturbed(slope, d_n, d_o, toward, away)
        to_source[block] = -per_difference(slope.sum(1), d_o)[:, None] * away
        if for_negatives:
            to_each[block] = per_difference(slope, d_n)[..., None] * toward
    return to_perturbed, to_each, to_source


def metric_perturbation_loss_scaled(gradient: Tensor, share: Tensor, total: Tensor) -> Tensor:
    """g · share · total."""
    return (total.to(share.dtype) * (gradient * share)).to(total.dtype).contiguous()


def _check_indices(indices: Tensor | None, size: int) -> None:
    """Only on the CPU: elsewhere looking at them would wait for the device."""
    if indices is None or indices.device.type != "cpu" or not indices.numel():
        return
    least, most = indices.aminmax()
    if least < -1 or most >= size:
        wrong = int(least) if least < -1 else int(most)
        raise ValueError(f"indices: expected −1, or a row of {size} negatives, got {wrong}")


def _differences(
    perturbed: Tensor, negatives: Tensor, original: Tensor, indices: Tensor | None, block: slice
) -> tuple[Tensor, Tensor]:
    """n_ij − p_i and o_i − p_i."""
    dtype = internal_dtype(perturbed)
    point = perturbed[block].to(dtype)
    if indices is None:
        rows = negatives[block]
    elif len(negatives):
        rows = negatives[torch.where(_inside(indices[block], len(negatives)), indices[block], 0)]
    else:
        rows = negatives.new_zeros((*indices[block].shape, negatives.shape[1]))
    return rows.to(dtype) - point[:, None], original[block].to(dtype) - point


def _inside(indices: Tensor, size: int) -> Tensor:
    return (indices >= 0) & (indices < size)


def _distance(toward: Tensor, indices: Tensor | None, size: int, block: slice) -> Tensor:
    distance = torch.linalg.vector_norm(toward, dim=-1)
    if indices is None:
        return distance
    distance = torch.where(_inside(indices[block], size), distance, float("nan"))
    return torch.where(indices[block] == -1, 0, distance)


def _slope(to_negatives: Tensor, to_original: Tensor, indices: Tensor | None, block: slice) -> Tensor:
    slope = torch.sigmoid(to_negatives - to_original[:, None])
    return slope if indices is None else torch.where(indices[block] == -1, 0, slope)


def _for_perturbed(slope: Tensor, to_negatives: Tensor, to_original: Tensor, toward: Tensor, away: Tensor) -> Tensor:
    pulled = torch.bmm(per_difference(slope, to_negatives)[:, None], toward)[:, 0]
    return per_difference(slope.sum(1), to_original)[:, None] * away - pulled
