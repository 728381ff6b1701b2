"""Rows that lie near 500,000 and differ by 1/8 to 300, all of which float32 holds; and Jaccard distances near 0."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from test_ranking import assert_same, distances, expected

from apd_kernels import jaccard_distance, k_reciprocal_rerank, knn, rank_metrics


def rows(spread: float, seed: int = 0) -> torch.Tensor:
    """Eight people, 96 rows in steps of 1/8; each person keeps together."""
    draw = torch.Generator().manual_seed(seed)
    people = torch.randint(-int(4 * spread), int(4 * spread) + 1, (8, 16), generator=draw)
    return 500_000 + (people.repeat(12, 1) + torch.randint(-1, 2, (96, 16), generator=draw)) / 8


@pytest.mark.parametrize("stray", [False, True], ids=["", "stray"])
@pytest.mark.parametrize("spread", [1.0, 20.0, 300.0])
def test_figures_and_lists(spread: float, stray: bool, backend: Backend) -> None:
    """Also where an image on either side could not be read, and has zeros."""
    x = rows(spread)
    ids = torch.arange(96) % 8
    if stray:
        x[[5, 40]] = 0
        ids[5] = -1  # differences of its distances, 2,000,000 each, are below float32
    exact = (x.double()[:30, None] - x.double()[None, 30:]).square().sum(-1)
    query, gallery = x[:30].to(backend.device), x[30:].to(backend.device)
    labels = ids[:30].to(backend.device), ids[30:].to(backend.device)
    found = rank_metrics(query, gallery, *labels, metric="euclidean")
    assert_same(found, expected(exact, ids[:30], ids[30:]))
    listed = knn(query, gallery, 10, metric="sqeuclidean").distances.double().cpu()
    assert torch.equal(listed[ids[:30] >= 0], exact.sort(1).values[ids[:30] >= 0, :10])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, backend: Backend) -> None:
    """Kernels multiply such rows as they are, but for those far away."""
    near = (8 * (rows(4.0) - 500_000)).clamp(-60, 60).round()
    far = (near + (1500 if dtype == torch.float16 else 192)).to(dtype)  # all integers
    ids = torch.arange(96) % 8
    exact = (near[:30, None] - near[None, 30:]).square().sum(-1)
    query, gallery = far[:30].to(backend.device), far[30:].to(backend.device)
    found = rank_metrics(query, gallery, ids[:30].to(backend.device), ids[30:].to(backend.device), metric="euclidean")
    assert_same(found, expected(exact.double(), ids[:30], ids[30:]))
    assert torch.equal(knn(query, gallery, 10, metric="sqeuclidean").distances.cpu(), exact.sort(1).values[:, :10])


def test_beyond_float32(backend: Backend) -> None:
    """Rows too far away for a square tie behind all others: ∞ − ∞ would count as nowhere, and flatter."""
    draw = torch.Generator().manual_seed(4)
    x, y = (torch.randint(-3, 4, (count, 6), generator=draw).float() for count in (20, 50))
    ids, gallery_ids = torch.arange(20) % 5, torch.arange(50) % 5
    exact = distances(x, y, "euclidean")
    exact[:, ::3] = torch.inf
    x *= 2.0**-60
    y *= torch.where(torch.arange(50) % 3 == 0, 2.0**100, 2.0**-60)[:, None]
    arguments = (one.to(backend.device) for one in (x, y, ids, gallery_ids))
    assert_same(rank_metrics(*arguments, metric="euclidean"), expected(exact, ids, gallery_ids))


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize("longest", [2.0**126, 2.0**-149])
def test_longest_and_shortest_numbers(longest: float, metric: str, backend: Backend) -> None:
    """Of queries, and for "dot" of the gallery too, up to the ends of float32."""
    draw = torch.Generator().manual_seed(5)
    x, y = (torch.randint(-3, 4, (count, 6), generator=draw).float() for count in (20, 50))
    ids, gallery_ids = torch.arange(20) % 5, torch.arange(50) % 5
    gallery = y * longest if metric == "euclidean" or longest > 1 else y
    exact = distances(x, y, metric)
    arguments = (one.to(backend.device) for one in (x * longest, gallery, ids, gallery_ids))
    assert_same(rank_metrics(*arguments, metric=metric), expected(exact, ids, gallery_ids))


@pytest.mark.parametrize("spread", [1.0, 20.0, 300.0])
def test_reranking(spread: float) -> None:
    x = rows(spread)
    near, far = (x - 500_000), x
    assert torch.equal(jaccard_distance(near, k1=12, k2=4), jaccard_distance(far, k1=12, k2=4))
    wanted, found = (k_reciprocal_rerank(one[:30], one[30:], k1=12, k2=4).dense() for one in (near, far))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    far[95] = 0  # an image that could not be read
    wanted, found = (jaccard_distance(one, k1=11, k2=4)[:95, :95] for one in (far.double(), far))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lambda_value", [0.0, 0.3, 1.0])
def test_reranked_distances_are_not_negative(lambda_value: float, dtype: torch.dtype) -> None:
    """And those of a query that is in the gallery are 0."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(20, 24, generator=draw, dtype=dtype).repeat(8, 1)
    x += 0.3 * torch.randn(160, 24, generator=draw, dtype=dtype)
    found = k_reciprocal_rerank(x[:60], x, lambda_value=lambda_value).dense()
    assert (found >= 0).all()
    assert not found.diagonal().any()
