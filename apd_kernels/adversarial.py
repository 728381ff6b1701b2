"""Adversarial perturbation of features: gradient ascent of a metric loss inside a ball around them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from apd_kernels._core.backend import named_backend, resolve_backend
from apd_kernels._core.checks import (
    check_choice,
    check_comparable,
    check_features,
    check_floating,
    check_integers,
    check_number,
    check_same_kind,
)
from apd_kernels._core.operators import differentiable, internal_dtype, operator
from apd_kernels._core.precision import resolve_precision
from apd_kernels._core.rows import unit_rows
from apd_kernels.losses import triplet_loss
from apd_kernels.mining import batch_hard
from apd_kernels.perturbation_loss import metric_perturbation_loss
from apd_kernels.reference import adversarial as reference

MAX_DIMENSION = 4096  # the kernels hold whole rows in registers; wider features take the PyTorch path


class PerturbInfo(NamedTuple):
    """What a perturbation did; one entry a set for (S, N, D)."""

    losses: Tensor  # (steps + 1,) or (steps + 1, S): the objective before the first step and after each
    flipped: Tensor  # of the rows whose nearest other row has their identity, the share for which it no longer has


@overload
def metric_perturb(
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    epsilon_mode: str = ...,
    steps: int = ...,
    step_size: float | None = ...,
    norm: str = ...,
    objective: str = ...,
    negatives: Tensor | None = ...,
    memory: Tensor | None = ...,
    memory_labels: Tensor | None = ...,
    random_start: bool = ...,
    noise: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def metric_perturb(
    x: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    epsilon_mode: str = ...,
    steps: int = ...,
    step_size: float | None = ...,
    norm: str = ...,
    objective: str = ...,
    negatives: Tensor | None = ...,
    memory: Tensor | None = ...,
    memory_labels: Tensor | None = ...,
    random_start: bool = ...,
    noise: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_info: Literal[True],
) -> tuple[Tensor, PerturbInfo]: ...
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
    negatives: Tensor | None = None,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    random_start: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, PerturbInfo]:
    """Features moved inside a ball so that they match badly: hard samples without a generator.

    Each step follows the gradient of the objective and projects every row back into the ball around its original. A row
    takes the whole step in the direction of its gradient (``"l2"``: the gradient divided by its norm, ``"linf"``: its
    sign); a row whose gradient is zero stays.

    ``objective="triplet"`` ascends the sum over the anchors of ln(1 + exp(d_p − d_n)), with the Euclidean distances to
    the farthest positive and the nearest negative, mined anew in each step. All rows move together, and a row's
    gradient includes the anchors that chose it. With a memory the partners are rows of the memory, which do not move.

    ``objective="negative"`` descends APD's eq. 3, the mean over a row's negatives of ln(1 + exp(d(z, n) − d(z, x))):
    toward its negatives, away from its original. The gradient of d(z, x) at z = x is 0, so the first step goes to the
    negatives. Without `negatives` it is the row of another identity nearest to x, in the batch or in the memory.

    Args:
        x: features, shape (N, D) or (S, N, D) for S sets with the same labels; float16, bfloat16, float32, float64.
        labels: identity of each row, shape (N,), any integer dtype; −1 is an identity like others: give
            ``x[labels != -1]`` to leave it out. Anchors without a positive or negative do not count.
        epsilon: radius of the ball, at least 0, in units of `x`; see `epsilon_mode`.
        epsilon_mode: ``"absolute"``, or ``"relative"``: each row's radius and step are multiplied by its own norm.
        steps: number of steps, at least 0; 0 returns `x` itself, and so does ``epsilon=0``.
        step_size: length of a step, in the unit of `epsilon`; None for 2.5 · epsilon / steps.
        norm: of the ball and the steps, ``"l2"`` or ``"linf"``.
        objective: ``"triplet"`` or ``"negative"``.
        negatives: for ``"negative"``: features of other identities, (N, D) or (N, M, D) for x (N, D), dtype as `x`.
        memory: rows to mine in instead of the batch, shape (M, D) or (S, M, D), dtype as `x`.
        memory_labels: identity of each row of the memory, shape (M,).
        random_start: begin at a point drawn uniformly from the ball.
        noise: begin at x + noise, projected into the ball: the form for torch.compile and for tests across devices.
            Shape and dtype of `x`.
        generator: of the random start.
        return_info: also return a `PerturbInfo`; it takes the steps one by one.

    Returns:
        Shape and dtype of `x`, or ``(perturbed, info)``. Computed in float32 or better, so that half-precision results
        lie in the ball up to their own rounding. The gradient is passed straight through to `x`. A NaN row is mined as
        the hardest and makes the rows that choose it NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, range or choice.

    How much it takes: on OSNet features of the 200 queries of a CUHK03 split, of which 60 have a nearest neighbour of
    their identity, 10 L2 steps at a relative epsilon of 0.05, 0.1 and 0.2 take it from 70%, 87% and 95% of these
    (random moves of the same length: 2%, 2% and 7%); ``python -m benchmarks.flips`` draws it from any feature file.

    A loss that is saturated beyond float32, where the nearest negative is 103 further than the farthest positive, has
    no gradient except where the N×N form serves (L2 steps on a batch that is small against D, see
    docs/architecture.md): such rows stay.

    Source: APD (Tan et al., Neural Networks 2025) perturbs images with a generator; this is its latent counterpart, by
    projected gradient ascent (Madry et al., 2018).

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 3.0]])
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> hard = metric_perturb(x, labels, epsilon=0.5, steps=5)
    >>> (hard - x).norm(dim=1)  # as far as the ball lets them
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    >>> (hard[0] - hard[1]).norm() > (x[0] - x[1]).norm()  # positives apart
    tensor(True)
    >>> _, info = metric_perturb(x, labels, epsilon=1.5, steps=3, return_info=True)
    >>> bool(info.losses[-1] > info.losses[0])
    True
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
    check_choice("objective", objective, ("triplet", "negative"))
    _check_partners(x, objective, negatives, memory, memory_labels)
    if noise is not None:
        check_floating("noise", noise)
        check_same_kind("noise", noise, "x", x)
        if noise.shape != x.shape:
            raise ValueError(f"noise: expected shape {tuple(x.shape)}, got {tuple(noise.shape)}")
        if random_start:
            raise ValueError("noise: expected None with random_start=True, which draws its own, got a tensor")
    if return_info and x.dtype in (torch.float16, torch.bfloat16):
        # The steps are taken one by one, and the points between them are not to be rounded.
        whole = (None if rows is None else rows.float() for rows in (negatives, memory, noise))
        moved, info = metric_perturb(
            x.float(),
            labels,
            epsilon=epsilon,
            epsilon_mode=epsilon_mode,
            steps=steps,
            step_size=step_size,
            norm=norm,
            objective=objective,
            **dict(zip(("negatives", "memory", "noise"), whole, strict=True)),
            memory_labels=memory_labels,
            random_start=random_start,
            generator=generator,
            return_info=True,
        )
        return moved.to(x.dtype), info
    backend = resolve_backend(x)
    if backend == "triton" and x.shape[-1] > MAX_DIMENSION:
        if named_backend() is not None:
            raise ValueError(f"x: the 'triton' backend takes at most {MAX_DIMENSION} dimensions, got {x.shape[-1]}")
        backend = "torch"
    moving = steps > 0 and epsilon > 0 and x.numel() > 0
    if not moving and not return_info:
        return x
    relative = epsilon_mode == "relative"
    step = float(2.5 * epsilon / max(1, steps) if step_size is None else step_size)
    begin = _beginning(x, float(epsilon), relative, norm, random_start, noise, generator) if moving else None
    precision = resolve_precision(None)
    partners = None if objective == "triplet" else _negatives(x, labels, negatives, memory, memory_labels)

    def advance(begin: Tensor | None, count: int) -> Tensor:
        if not moving:
            return x
        ball = (float(epsilon), step, count, relative, norm)
        if partners is None:
            return _metric_perturb(x, labels, begin, memory, memory_labels, *ball, precision, backend)
        return _negative_perturb(x, *partners, begin, *ball, backend)

    if not return_info:
        return advance(begin, steps)
    points = [x if begin is None else begin.to(x.dtype)]
    for _ in range(steps):
        points.append(advance(points[-1] if len(points) > 1 else begin, 1))
    with torch.no_grad():
        if partners is None:
            losses = [triplet_loss(z, labels, memory, memory_labels, margin=None) for z in points]
        else:
            losses = [_eq3(z, *partners, x) for z in points]
        return points[-1], PerturbInfo(torch.stack(losses), _flipped(x, points[-1], labels))


