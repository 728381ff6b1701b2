"""Losses of one's own over all pairs of rows, without a distance matrix: see docs/pair-reduce.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apd_kernels._core.checks import check_tensor
from apd_kernels._core.operands import PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels._core.pairing import Pairing, checked_pairing
from apd_kernels._core.reducer import REDUCERS, PairReducer, device_function, language
from apd_kernels.mining import gradients
from apd_kernels.reference import pairs as reference

__all__ = ["PairReducer", "Pairing", "jit", "pair_reduce", "tl"]

if TYPE_CHECKING:
    jit: Any
    tl: Any


def __getattr__(name: str) -> Any:
    """`tl` and `jit` of Triton, which is imported no sooner; without it those of PyTorch."""
    if name == "tl":
        return language()
    if name == "jit":
        return device_function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pair_reduce(
    x: Tensor,
    y: Tensor | PreparedRows | None,
    reducer: PairReducer,
    pairing: Pairing,
    *,
    values: Sequence[Tensor] = (),
    parameters: Sequence[float] = (),
    metric: str = "euclidean",
    precision: str | None = None,
) -> tuple[Tensor, ...]:
    """What a `PairReducer` makes of the distances of each anchor to its positives and negatives.

    Args:
        x: anchors, shape (N, D) or (S, N, D) for S feature sets with the same labels.
        y: the rows that they are paired with, shape (M, D) or (S, M, D), or `prepare_rows` of them; the anchors
            themselves when None, no anchor with itself.
        reducer: the reduction.
        pairing: which pairs are positives and which are negatives, as in `batch_hard`:
            ``Pairing(labels, y_labels, own, domains, y_domains, y_valid, positives, negatives)``.
        values: of each anchor, for the reducer's functions: tensors of shape (N,) or (S, N). No gradient flows to them.
        parameters: numbers that follow the values. Another number does not compile another kernel.
        metric, precision: of the distances, as in `pairwise_distance`.

    Returns:
        The results, (N,) or (S, N) each, in float32 (float64 for float64). Where the reducer has `weights` they are
        differentiable by x and y, once. Nothing of N×M elements exists: distances are computed again in the backward
        pass, and of the pair weights at most 64 MB at a time. Sums have one order, the same in every run. Distances
        come from products, with the error that `weighted_pairs` names.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; values that want a gradient.

    >>> import torch
    >>> from apd_kernels.pairs import PairReducer, Pairing, pair_reduce, tl
    >>> def tile(d, positive, negative, values):
    ...     return (tl.sum(tl.where(negative & (d < values[0]), 1.0, 0.0), 1),)
    >>> def combine(state, later):
    ...     return (state[0] + later[0],)
    >>> near_negatives = PairReducer(start=(0.0,), tile=tile, combine=combine)
    >>> x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    >>> pair_reduce(x, None, near_negatives, Pairing(torch.tensor([7, 7, 8, 8])), parameters=(4.5,))
    (tensor([0., 1., 1., 0.]),)
    """
    if not isinstance(reducer, PairReducer):
        raise TypeError(f"reducer: expected a PairReducer, got {type(reducer).__name__}")
    if not isinstance(pairing, Pairing):
        raise TypeError(f"pairing: expected a Pairing, got {type(pairing).__name__}")
    x, rows, prepared, precision, backend = checked_operands(x, y, metric, precision)
    labels, y_labels, own, domains, y_domains, y_valid, positives, negatives = pairing
    pairing = checked_pairing(x, labels, rows, y_labels, own, domains, y_domains, y_valid, positives, negatives)
    stacked = _pair_reduce(
        x, rows, *prepared, *pairing, _stacked(values, x), [float(number) for number in parameters], reducer.key,
        metric, precision, backend,
    )  # fmt: skip
    return tuple(stacked.unbind(0))


def _stacked(values: Sequence[Tensor], x: Tensor) -> Tensor:
    """(V, …, N) in the internal dtype."""
    for k, value in enumerate(values):
        name = f"values[{k}]"
        check_tensor(name, value)
        if value.shape not in (x.shape[:-1], x.shape[-2:-1]):
            raise ValueError(f"{name}: expected shape {tuple(x.shape[:-1])}, got {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {value.device}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected values without a gradient, which would be lost; detach() them")
    if not values:
        return x.new_empty((0, *x.shape[:-1]), dtype=internal_dtype(x))
    return torch.stack([value.to(internal_dtype(x)).expand(x.shape[:-1]) for value in values])


def _fake(x: Tensor, values: Tensor, parameters: list[float], reducer: str, **_: Any) -> Tensor:
    results = REDUCERS[reducer].results(values.shape[0], len(parameters))
    return x.new_empty((results, *x.shape[:-1]), dtype=internal_dtype(x))


def _fake_backward(x: Tensor, y: Tensor | None, needs_x: bool, needs_y: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), x.new_empty(0 if y is None or not needs_y else y.shape)


_pair_reduce = operator(reference.pair_reduce, fake=_fake)
_pair_reduce_backward = operator(reference.pair_reduce_backward, fake=_fake_backward)
first_derivatives_only(_pair_reduce_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, positives, negatives, values, parameters, reducer, metric, precision, backend = inputs
    if "weights" not in REDUCERS[reducer].functions:
        ctx.mark_non_differentiable(output)
    ctx.rules = positives, negatives
    ctx.choices = parameters, reducer, metric, precision
    ctx.backend = backend
    ctx.save_for_backward(output, *tensors, values)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, for_results: Tensor) -> tuple[Any, ...]:
    results, *tensors, values = ctx.saved_tensors
    sides = _pair_reduce_backward(
        for_results, results, *tensors, *ctx.rules, values, *ctx.choices, *ctx.needs_input_grad[:2], ctx.backend
    )
    return gradients(ctx, *sides)


differentiable(_pair_reduce, _setup_context, _backward)
