"""Adversarial perturbation of features: gradient ascent of a metric loss inside a ball around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apd_kernels._core.backend import resolve_backend
from apd_kernels._core.checks import check_choice, check_features, check_integers, check_number
from apd_kernels._core.operators import differentiable, operator
from apd_kernels._core.precision import resolve_precision


def metric_perturb(
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    epsilon_mode: str = "absolute",
    steps: int = 1,
    step_size: float | None = None,
    norm: str = "l2",
    objective: str = "triplet",
) -> Tensor:
    """Features moved inside a ball so that they match badly: hard samples without a generator.

    Each step mines, for every row as an anchor, its farthest positive and nearest negative, ascends the sum over the
    anchors of ln(1 + exp(d_p − d_n)) with Euclidean distances, and projects every row back into the ball around its
    original. All rows move together, and a row's gradient includes the anchors that chose it. A row takes the whole
    step in the direction of its gradient (``"l2"``: the gradient divided by its norm, ``"linf"``: its sign); a row
    whose gradient is zero stays.

    Args:
        x: features, shape (N, D) or (S, N, D) for S sets with the same labels; float16, bfloat16, float32, float64.
        labels: identity of each row, shape (N,), any integer dtype. Anchors without a positive or negative do not
            count.
        epsilon: radius of the ball, at least 0, in units of `x`; see `epsilon_mode`.
        epsilon_mode: ``"absolute"``, or ``"relative"``: each row's radius and step are multiplied by its own norm.
        steps: number of steps, at least 0; 0 returns `x` itself, and so does ``epsilon=0``.
        step_size: length of a step, in the unit of `epsilon`; None for 2.5 · epsilon / steps.
        norm: of the ball and the steps, ``"l2"`` or ``"linf"``.
        objective: ``"triplet"``, the soft-margin batch-hard loss described above.

    Returns:
        Shape and dtype of `x`. Computed in float32 (float64 for float64), so that half-precision results lie in the
        ball up to their own rounding. The gradient is passed straight through to `x`. A NaN row is mined as the hardest
        and makes the rows that choose it NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, range or choice.

    Source: APD (Tan et al., Neural Networks 2025) perturbs images with a generator; this is its latent counterpart, by
    projected gradient ascent (Madry et al., 2018).

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 3.0]])
    >>> hard = metric_perturb(x, torch.tensor([0, 0, 1, 1]), epsilon=0.5, steps=5)
    >>> (hard - x).norm(dim=1)  # as far as the ball lets them
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    >>> (hard[0] - hard[1]).norm() > (x[0] - x[1]).norm()  # positives apart
    tensor(True)
    """
    check_features("x", x)
    check_integers("labels", labels, x.shape[-2], x.device)
    check_number("epsilon", epsilon)
    check_choice("epsilon_mode", epsilon_mode, ("absolute", "relative"))
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    if step_size is not None:
        check_number("step_size", step_size)
    check_choice("norm", norm, ("l2", "linf"))
    check_choice("objective", objective, ("triplet",))
    backend = resolve_backend(x)
    if steps == 0 or epsilon == 0:
        return x
    step = 2.5 * epsilon / steps if step_size is None else step_size
    return _metric_perturb(
        x,
        labels,
        float(epsilon),
        float(step),
        steps,
        epsilon_mode == "relative",
        norm,
        resolve_precision(None),
        backend,
    )


def _fake(
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
    precision: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


_metric_perturb = operator(
    "perturb",
    "metric_perturb(Tensor x, Tensor labels, float epsilon, float step_size, int steps, bool relative, str norm, "
    "str precision, str backend) -> Tensor",
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inputs = len(inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (gradient, *(None,) * (ctx.inputs - 1))


differentiable(_metric_perturb, _setup_context, _backward)
