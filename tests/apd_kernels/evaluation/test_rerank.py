"""Re-ranking against the formulas written out densely in float64, ties on purpose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dense_rerank import clustered, reranked, squared
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apd_kernels import (
    RerankedDistances,
    jaccard_distance,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_distances,
    query_expansion,
    rank_metrics,
    use_backend,
)
from apd_kernels.evaluation.rerank import RERANK_METRICS, VARIANTS, _prepared
from apd_kernels.reference import rerank as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")]


def rows(count: int, dimension: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Around centres, four rows each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, count // 4), dimension, generator=generator, dtype=torch.float64)
    chosen = torch.randint(0, len(centres), (count,), generator=generator)
    noise = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return (centres[chosen] + 0.6 * noise).to(dtype)


def integer_rows(count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Few distinct rows, so that most distances tie; squares are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (count, 3), generator=generator).to(dtype)


def assert_close(found: Tensor, wanted: np.ndarray | Tensor, tolerance: float, what: str = "result") -> None:
    wanted = torch.as_tensor(wanted).double()
    assert found.shape == wanted.shape, what
    error = (found.double().cpu() - wanted).abs()
    assert not error.isnan().any(), what
    assert error.numel() == 0 or float(error.max()) <= tolerance, f"{what}: off by {float(error.max()):.3g}"


def rerank_case(x: Tensor, queries: int, metric: str, tolerance: float, **options: Any) -> RerankedDistances:
    found = k_reciprocal_rerank(x[:queries], x[queries:], metric=metric, **options)
    s = squared(x, metric)
    if metric != "euclidean":
        s = s**2
    options = {"k1": 20, "k2": 6, "lambda_value": 0.3} | options
    assert_close(found.dense(), reranked(s, queries, **options), tolerance)
    return found


@pytest.mark.parametrize("metric", RERANK_METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "queries"), [(1, 1), (2, 1), (37, 10), (199, 40)])
def test_random_features(count: int, queries: int, dtype: torch.dtype, metric: str) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    options = [{}, {"k1": 7, "k2": 3, "lambda_value": 0.6}, {"k1": 13, "k2": 1}]
    for seed, chosen in enumerate(options[: 1 if count > 100 else 3]):
        rerank_case(rows(count, 16, seed, dtype), queries, metric, tolerance, **chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_lowest_index(seed: int, dtype: torch.dtype) -> None:
    """Also at the end of the lists, where a plain top-k is free to choose."""
    x = integer_rows(60, seed, dtype)
    for metric in ("euclidean", "sqeuclidean"):
        for k1, k2 in ((20, 6), (5, 1), (3, 9)):
            rerank_case(x, 20, metric, 1e-6, k1=k1, k2=k2)
    assert_close(jaccard_distance(x, k1=7, k2=3), clustered(squared(x), 7, 3), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dimension", [1, 3, 64, 255, 1000])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equal_rows_tie(metric: str, dimension: int, dtype: torch.dtype) -> None:
    """A few distinct rows, each at random places of many tiles: equal ones are at distance 0, in order of index."""
    generator = torch.Generator().manual_seed(dimension)
    distinct = torch.randn(40, dimension, generator=generator)
    distinct[:, 0] += torch.arange(40)  # no two of them nearly equal
    distinct = distinct.to(dtype)
    first = torch.from_numpy((squared(distinct, metric) == 0).argmax(1))  # one direction may be that of many rows
    for count in (40, 1000):
        rows_drawn = torch.randint(0, 40, (count,), generator=generator)
        drawn = first[rows_drawn]
        lists, _ = _neighbours(distinct[rows_drawn], metric, 30)
        same = drawn[:, None] == drawn[None]
        wanted = same.double().argsort(dim=1, descending=True, stable=True)[:, :30]
        counts = same.sum(1).clamp(max=30)
        for row in range(count):
            length = int(counts[row])
            assert torch.equal(lists[row, :length], wanted[row, :length]), row
        # Distances to the copies of another row are equal, so its copies follow each other by index.
        of_list = drawn[lists]
        for later in range(1, 30):
            follows = of_list[:, later] == of_list[:, later - 1]
            assert (lists[follows, later] > lists[follows, later - 1]).all()


def _neighbours(x: Tensor, metric: str, k: int) -> tuple[Tensor, Tensor]:
    prepared, count, _ = _prepared({"x": x}, metric)
    return reference.neighbours(reference.RowDistances(prepared, count), k)


@pytest.mark.parametrize("k", [1, 2, 5, 8, 9])
def test_nearest(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for levels in (1, 2, 5, 1000):
        distances = torch.randint(0, levels, (50, 9), generator=generator).float()
        values, indices = reference.nearest(distances, k)
        wanted = distances.sort(dim=1, stable=True)
        assert torch.equal(values, wanted.values[:, :k])
        assert torch.equal(indices, wanted.indices[:, :k])


@pytest.mark.parametrize("variant", ["torchreid", "transreid"])
@pytest.mark.parametrize("k2", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_features_are_at_distance_0(dtype: torch.dtype, k2: int, variant: str) -> None:
    row = torch.randn(1, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = row.expand(90, -1)
    zeros = torch.zeros(30, 60)
    assert torch.equal(k_reciprocal_rerank(x[:30], x[30:], k2=k2, variant=variant).dense().float(), zeros)
    assert torch.equal(jaccard_distance(x, k2=k2).float(), torch.zeros(90, 90))
    assert torch.equal(k_reciprocal_rerank(x[:30], x[30:] * 0, k2=k2, metric="cosine").dense().isnan(), zeros.bool())
    if variant == "torchreid":
        assert torch.equal(k_reciprocal_rerank(x[:30], x[30:], k2=k2, metric="cosine").dense().float(), zeros)
    found = k_reciprocal_rerank_from_distances(zeros, zeros[:, :30], torch.zeros(60, 60), k2=k2, variant=variant)
    assert torch.equal(found.dense(), zeros)


def test_long_lists_are_clipped() -> None:
    """k1 and k2 beyond the number of images."""
    x = rows(25, 8, 0)
    for k1, k2 in ((25, 6), (1000, 6), (10, 1000), (1000, 1000)):
        rerank_case(x, 7, "euclidean", 1e-12, k1=k1, k2=k2)
    for k1, k2 in ((25, 25), (1000, 6), (1000, 1000)):
        wanted = clustered(squared(x), k1, k2)
        assert_close(jaccard_distance(x, k1=k1, k2=k2), wanted, 1e-12)
    assert torch.equal(jaccard_distance(x, k1=5, k2=1000), jaccard_distance(x, k1=5, k2=5))
    everything = query_expansion(x[:7], x[7:], k=1000, alpha=0.0)
    assert_close(torch.cat(everything), x.mean(0).expand(25, -1), 1e-12)


def test_few_images() -> None:
    x = rows(3, 4, 0)
    assert k_reciprocal_rerank(x[:0], x).dense().shape == (0, 3)
    assert k_reciprocal_rerank(x, x[:0]).dense().shape == (3, 0)
    assert k_reciprocal_rerank(x[:0], x[:0]).dense().shape == (0, 0)
    assert k_reciprocal_rerank(x, x[:0]).topk(2).indices.tolist() == [[-1, -1]] * 3
    assert torch.equal(jaccard_distance(x[:1]), torch.zeros(1, 1, dtype=torch.float64))
    for sparse in (False, True):
        assert jaccard_distance(x[:0], sparse=sparse).shape == (0, 0)
    assert [part.shape for part in query_expansion(x[:0], x[:0])] == [(0, 4), (0, 4)]
    assert torch.equal(torch.cat(query_expansion(x[:1], x[:0])), x[:1])
    empty = [x.new_zeros(shape) for shape in ((0, 3), (0, 0), (3, 3))]
    assert k_reciprocal_rerank_from_distances(*empty).dense().shape == (0, 3)


@pytest.mark.parametrize("variant", ["torchreid", "transreid"])
def test_from_distances_equals_from_features(variant: str) -> None:
    x = rows(150, 16, 3)
    distance = torch.from_numpy(squared(x))
    if variant == "torchreid":
        distance = distance.sqrt()
    parts = distance[:50, 50:], distance[:50, :50], distance[50:, 50:]
    options = {"k1": 12, "k2": 4, "lambda_value": 0.4, "variant": variant}
    found = k_reciprocal_rerank_from_distances(*parts, **options).dense()
    assert_close(
        found, k_reciprocal_rerank(x[:50], x[50:], **options).dense(), 1e-12 if variant == "torchreid" else 1e-3
    )


def test_transreid_rounds_encodings() -> None:
    """Near the exact result, and not the same."""
    x = rows(150, 16, 4)
    exact, rounded = (k_reciprocal_rerank(x[:50], x[50:], variant=variant).dense() for variant in VARIANTS[:2])
    difference = float((exact - rounded).abs().max())
    assert 0 < difference < 4e-3


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jaccard_distance(dtype: torch.dtype, metric: str) -> None:
    for count, k1, k2 in ((1, 20, 6), (37, 20, 6), (120, 7, 3), (199, 15, 1)):
        x = (rows(count, 16, count, torch.float64) / 4).to(dtype)
        wanted = clustered(squared(x, metric), k1, k2)
        found = jaccard_distance(x, k1=k1, k2=k2, metric=metric)
        assert_close(found, wanted, 1e-12 if dtype == torch.float64 else 2e-6)
        assert torch.equal(found, found.T)
        stored = jaccard_distance(x, k1=k1, k2=k2, metric=metric, sparse=True)
        assert stored.layout == torch.sparse_csr
        torch.sparse_csr_tensor(
            stored.crow_indices(), stored.col_indices(), stored.values(), stored.shape, check_invariants=True
        )
        filled = torch.ones_like(found)
        filled[torch.repeat_interleave(stored.crow_indices().diff()), stored.col_indices()] = stored.values()
        assert torch.equal(filled, found)
        assert bool((stored.values() < 1).all())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jaccard_of_queries_and_gallery(dtype: torch.dtype, metric: str) -> None:
    """The corner of the joint matrix, to the bit, dense and sparse; and what fast-reid mixes with it."""
    x = (rows(120, 16, 3, torch.float64) / 4).to(dtype)
    x[5] = 0
    whole = jaccard_distance(x, k1=12, k2=4, metric=metric)
    found = jaccard_distance(x[:30], x[30:], k1=12, k2=4, metric=metric)
    assert torch.equal(found, whole[:30, 30:])
    stored = jaccard_distance(x[:30], x[30:], k1=12, k2=4, metric=metric, sparse=True)
    assert stored.shape == (30, 90)
    filled = torch.ones_like(found)
    filled[torch.repeat_interleave(stored.crow_indices().diff()), stored.col_indices()] = stored.values()
    assert torch.equal(filled, found)
    options: dict[str, Any] = {"k1": 12, "k2": 4, "metric": metric, "variant": "fastreid"}
    mixed = k_reciprocal_rerank(x[:30], x[30:], lambda_value=0.3, **options)
    s = torch.from_numpy(squared(x, metric))[:30, 30:]
    distance = s / 2 if metric == "cosine" else s.sqrt()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(mixed.dense(), (0.7 * found.double() + 0.3 * distance).numpy(), tolerance * float(distance.max() + 1))
    assert torch.equal(k_reciprocal_rerank(x[:30], x[30:], lambda_value=0.0, **options).dense(), found)
    if metric == "euclidean":
        options["metric"] = "sqeuclidean"
        squares = k_reciprocal_rerank(x[:30], x[30:], lambda_value=1.0, **options).dense()
        assert_close(squares, s.numpy(), tolerance * float(s.max()))


def test_jaccard_in_float16() -> None:
    x = rows(100, 16, 1) / 4
    exact, rounded = jaccard_distance(x), jaccard_distance(x, dtype=torch.float16)
    assert rounded.dtype == torch.float16
    assert 0 < float((exact - rounded).abs().max()) < 4e-3
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).repeat(10, 1)
    x += 0.4 * torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    for sparse in (False, True):
        found = jaccard_distance(x, dtype=torch.float16, sparse=sparse)
        assert float((found.values() if sparse else found).min()) == 0  # DBSCAN refuses what is below
    with pytest.raises(TypeError, match=r"dtype: expected torch\.float16, torch\.float32 or None, got torch\.float64"):
        jaccard_distance(x.float(), dtype=torch.float64)


def near_borders(metric: str) -> Tensor:
    """Rows of float32 in groups about a centre each, as far from each other as float32 can tell."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 64, generator=generator, dtype=torch.float64)
    around = torch.randn(12, 40, 64, generator=generator, dtype=torch.float64)
    # The QR factors are orthogonal directions: all members of a group are equally far apart but for 1e-8.
    directions = torch.linalg.qr(around.mT)[0].mT
    x = (centres[:, None] + 0.5 * directions * (1 + 1e-7 * around[..., :1])).flatten(0, 1)
    return (torch.nn.functional.normalize(x) if metric == "cosine" else x).float()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_lists_are_those_of_float64(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where squared gaps at the borders of lists are 1e-8, products of float32 do not tell who is in them."""
    x = near_borders(metric)
    wanted = jaccard_distance(x.double(), metric=metric)
    assert_close(jaccard_distance(x, metric=metric), wanted.numpy(), 1e-5)
    reranked = [k_reciprocal_rerank(y[:100], y[100:], metric=metric).dense() for y in (x, x.double())]
    assert_close(reranked[0], reranked[1].numpy(), 1e-5)
    monkeypatch.setattr(reference, "PRODUCT_ERROR", -1.0)  # nothing is in doubt
    assert float((jaccard_distance(x, metric=metric) - wanted).abs().max()) > 0.01


def test_numpy_takes_reranked_distances() -> None:
    x = rows(60, 16, 2)
    found = k_reciprocal_rerank(x[:20], x[20:])
    assert np.array_equal(np.asarray(found), found.dense().numpy())
    assert np.asarray(found, dtype=np.float32).dtype == np.float32
    assert np.argsort(found, axis=1).shape == (20, 40)
    with pytest.raises(ValueError, match="copy: expected None or True"):
        found.__array__(copy=False)


def test_jaccard_of_long_rows_does_not_underflow() -> None:
    """exp(−s) of every neighbour is 0 in float32; their shares are not."""
    x = rows(60, 16, 0) * 1000
    wanted = clustered(squared(x), 10, 3)
    for dtype in (torch.float32, torch.float64):
        found = jaccard_distance(x.to(dtype), k1=10, k2=3)
        assert not found.isnan().any()
        assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_scale_does_not_matter(size: float) -> None:
    x = rows(100, 16, 5, torch.float32)
    wanted = reranked(squared(x), 30, 20, 6, 0.3)
    assert_close(k_reciprocal_rerank(x[:30] * size, x[30:] * size).dense(), wanted, 3e-6)


def test_common_offset() -> None:
    """Rows far from the origin keep their distances."""
    x = rows(100, 16, 6)
    y = (x + 100).float()
    assert_close(k_reciprocal_rerank(y[:30], y[30:]).dense(), reranked(squared(y), 30, 20, 6, 0.3), 2e-5)


def test_layouts() -> None:
    x = rows(90, 15, 7, torch.float32)
    wanted = k_reciprocal_rerank(x[:30], x[30:]).dense()
    other = torch.stack([x, x], 2)[..., 1].T.contiguous().T
    assert torch.equal(k_reciprocal_rerank(other[:30], other[30:]).dense(), wanted)


def test_autocast_is_ignored() -> None:
    x = rows(90, 15, 7, torch.float32)

    def everything() -> list[Tensor]:
        found = k_reciprocal_rerank(x[:30], x[30:])
        return [found.dense(), found.topk(3).distances, jaccard_distance(x), *query_expansion(x[:30], x[30:])]

    wanted = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, everything(), wanted))


@pytest.mark.parametrize("variant", ["torchreid", "transreid"])
def test_blocks_do_not_change_the_result(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(700, 32, 8, torch.float32)
    whole = k_reciprocal_rerank(x[:300], x[300:], variant=variant)
    wanted, lists, clusters = whole.dense(), whole.topk(5), jaccard_distance(x)
    expansion = query_expansion(x[:300], x[300:])
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 4096)
    parts = k_reciprocal_rerank(x[:300], x[300:], variant=variant)
    pieces = list(parts.blocks())
    assert [part for part, _ in pieces] == [slice(0, 256), slice(256, 300)]
    assert torch.equal(torch.cat([block for _, block in pieces]), wanted)
    assert all(map(torch.equal, parts.topk(5), lists))
    assert torch.equal(jaccard_distance(x), clusters)
    assert all(map(torch.equal, query_expansion(x[:300], x[300:]), expansion))


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_no_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1 << 17)
    x = rows(1500, 64, 9, torch.float32)
    ids = torch.arange(1500) % 250
    with _Largest() as largest:
        found = k_reciprocal_rerank(x[:500], x[500:])
        found.topk(10)
        found.rank_metrics(ids[:500], ids[500:])
        jaccard_distance(x, sparse=True)
        query_expansion(x[:500], x[500:])
    assert 256 * 1500 <= largest.elements <= 256 * (1500 + 1536)


def test_topk() -> None:
    x = integer_rows(120, 0, torch.float32)
    found = k_reciprocal_rerank(x[:40], x[40:])
    dense = found.dense()
    for k in (1, 10, 80, 100):
        wanted = dense.sort(dim=1, stable=True)
        lists = found.topk(k)
        assert torch.equal(lists.distances[:, :80], wanted.values[:, :k])
        assert torch.equal(lists.indices[:, :80], wanted.indices[:, :k])
        assert bool((lists.indices[:, 80:] == -1).all())
        assert bool(lists.distances[:, 80:].isposinf().all())


@pytest.mark.parametrize("seed", range(6))
def test_evaluation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `rank_metrics` of the dense result: −x·y of x = −distance and y = the unit vectors is the distance."""
    generator = torch.Generator().manual_seed(seed)
    x = integer_rows(500, seed, torch.float32) if seed % 2 else rows(500, 16, seed, torch.float32)
    found = k_reciprocal_rerank(x[:300], x[300:])
    dense = found.dense()
    query_ids, gallery_ids = torch.randint(-1, 40, (300,), generator=generator), torch.randint(-1, 40, (200,))
    cams = (torch.randint(0, 3, (300,), generator=generator), torch.randint(0, 3, (200,), generator=generator))
    for labels in ((query_ids, gallery_ids), (query_ids, gallery_ids, *cams)):
        for options in ({"ap": "rectangular"}, {"ap": "trapezoidal", "max_rank": 7}):
            wanted = rank_metrics(-dense, torch.eye(200), *labels, metric="dot", **options)
            monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1 << (10 if seed > 2 else 24))
            result = found.rank_metrics(*labels, **options)
            for one, other in zip(result, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)


