from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import rank_metrics
from benchmarks import eager
from benchmarks.workload import DEVICE, ON_GPU, identities

# Market-1501's size on a GPU, a sixth of it on a CPU; three kinds of features, from separable to hard.
QUERIES, GALLERY, DIMENSION, PEOPLE = (3368, 19732, 2048, 751) if ON_GPU else (560, 3288, 512, 125)


def _features(spread: float) -> tuple[torch.Tensor, ...]:
    """Identity structure in 64 dimensions, as real features have it; spread 0.5, 1.0, 1.45: mAP near 1, 0.8, 0.2."""
    each = (QUERIES + GALLERY) // PEOPLE
    low, ids = identities(PEOPLE, each, 64, spread)
    order = torch.randperm(len(ids), device=DEVICE)
    rows = (low @ torch.randn(64, DIMENSION, device=DEVICE))[order].contiguous()
    ids, cams = ids[order], torch.randint(0, 6, (len(ids),), device=DEVICE)
    return rows[:QUERIES], rows[QUERIES:], ids[:QUERIES], ids[QUERIES:], cams[:QUERIES], cams[QUERIES:]


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.45])
@pytest.mark.parametrize("candidate", ["ours", "eager"])
def test_rank_metrics(measure: Callable[..., None], candidate: str, spread: float) -> None:
    inputs = _features(spread)

    def ours() -> torch.Tensor:
        result = rank_metrics(*inputs, metric="cosine", precision="fp32")
        return torch.stack([torch.tensor(result.mAP), result.cmc[0]])

    def matrix() -> torch.Tensor:
        return eager.rank_metrics(*inputs)

    expected = eager.rank_metrics(inputs[0].double(), inputs[1].double(), *inputs[2:])
    measure(
        ours if candidate == "ours" else matrix,
        title=f"rank_metrics {QUERIES}x{len(inputs[1])}x{DIMENSION}, mAP {expected[0]:.2f}",
        candidate=candidate,
        expected=(expected.cpu() if candidate == "ours" else expected,),
        tolerance=1e-4,
    )
