"""Hard-sample mining: the farthest positive and the nearest negative of every anchor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_number
from apd_kernels._core.operands import PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels._core.pairing import Pairing, checked_matrix_pairing, checked_pairing
from apd_kernels._core.rows import BLOCK_ELEMENTS, per_difference, row_blocks
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


TRIPLETS = ("all", "easy", "semi-hard", "hard")


def triplets_from_distances(
    distances: Tensor, pairing: Pairing, *, kind: str = "all", margin: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets (anchor, positive, negative) of a kind, for losses on given triplets.

    ``triplet_loss_from_distances(d[a, p], d[a, n])`` is the loss of them, also with ``d = paired_distance(x[a], …)``.

    Args:
        distances, pairing: as in `batch_hard_from_distances`.
        kind: ``"all"``; ``"easy"``: d_n − d_p > margin; ``"semi-hard"``: 0 < d_n − d_p ≤ margin (Schroff et al., 2015);
            ``"hard"``: d_n ≤ d_p. As `TripletMarginMiner` of pytorch-metric-learning, whose ``"all"`` are the last two.
        margin: m, at least 0.

    Returns:
        int64 (T,) each, ordered by anchor, positive, negative. An operation of PyTorch that waits for the GPU; beside
        the result it takes 64 MB at a time.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> distances = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 1.1], [5.0, 1.1, 0.0]])
    >>> triplets_from_distances(distances, Pairing(torch.tensor([7, 7, 8])), kind="semi-hard")
    (tensor([1]), tensor([0]), tensor([2]))
    """
    check_choice("kind", kind, TRIPLETS)
    check_number("margin", margin)
    pairing = checked_matrix_pairing(distances, pairing)
    d = distances.detach()
    rows, columns = d.shape
    parts = []
    for block in row_blocks(rows, max(1, columns * columns)):
        positive, negative = pair_masks(pairing, block)
        anchor, place = positive.nonzero(as_tuple=True)
        for some in torch.arange(len(anchor), device=d.device).split(max(1, BLOCK_ELEMENTS // max(1, columns))):
            a, p = anchor[some] + block.start, place[some]
            gap = d[a] - d[a, p][:, None]
            wanted = {
                "all": lambda gap: torch.ones_like(gap, dtype=torch.bool),
                "easy": lambda gap: gap > margin,
                "semi-hard": lambda gap: (gap > 0) & (gap <= margin),
                "hard": lambda gap: gap <= 0,
            }[kind](gap)
            at, n = (wanted & negative[anchor[some]]).nonzero(as_tuple=True)
            parts.append((a[at], p[at], n))
    if not parts:
        none = torch.empty(0, dtype=torch.int64, device=d.device)
        return none, none, none
    a, p, n = (torch.cat(part) for part in zip(*parts, strict=True))
    return a, p, n


def ranked_pairs_from_distances(
    distances: Tensor, pairing: Pairing, *, positives: tuple[int, int] = (1, 1), negatives: tuple[int, int] = (1, 1)
) -> Pair:
    """The positives and the negatives of every anchor that are the first-hardest … last-hardest: mining in a range.

    ``(1, 1)`` both is `batch_hard`; ``negatives=(1, 5)`` the five nearest negatives, ``positives=(2, 2)`` leaves out
    the farthest positive, which may be a wrong label. As open-metric-learning's `NHardTripletsMiner`.

    Args:
        distances, pairing: as in `batch_hard_from_distances`.
        positives, negatives: first and last place, from 1.

    Returns:
        `Pair` of int64 columns, (N, last − first + 1) each, hardest first; −1 where an anchor has no more. Equal
        distances by lowest index; a NaN is hardest. An operation of PyTorch, whose masks take 64 MB at a time.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.

    >>> import torch
    >>> distances = torch.tensor([[0.0, 1.0, 5.0, 3.0]])
    >>> ranked_pairs_from_distances(distances, Pairing(torch.tensor([7]), torch.tensor([7, 7, 8, 8])), negatives=(1, 3))
    Pair(positive=tensor([[1]]), negative=tensor([[ 3,  2, -1]]))
    """
    pairing = checked_matrix_pairing(distances, pairing)
    for name, places in (("positives", positives), ("negatives", negatives)):
        whole = isinstance(places, tuple) and len(places) == 2 and all(type(place) is int for place in places)
        if not whole or not 1 <= places[0] <= places[1]:
            raise ValueError(f"{name}: expected a first and a last place, 1 or more, got {places!r}")
    d, (rows, columns) = distances.detach(), distances.shape
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in row_blocks(rows, max(1, columns)):
        for side, mask, places, sign in zip(
            sides, pair_masks(pairing, block), (positives, negatives), (-1, 1), strict=True
        ):
            first, last = places
            key = torch.where(mask, sign * d[block], torch.inf)
            order = key.argsort(dim=1, stable=True)
            # A NaN, which sorting puts last, stands first; those that are none stand behind an infinite distance.
            order = order.gather(1, (~key.isnan().gather(1, order)).int().argsort(dim=1, stable=True))
            order = order.gather(1, (~mask.gather(1, order)).int().argsort(dim=1, stable=True))[:, first - 1 : last]
            found = torch.where(mask.gather(1, order), order, -1)
            missing = last - first + 1 - found.shape[1]
            side.append(torch.nn.functional.pad(found, (0, missing), value=-1))
    nothing = [
        torch.empty((0, last - first + 1), dtype=torch.int64, device=d.device) for first, last in (positives, negatives)
    ]
    return Pair(*(torch.cat([none, *side]) for none, side in zip(nothing, sides, strict=True)))


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
