"""What holds for every training operation: the same bits in every run, autocast ignored, CUDA graphs, no waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from torch import Tensor

import apd_kernels as ak

pytestmark = pytest.mark.oldest

Operation = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def _with_gradient(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs and the gradient of their sum."""
    a = x.detach().requires_grad_()
    outputs = function(a)
    (gradient,) = torch.autograd.grad(torch.stack([out.float().sum() for out in outputs]).sum(), a)
    return *(out.detach() for out in outputs), gradient


def _ssd(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    maps = x.view(len(x), -1, 4, 2)
    permutation = torch.arange(len(x), device=x.device).roll(len(x) // 2)
    logits = [maps.detach() * 0.5, maps.detach() - 1]
    return _with_gradient(lambda a: (ak.ssd_mask(a.view(maps.shape), logits, permutation, stacked=True),), x)


def _perturbation_loss(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    negatives = x.roll(len(x) // 2, 0)
    return _with_gradient(lambda a: (ak.metric_perturbation_loss(a, negatives, x.roll(1, 1)),), x)


OPERATIONS: dict[str, Operation] = {
    "pairwise_distance": lambda x, labels: _with_gradient(lambda a: (ak.pairwise_distance(a, x.roll(1, 1)),), x),
    "paired_distance": lambda x, labels: _with_gradient(lambda a: (ak.paired_distance(a, x.roll(1, 1)),), x),
    "batch_hard": lambda x, labels: _with_gradient(lambda a: tuple(ak.batch_hard(a, labels).distances), x),
    "triplet_loss": lambda x, labels: _with_gradient(lambda a: (ak.triplet_loss(a, labels, margin=None),), x),
    "circle_loss": lambda x, labels: _with_gradient(lambda a: (ak.circle_loss(a, labels),), x),
    "supervised_contrastive_loss": lambda x, labels: _with_gradient(
        lambda a: (ak.supervised_contrastive_loss(a, labels),), x
    ),
    "metric_perturb, N×N": lambda x, labels: (ak.metric_perturb(x, labels, epsilon=0.5, steps=2),),
    "metric_perturb, direct": lambda x, labels: (ak.metric_perturb(x[:, :16].clone(), labels, epsilon=0.5, steps=2),),
    "metric_perturb, l∞": lambda x, labels: (ak.metric_perturb(x, labels, epsilon=0.1, steps=2, norm="linf"),),
    "metric_perturb, negative": lambda x, labels: (
        ak.metric_perturb(x, labels, epsilon=0.5, steps=2, objective="negative"),
    ),
    "metric_perturbation_loss": _perturbation_loss,
    "ssd_mask": _ssd,
}
NAMES = list(OPERATIONS)


def _input(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) // 3
    x = torch.randn(4, 64, generator=generator)[labels] + torch.randn(12, 64, generator=generator)
    return x.to(device), labels.to(device)


@pytest.mark.parametrize("name", NAMES)
def test_bits_repeat_and_autocast_is_ignored(backend: Backend, name: str) -> None:
    x, labels = _input(backend.device)
    first = OPERATIONS[name](x, labels)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        under_autocast = OPERATIONS[name](x, labels)
    for value, repeated, other in zip(first, OPERATIONS[name](x, labels), under_autocast, strict=True):
        assert torch.equal(value, repeated)
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [12, 64, 200, 2048])
@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_cuda_graph(name: str, rows: int) -> None:
    """No operation waits for the device, and a replay on new input gives the bits of a call."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.arange(rows) // 4).cuda()
    x, other = (torch.randn(rows, 1024, generator=generator).cuda() for _ in range(2))
    given = x.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            OPERATIONS[name](given, labels)
        torch.cuda.current_stream().wait_stream(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = OPERATIONS[name](given, labels)
    for features in (x, other):
        given.copy_(features)
        graph.replay()
        for output, expected in zip(outputs, OPERATIONS[name](features, labels), strict=True):
            assert torch.equal(output, expected)
