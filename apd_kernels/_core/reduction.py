"""From one term for each anchor to a loss."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "mean_all", "sum", "none")


def reduced(terms: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Terms (…, N) of anchors, of which those count that are valid: their mean, their sum over N, their sum, or the
    terms themselves, 0 where they do not count."""
    terms = terms.where(valid, 0)
    if reduction == "none":
        return terms
    total = terms.sum(-1)
    if reduction == "sum":
        return total
    return total / (max(1, terms.shape[-1]) if reduction == "mean_all" else valid.sum(-1).clamp(min=1))
