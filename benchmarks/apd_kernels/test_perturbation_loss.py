from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import metric_perturbation_loss
from benchmarks import eager
from benchmarks.workload import CANDIDATES, DEVICE, compiled


@pytest.mark.parametrize("candidate", [*CANDIDATES, "floor"])
def test_metric_perturbation_loss(measure: Callable[..., None], candidate: str) -> None:
    n, m, d = 64, 4, 2048
    perturbed = torch.randn(n, d, device=DEVICE, requires_grad=True)
    negatives, original = torch.randn(n, m, d, device=DEVICE), torch.randn(n, d, device=DEVICE)
    function = metric_perturbation_loss if candidate == "ours" else compiled(candidate, eager.perturbation_loss)

    def work() -> tuple[torch.Tensor, ...]:
        loss = function(perturbed, negatives, original)
        return loss, *torch.autograd.grad(loss, perturbed)

    def floor() -> tuple[torch.Tensor, ...]:  # all are read once, and the gradient is written
        with torch.no_grad():
            return perturbed + original, torch.dot(negatives.flatten(), negatives.flatten())

    a = perturbed.detach().double().requires_grad_()
    expected = eager.perturbation_loss(a, negatives.double(), original.double())
    measure(
        floor if candidate == "floor" else work,
        title=f"metric_perturbation_loss {n}x{m}x{d} forward+backward",
        candidate=candidate,
        expected=(expected.detach(), *torch.autograd.grad(expected, a)),
        tolerance=1e-5,
    )
