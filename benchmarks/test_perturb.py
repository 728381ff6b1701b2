from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import metric_perturb
from benchmarks import eager
from benchmarks.workload import CANDIDATES, ON_GPU, compiled, identities

SIZES = [(64, 2048)] + ([(4096, 2048)] if ON_GPU else [])
EPSILON, STEPS = 2.0, 10


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_metric_perturb(measure: Callable[..., None], candidate: str, size: tuple[int, int]) -> None:
    n, d = size
    x, labels = identities(n // 4, 4, d)
    step = 2.5 * EPSILON / STEPS
    if candidate == "ours":

        def work() -> torch.Tensor:
            return metric_perturb(x, labels, epsilon=EPSILON, steps=STEPS)
    else:
        # autograd.grad is not traced into one graph, so the compiled candidate is the step that eager takes.
        function = compiled(candidate, eager.ascent_step)

        def work() -> torch.Tensor:
            moved = x
            for _ in range(STEPS):
                moved = function(moved, x, labels, EPSILON, step)
            return moved

    expected = start = x.double()
    for _ in range(STEPS):
        expected = eager.ascent_step(expected, start, labels, EPSILON, step)
    title = f"metric_perturb {n}x{d}, {STEPS} L2 steps"
    measure(work, title=title, candidate=candidate, expected=(expected,), tolerance=1e-4)
