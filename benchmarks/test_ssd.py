from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import identity_derangement, ssd_mask
from benchmarks import eager
from benchmarks.workload import CANDIDATES, DEVICE, ON_GPU, compiled

SHAPE = (64, 768, 16, 8) if ON_GPU else (32, 192, 8, 4)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_ssd_mask(measure: Callable[..., None], candidate: str) -> None:
    features = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    logits = [torch.randn(SHAPE, device=DEVICE, requires_grad=True) for _ in range(3)]
    permutation = identity_derangement(torch.arange(SHAPE[0], device=DEVICE) // 4)
    function = ssd_mask if candidate == "ours" else compiled(candidate, eager.ssd_mask)
    weights = [torch.randn(SHAPE, device=DEVICE) for _ in range(3)]

    def work() -> tuple[torch.Tensor, ...]:
        maps = function(features, logits, permutation)
        return (*maps, *torch.autograd.grad(tuple(maps), [features, *logits], weights))

    inputs = [t.detach().double().requires_grad_() for t in (features, *logits)]
    maps = eager.ssd_mask(inputs[0], inputs[1:], permutation)
    gradients = torch.autograd.grad(maps, inputs, [w.double() for w in weights])
    measure(
        work,
        title=f"ssd_mask {'x'.join(map(str, SHAPE))}, 3 maps, forward+backward",
        candidate=candidate,
        expected=(*(m.detach() for m in maps), *gradients),
        tolerance=1e-5,
    )
