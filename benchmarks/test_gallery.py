from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from apd_kernels import Gallery
from benchmarks.workload import ON_GPU, identities

ROWS, DIMENSION, K = (100_000, 512, 100) if ON_GPU else (10_000, 512, 100)


@pytest.mark.parametrize("candidate", ["ours", "eager"])
def test_search(measure: Callable[..., None], candidate: str) -> None:
    """256 queries, the K nearest of ROWS gallery rows; the gallery is built once, outside the timing."""
    rows, _ = identities(ROWS // 10, 10, DIMENSION)
    query = rows[:256] + 0.1
    gallery = Gallery(DIMENSION, metric="euclidean")
    gallery.add(rows)

    def search() -> torch.Tensor:
        return gallery.search(query, K).distances

    def matrix() -> torch.Tensor:
        return torch.cdist(query, rows).topk(K, largest=False).values

    expected = torch.cdist(query.double(), rows.double()).topk(K, largest=False).values
    measure(
        search if candidate == "ours" else matrix,
        title=f"Gallery.search 256x{ROWS}x{DIMENSION}, k={K}",
        candidate=candidate,
        expected=(expected.cpu() if candidate == "ours" else expected,),
        tolerance=1e-4,
    )
