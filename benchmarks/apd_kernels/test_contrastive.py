from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import circle_loss, supervised_contrastive_loss
from benchmarks import eager
from benchmarks.workload import CANDIDATES, ON_GPU, compiled, identities

LOSSES = {
    "circle_loss": (circle_loss, eager.circle_loss),
    "supervised_contrastive_loss": (supervised_contrastive_loss, eager.supervised_contrastive_loss),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("in_memory", [False, True], ids=["batch", "memory"])
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_contrastive(measure: Callable[..., None], candidate: str, in_memory: bool, name: str) -> None:
    """A batch against itself, and 256 anchors against a memory that has no gradient."""
    ours, full = LOSSES[name]
    if in_memory:
        count, each, d = (4096, 16, 2048) if ON_GPU else (1024, 8, 512)
        y, y_labels = identities(count, each, d)
        x, labels = (y[::each][:256] + 0.1).contiguous(), y_labels[::each][:256].contiguous()
        others: tuple[torch.Tensor, ...] = (y, y_labels)
    else:
        n, d = (4096, 2048) if ON_GPU else (1024, 512)
        x, labels = identities(n // 4, 4, d)
        others = ()
    x.requires_grad_()
    function = compiled(candidate, full)

    def work() -> tuple[torch.Tensor, ...]:
        loss = ours(x, labels, *others) if candidate == "ours" else function(x, labels, *(others or (x, labels)))
        return loss, *torch.autograd.grad(loss, x)

    a = x.detach().double().requires_grad_()
    expected = full(a, labels, *((others[0].double(), others[1]) if others else (a, labels)))
    size = f"{len(x)}x{len(others[0] if others else x)}x{d}"
    measure(
        work,
        title=f"{name} {size} forward+backward",
        candidate=candidate,
        expected=(expected.detach(), *torch.autograd.grad(expected, a)),
        tolerance=1e-4,  # of the largest term of the loss: γ = 128 multiplies what float32 products leave
    )
