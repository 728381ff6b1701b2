from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import pairwise_distance
from benchmarks import eager
from benchmarks.workload import CANDIDATES, DEVICE, ON_GPU, compiled

SIZE = (8192, 8192, 2048) if ON_GPU else (1024, 1024, 512)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("candidate", [*CANDIDATES, "cdist"])
def test_pairwise_distance(measure: Callable[..., None], candidate: str, backward: bool) -> None:
    n, m, d = SIZE
    x, y = torch.randn(n, d, device=DEVICE), torch.randn(m, d, device=DEVICE)
    x.requires_grad_(backward)
    weights = torch.rand(n, m, device=DEVICE)
    forward = {"ours": pairwise_distance, "cdist": torch.cdist}.get(candidate) or compiled(candidate, eager.distance)

    def work() -> tuple[torch.Tensor, ...]:
        distance = forward(x, y)
        return (distance, *torch.autograd.grad(distance, x, weights)) if backward else (distance,)

    sample = slice(None, 64)  # the reference of a few rows, so that checking does not need the memory of float64
    a = x[sample].double().detach().requires_grad_()
    reference = torch.cdist(a, y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = (reference.detach(),)
    if backward:
        expected += torch.autograd.grad(reference, a, weights[sample].double())

    def checked() -> tuple[torch.Tensor, ...]:
        return tuple(value[sample] for value in work())

    measure(
        checked,
        title=f"pairwise_distance {n}x{m}x{d} {'forward+backward' if backward else 'forward'}",
        candidate=candidate,
        expected=expected,
        tolerance=1e-5,
    )