def _check_partners(
    x: Tensor, objective: str, negatives: Tensor | None, memory: Tensor | None, memory_labels: Tensor | None
) -> None:
    if negatives is not None:
        if objective != "negative":
            raise ValueError(f"negatives: expected None for objective={objective!r}, which mines its own, got a tensor")
        check_floating("negatives", negatives)
        check_same_kind("negatives", negatives, "x", x)
        n, d = x.shape[-2:]
        shape = negatives.shape
        if x.dim() != 2 or negatives.dim() not in (2, 3) or shape[0] != n or shape[-1] != d:
            raise ValueError(f"negatives: expected shape ({n}, {d}) or ({n}, M, {d}) for x (N, D), got {tuple(shape)}")
        if memory is not None:
            raise ValueError("memory: expected None with negatives, which leave nothing to mine, got a tensor")
    if (memory is None) != (memory_labels is None):
        given, missing = ("memory", "memory_labels") if memory_labels is None else ("memory_labels", "memory")
        raise ValueError(f"{missing}: expected with {given}, got None")
    if memory is not None and memory_labels is not None:
        check_comparable("memory", memory, "x", x)
        check_integers("memory_labels", memory_labels, memory.shape[-2], x.device)


def _beginning(
    x: Tensor,
    epsilon: float,
    relative: bool,
    norm: str,
    random_start: bool,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """The first point where it is not x, in the internal dtype."""
    if noise is None and not random_start:
        return None
    start = x.detach().to(internal_dtype(x))
    order = 2 if norm == "l2" else float("inf")
    radius = start.new_full((1,), epsilon)
    if relative:
        radius = epsilon * torch.linalg.vector_norm(start, ord=order, dim=-1, keepdim=True)
    if noise is not None:
        offset = noise.detach().to(start.dtype)
        if norm == "linf":
            return start + offset.clamp(-radius, radius)
        length = torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
        return start + offset * (radius / torch.where(length > radius, length, radius)).nan_to_num(0)
    drawn = torch.empty_like(start, memory_format=torch.contiguous_format)
    if norm == "linf":
        return start + radius * drawn.uniform_(-1, 1, generator=generator)
    direction = unit_rows(drawn.normal_(generator=generator))
    share = torch.empty_like(start[..., :1]).uniform_(generator=generator)
    return start + radius * share ** (1 / x.shape[-1]) * direction


def _negatives(
    x: Tensor, labels: Tensor, negatives: Tensor | None, memory: Tensor | None, memory_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The negatives of each row, (…, N, M, D), and which rows have any."""
    if negatives is not None:
        rows = negatives.detach() if negatives.dim() == 3 else negatives.detach()[:, None]
        return rows, torch.full(x.shape[:-1], rows.shape[1] > 0, device=x.device)
    with torch.no_grad():
        index = batch_hard(x, labels, memory, memory_labels).indices.negative
        source = x.detach() if memory is None else memory.detach()
        if source.shape[-2] == 0:
            return x.new_zeros((*x.shape[:-1], 0, x.shape[-1])), index >= 0
        taken = source.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, x.shape[-1]))
        return taken[..., None, :], index >= 0


def _eq3(z: Tensor, negatives: Tensor, valid: Tensor, x: Tensor) -> Tensor:
    """APD's eq. 3 of each set, over the rows that have negatives."""
    if x.dim() == 3:
        return torch.stack([_eq3(*rows) for rows in zip(z, negatives, valid, x, strict=True)])
    index = torch.arange(negatives.shape[:2].numel(), device=x.device).view(negatives.shape[:2])
    return metric_perturbation_loss(z, negatives.flatten(0, 1), x, indices=index.where(valid[:, None], -1))


def _flipped(x: Tensor, perturbed: Tensor, labels: Tensor) -> Tensor:
    def own_identity_first(z: Tensor) -> Tensor:
        # Every row its own identity: the nearest "negative" is the nearest other row.
        alone = torch.arange(len(labels), device=labels.device)
        nearest = batch_hard(z, alone).indices.negative
        return (labels[nearest.clamp(min=0)] == labels) & (nearest >= 0)

    before = own_identity_first(x)
    lost = before & ~own_identity_first(perturbed)
    return lost.sum(-1).to(internal_dtype(x)) / before.sum(-1).clamp(min=1)


def _fake(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape)


_metric_perturb = operator(reference.metric_perturb, fake=_fake)
_negative_perturb = operator(reference.negative_perturb, fake=_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inputs = len(inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (gradient, *(None,) * (ctx.inputs - 1))


differentiable(_metric_perturb, _setup_context, _backward)
differentiable(_negative_perturb, _setup_context, _backward)
