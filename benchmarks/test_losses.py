from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import triplet_loss
from benchmarks import eager
from benchmarks.workload import CANDIDATES, ON_GPU, compiled, identities


@pytest.mark.parametrize("size", [(64, 2048), (4096, 2048) if ON_GPU else (1024, 512)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_triplet_loss(measure: Callable[..., None], candidate: str, size: tuple[int, int]) -> None:
    n, d = size
    x, labels = identities(n // 4, 4, d)
    x.requires_grad_()
    function = triplet_loss if candidate == "ours" else compiled(candidate, eager.triplet_loss)

    def work() -> tuple[torch.Tensor, ...]:
        loss = function(x, labels, margin=None)
        return loss, *torch.autograd.grad(loss, x)

    a = x.detach().double().requires_grad_()
    expected = eager.triplet_loss(a, labels, margin=None)
    measure(
        work,
        title=f"triplet_loss {n}x{d} forward+backward",
        candidate=candidate,
        expected=(expected.detach(), *torch.autograd.grad(expected, a)),
        tolerance=1e-5,
    )
