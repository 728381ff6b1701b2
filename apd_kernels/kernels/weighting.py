"""Softmax-weighted distances.

d_p,i = Σ_p softmax_p(d_ip) d_ip,   d_n,i = Σ_n softmax_n(−d_in) d_in
∂d_p/∂d_ij = softmax_p (1 + d_ij − d_p),   ∂d_n/∂d_ij = softmax_n (1 − d_ij + d_n)
∂x_i = Σ_j w_ij (x_i − y_j)   with w the slope/d (euclidean), 2·slope (sqeuclidean),
∂x_i = −Σ_j w_ij y_j          with w the slope (dot, and cosine of unit rows)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import dot_precision, sets_of_rows
from apd_kernels.kernels._pairs import (
    Reduction,
    add_weighted_pairs,
    exponentials,
    log_sum_exp,
    reduced,
    shared_scale,
)
from apd_kernels.kernels.distance import METRIC_NUMBER

_NOTHING = (-float("inf"), 0.0, 0.0)  # of a side: the largest logit, the total of the exponentials, and of e d


@triton.jit
def _sums(d, positive, negative, values):
    farthest, e, of_positives = exponentials(d, positive)
    d_p = tl.sum(tl.where(positive, e * d, 0.0), 1)
    nearest, e, of_negatives = exponentials(-d, negative)
    return farthest, of_positives, d_p, nearest, of_negatives, tl.sum(tl.where(negative, e * d, 0.0), 1)


@triton.jit
def _added(state, later):
    farthest, f, g = shared_scale(state[0], later[0])
    nearest, h, k = shared_scale(state[3], later[3])
    return (
        farthest, state[1] * f + later[1] * g, state[2] * f + later[2] * g,
        nearest, state[4] * h + later[4] * k, state[5] * h + later[5] * k,
    )  # fmt: skip


@triton.jit
def _distances(state, values):
    """d_p and d_n, 0 for a missing side, and the log-sum-exps, −inf for it."""
    farthest, of_positives, d_p, nearest, of_negatives, d_n = state
    d_p = tl.where(of_positives == 0, 0.0, d_p / tl.where(of_positives == 0, 1.0, of_positives))
    d_n = tl.where(of_negatives == 0, 0.0, d_n / tl.where(of_negatives == 0, 1.0, of_negatives))
    return d_p, d_n, log_sum_exp(farthest, of_positives), log_sum_exp(nearest, of_negatives)


@triton.jit
def _slopes(d, positive, negative, values, results, gradients):
    """A NaN without a weight stays out."""
    d_p, d_n, of_positives, of_negatives = results
    g = tl.where(positive, gradients[0], gradients[1])
    paired = (positive | negative) & (g != 0)
    softmax = tl.exp(tl.where(paired, tl.where(positive, d - of_positives, -d - of_negatives), 0.0))
    above = tl.where(positive, d - d_p, d_n - d)
    return tl.where(paired, g * softmax * (1 + above), 0.0)


_WEIGH = Reduction("_weigh", start=_NOTHING * 2, tile=_sums, combine=_added, finish=_distances, weights=_slopes)


def weighted_pairs(
    x: Tensor, y: Tensor | None, prepared: Operands, pairing: Pairing, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_weigh`, then `_weigh_merge`."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    if b.shape[1] == 0:
        zeros = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
        missing = torch.full_like(zeros, -float("inf"))
        return zeros, zeros.clone(), missing, missing.clone()
    found = reduced(_WEIGH, a, b, pairing, METRIC_NUMBER[metric], dot_precision(a, precision), 4)
    positive, negative, of_positives, of_negatives = (result.view(x.shape[:-1]) for result in found)
    return positive, negative, of_positives, of_negatives


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
    """Blocks of `_weigh_weights`, each with its sums of rows."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    for_x = torch.zeros(x.shape if needs_x else 0, dtype=torch.float32, device=x.device)
    for_y = torch.zeros(0 if y is None or not needs_y else y.shape, dtype=torch.float32, device=x.device)
    given = (), (), *(
        tuple(value.contiguous() for value in values)
        for values in ((positive, negative, of_positives, of_negatives), (for_positive, for_negative))
    )  # fmt: skip
    add_weighted_pairs(for_x, for_x if y is None else for_y, _WEIGH, a, b, pairing, METRIC_NUMBER[metric],
                       dot_precision(a, precision), precision, given)  # fmt: skip
    return for_x.to(x.dtype), for_y.to(x.dtype if y is None else y.dtype)
