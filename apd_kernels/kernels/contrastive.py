"""Circle loss and supervised contrastive loss, from the similarities s_ij = x_i·y_j of tiles.

    circle:       u = 1 − s_p or s_n,   l = γ (u + m)₊ (u − m),   term = softplus(LSE_p(l) + LSE_n(l))
                  w_ij = ∂term/∂s_ij = ∓ σ(LSE_p + LSE_n) exp(l_ij − LSE) γ (u + m)₊       (− for positives)
    contrastive:  l = s/τ,   term = LSE(l) − mean_p l_ip
                  w_ij = (exp(l_ij − LSE) − [j is a positive] / number of positives) / τ
    ∂x_i = Σ_j w_ij y_j,   ∂y_j = Σ_i w_ij x_i

Both losses are the mean of the terms, summed by one program per set in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import dot_precision, launch, sets_of_rows
from apd_kernels.kernels._pairs import (
    Reduction,
    add_weighted_pairs,
    exponentials,
    log_sum_exp,
    reduced,
    shared_scale,
)
from apd_kernels.kernels.distance import METRIC_NUMBER
from apd_kernels.kernels.losses import sigmoid, softplus


@triton.jit
def circle_logits(s, positive, gamma, margin):
    """Logits, and their derivative by u where the weight (u + m)₊ is a constant."""
    u = tl.where(positive, 1 - s, s)
    by_u = gamma * tl.where(u + margin < 0, 0.0, u + margin)
    return by_u * (u - margin), by_u


@triton.jit
def _circle_sums(d, positive, negative, values):
    logits, _ = circle_logits(-d, positive, values[0], values[1])
    largest, _, total = exponentials(logits, positive)
    third, _, fourth = exponentials(logits, negative)
    return largest, total, third, fourth


@triton.jit
def _circle_added(state, later):
    largest, f, g = shared_scale(state[0], later[0])
    third, h, k = shared_scale(state[2], later[2])
    return largest, state[1] * f + later[1] * g, third, state[3] * h + later[3] * k


@triton.jit
def _circle_terms(state, values):
    """The term, 0 for an anchor without its pairs, LSE_p, −inf for such a one, and LSE_n."""
    valid = (state[1] != 0) & (state[3] != 0)
    of_positives, of_negatives = log_sum_exp(state[0], state[1]), log_sum_exp(state[2], state[3])
    term = softplus(tl.where(valid, of_positives + of_negatives, 0.0))
    return (
        tl.where(valid, term, 0.0), tl.where(valid, of_positives, -float("inf")), tl.where(valid, of_negatives, 1.0)
    )  # fmt: skip


@triton.jit
def _circle_slopes(d, positive, negative, values, results, gradients):
    _, log_sum, of_negatives = results
    paired = (positive | negative) & (log_sum != -float("inf"))
    logits, by_u = circle_logits(-d, positive, values[0], values[1])
    outer = sigmoid(tl.where(log_sum == -float("inf"), 0.0, log_sum + of_negatives))
    of_side = tl.where(positive, log_sum, of_negatives)
    w = outer * by_u * tl.exp(tl.where(paired, logits - of_side, 0.0))
    return tl.where(paired, tl.where(positive, w, -w), 0.0)


@triton.jit
def _contrastive_sums(d, positive, negative, values):
    """Largest and total of all, the positives' logits and their number."""
    logits = -d * values[0]
    largest, _, total = exponentials(logits, positive | negative)
    return largest, total, tl.sum(tl.where(positive, logits, 0.0), 1), tl.sum(positive.to(tl.float32), 1)


@triton.jit
def _contrastive_added(state, later):
    largest, f, g = shared_scale(state[0], later[0])
    return largest, state[1] * f + later[1] * g, state[2] + later[2], state[3] + later[3]


@triton.jit
def _contrastive_terms(state, values):
    """The term, 0 for an anchor without a positive, LSE, −inf for such a one, and the number of positives."""
    largest, total, of_positives, count = state
    valid = count > 0
    log_sum = log_sum_exp(largest, total)
    term = log_sum - of_positives / tl.where(valid, count, 1.0)
    return tl.where(valid, term, 0.0), tl.where(valid, log_sum, -float("inf")), tl.where(valid, count, 1.0)


@triton.jit
def _contrastive_slopes(d, positive, negative, values, results, gradients):
    _, log_sum, count = results
    paired = (positive | negative) & (log_sum != -float("inf"))
    softmax = tl.exp(tl.where(paired, -d * values[0] - log_sum, 0.0))
    return tl.where(paired, values[0] * (tl.where(positive, 1.0 / tl.maximum(count, 1.0), 0.0) - softmax), 0.0)


_nothing = -float("inf")
_REDUCTIONS = {
    "circle": Reduction(
        "_contrast", start=(_nothing, 0.0, _nothing, 0.0),
        tile=_circle_sums, combine=_circle_added, finish=_circle_terms, weights=_circle_slopes,
    ),
    "contrastive": Reduction(
        "_contrast", start=(_nothing, 0.0, 0.0, 0.0),
        tile=_contrastive_sums, combine=_contrastive_added, finish=_contrastive_terms, weights=_contrastive_slopes,
    ),
}  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _contrast_mean(terms, first, loss, share, N, BLOCK: tl.constexpr):
    """One program a set: the mean of its terms, and 1 / their number."""
    s = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(terms + s * N + i, mask=i < N, other=0.0)
        count += (tl.load(first + s * N + i, mask=i < N, other=-float("inf")) != -float("inf")).to(tl.int32)
    scale = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(loss + s, tl.sum(total, 0) * scale)
    tl.store(share + s, scale)


@triton.jit(do_not_specialize=["size"])
def _contrast_scaled(gradient, share, total, out, size, BLOCK: tl.constexpr):
    """g · share · total of one set."""
    s = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(gradient + s) * tl.load(share + s)
    tl.store(out + s * size + i, tl.load(total + s * size + i, mask=i < size) * factor, mask=i < size)


def contrastive_loss(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    form: str,
    scale: float,
    margin: float,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_contrast`, `_contrast_merge`, `_contrast_mean`; for gradients, `_contrast_weights` and sums by block."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, _ = a.shape
    for_x = torch.zeros(x.shape if needs_x else 0, dtype=torch.float32, device=x.device)
    for_y = torch.zeros(0 if y is None or not needs_y else y.shape, dtype=torch.float32, device=x.device)
    if b.shape[1] == 0:
        loss = torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
        return loss, torch.ones_like(loss), for_x, for_y
    loss, share = (torch.empty(x.shape[:-2], dtype=torch.float32, device=x.device) for _ in range(2))
    choices = a, b, pairing, METRIC_NUMBER["dot"], dot_precision(a, precision)
    results = reduced(_REDUCTIONS[form], *choices, 3, (), (scale, margin))
    launch(_contrast_mean, (sets,), *results[:2], loss, share, n, BLOCK=1024, num_warps=4)
    if needs_x or needs_y:
        given = (), (scale, margin), results, ()
        add_weighted_pairs(for_x, for_x if y is None else for_y, _REDUCTIONS[form], *choices, precision, given)
    return loss, share, for_x, for_y


def contrastive_loss_scaled(gradient: Tensor, share: Tensor, for_x: Tensor, for_y: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `_contrast_scaled` for x and for y."""
    sets = share.numel()
    scaled = []
    for total in (for_x, for_y):
        out = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        size = total.numel() // max(1, sets)
        launch(
            _contrast_scaled, (triton.cdiv(size, 1024), sets),
            gradient.contiguous(), share, total.contiguous(), out, size, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        scaled.append(out)
    return scaled[0], scaled[1]
