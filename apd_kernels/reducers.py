"""Parts that reducers of pairs share, and the terms of the contrastive losses one by one; see docs/pair-reduce.md.

Triton, where it is installed, is loaded with this module, which `apd_kernels` therefore loads when it is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.operands import PreparedRows
from apd_kernels.pairs import Pairing, PairReducer, jit, pair_reduce, tl

__all__ = ["MISSING", "exponentials", "joined", "log_total"]

MISSING = -1e29
"""What is smaller comes from `log_total` of no pair."""


@jit
def exponentials(logits, mask):
    """The largest logit under the mask, and the total of the exponentials less it; (−1e30, 0) without one."""
    largest = tl.maximum(tl.max(tl.where(mask, logits, -1e30), 1), -1e30)
    return largest, tl.sum(tl.where(mask, tl.exp(tl.where(mask, logits - largest[:, None], 0.0)), 0.0), 1)


@jit
def joined(largest, total, other, other_total):
    """Two results of `exponentials` as one of both."""
    larger = tl.maximum(largest, other)
    return larger, total * tl.exp(largest - larger) + other_total * tl.exp(other - larger)


@jit
def log_total(largest, total):
    """The log of the sum of exponentials, −1e30 where there is none."""
    return tl.where(total == 0, -1e30, largest + tl.log(tl.where(total == 0, 1.0, total)))


@jit
def circle_logits(d, positive, gamma, margin):
    """γ (u + m)₊ (u − m) of u = 1 − s_p or s_n, and the factor γ (u + m)₊, which is constant to the gradient."""
    u = tl.where(positive, d, 1 - d)
    factor = gamma * tl.maximum(u + margin, 0.0)
    return factor * (u - margin), factor


@jit
def both_exponentials(logits, positive, negative):
    largest_p, total_p = exponentials(logits, positive)
    largest_n, total_n = exponentials(logits, negative)
    return largest_p, total_p, largest_n, total_n


@jit
def both_softmaxes(logits, positive, negative, results, gradients):
    """∂L/∂logit of a positive, and of a negative less its sign, whose similarity falls with the distance."""
    of_positives = gradients[0] * tl.exp(tl.where(positive, logits - results[0], 0.0))
    of_negatives = -gradients[1] * tl.exp(tl.where(negative, logits - results[1], 0.0))
    return tl.where(positive, of_positives, of_negatives)


def circle_tile(d, positive, negative, values):
    logits, _ = circle_logits(d, positive, values[0], values[1])
    return both_exponentials(logits, positive, negative)


def circle_combine(state, later):
    largest_p, total_p = joined(state[0], state[1], later[0], later[1])
    largest_n, total_n = joined(state[2], state[3], later[2], later[3])
    return largest_p, total_p, largest_n, total_n


def circle_finish(state, values):
    return log_total(state[0], state[1]), log_total(state[2], state[3])


def circle_weights(d, positive, negative, values, results, gradients):
    logits, factor = circle_logits(d, positive, values[0], values[1])
    return factor * both_softmaxes(logits, positive, negative, results, gradients)


CIRCLE = PairReducer(
    start=(-1e30, 0.0, -1e30, 0.0),
    tile=circle_tile, combine=circle_combine, finish=circle_finish, weights=circle_weights, name="circle",
)  # fmt: skip


@jit
def cosface_logits(d, positive, gamma, margin):
    """−γ s_p and γ (s_n + m)."""
    return gamma * tl.where(positive, d - 1, 1 - d + margin)


def cosface_tile(d, positive, negative, values):
    return both_exponentials(cosface_logits(d, positive, values[0], values[1]), positive, negative)


def cosface_weights(d, positive, negative, values, results, gradients):
    logits = cosface_logits(d, positive, values[0], values[1])
    return values[0] * both_softmaxes(logits, positive, negative, results, gradients)


COSFACE = PairReducer(
    start=(-1e30, 0.0, -1e30, 0.0),
    tile=cosface_tile, combine=circle_combine, finish=circle_finish, weights=cosface_weights, name="cosface",
)  # fmt: skip


def contrastive_tile(d, positive, negative, values):
    logits = (values[1] - d) * values[0]
    largest, total = exponentials(logits, positive | negative)
    of_positives = tl.sum(tl.where(positive, logits, 0.0), 1)
    return largest, total, of_positives, tl.sum(tl.where(positive, 1.0, 0.0), 1)


def contrastive_combine(state, later):
    largest, total = joined(state[0], state[1], later[0], later[1])
    return largest, total, state[2] + later[2], state[3] + later[3]


def contrastive_finish(state, values):
    return log_total(state[0], state[1]), state[2], state[3]


def contrastive_weights(d, positive, negative, values, results, gradients):
    logits = (values[1] - d) * values[0]
    of_all = gradients[0] * tl.exp(tl.where(positive | negative, logits - results[0], 0.0))
    return -values[0] * (of_all + tl.where(positive, gradients[1], 0.0))


CONTRASTIVE = PairReducer(
    start=(-1e30, 0.0, 0.0, 0.0),
    tile=contrastive_tile, combine=contrastive_combine, finish=contrastive_finish, weights=contrastive_weights,
    name="contrastive",
)  # fmt: skip


def margin_terms(
    form: str,
    x: Tensor,
    y: Tensor | PreparedRows | None,
    pairing: Pairing,
    gamma: float,
    margin: float,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    """The term of each anchor in `circle_loss` or `cosface_loss`, and which count."""
    of_positives, of_negatives = pair_reduce(
        x,
        y,
        {"circle": CIRCLE, "cosface": COSFACE}[form],
        pairing,
        parameters=(gamma, margin),
        metric="cosine",
        precision=precision,
    )
    # Not smaller, rather than larger: a NaN counts.
    valid = ~((of_positives < MISSING) | (of_negatives < MISSING))
    return F.softplus(torch.where(valid, of_positives + of_negatives, 0), threshold=40), valid


def contrastive_terms(
    x: Tensor,
    y: Tensor | PreparedRows | None,
    pairing: Pairing,
    temperature: float,
    metric: str,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    """The term of each anchor in `supervised_contrastive_loss`, and which count."""
    base = 1.0 if metric == "cosine" else 0.0  # s = base − d
    of_all, of_positives, count = pair_reduce(
        x, y, CONTRASTIVE, pairing, parameters=(1 / temperature, base), metric=metric, precision=precision
    )
    valid = count.detach() > 0
    return torch.where(valid, of_all - of_positives / count.detach().clamp(min=1), 0), valid
