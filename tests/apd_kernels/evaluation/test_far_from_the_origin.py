"""Rows that lie near 500,000 and differ by 1/8 to 300, all of which float32 holds; and Jaccard distances near 0."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from test_ranking import assert_same, expected

from apd_kernels import jaccard_distance, k_reciprocal_rerank, knn, rank_metrics


def rows(spread: float, seed: int = 0) -> torch.Tensor:
    """Eight people, 96 rows in steps of 1/8; each person keeps together."""
    draw = torch.Generator().manual_seed(seed)
    people = torch.randint(-int(4 * spread), int(4 * spread) + 1, (8, 16), generator=draw)
    return 500_000 + (people.repeat(12, 1) + torch.randint(-1, 2, (96, 16), generator=draw)) / 8


@pytest.mark.parametrize("spread", [1.0, 20.0, 300.0])
def test_figures_and_lists(spread: float, backend: Backend) -> None:
    x = rows(spread)
    ids = torch.arange(96) % 8
    exact = (x.double()[:30, None] - x.double()[None, 30:]).square().sum(-1)
    query, gallery = x[:30].to(backend.device), x[30:].to(backend.device)
    labels = ids[:30].to(backend.device), ids[30:].to(backend.device)
    found = rank_metrics(query, gallery, *labels, metric="euclidean")
    assert_same(found, expected(exact, ids[:30], ids[30:]))
    listed = knn(query, gallery, 10, metric="sqeuclidean")
    assert torch.equal(listed.distances.double().cpu(), exact.sort(1).values[:, :10])


@pytest.mark.parametrize("spread", [1.0, 20.0, 300.0])
def test_reranking(spread: float) -> None:
    x = rows(spread)
    near, far = (x - 500_000), x
    assert torch.equal(jaccard_distance(near, k1=12, k2=4), jaccard_distance(far, k1=12, k2=4))
    wanted, found = (k_reciprocal_rerank(one[:30], one[30:], k1=12, k2=4).dense() for one in (near, far))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_distances_that_clustering_accepts(metric: str, dtype: torch.dtype) -> None:
    """scikit-learn refuses negative distances, and wants zeros on the diagonal."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(300, 24, generator=draw, dtype=dtype)
    x[7] = x[3]
    dense = jaccard_distance(x, k1=20, k2=6, metric=metric)
    assert torch.equal(dense.diagonal(), torch.zeros(300, dtype=dtype))
    assert (dense >= 0).all()
    sparse = jaccard_distance(x, k1=20, k2=6, metric=metric, sparse=True)
    assert (sparse.values() >= 0).all()
    row = torch.repeat_interleave(sparse.crow_indices().diff())
    own = sparse.values()[row == sparse.col_indices()]
    assert torch.equal(own, torch.zeros(300, dtype=dtype))


@pytest.mark.parametrize("lambda_value", [0.0, 0.3, 1.0])
def test_reranked_distances_are_not_negative(lambda_value: float) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(60, 24, generator=draw)
    gallery = torch.cat([x, torch.randn(100, 24, generator=draw)])
    distances = k_reciprocal_rerank(x, gallery, lambda_value=lambda_value).dense()
    assert (distances >= 0).all()
