from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import metric_perturb
from benchmarks import eager
from benchmarks.workload import CANDIDATES, DEVICE, ON_GPU, compiled, identities

DIMENSION, EPSILON, STEPS = 2048, 2.0, 10
CASES = [(n, "l2") for n in ((64, 256, 512, 4096) if ON_GPU else (64, 256))] + [(64, "linf")]


@pytest.mark.parametrize(("n", "norm"), CASES)
@pytest.mark.parametrize("candidate", [*CANDIDATES, "floor"])
def test_metric_perturb(measure: Callable[..., None], candidate: str, n: int, norm: str) -> None:
    x, labels = identities(n // 4, 4, DIMENSION)
    epsilon = EPSILON if norm == "l2" else EPSILON / DIMENSION**0.5  # the corners of that cube are as far away
    # autograd.grad is not traced into one graph, so the compiled candidate is the step that eager takes.
    step = compiled(candidate, eager.ascent_step)

    def ascent(start: torch.Tensor, step: Callable[..., torch.Tensor]) -> torch.Tensor:
        moved = start
        for _ in range(STEPS):
            moved = step(moved, start, labels, epsilon, 2.5 * epsilon / STEPS, norm)
        return moved

    coefficients = torch.rand(n, n, device=DEVICE)

    def floor() -> tuple[torch.Tensor, ...]:
        if norm == "linf":  # a step by signs leaves the span of the rows, so that each takes a product of its own
            return tuple(x @ x.t() for _ in range(STEPS))
        return x @ x.t(), coefficients @ x

    def ours() -> torch.Tensor:
        return metric_perturb(x, labels, epsilon=epsilon, steps=STEPS, norm=norm)

    measure(
        {"ours": ours, "floor": floor}.get(candidate, lambda: ascent(x, step)),
        title=f"metric_perturb {n}x{DIMENSION}, {STEPS} {'L2' if norm == 'l2' else 'L-infinity'} steps",
        candidate=candidate,
        expected=(ascent(x.double(), eager.ascent_step),),
        tolerance=1e-4,
    )


@pytest.mark.parametrize("candidate", [*CANDIDATES, "floor"])
def test_toward_negatives(measure: Callable[..., None], candidate: str) -> None:
    """Descent of eq. 3 to negatives that are given."""
    n, m = 64, 4
    x, labels = identities(n // 4, 4, DIMENSION)
    negatives = torch.randn(n, m, DIMENSION, device=DEVICE)
    step = compiled(candidate, eager.descent_step)

    def descent(start: torch.Tensor, step: Callable[..., torch.Tensor]) -> torch.Tensor:
        moved, others = start, negatives.to(start.dtype)
        for _ in range(STEPS):
            moved = step(moved, start, others, EPSILON, 2.5 * EPSILON / STEPS)
        return moved

    def floor() -> tuple[torch.Tensor, ...]:  # rows and negatives are read once, and as many rows written
        return x + x, torch.dot(negatives.flatten(), negatives.flatten())

    def ours() -> torch.Tensor:
        return metric_perturb(x, labels, epsilon=EPSILON, steps=STEPS, objective="negative", negatives=negatives)

    measure(
        {"ours": ours, "floor": floor}.get(candidate, lambda: descent(x, step)),
        title=f"metric_perturb {n}x{m}x{DIMENSION} toward negatives, {STEPS} L2 steps",
        candidate=candidate,
        expected=(descent(x.double(), eager.descent_step),),
        tolerance=1e-4,
    )