def expanded(x: Tensor, k: int, alpha: float, times: int) -> Tensor:
    for _ in range(times):
        s = squared(x, "cosine")
        order = s.argsort(1, kind="stable")[:, :k]
        weight = np.clip(1 - np.take_along_axis(s, order, 1) / 2, 0, None) ** alpha
        x = torch.from_numpy((weight[..., None] * x.double().numpy()[order]).mean(1))
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_expansion(dtype: torch.dtype) -> None:
    for count, k, alpha, times in ((1, 10, 3.0, 1), (37, 10, 3.0, 1), (120, 5, 0.0, 1), (120, 7, 2.5, 2)):
        x = rows(count, 16, count, dtype)
        found = query_expansion(x[: count // 3], x[count // 3 :], k=k, alpha=alpha, times=times)
        wanted = expanded(x, k, alpha, times)
        scale = float(wanted.abs().max())
        assert found.query.shape == (count // 3, 16)
        assert_close(torch.cat(found) / scale, wanted / scale, 1e-12 if dtype == torch.float64 else 5e-6)


def test_negative_similarities_do_not_give_nan() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, -1.0]])
    found = torch.cat(query_expansion(x[:1], x[1:], k=3, alpha=2.5))
    assert_close(found, expanded(x, 3, 2.5, 1), 1e-6)


