"""Triplet loss."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_floating, check_number, check_tensor
from apd_kernels._core.operands import PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, internal_dtype, operator
from apd_kernels._core.pairing import checked_pairing
from apd_kernels._core.reduction import REDUCTIONS, reduced
from apd_kernels.mining import HardPairs, Pair, batch_hard, gradients, pair_gradient
from apd_kernels.paired import paired_distance
from apd_kernels.reference import losses as reference
from apd_kernels.weighting import WeightedPairs, weighted_pairs

MINING = ("hard", "weighted")


@overload
def triplet_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | PreparedRows | None = ...,
    y_labels: Tensor | None = ...,
    *,
    margin: float | None = ...,
    mining: str = ...,
    metric: str = ...,
    precision: str | None = ...,
    own: Tensor | None = ...,
    y_valid: Tensor | None = ...,
    domains: Tensor | None = ...,
    y_domains: Tensor | None = ...,
    positives: str = ...,
    negatives: str = ...,
    indices: tuple[Tensor, Tensor] | None = ...,
    reverse: bool = ...,
    reduction: str = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...
@overload
def triplet_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | PreparedRows | None = ...,
    y_labels: Tensor | None = ...,
    *,
    margin: float | None = ...,
    mining: str = ...,
    metric: str = ...,
    precision: str | None = ...,
    own: Tensor | None = ...,
    y_valid: Tensor | None = ...,
    domains: Tensor | None = ...,
    y_domains: Tensor | None = ...,
    positives: str = ...,
    negatives: str = ...,
    indices: tuple[Tensor, Tensor] | None = ...,
    reverse: bool = ...,
    reduction: str = ...,
    return_indices: Literal[True],
) -> tuple[Tensor, Pair]: ...
def triplet_loss(
    x: Tensor,
    labels: Tensor,
    y: Tensor | PreparedRows | None = None,
    y_labels: Tensor | None = None,
    *,
    margin: float | None = 0.3,
    mining: str = "hard",
    metric: str = "euclidean",
    precision: str | None = None,
    own: Tensor | None = None,
    y_valid: Tensor | None = None,
    domains: Tensor | None = None,
    y_domains: Tensor | None = None,
    positives: str = "all",
    negatives: str = "all",
    indices: tuple[Tensor, Tensor] | None = None,
    reverse: bool = False,
    reduction: str = "mean",
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Pair]:
    """Triplet loss on the hardest pairs (Hermans et al., 2017) or on softly weighted ones (Ristani, Tomasi, 2018).

    With d_p the distance to the farthest positive and d_n that to the nearest negative, the term of an anchor is
    max(0, d_p − d_n + margin), or ln(1 + exp(d_p − d_n)) for ``margin=None``. The loss is the mean over anchors that
    have both; 0 where none has. Another form of the term, and distances that are there already or are wanted as well:
    `triplet_loss_from_distances`.

    Args:
        x, labels, y, y_labels, metric, precision, own, y_valid, domains, y_domains, positives, negatives: as in
            `batch_hard`; so label −1 is an identity like others, unless `y_valid` leaves it out.
        margin: hinge margin, at least 0; None for the soft margin.
        mining: ``"hard"``: d_p and d_n are those of `batch_hard`, mined, measured and summed in one operation;
            ``"weighted"``: those of `weighted_pairs`, means over all positives and negatives.
        indices: (positive, negative) winners to use instead of mining, each int64 (N,) or (S, N) as returned by
            `return_indices` or by `batch_hard` (``.indices``); anchors with a −1 are left out. An index
            beyond the rows is PyTorch's error of indexing on its path and makes the loss NaN in the kernels.
        reverse: take d_n − d_p instead of d_p − d_n: the term then *removes* identity (APD, L_NK). The pairs mined are
            the same.
        reduction: ``"mean"`` over the anchors that have both, in one operation; ``"mean_all"``: their sum over N;
            ``"sum"``; ``"none"``: the term of each anchor, 0 where it lacks one.
        return_indices: also return the winners, so that several losses share one mining.

    Returns:
        The loss, a float32 scalar ((S,) for S sets; float64 for float64 inputs), with ``reduction="none"`` (N,) or
        (S, N); or ``(loss, indices)``. First derivatives only.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; winners given or asked for with
            ``mining="weighted"``, which has none.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    >>> triplet_loss(x, torch.tensor([7, 7, 8, 8]), margin=0.3)
    tensor(2.0250)
    """
    if margin is not None:
        check_number("margin", margin)
        margin = float(margin)
    check_choice("mining", mining, MINING)
    check_choice("reduction", reduction, REDUCTIONS)
    pairing: dict[str, Any] = {
        "own": own,
        "y_valid": y_valid,
        "domains": domains,
        "y_domains": y_domains,
        "positives": positives,
        "negatives": negatives,
    }
    if mining == "weighted":
        for name, value in (("indices", indices is not None), ("return_indices", return_indices)):
            if value:
                raise ValueError(f"{name}: expected mining='hard', which has winners, got mining='weighted'")
        pairs = weighted_pairs(x, labels, y, y_labels, metric=metric, precision=precision, **pairing)
        return _of_pairs(pairs, margin, reverse, reduction)
    if reduction != "mean" and indices is None:
        hard = batch_hard(x, labels, y, y_labels, metric=metric, precision=precision, **pairing)
        loss = _of_pairs(hard, margin, reverse, reduction)
        return (loss, hard.indices) if return_indices else loss
    x, rows, prepared, precision, backend = checked_operands(x, y, metric, precision)
    checked = checked_pairing(x, labels, rows, y_labels, **pairing)
    if indices is None:
        loss, _, _, *winners = _triplet_loss(x, rows, *prepared, *checked, margin, reverse, metric, precision, backend)
        pair = Pair(*winners)
    else:
        pair = _checked_indices(indices, x)
        if reduction == "mean":
            loss, _, _ = _triplet_loss_indexed(x, rows, *pair, margin, reverse, metric, backend)
        else:
            valid = (pair.positive >= 0) & (pair.negative >= 0)
            anchors = torch.where(valid[..., None], x, 0)  # a NaN of a row that does not count stays out
            others = x if rows is None else rows
            taken = (torch.where(valid[..., None], _taken(others, index), 0) for index in pair)
            distances = Pair(*(paired_distance(anchors, rows_of_side, metric=metric) for rows_of_side in taken))
            loss = _of_pairs(HardPairs(distances, pair, valid), margin, reverse, reduction)
    return (loss, pair) if return_indices else loss


def triplet_loss_from_distances(
    positive: Tensor,
    negative: Tensor,
    *,
    valid: Tensor | None = None,
    margin: float | None = 0.3,
    soft: bool = False,
    reverse: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The triplet loss of distances to positives and negatives, wherever they come from.

    So every form of the loss is a mining, what happens to its distances, and this. Of `batch_hard`, `weighted_pairs`,
    or their counterparts for a distance matrix: with the distances for the log, a floor
    (``mined.distances.positive.clamp(min=1e-6)``) or a factor. Of given triplets (a, p, n): with
    ``paired_distance(x[a], x[p])`` and ``paired_distance(x[a], x[n])``.

    Args:
        positive, negative: distances d_p and d_n of each anchor or triplet, one shape (…, N); float16, bfloat16,
            float32 or float64.
        valid: which count, bool, of their shape; all when None.
        margin: m, at least 0; None for the soft margin ln(1 + exp(d_p − d_n)).
        soft: take ln(1 + exp(d_p − d_n + m)) instead of max(0, d_p − d_n + m).
        reverse: take d_n − d_p instead of d_p − d_n.
        reduction: over the last dimension, as in `triplet_loss`.

    Returns:
        The loss, in the dtype of the distances. An operation of PyTorch: differentiable as often as its inputs.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; `soft` without a margin.

    >>> import torch
    >>> from apd_kernels import batch_hard
    >>> x = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    >>> mined = batch_hard(x, torch.tensor([7, 7, 8, 8]))
    >>> triplet_loss_from_distances(*mined.distances, valid=mined.valid, margin=0.3, reduction="none")
    tensor([0.0000, 0.8000, 7.3000, 0.0000])
    """
    check_floating("positive", positive)
    if not positive.dim():
        raise ValueError("positive: expected shape (…, N), got ()")
    if valid is None:
        valid = torch.ones_like(positive, dtype=torch.bool)
    for name, other, dtype in (("negative", negative, positive.dtype), ("valid", valid, torch.bool)):
        check_tensor(name, other)
        if other.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {other.dtype}")
        if other.shape != positive.shape or other.device != positive.device:
            raise ValueError(
                f"{name}: expected shape {tuple(positive.shape)} on {positive.device} as positive, "
                f"got {tuple(other.shape)} on {other.device}"
            )
    if margin is not None:
        check_number("margin", margin)
    elif soft:
        raise ValueError("soft: expected with a margin, got margin=None, which is the soft margin without one")
    check_choice("reduction", reduction, REDUCTIONS)
    return _of_distances(positive, negative, valid, margin, soft, reverse, reduction)


