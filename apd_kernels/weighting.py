"""Soft-weighted pairs: every positive and negative of an anchor, the hard ones most."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.operands import PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels._core.pairing import Pairing, checked_matrix_pairing, checked_pairing
from apd_kernels.mining import Pair, gradients
from apd_kernels.reference import weighting as reference
from apd_kernels.reference.pairing import pair_masks


class WeightedPairs(NamedTuple):
    """What `weighted_pairs` found for every anchor."""

    distances: Pair  # float32 or float64, differentiable; 0 where there is none
    valid: Tensor  # bool: the anchor has a positive and a negative


def weighted_pairs(
    x: Tensor,
    labels: Tensor,
    y: Tensor | PreparedRows | None = None,
    y_labels: Tensor | None = None,
    *,
    metric: str = "euclidean",
    precision: str | None = None,
    own: Tensor | None = None,
    y_valid: Tensor | None = None,
    domains: Tensor | None = None,
    y_domains: Tensor | None = None,
    positives: str = "all",
    negatives: str = "all",
) -> WeightedPairs:
    """Weighted means of each anchor's distances to its positives and to its negatives, without a distance matrix.

    The weights are softmax(d) over the positives and softmax(−d) over the negatives, and have a gradient: soft-margin
    forms of `batch_hard` (Ristani & Tomasi, 2018; fast-reid's `weighted_example_mining`). They are shifted by the
    largest before the exponential and sum to 1, at any distance.

    Args:
        x, labels, y, y_labels, metric, own, y_valid, domains, y_domains, positives, negatives: as in `batch_hard`
            (label −1, too). fast-reid also counts the anchor as its own positive, at distance 0: pass ``y=x.clone()``
            with ``y_labels=labels``.
        precision: of the products that give the distances, as in `pairwise_distance`.

    Returns:
        `WeightedPairs` ``(distances, valid)`` with ``distances`` a ``(positive, negative)`` pair. The gradient of a
        Euclidean distance at 0 is 0; a NaN row makes the distances of anchors paired with it NaN. First derivatives
        only. Nothing of N×M elements exists: distances are computed again in the backward pass, and of the pair weights
        at most 64 MB at a time.

        Distances come from ‖x‖² + ‖y‖² − 2x·y, as in `pairwise_distance`: a float32 d is off by up to 1e-6 r²/d, or
        1e-3 r between duplicates, with r the larger norm (on the PyTorch path from near the rows' mean), and its
        gradient by the same share. Where only the hardest pair counts, `batch_hard` has no such error.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> weighted_pairs(x, torch.tensor([7, 7, 8, 8])).distances
    Pair(positive=tensor([1., 1., 4., 4.]), negative=tensor([5.0719, 4.0719, 4.2689, 8.2689]))
    """
    x, rows, prepared, precision, backend = checked_operands(x, y, metric, precision)
    pairing = checked_pairing(x, labels, rows, y_labels, own, domains, y_domains, y_valid, positives, negatives)
    positive, negative, of_positives, of_negatives = _weighted_pairs(
        x, rows, *prepared, *pairing, metric, precision, backend
    )
    missing = -float("inf")
    return WeightedPairs(Pair(positive, negative), (of_positives != missing) & (of_negatives != missing))


def weighted_pairs_from_distances(distances: Tensor, pairing: Pairing) -> WeightedPairs:
    """`weighted_pairs` of distances that somebody else has computed.

    Args:
        distances, pairing: as in `batch_hard_from_distances`.

    Returns:
        `WeightedPairs`, in float32 (float64 for float64). An operation of PyTorch, differentiable as often as the
        distances; it makes some matrices of their size.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> distances = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 4.0], [5.0, 4.0, 0.0]])
    >>> weighted_pairs_from_distances(distances, Pairing(torch.tensor([7, 7, 8]))).distances.negative
    tensor([5.0000, 4.0000, 4.2689])
    """
    pairing = checked_matrix_pairing(distances, pairing)
    d = distances.to(internal_dtype(distances))
    positive, negative = pair_masks(pairing, slice(0, len(d)))
    means = Pair(_softly(d, d, positive), _softly(d, -d, negative))
    return WeightedPairs(means, positive.any(1) & negative.any(1))


def _softly(d: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """Σ softmax(logits) d under the mask, 0 where it is empty."""
    if not d.shape[1]:
        return d.sum(1)
    some = mask.any(1, keepdim=True)
    weights = logits.masked_fill(~mask, -torch.inf).masked_fill(~some, 0).softmax(1)
    counts = mask & (weights != 0)  # an infinite distance has no weight among negatives, and 0 · ∞ is nothing
    return torch.where(some, weights * torch.where(counts, d, 0), 0).sum(1)


def _fake(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    distance = x.new_empty(x.shape[:-1], dtype=internal_dtype(x))
    return distance, torch.empty_like(distance), torch.empty_like(distance), torch.empty_like(distance)


def _fake_backward(x: Tensor, y: Tensor | None, needs_x: bool, needs_y: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), x.new_empty(0 if y is None or not needs_y else y.shape)


# Besides the distances: the logs of the sums over exp(d) of the positives and exp(−d) of the negatives; −inf where
# there is none.
_weighted_pairs = operator(reference.weighted_pairs, fake=_fake)
_weighted_pairs_backward = operator(reference.weighted_pairs_backward, fake=_fake_backward)
first_derivatives_only(_weighted_pairs_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, *tensors, ctx.positives, ctx.negatives, ctx.metric, ctx.precision, ctx.backend = inputs
    _, _, *sums = output
    ctx.mark_non_differentiable(*sums)
    ctx.save_for_backward(*output, x, y, *tensors)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, for_positive: Tensor, for_negative: Tensor, *_: Tensor) -> tuple[Any, ...]:
    sides = _weighted_pairs_backward(
        for_positive,
        for_negative,
        *ctx.saved_tensors,
        ctx.positives,
        ctx.negatives,
        ctx.metric,
        ctx.precision,
        *ctx.needs_input_grad[:2],
        ctx.backend,
    )
    return gradients(ctx, *sides)


differentiable(_weighted_pairs, _setup_context, _backward)
