"""Pairwise distances."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apd_kernels._core.operands import PreparedRows, checked_operands
from apd_kernels._core.operators import differentiable, first_derivatives_only, internal_dtype, operator
from apd_kernels.reference import distance as reference


def pairwise_distance(
    x: Tensor, y: Tensor | PreparedRows | None = None, *, metric: str = "euclidean", precision: str | None = None
) -> Tensor:
    """Distances between all rows of two feature sets; smaller is nearer.

    Args:
        x: features, shape (N, D) or (S, N, D) for S independent sets; float16, bfloat16, float32 or float64.
        y: features, shape (M, D) or (S, M, D), dtype and device as `x`, or `prepare_rows` of them; `x` itself when
            None.
        metric: ``"euclidean"`` ‖x−y‖, ``"sqeuclidean"`` ‖x−y‖², ``"cosine"`` 1 − cos (1 for a zero row),
            ``"dot"`` −x·y.
        precision: of float32 products on tensor cores: ``"fp32"``, ``"tf32"`` or ``"bf16"``; None reads PyTorch's
            matmul precision switch. The PyTorch path always follows that switch.

    Returns:
        (N, M) or (S, N, M), float32 (float64 for float64 inputs). The gradient of a Euclidean distance at 0 is 0. With
        ``y=None`` the diagonal of ``"euclidean"`` and ``"sqeuclidean"`` is exactly 0. A NaN row gives NaN. Squares come
        from ‖x‖² + ‖y‖² − 2x·y and are rounded like these terms: between near-duplicates a float32 ``"euclidean"``
        below 1e-3 ‖x‖ is mostly rounding, and the squares of Euclidean rows must fit float32. First derivatives only.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> pairwise_distance(x)
    tensor([[0., 5.],
            [5., 0.]])
    """
    x, rows, prepared, precision, backend = checked_operands(x, y, metric, precision)
    return _pairwise_distance(x, rows, *prepared, metric, precision, backend)


def _fake(x: Tensor, y: Tensor | None, **_: Any) -> Tensor:
    columns = x.shape[-2] if y is None else y.shape[-2]
    return x.new_empty((*x.shape[:-1], columns), dtype=internal_dtype(x))


def _fake_backward(x: Tensor, y: Tensor | None, needs_x: bool, needs_y: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_x else 0), x.new_empty(0 if y is None or not needs_y else y.shape)


_pairwise_distance = operator(reference.pairwise_distance, fake=_fake)
_pairwise_distance_backward = operator(reference.pairwise_distance_backward, fake=_fake_backward)
first_derivatives_only(_pairwise_distance_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *_, metric, precision, backend = inputs
    ctx.save_for_backward(output, x, y)
    ctx.choices, ctx.inputs = (metric, precision, backend), len(inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    distance, x, y = ctx.saved_tensors
    *choices, backend = ctx.choices
    needs_x, needs_y = ctx.needs_input_grad[:2]
    for_x, for_y = _pairwise_distance_backward(gradient, distance, x, y, *choices, needs_x, needs_y, backend)
    return for_x if needs_x else None, for_y if needs_y else None, *(None,) * (ctx.inputs - 2)


differentiable(_pairwise_distance, _setup_context, _backward)
