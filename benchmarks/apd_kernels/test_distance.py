from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import paired_distance, pairwise_distance, prepare_rows
from benchmarks import eager
from benchmarks.workload import CANDIDATES, DEVICE, ON_GPU, compiled

SIZE = (8192, 8192, 2048) if ON_GPU else (1024, 1024, 512)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("candidate", [*CANDIDATES, "kept", "cdist", "pytorch-metric-learning", "floor"])
def test_pairwise_distance(measure: Callable[..., None], candidate: str, backward: bool) -> None:
    n, m, d = SIZE
    x, y = torch.randn(n, d, device=DEVICE), torch.randn(m, d, device=DEVICE)
    x.requires_grad_(backward)
    weights = torch.rand(n, m, device=DEVICE)
    kept = prepare_rows(y) if candidate == "kept" else None
    forward: Callable[..., torch.Tensor]
    if candidate == "pytorch-metric-learning":
        distances = pytest.importorskip("pytorch_metric_learning.distances")
        forward = distances.LpDistance(normalize_embeddings=False)
    else:
        forward = {"ours": pairwise_distance, "kept": pairwise_distance, "cdist": torch.cdist}.get(
            candidate
        ) or compiled(candidate, eager.distance)

    def work() -> tuple[torch.Tensor, ...]:
        distance = forward(x, y if kept is None else kept)
        return (distance, *torch.autograd.grad(distance, x, weights)) if backward else (distance,)

    def floor() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (x @ y.t(), weights @ y) if backward else (x @ y.t(),)

    sample = slice(None, 64)  # the reference of a few rows, so that checking does not need the memory of float64
    a = x[sample].double().detach().requires_grad_()
    reference = torch.cdist(a, y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = (reference.detach(),)
    if backward:
        expected += torch.autograd.grad(reference, a, weights[sample].double())

    def checked() -> tuple[torch.Tensor, ...]:
        return tuple(value[sample] for value in (floor if candidate == "floor" else work)())

    measure(
        checked,
        title=f"pairwise_distance {n}x{m}x{d} {'forward+backward' if backward else 'forward'}",
        candidate=candidate,
        expected=expected,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("candidate", [*CANDIDATES, "floor"])
def test_paired_distance(measure: Callable[..., None], candidate: str, backward: bool) -> None:
    n, d = (65536, 2048) if ON_GPU else (4096, 512)
    x, y = torch.randn(n, d, device=DEVICE, requires_grad=backward), torch.randn(n, d, device=DEVICE)
    weights = torch.rand(n, device=DEVICE)
    forward = paired_distance if candidate == "ours" else compiled(candidate, torch.nn.functional.pairwise_distance)

    def work() -> tuple[torch.Tensor, ...]:
        distance = forward(x, y)
        return (distance, *torch.autograd.grad(distance, x, weights)) if backward else (distance,)

    def floor() -> tuple[torch.Tensor, ...]:  # both are read and, backward, one is written
        with torch.no_grad():
            return (x + y,) if backward else (torch.dot(x.flatten(), y.flatten()),)

    a = x.double().detach().requires_grad_()
    reference = (a - y.double()).norm(dim=1)
    expected = (reference.detach(),)
    if backward:
        expected += torch.autograd.grad(reference, a, weights.double())
    measure(
        floor if candidate == "floor" else work,
        title=f"paired_distance {n}x{d} {'forward+backward' if backward else 'forward'}",
        candidate=candidate,
        expected=expected,
        tolerance=1e-5,
    )
