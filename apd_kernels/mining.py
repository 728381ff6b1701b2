"""Hard-sample mining: the farthest positive and the nearest negative of every anchor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.operands import PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels._core.pairing import Pairing, checked_matrix_pairing, checked_pairing
from apd_kernels._core.rows import per_difference, row_blocks
from apd_kernels.reference import mining as reference
from apd_kernels.reference.pairing import pair_masks


class Pair(NamedTuple):
    """One tensor for the positives of the anchors and one for their negatives, each (N,) or (S, N)."""

    positive: Tensor
    negative: Tensor


class HardPairs(NamedTuple):
    """What `batch_hard` found for every anchor."""

    distances: Pair  # float32 or float64, differentiable; 0 where there is none
    indices: Pair  # int64 rows of y (of x without y); -1 where there is none
    valid: Tensor  # bool: the anchor has a positive and a negative


def batch_hard(
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
) -> HardPairs:
    """Each anchor's farthest row of the same identity and nearest row of another one, without a distance matrix.

    Winners are chosen from products; their distances are then recomputed from the difference of the two rows, so they
    carry no cancellation error, and only the winners receive a gradient.

    Args:
        x: anchors, shape (N, D) or (S, N, D) for S feature sets with the same labels.
        labels: identity of each anchor, shape (N,), any integer dtype. −1 is an identity like others: see `y_valid`.
        y: rows to choose from, shape (M, D) or (S, M, D), or `prepare_rows` of them; the anchors themselves when None,
            each anchor excluded from its own choice.
        y_labels: identity of each row of `y`, shape (M,).
        metric: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``, as in `pairwise_distance`.
        precision: of the products that choose the winners, as in `pairwise_distance`.
        own: the row of `y` that is the anchor itself and not to be chosen by it, shape (N,), any integer dtype; −1 for
            none. For a batch gathered from all ranks: ``start + torch.arange(N)``.
        y_valid: rows of `y` that may be chosen at all, bool (M,); without `y` of `x`, (N,): ``labels != -1`` leaves out
            what clustering calls outliers, as anchors too, which have no positive left. (`rank_metrics` does so itself,
            see its `junk`.)
        domains, y_domains: domain (data set, camera) of each anchor and each row of `y`, (N,) and (M,), any integer
            dtype.
        positives, negatives: ``"all"``, or only those ``"within"`` the anchor's domain or ``"across"``, from others.

    Returns:
        `HardPairs` ``(distances, indices, valid)``; the first two are ``(positive, negative)`` pairs. Equal distances
        are won by the lowest index. A row with a NaN wins on either side, and its distance is NaN. First derivatives
        only.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> mined = batch_hard(x, torch.tensor([7, 7, 8, 8]))
    >>> mined.distances.positive, mined.distances.negative
    (tensor([1., 1., 4., 4.]), tensor([5., 4., 4., 8.]))
    >>> mined.indices.negative
    tensor([2, 2, 1, 1])
    """
    x, rows, prepared, precision, backend = checked_operands(x, y, metric, precision)
    pairing = checked_pairing(x, labels, rows, y_labels, own, domains, y_domains, y_valid, positives, negatives)
    positive, negative, positive_index, negative_index = _batch_hard(
        x, rows, *prepared, *pairing, metric, precision, backend
    )
    return HardPairs(
        distances=Pair(positive, negative),
        indices=Pair(positive_index, negative_index),
        valid=(positive_index >= 0) & (negative_index >= 0),
    )


def batch_hard_from_distances(distances: Tensor, pairing: Pairing) -> HardPairs:
    """`batch_hard` of distances that somebody else has computed.

    Args:
        distances: of N anchors to M rows, smaller is nearer, shape (N, M); float16, bfloat16, float32 or float64.
        pairing: a `Pairing`: ``Pairing(labels)`` for a batch with itself, where no anchor is its own positive;
            ``Pairing(labels, y_labels)`` for others, or where it is.

    Returns:
        `HardPairs`, the distances in the dtype given. Equal distances are won by the lowest index, a NaN wins on either
        side. Differentiable as indexing is. An operation of PyTorch, whose masks take 64 MB at a time.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> distances = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 4.0], [5.0, 4.0, 0.0]])
    >>> mined = batch_hard_from_distances(distances, Pairing(torch.tensor([7, 7, 8])))
    >>> mined.distances.positive, mined.indices.negative, mined.valid
    (tensor([1., 1., 0.]), tensor([2, 2, 1]), tensor([ True,  True, False]))
    """
    pairing = checked_matrix_pairing(distances, pairing)
    values, (rows, columns) = distances.detach(), distances.shape
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in row_blocks(rows, columns) if columns else ():
        for side, mask, beyond in zip(sides, pair_masks(pairing, block), (-torch.inf, torch.inf), strict=True):
            d = torch.where(mask, values[block], beyond)
            index = d.argmin(1) if beyond > 0 else d.argmax(1)
            # The row that is infinitely far has to be told from none.
            index = torch.where(mask.gather(1, index[:, None])[:, 0], index, _first(mask))
            side.append(index)
    none = torch.full((rows,), -1, device=distances.device)
    indices = Pair(*(torch.cat(side) if side else none for side in sides))
    taken = (_chosen(distances, index) for index in indices)
    return HardPairs(Pair(*taken), indices, (indices.positive >= 0) & (indices.negative >= 0))


def _first(mask: Tensor) -> Tensor:
    """The first column under the mask, −1 where there is none."""
    first = mask.int().argmax(1)
    return torch.where(mask.gather(1, first[:, None])[:, 0], first, -1)


def _chosen(distances: Tensor, index: Tensor) -> Tensor:
    if not distances.shape[1]:
        return distances.sum(1)  # zeros, with a gradient as the others
    return torch.where(index >= 0, distances.gather(1, index.clamp(min=0)[:, None])[:, 0], 0)


def _fake(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    distance = x.new_empty(x.shape[:-1], dtype=internal_dtype(x))
    index = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return distance, torch.empty_like(distance), index, torch.empty_like(index)


def _fake_gradient(x: Tensor, y: Tensor | None, for_x: bool, for_y: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else 0), x.new_empty(0 if y is None or not for_y else y.shape)


_batch_hard = operator(reference.batch_hard, fake=_fake)
# The weights are those of row differences, times `scale` of the set, (S,) or 0-d.
pair_gradient = operator(reference.pair_gradient, fake=_fake_gradient)
first_derivatives_only(pair_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, *_, ctx.metric, _, ctx.backend = inputs
    positive, negative, positive_index, negative_index = output
    ctx.mark_non_differentiable(positive_index, negative_index)
    ctx.save_for_backward(x, y, positive, negative, positive_index, negative_index)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, for_positive: Tensor, for_negative: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, y, positive, negative, positive_index, negative_index = ctx.saved_tensors
    for_x, for_y = pair_gradient(
        x,
        y,
        per_difference(for_positive, positive, ctx.metric),
        per_difference(for_negative, negative, ctx.metric),
        positive_index,
        negative_index,
        None,
        ctx.metric,
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1],
        ctx.backend,
    )
    return gradients(ctx, for_x, for_y)


def gradients(ctx: Any, for_x: Tensor, for_y: Tensor) -> tuple[Any, ...]:
    """What a backward function returns for the operator's arguments (x, y, …)."""
    sides = for_x if ctx.needs_input_grad[0] else None, for_y if ctx.needs_input_grad[1] else None
    return *sides, *(None,) * (ctx.inputs - 2)


differentiable(_batch_hard, _setup_context, _backward)
