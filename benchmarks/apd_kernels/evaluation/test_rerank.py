from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import jaccard_distance, k_reciprocal_rerank
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


@pytest.mark.parametrize("candidate", ["ours", "ours sparse", "eager"])
def test_jaccard_distance(measure: Callable[..., None], candidate: str) -> None:
    """Among all images, as clustering takes it; "ours sparse" keeps the pairs that share a neighbour."""
    rows = _features()

    def sparse() -> torch.Tensor:
        return jaccard_distance(rows, sparse=True)

    expected = jaccard_distance(rows.double())
    if candidate == "ours sparse":
        kept = sparse()
        dense = torch.ones_like(expected, dtype=kept.dtype)
        row = torch.repeat_interleave(torch.arange(len(rows), device=DEVICE), kept.crow_indices().diff())
        dense[row, kept.col_indices()] = kept.values()
        torch.testing.assert_close(dense, expected.to(dense.dtype), rtol=0, atol=1e-3)
    measure(
        {
            "ours": lambda: jaccard_distance(rows),
            "ours sparse": sparse,
            "eager": lambda: eager.jaccard_distance(rows),
        }[candidate],
        title=f"jaccard_distance {len(rows)}x{DIMENSION}",
        candidate=candidate,
        expected=() if candidate == "ours sparse" else (expected,),
        tolerance=1e-3,
    )