_X = rows(12, 4, 0, torch.float32)
_NAN = _X.clone()
_NAN[3, 1] = math.nan


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (k_reciprocal_rerank, {"query": [1]}, TypeError, "query: expected a torch.Tensor"),
        (k_reciprocal_rerank, {"gallery": _X.double()}, TypeError, "gallery: expected torch.float32 as query"),
        (k_reciprocal_rerank, {"gallery": _X[:, :3]}, ValueError, r"gallery: expected shape \(G, 4\), got \(12, 3\)"),
        (k_reciprocal_rerank, {"gallery": _NAN}, ValueError, "gallery: expected finite features, .* in 1 rows: 3"),
        (k_reciprocal_rerank, {"k1": 0}, ValueError, "k1: expected at least 1, got 0"),
        (k_reciprocal_rerank, {"k2": 2.0}, TypeError, "k2: expected an int, got float"),
        (k_reciprocal_rerank, {"lambda_value": 1.5}, ValueError, "lambda_value: expected at most 1, got 1.5"),
        (k_reciprocal_rerank, {"variant": "osnet"}, ValueError, "variant: expected 'torchreid' or 'transreid'"),
        (k_reciprocal_rerank, {"metric": "dot"}, ValueError, "metric: expected 'euclidean' or"),
        (
            k_reciprocal_rerank,
            {"variant": "transreid", "metric": "cosine"},
            ValueError,
            "metric: expected 'euclidean' for variant 'transreid', got 'cosine'",
        ),
        (jaccard_distance, {"features": _NAN}, ValueError, "features: expected finite features"),
        (jaccard_distance, {"features": _X[0]}, ValueError, r"features: expected shape \(N, D\), got \(4,\)"),
        (jaccard_distance, {"features": _X, "k1": True}, TypeError, "k1: expected an int, got bool"),
        (query_expansion, {"alpha": -1.0}, ValueError, "alpha: expected a finite number of at least 0, got -1"),
        (query_expansion, {"times": 0}, ValueError, "times: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    if function is not jaccard_distance:
        arguments = {"query": _X, "gallery": _X} | arguments
    with pytest.raises(error, match=f"^{message}"):
        function(**arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 3), (3, 3)), r"query_query: expected shape \(2, 2\), got \(2, 3\)"),
        (((2, 3), (2, 2), (2, 2)), r"gallery_gallery: expected shape \(3, 3\), got \(2, 2\)"),
        (((6,), (2, 2), (3, 3)), r"query_gallery: expected shape \(Q, G\), got \(6,\)"),
    ],
)
def test_wrong_matrices(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        k_reciprocal_rerank_from_distances(*map(torch.ones, shapes))


def test_distances_that_are_not_finite() -> None:
    broken = torch.ones(3, 3)
    broken[1, 2] = math.inf
    with pytest.raises(ValueError, match="gallery_gallery: expected finite distances, got NaN or infinity"):
        k_reciprocal_rerank_from_distances(torch.ones(2, 3), torch.ones(2, 2), broken)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_distances(dtype: torch.dtype) -> None:
    distance = torch.from_numpy(squared(rows(60, 8, 0))).sqrt().to(dtype)
    parts = distance[:20, 20:], distance[:20, :20], distance[20:, 20:]
    wanted = k_reciprocal_rerank_from_distances(*(part.float() for part in parts)).dense()
    assert torch.equal(k_reciprocal_rerank_from_distances(*parts).dense(), wanted)


def test_wrong_labels() -> None:
    found = k_reciprocal_rerank(_X[:4], _X[4:])
    with pytest.raises(ValueError, match=r"gallery_ids: expected shape \(8,\), got \(4,\)"):
        found.rank_metrics(torch.arange(4), torch.arange(4))
    with pytest.raises(ValueError, match="query_ids: expected at least one query with"):
        found.rank_metrics(torch.arange(4), torch.arange(8) + 9)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        found.topk(0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: k_reciprocal_rerank(_X, _X),
        lambda: k_reciprocal_rerank_from_distances(*[torch.ones(2, 2)] * 3),
        lambda: jaccard_distance(_X),
        lambda: query_expansion(_X, _X),
    ],
)
def test_a_named_backend_does_not_fall_back(call: Any) -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"backend 'triton': .* use the 'torch' backend"):
        call()
    with use_backend("torch"):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    x = rows(1500, 64, 0, dtype)
    ids = torch.arange(1500) // 4
    with use_backend("torch"):
        here, there = (k_reciprocal_rerank(y[:500], y[500:]) for y in (x, x.cuda()))
        assert_close(there.dense(), here.dense(), 1e-5)
        assert there.topk(3).indices.is_cuda
        measured = there.rank_metrics(ids[:500].cuda(), ids[500:].cuda())
        assert measured.mAP == pytest.approx(here.rank_metrics(ids[:500], ids[500:]).mAP, abs=1e-3)
        assert torch.equal(jaccard_distance(x.cuda()), jaccard_distance(x.cuda()))
        assert_close(jaccard_distance(x.cuda()), jaccard_distance(x), 1e-5)
        assert_close(
            query_expansion(x[:500].cuda(), x[500:].cuda()).query, query_expansion(x[:500], x[500:]).query, 1e-4
        )
