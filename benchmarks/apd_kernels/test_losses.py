from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import triplet_loss
from benchmarks import eager
from benchmarks.workload import CANDIDATES, ON_GPU, compiled, identities


@pytest.mark.parametrize("size", [(64, 2048), (4096, 2048) if ON_GPU else (1024, 512)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("candidate", [*CANDIDATES, "pytorch-metric-learning", "floor"])
def test_triplet_loss(measure: Callable[..., None], candidate: str, size: tuple[int, int]) -> None:
    n, d = size
    x, labels = identities(n // 4, 4, d)
    x.requires_grad_()
    function: Callable[..., torch.Tensor]
    if candidate == "pytorch-metric-learning":
        function = _of_pytorch_metric_learning()
    else:
        function = triplet_loss if candidate == "ours" else compiled(candidate, eager.triplet_loss)

    def work() -> tuple[torch.Tensor, ...]:
        if candidate == "floor":  # the product that mining compares, and one pass for the gradient
            with torch.no_grad():
                return x @ x.t(), x + x
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


def _of_pytorch_metric_learning() -> Callable[..., torch.Tensor]:
    """Its batch-hard miner and its triplet loss with the soft margin, on features as they are."""
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    distance = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=distance)
    criterion = losses.TripletMarginLoss(margin=0, smooth_loss=True, distance=distance, reducer=reducers.MeanReducer())

    def function(x: torch.Tensor, labels: torch.Tensor, margin: None) -> torch.Tensor:
        return criterion(x, labels, miner(x, labels))

    return function
