from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import k_reciprocal_rerank
from benchmarks import eager
from benchmarks.workload import DEVICE, ON_GPU, identities

QUERIES, GALLERY, DIMENSION, PEOPLE = (3368, 19732, 512, 751) if ON_GPU else (560, 3288, 512, 125)


def _features() -> torch.Tensor:
    rows, _ = identities(PEOPLE, -(-(QUERIES + GALLERY) // PEOPLE), DIMENSION)
    return rows[torch.randperm(len(rows), device=DEVICE)[: QUERIES + GALLERY]]


@pytest.mark.parametrize("candidate", ["ours", "eager"])
def test_k_reciprocal_rerank(measure: Callable[..., None], candidate: str) -> None:
    """The 100 nearest of each query after re-ranking; the peer makes N×N matrices."""
    query, gallery = _features().split([QUERIES, GALLERY])
    measure(
        {
            "ours": lambda: k_reciprocal_rerank(query, gallery).topk(100).distances,
            "eager": lambda: eager.k_reciprocal_rerank(query, gallery).topk(100, largest=False).values,
        }[candidate],
        title=f"k_reciprocal_rerank {QUERIES}x{GALLERY}x{DIMENSION}, 100 nearest",
        candidate=candidate,
        expected=(k_reciprocal_rerank(query.double(), gallery.double()).topk(100).distances,),
        tolerance=1e-3,
    )
