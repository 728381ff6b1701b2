from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from apd_kernels import rank_metrics
from benchmarks import eager
from benchmarks.workload import ON_GPU, ranking_features

# Queries, gallery images, dimension, people.
MARKET = (3368, 19732, 2048, 751)
SIZES = {
    "a sixth of Market-1501": (560, 3288, 512, 125),
    "Market-1501": MARKET,
    "MSMT17": (11659, 82161, 2048, 3060),
    "Market-1501 + 500k distractors": MARKET,
}
DISTRACTORS = {"Market-1501 + 500k distractors": 500_000}
HERE = list(SIZES)[1:] if ON_GPU else list(SIZES)[:2]
SPREADS = [0.5, 1.0, 1.45]  # features from separable to hard: mAP near 1, 0.8, 0.2 at the small size


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("size", HERE)
@pytest.mark.parametrize("candidate", ["ours", "eager", "numpy loop", "floor"])
def test_rank_metrics(measure: Callable[..., None], candidate: str, size: str, spread: float) -> None:
    """From features to mAP and rank-1; the floor is the product of the normalized rows."""
    if candidate == "numpy loop" and ON_GPU:
        pytest.skip("the loop over queries is what CPUs run")
    inputs = ranking_features(*SIZES[size], spread=spread, distractors=DISTRACTORS.get(size, 0))
    query, gallery = inputs[:2]
    unit, unit_gallery = (F.normalize(query), F.normalize(gallery)) if candidate == "floor" else (query, gallery)

    def ours() -> torch.Tensor:
        result = rank_metrics(*inputs, metric="cosine", precision="fp32")
        return torch.stack([torch.tensor(result.mAP), result.cmc[0].cpu()])

    def floor() -> torch.Tensor:
        for rows in unit.split(1024):  # a block at a time, as none needs them all
            product = rows @ unit_gallery.t()
        return product

    expected = eager.rank_metrics(query.double(), gallery.double(), *inputs[2:])
    measure(
        {
            "ours": ours,
            "eager": lambda: eager.rank_metrics(*inputs),
            "numpy loop": lambda: eager.rank_metrics_in_a_loop(*inputs),
            "floor": floor,
        }[candidate],
        title=f"rank_metrics, {size}: {len(query)}x{len(gallery)}x{query.shape[1]}, mAP {expected[0]:.2f}",
        candidate=candidate,
        expected=(expected.cpu() if candidate == "ours" else expected,),
        tolerance=1e-4,
    )
