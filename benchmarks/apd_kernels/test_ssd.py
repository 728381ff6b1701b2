from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import identity_derangement, ssd_mask
from benchmarks import eager
from benchmarks.workload import CANDIDATES, DEVICE, ON_GPU, compiled

LARGE = (64, 768, 16, 8)
CASES = (
    [(LARGE, torch.float32, False), (LARGE, torch.bfloat16, False), (LARGE, torch.float32, True)]
    if ON_GPU
    else [((32, 192, 8, 4), torch.float32, False), (LARGE, torch.float32, False)]
)


def _name(case: tuple[tuple[int, ...], torch.dtype, bool]) -> str:
    shape, dtype, stacked = case
    kind = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return f"{'x'.join(map(str, shape))}{kind}{', stacked' if stacked else ''}"


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("candidate", [*CANDIDATES, "floor"])
def test_ssd_mask(
    measure: Callable[..., None], candidate: str, case: tuple[tuple[int, ...], torch.dtype, bool]
) -> None:
    shape, dtype, stacked = case
    features, *logits = (torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(4))
    permutation = identity_derangement(torch.arange(shape[0], device=DEVICE) // 4)
    weights = torch.randn(3 * shape[0], *shape[1:], device=DEVICE, dtype=dtype)

    def one_batch(*arguments: object) -> torch.Tensor:
        return torch.cat(eager.ssd_mask(*arguments))

    full = compiled(candidate, one_batch if stacked else eager.ssd_mask)

    def work() -> tuple[torch.Tensor, ...]:
        if candidate == "ours":
            maps = ssd_mask(features, logits, permutation, stacked=stacked)
        else:
            maps = full(features, logits, permutation)
        outputs, gradients = ((maps,), (weights,)) if stacked else (tuple(maps), weights.chunk(3))
        return (*outputs, *torch.autograd.grad(outputs, [features, *logits], gradients))

    # Forward 4 maps are read and 3 written, backward 7 and 4: as many as a copy of 9 maps reads and writes.
    source, target = (torch.randn(9, *shape, device=DEVICE).to(dtype) for _ in range(2))

    def floor() -> torch.Tensor:
        return target.copy_(source)

    inputs = [t.detach().double().requires_grad_() for t in (features, *logits)]
    maps = eager.ssd_mask(inputs[0], inputs[1:], permutation)
    gradients = torch.autograd.grad(maps, inputs, weights.double().chunk(3))
    outputs = [m.detach() for m in maps]
    measure(
        floor if candidate == "floor" else work,
        title=f"ssd_mask {_name(case)}, 3 maps, forward+backward",
        candidate=candidate,
        expected=(*([torch.cat(outputs)] if stacked else outputs), *gradients),
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,  # eager rounds each step to bfloat16
    )
