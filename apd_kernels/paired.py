"""Distances between the rows of two feature sets, row by row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apd_kernels._core.backend import resolve_backend
from apd_kernels._core.checks import check_choice, check_comparable, check_features
from apd_kernels._core.operands import METRICS
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels.reference import paired as reference


def paired_distance(x: Tensor, y: Tensor, *, metric: str = "euclidean") -> Tensor:
    """Distance of each row of x from the same row of y, taken from their difference: near-duplicates keep their digits.

    Args:
        x: features, shape (N, D) or (S, N, D); float16, bfloat16, float32 or float64.
        y: features of the same shape, dtype and device.
        metric: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``, as in `pairwise_distance`.

    Returns:
        (N,) or (S, N), float32 (float64 for float64 inputs). The gradient of a Euclidean distance at 0, and of a cosine
        distance from a zero row (1), is 0. A NaN row gives NaN. First derivatives only.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> paired_distance(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [2.0, 0.0]]))
    tensor([5., 1.])
    """
    check_features("x", x)
    check_comparable("y", y, "x", x)
    if y.shape != x.shape:
        raise ValueError(f"y: expected shape {tuple(x.shape)} as x, got {tuple(y.shape)}")
    check_choice("metric", metric, METRICS)
    distance: Tensor = _paired_distance(x, y, metric, resolve_backend(x))
    return distance


def _fake(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=internal_dtype(x))


def _fake_backward(x: Tensor, for_x: bool, for_y: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else 0), x.new_empty(x.shape if for_y else 0)


_paired_distance = operator(reference.paired_distance, fake=_fake)
_paired_distance_backward = operator(reference.paired_distance_backward, fake=_fake_backward)
first_derivatives_only(_paired_distance_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *ctx.choices = inputs
    ctx.save_for_backward(output, x, y)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    metric, backend = ctx.choices
    needs_x, needs_y = ctx.needs_input_grad[:2]
    for_x, for_y = _paired_distance_backward(gradient, *ctx.saved_tensors, metric, needs_x, needs_y, backend)
    return for_x if needs_x else None, for_y if needs_y else None, None, None


differentiable(_paired_distance, _setup_context, _backward)