def _of_pairs(pairs: HardPairs | WeightedPairs, margin: float | None, reverse: bool, reduction: str) -> Tensor:
    return _of_distances(*pairs.distances, pairs.valid, margin, False, reverse, reduction)


def _of_distances(
    positive: Tensor,
    negative: Tensor,
    valid: Tensor,
    margin: float | None,
    soft: bool,
    reverse: bool,
    reduction: str,
) -> Tensor:
    gap = negative - positive if reverse else positive - negative
    gap = torch.where(valid, gap, 0)  # not in the result, but 0 · NaN would be in the gradient
    if margin is not None:
        gap = gap + margin
    terms = F.softplus(gap, threshold=40) if soft or margin is None else gap.relu()
    if reduction == "none" or terms.dtype not in (torch.float16, torch.bfloat16):
        return reduced(terms, valid, reduction)
    return reduced(terms.float(), valid, reduction).to(terms.dtype)  # a sum of float16 overflows at 65,504


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], of each set its own; row 0 for −1, zeros where there are no rows."""
    if not rows.shape[-2]:
        return rows.new_zeros(*index.shape, rows.shape[-1])
    return rows.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, rows.shape[-1]))


def _checked_indices(indices: tuple[Tensor, Tensor], x: Tensor) -> Pair:
    if not isinstance(indices, tuple) or len(indices) != 2:
        raise TypeError(f"indices: expected a pair of tensors (positive, negative), got {type(indices).__name__}")
    for name, index in zip(("indices.positive", "indices.negative"), indices, strict=True):
        check_tensor(name, index)
        if index.dtype != torch.int64:
            raise TypeError(f"{name}: expected an int64 tensor, got {index.dtype}")
        if index.shape != x.shape[:-1] or index.device != x.device:
            raise ValueError(
                f"{name}: expected shape {tuple(x.shape[:-1])} on {x.device}, "
                f"got {tuple(index.shape)} on {index.device}"
            )
    return Pair(*indices)


def _fake_indexed(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = internal_dtype(x)
    weights = x.new_empty(x.shape[:-1], dtype=dtype)
    return x.new_empty(x.shape[:-2], dtype=dtype), weights, torch.empty_like(weights)


def _fake_mined(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    index = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return *_fake_indexed(x), index, torch.empty_like(index)


# Besides the loss both return, for every anchor, the loss's derivative by d_p and by d_n per row difference
# (∂L/∂d · 1/d for "euclidean"): all that the backward pass needs beyond the rows and the winners.
_triplet_loss = operator(reference.triplet_loss, fake=_fake_mined)
_triplet_loss_indexed = operator(reference.triplet_loss_indexed, fake=_fake_indexed)


def _setup_mined(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, *_, ctx.metric, _, ctx.backend = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(x, y, *rest)
    ctx.inputs = len(inputs)


def _setup_indexed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, positive_index, negative_index, *_, ctx.metric, ctx.backend = inputs
    _, *weights = output
    ctx.mark_non_differentiable(*weights)
    ctx.save_for_backward(x, y, *weights, positive_index, negative_index)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, y, *weights_and_winners = ctx.saved_tensors
    sides = pair_gradient(x, y, *weights_and_winners, gradient, ctx.metric, *ctx.needs_input_grad[:2], ctx.backend)
    return gradients(ctx, *sides)


differentiable(_triplet_loss, _setup_mined, _backward)
differentiable(_triplet_loss_indexed, _setup_indexed, _backward)
