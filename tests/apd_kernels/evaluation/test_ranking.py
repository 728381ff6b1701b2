"""Ranking metrics against a float64 loop over the queries, ties on purpose, and numbers of other implementations."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor

from apd_kernels import (
    RankAccumulator,
    RankMetrics,
    positive_ranks_from_distances,
    rank_metrics,
    rank_metrics_from_distances,
    tpr_at_fpr_from_distances,
    use_backend,
)
from apd_kernels._core.operands import METRICS
from apd_kernels.evaluation.retrieval_metrics import AVERAGE_PRECISIONS

pytestmark = pytest.mark.oldest

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def of_one_order(positive: list[bool], ap: str, max_rank: int) -> tuple[float, float, float, list[bool]]:
    """AP, INP, rank of the first positive and CMC of one ranked list."""
    ranks = [rank for rank, is_positive in enumerate(positive, 1) if is_positive]
    return of_ranks(ranks, list(range(1, len(ranks) + 1)), ap, max_rank)


def of_ranks(ranks: list[int], hits: list[int], ap: str, max_rank: int) -> tuple[float, float, float, list[bool]]:
    """The same from the rank of each positive and the positives up to it."""
    precision = [hit / rank for hit, rank in zip(hits, ranks, strict=True)]
    if ap == "trapezoidal":
        before = [(hit - 1) / (rank - 1) if rank > 1 else 1.0 for hit, rank in zip(hits, ranks, strict=True)]
        precision = [(one + other) / 2 for one, other in zip(precision, before, strict=True)]
    found = [ranks[0] <= k for k in range(1, max_rank + 1)]
    return sum(precision) / len(ranks), len(ranks) / ranks[-1], ranks[0], found


def of_one_query(
    positives: list[float], negatives: list[float], ap: str, ties: str, max_rank: int
) -> tuple[float, float, float, Tensor]:
    """The same from distances; the mean over the orders of the images at one distance where that is asked for."""
    groups: dict[float, list[int]] = {}
    for distance in positives:
        groups.setdefault(distance, [0, 0])[0] += 1
    for distance in negatives:
        groups.setdefault(distance, [0, 0])[1] += 1
    if ties == "grouped":
        ranks, hits, images, found = [], [], 0, 0
        for _, (a, b) in sorted(groups.items()):
            images, found = images + a + b, found + a
            ranks += [images] * a
            hits += [found] * a
        *figures, reached = of_ranks(ranks, hits, ap, max_rank)
        return *figures, torch.tensor(reached, dtype=torch.float64)
    if ties != "expected":
        ranked = []
        for _, (a, b) in sorted(groups.items()):
            ranked += [True] * a + [False] * b if ties == "optimistic" else [False] * b + [True] * a
        *figures, found = of_one_order(ranked, ap, max_rank)
        return *figures, torch.tensor(found, dtype=torch.float64)
    mean, weights = torch.zeros(3, dtype=torch.float64), 0
    share = torch.zeros(max_rank, dtype=torch.float64)
    orders = [set(itertools.permutations([True] * a + [False] * b)) for _, (a, b) in sorted(groups.items())]
    for chosen in itertools.product(*orders):  # equally likely
        *figures, reached = of_one_order([item for group in chosen for item in group], ap, max_rank)
        mean, weights = mean + torch.tensor(figures, dtype=torch.float64), weights + 1
        share += torch.tensor(reached, dtype=torch.float64)
    return *(mean / weights).tolist(), share / weights


def expected(
    distance: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    ap: str = "rectangular",
    ties: str = "pessimistic",
    max_rank: int = 50,
    exclude: Tensor | None = None,
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> RankMetrics:
    """The definitions, query by query, from a float64 distance matrix."""
    figures, found = [], torch.zeros(max_rank, dtype=torch.float64)
    for i, row in enumerate(distance.double()):
        positive = gallery_ids == query_ids[i]
        kept = gallery_ids != junk if junk is not None else gallery_ids == gallery_ids
        if query_cams is not None and gallery_cams is not None and query_cams[i] != unknown_camera:
            kept &= ~(positive & (gallery_cams == query_cams[i]))
        if exclude is not None:
            kept &= torch.arange(len(gallery_ids)) != exclude[i]
        positives, negatives = row[kept & positive].tolist(), row[kept & ~positive].tolist()
        if query_ids[i] == junk or len(positives) == 0:
            figures.append((math.nan,) * 3)
            continue
        if ties == "stable":
            order = row[kept].argsort(stable=True)
            *of_order, found_at = of_one_order(positive[kept][order].tolist(), ap, max_rank)
            of_query = (*of_order, torch.tensor(found_at, dtype=torch.float64))
        else:
            of_query = of_one_query(positives, negatives, ap, ties, max_rank)
        figures.append(of_query[:3])
        found += of_query[3]
    each, inverse, first = torch.tensor(figures, dtype=torch.float64).unbind(1)
    valid = ~each.isnan()
    means = float(each[valid].mean()), float(inverse[valid].mean())
    return RankMetrics(found / valid.sum(), *means, each, valid, inverse, first)


def assert_same(found: RankMetrics, wanted: RankMetrics, tolerance: float = 1e-12) -> None:
    for name, one, other in zip(RankMetrics._fields, found, wanted, strict=True):
        assert type(one) is type(other), name
        assert_close(one.cpu() if isinstance(one, Tensor) else one, other, name, tolerance)


def assert_close(found: object, wanted: object, name: str, tolerance: float) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """float64, and equal for equal rows: sums over one row are taken in one order, whatever its place."""
    x, y = x.double()[:, None], y.double()[None]
    if metric in ("euclidean", "sqeuclidean"):
        return (x - y).square().sum(-1)
    if metric == "cosine":
        x, y = (rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300) for rows in (x, y))
    return -(x * y).sum(-1)


def exact_case(seed: int, max_gallery: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random arguments whose products are exact in every dtype: a row is ±1 in four places, times a power of two.

    Distances take few values, so most positives tie with negatives. Ids and cameras leave some queries without a
    positive; options, sizes and layouts vary.
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dimension, queries, images = draw.choice([4, 7, 16, 33]), draw.randint(1, 40), draw.randint(1, max_gallery)
    cameras, identities = draw.choice([None, 1, 2, 6]), draw.choice([2, 5, 30])

    def rows(count: int) -> Tensor:
        places = torch.rand(count, dimension, generator=generator).argsort(1)[:, :4]
        signs = torch.randint(0, 2, (count, 4), generator=generator) * 2.0 - 1
        scale = 2.0 ** torch.randint(-1, 3, (count, 1), generator=generator)
        x = (torch.zeros(count, dimension).scatter_(1, places, signs) * scale).to(DTYPES[seed % 4])
        return x if draw.random() < 0.7 else torch.stack([x, x])[1].T.contiguous().T

    def integers(count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).to(draw.choice([torch.int32, torch.int64]))

    query, gallery = rows(queries), rows(images)
    query_ids, gallery_ids = integers(queries, -1, identities), integers(images, -1, identities)
    cams: tuple[Tensor | None, Tensor | None] = (None, None)
    if cameras is not None:
        cams = (integers(queries, 0, cameras + 1), integers(images, 0, cameras + 1))
    gallery_ids[0] = query_ids[0] = 1  # at least one query counts
    if cams[0] is not None and cams[1] is not None:
        cams[0][0], cams[1][0] = 0, 1
    options = {
        "metric": draw.choice(METRICS),
        "ap": draw.choice(AVERAGE_PRECISIONS),
        "ties": draw.choice(["pessimistic", "optimistic"]),
        "max_rank": draw.choice([1, 10, 50, 300]),
    }
    return (query, gallery, query_ids, gallery_ids, *cams), options


def check_exact_case(seed: int, device: str, max_gallery: int) -> None:
    """From the features, in one piece and in three, and from the distances."""
    arguments, options = exact_case(seed, max_gallery)
    arguments = tuple(None if value is None else value.to(device) for value in arguments)
    found = rank_metrics(*arguments, **options)
    assert_same(in_pieces(*arguments, cuts=(len(arguments[1]) // 3, len(arguments[1]) // 2), **options), found, 0)
    metric = options.pop("metric")
    query, gallery, *labels = arguments
    exact = distances(query, gallery, metric)
    assert_same(rank_metrics_from_distances(exact, *labels, **options), found)
    labels = [None if value is None else value.cpu() for value in labels]
    assert_same(found, expected(exact.cpu(), *labels, **options))


def in_pieces(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    cuts: tuple[int, ...],
    **options: Any,
) -> RankMetrics:
    ranks = RankAccumulator(query, query_ids, query_cams, **options)
    pieces = [slice(*ends) for ends in itertools.pairwise((0, *cuts, len(gallery)))]
    for step, order in ((ranks.add_positives, pieces), (ranks.count, pieces[::-1])):
        for piece in order:
            step(gallery[piece], gallery_ids[piece], None if gallery_cams is None else gallery_cams[piece])
    return ranks.compute()


@pytest.mark.parametrize("tens", range(25))
def test_random_cases(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        check_exact_case(seed, "cpu", 300)


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_random_cases_of_every_backend(backend: Backend, seed: int) -> None:
    if backend.name == "triton":  # float16 and float32: the interpreter multiplies bfloat16 wrongly
        seed = 4 * (seed - 1000) + 2 * (seed % 2)
    check_exact_case(seed, backend.device, 150)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [1, 3, 64, 255, 1000])
def test_equal_rows_tie(metric: str, dimension: int, dtype: torch.dtype) -> None:
    """A gallery of a few distinct rows, each under several identities, at random places of many tiles."""
    draw = np.random.default_rng(dimension)
    generator = torch.Generator().manual_seed(dimension)
    for images in (40, 1600):
        distinct = torch.randn(6, dimension, generator=generator).to(dtype)
        query = torch.randn(300, dimension, generator=generator).to(dtype)[: min(images, 300)]
        drawn = torch.from_numpy(draw.integers(0, 6, images))
        query_ids = torch.from_numpy(draw.integers(0, 9, len(query)))
        gallery_ids = torch.from_numpy(draw.integers(0, 9, images))
        wanted = expected(distances(query, distinct, metric)[:, drawn], query_ids, gallery_ids)
        assert_same(rank_metrics(query, distinct[drawn], query_ids, gallery_ids, metric=metric), wanted)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equal_rows_tie_on_every_backend(backend: Backend, metric: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    distinct, query = (torch.randn(n, 50, generator=generator).to(dtype) for n in (4, 37))
    drawn, gallery_ids = (torch.randint(0, 4, (199,), generator=generator) for _ in range(2))
    query_ids = torch.randint(0, 4, (37,), generator=generator)
    wanted = expected(distances(query, distinct, metric)[:, drawn], query_ids, gallery_ids)
    arguments = (query, distinct[drawn], query_ids, gallery_ids)
    assert_same(rank_metrics(*(value.to(backend.device) for value in arguments), metric=metric), wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_a_collapsed_model_does_not_score(backend: Backend, metric: str) -> None:
    """All features equal: every negative comes before every positive."""
    row = torch.randn(1, 70, generator=torch.Generator().manual_seed(0), device="cpu").to(backend.device)
    gallery_ids = torch.arange(140, device=backend.device) // 2
    result = rank_metrics(row.expand(70, -1), row.expand(140, -1), gallery_ids[::2], gallery_ids, metric=metric)
    assert result.cmc.count_nonzero() == 0
    assert result.mAP == pytest.approx((1 / 139 + 2 / 140) / 2, abs=1e-15)
    assert result.mINP == pytest.approx(2 / 140, abs=1e-15)


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_rows_tie_on_other_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            test_equal_rows_tie("cosine", 255, dtype)
    finally:
        torch.set_num_threads(before)


def test_many_positives_of_one_query() -> None:
    """5,000 positives of one query among queries with a few; gallery wider than one chunk of columns."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-4, 5, (n, 8), generator=generator).float() for n in (20, 70_000))
    gallery_ids = torch.randint(10, 4000, (70_000,), generator=generator)
    gallery_ids[torch.randperm(70_000, generator=generator)[:5000]] = 3
    query_ids = torch.randint(10, 4000, (20,), generator=generator)
    query_ids[7] = 3
    for metric in ("euclidean", "dot"):
        wanted = expected(distances(query, gallery, metric), query_ids, gallery_ids)
        assert_same(rank_metrics(query, gallery, query_ids, gallery_ids, metric=metric), wanted, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e12, 1e30])
def test_any_finite_magnitude(backend: Backend, metric: str, dtype: torch.dtype, scale: float) -> None:
    """Squares of these features leave the range of float32."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-4, 5, (n, 8), generator=generator).to(dtype) for n in (9, 60))
    query_ids, gallery_ids = (torch.randint(0, 6, (n,), generator=generator) for n in (9, 60))
    scale = 2.0 ** round(math.log2(scale))
    if metric == "cosine":
        gallery[:], query[:] = gallery[0], query[0]
    wanted = expected(distances(query, gallery, metric), query_ids, gallery_ids)
    arguments = (query * scale, gallery * scale, query_ids, gallery_ids)
    assert_same(rank_metrics(*(value.to(backend.device) for value in arguments), metric=metric), wanted)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_a_large_common_offset_changes_nothing(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 64, generator=generator) for n in (20, 300))
    query, gallery = query + 1000, gallery + 1000
    query_ids, gallery_ids = (torch.randint(0, 30, (n,), generator=generator) for n in (20, 300))
    wanted = expected(distances(query, gallery, metric), query_ids, gallery_ids)
    assert_same(rank_metrics(query, gallery, query_ids, gallery_ids, metric=metric), wanted, 1e-3)


def test_order_of_the_gallery_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 40, generator=generator) for n in (30, 500))
    query_ids, gallery_ids = (torch.randint(0, 30, (n,), generator=generator) for n in (30, 500))
    order = torch.randperm(500, generator=generator)
    result = rank_metrics(query, gallery, query_ids, gallery_ids)
    assert_same(rank_metrics(query, gallery[order], query_ids, gallery_ids[order]), result, 0)


def test_fewer_images_than_max_rank() -> None:
    result = rank_metrics(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([1, 0]), max_rank=5)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]


def test_no_gradient_is_recorded() -> None:
    x, ids = torch.eye(3, requires_grad=True), torch.tensor([0, 0, 1])
    assert not rank_metrics(x, x, ids, ids).ap.requires_grad


def test_autocast_is_ignored() -> None:
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 40, generator=generator) for n in (30, 500))
    query_ids, gallery_ids = (torch.randint(0, 30, (n,), generator=generator) for n in (30, 500))
    result = rank_metrics(query, gallery, query_ids, gallery_ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(rank_metrics(query, gallery, query_ids, gallery_ids), result, 0)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="PyTorch 2.4 compiles inside of functions that it leaves out of a graph",
)
def test_called_from_compiled_code() -> None:
    """It runs as it is; a graph without breaks is refused with the reason."""
    x, ids = torch.eye(4), torch.tensor([0, 0, 1, 1])

    def share(x: Tensor) -> Tensor:
        return rank_metrics(x * 2, x, ids, ids).cmc + 1

    assert torch.equal(torch.compile(share, backend="eager")(x), share(x))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads its data"):
        torch.compile(share, backend="eager", fullgraph=True)(x)


_X, _IDS = torch.eye(4), torch.tensor([0, 0, 1, 1])
_NAN = torch.eye(4).index_put((torch.tensor([1, 3]), torch.tensor([0, 0])), torch.tensor(math.nan))
_WRONG: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("query", TypeError, "expected float16", {"query": _X.long()}),
    ("query", ValueError, r"expected shape \(N, D\)", {"query": _X[None]}),
    ("query", ValueError, "expected finite features, got NaN or infinity in 2 rows: 1, 3", {"query": _NAN}),
    ("gallery", ValueError, "expected finite features, .* in 4 rows: 0, 1, 2, 3", {"gallery": _X / 0}),
    ("gallery", TypeError, "expected torch.float32 as query", {"gallery": _X.double()}),
    ("gallery", ValueError, r"expected shape \(G, 4\), got \(4, 3\)", {"gallery": _X[:, :3]}),
    ("query_ids", ValueError, r"expected shape \(4,\), got \(3,\)", {"query_ids": _IDS[1:]}),
    ("query_ids", TypeError, "expected an integer dtype", {"query_ids": _IDS.float()}),
    ("query_ids", ValueError, "expected at least one query", {"query_ids": _IDS + 5}),
    ("query_ids", ValueError, "expected at least one query", {"query_ids": -_IDS.new_ones(4), "gallery_ids": _IDS - 1}),
    ("query_ids", ValueError, "from another camera", {"query_cams": _IDS * 0, "gallery_cams": _IDS * 0}),
    ("query_ids", ValueError, "expected at least one query", {"query": _X[:0], "query_ids": _IDS[:0]}),
    ("query_ids", ValueError, "expected at least one query", {"gallery": _X[:0], "gallery_ids": _IDS[:0]}),
    ("gallery_ids", ValueError, r"expected shape \(4,\)", {"gallery_ids": _IDS[None]}),
    ("gallery_cams", ValueError, "expected with query_cams, got None", {"query_cams": _IDS}),
    ("query_cams", ValueError, "expected with gallery_cams, got None", {"gallery_cams": _IDS}),
    ("query_cams", ValueError, r"expected shape \(4,\)", {"query_cams": _IDS[1:], "gallery_cams": _IDS}),
    ("metric", ValueError, "expected 'euclidean' or", {"metric": "l2"}),
    ("ap", ValueError, "expected 'rectangular' or 'trapezoidal'", {"ap": "interpolated"}),
    ("max_rank", ValueError, "expected from 1 to", {"max_rank": 0}),
    ("max_rank", TypeError, "expected an int, got float", {"max_rank": 5.0}),
    ("precision", ValueError, "expected 'fp32'", {"precision": "fp8"}),
]


@pytest.mark.parametrize(("name", "error", "message", "change"), _WRONG)
def test_wrong_arguments(name: str, error: type[Exception], message: str, change: dict[str, Any]) -> None:
    arguments = {"query": _X, "gallery": _X, "query_ids": _IDS, "gallery_ids": _IDS} | change
    with pytest.raises(error, match=f"^{name}: {message}" if "camera" not in message[:20] else message):
        rank_metrics(**arguments)


def test_a_backend_named_for_float64_does_not_fall_back() -> None:
    pytest.importorskip("triton")
    with use_backend("triton"), pytest.raises(TypeError, match="float64"):
        rank_metrics(_X.double(), _X.double(), _IDS, _IDS)


@pytest.mark.gpu
def test_refused_while_a_graph_is_captured() -> None:
    x, ids = _X.cuda(), _IDS.cuda()
    with pytest.raises(RuntimeError, match="outside CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        rank_metrics(x, x, ids, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_tie_on_a_gpu(metric: str, precision: str, dtype: torch.dtype) -> None:
    """Tiles of tensor-core products, at sizes that the interpreter does not reach."""
    generator = torch.Generator().manual_seed(0)
    distinct, query = (torch.randn(n, 333, generator=generator).to(dtype) for n in (3, 1000))
    drawn = torch.randint(0, 3, (7000,), generator=generator)
    query_ids, gallery_ids = (torch.randint(0, 90, (n,), generator=generator) for n in (1000, 7000))
    wanted = expected(distances(query, distinct, metric)[:, drawn], query_ids, gallery_ids)
    arguments = (value.cuda() for value in (query, distinct[drawn], query_ids, gallery_ids))
    found = rank_metrics(*arguments, metric=metric, precision=precision)
    assert_same(found, wanted, 1e-12 if precision == "fp32" else 1e-2)


# Rank-1, rank-5, mAP, mINP, and mAP with trapezoidal AP, as two other implementations give them.
REAL = {
    ("cuhk03", "cosine"): (199, 0.316583, 0.547739, 0.345945, 0.264044, 0.316152),
    ("cuhk03", "euclidean"): (199, 0.336683, 0.492462, 0.322023, 0.220193, None),
    ("cuhk01", "cosine"): (972, 0.759259, 0.894033, 0.737614, 0.657561, 0.710543),
    ("cuhk01", "euclidean"): (972, 0.633745, 0.824074, 0.616537, 0.515005, None),
    ("viper", "cosine"): (316, 0.449367, 0.677215, 0.554992, 0.554992, 0.502180),
    ("viper", "euclidean"): (316, 0.439873, 0.604430, 0.522546, 0.522546, None),
    ("pku", "cosine"): (74, 0.202703, 0.432432, 0.235322, 0.143594, 0.214947),
    ("pku", "euclidean"): (74, 0.256757, 0.500000, 0.230139, 0.113250, None),
    ("market_mini", "cosine"): (30, 0.700000, 0.966667, 0.759286, 0.716587, 0.714028),
    ("market_mini", "euclidean"): (30, 0.700000, 0.933333, 0.730491, 0.671631, None),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "metric"), REAL)
def test_real_features(real_data: Path, name: str, metric: str, dtype: torch.dtype) -> None:
    file = np.load(real_data / "data" / "features" / f"osnet_{name}.npz")
    features, ids, cams = (torch.from_numpy(file[key]) for key in ("features", "pids", "camids"))
    query, gallery = (torch.from_numpy(file["split"] == split) for split in (1, 2))
    features = features.to(dtype)
    arguments = (features[query], features[gallery], ids[query], ids[gallery], cams[query], cams[gallery])
    counted, *wanted, trapezoidal = REAL[name, metric]
    result = rank_metrics(*arguments, metric=metric)
    assert int(result.valid.sum()) == counted
    found = [float(result.cmc[0]), float(result.cmc[4]), result.mAP, result.mINP]
    assert [round(value, 6) for value in found] == wanted
    if trapezoidal is not None:
        assert round(rank_metrics(*arguments, metric=metric, ap="trapezoidal").mAP, 6) == trapezoidal


def _golden(folder: Path, file: str, *, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The arrays of each case."""
    arrays = np.load(folder / "golden" / f"{file}.npz")
    cases: dict[str, dict[str, Any]] = {}
    for key in arrays.files:
        case, _, name = key.partition("__")
        if name and case not in without:
            cases.setdefault(case, {})[name] = torch.from_numpy(np.atleast_1d(arrays[key]))
    return cases


def _of_distances(case: dict[str, Any], max_rank: int, **options: Any) -> RankMetrics:
    """From the distances, and from features: −x·y of x = −distance and y = unit vectors is the distance, exactly."""
    distance = case["distmat"]
    queries, images = map(torch.arange, distance.shape)  # identities where a case names none
    labels = [case.get("q_pids", queries), case.get("g_pids", images)]
    labels += [case.get("q_camids", queries * 0), case.get("g_camids", images * 0 + 1)]
    unit_vectors = torch.eye(len(images), dtype=distance.dtype)
    result = rank_metrics_from_distances(distance, *labels, max_rank=max_rank, **options)
    of_features = rank_metrics(-distance, unit_vectors, *labels, metric="dot", max_rank=max_rank, **options)
    assert_same(of_features, result)
    return result


@pytest.mark.parametrize(
    "file",
    [
        f"{peer}_{function}"
        for peer, functions in {
            "torchreid": ("evaluate_rank", "evaluate_cy", "eval_cuhk03"),
            "fastreid": ("evaluate_rank", "evaluate_cy", "eval_cuhk03"),
            "transreid": ("eval_func",),
            "strongbaseline": ("eval_func",),
        }.items()
        for function in functions
    ],
)
def test_golden_rankings(real_data: Path, file: str) -> None:
    for name, case in _golden(real_data, file).items():
        kinds = {"_ties_worst": "pessimistic", "_ties_best": "optimistic"} if "cmc_ties_worst" in case else {"": None}
        for suffix, ties in kinds.items():
            result = _of_distances(case, int(case["max_rank"]), **({} if ties is None else {"ties": ties}))
            if not file.endswith("cuhk03"):
                cmc = case[f"cmc{suffix}"].double()
                assert_close(result.cmc[: len(cmc)], cmc, name, 1e-6)
            if f"all_AP{suffix}" in case:
                average = case[f"all_AP{suffix}"].double()
                assert_close(result.ap[result.valid], average, name, 1e-6)
                inverse = float(case[f"all_INP{suffix}"].double().mean())
                assert result.mINP == pytest.approx(inverse, abs=1e-6), name
            else:
                assert result.mAP == pytest.approx(float(case[f"mAP{suffix}"]), abs=1e-6), name


@pytest.mark.parametrize("peer", ["torchreid", "fastreid"])
def test_golden_single_shot(real_data: Path, peer: str) -> None:
    """Their CMC is the mean of ten draws for each of 24 queries, ours here of 400: as near as the former varies."""
    for name, case in _golden(real_data, f"{peer}_eval_cuhk03").items():
        labels = [case[key] for key in ("q_pids", "g_pids", "q_camids", "g_camids")]
        unit_vectors = torch.eye(case["distmat"].shape[1], dtype=case["distmat"].dtype)
        result = rank_metrics(
            -case["distmat"], unit_vectors, *labels, metric="dot", max_rank=int(case["max_rank"]), single_shot=400
        )
        cmc = case["cmc"].double()
        spread = (cmc * (1 - cmc) / 10 / int(result.valid.sum())).sqrt()
        found = result.cmc[: len(cmc)]
        exact = name == "one_image_per_identity"
        assert (found - cmc).abs().le(1e-6 if exact else 4 * spread + 0.02).all(), (name, found, cmc)
        assert result.mAP == pytest.approx(float(case["mAP"]), abs=1e-6), name


@pytest.mark.parametrize("peer", ["bau", "clustercontrast"])
def test_golden_open_reid(real_data: Path, peer: str) -> None:
    """Their mAP is scikit-learn's; their CMC counts the first match, or each by 1 over their number; and separate
    cameras leave out what the query's camera saw: infinitely far, it is behind every positive."""
    for name, case in _golden(real_data, f"{peer}_cmc", without=("ties_mixed", "default_ids")).items():
        assert_close(_of_distances(case, 100).cmc, case["cmc_market1501"], name, 1e-9)
        labels = [case[key] for key in ("q_pids", "g_pids", "q_camids", "g_camids")]
        ranks = positive_ranks_from_distances(case["distmat"], *labels)
        assert_close(ranks.cmc(100), case["cmc_market1501"], name, 1e-9)
        assert_close(ranks.cmc(100, every_match=True), case["cmc_default"], name, 1e-9)
        apart = case["distmat"].masked_fill(case["q_camids"][:, None] == case["g_camids"], torch.inf)
        ranks = positive_ranks_from_distances(apart, *labels)
        assert_close(ranks.cmc(100), case["cmc_separate_camera"], name, 1e-9)
    for name, case in _golden(real_data, f"{peer}_mean_ap").items():
        assert _of_distances(case, 1, ties="grouped").mAP == pytest.approx(float(case["mAP"]), abs=1e-9), name


def test_golden_verification(real_data: Path) -> None:
    """fast-reid's scores and labels of all pairs; the rate at a threshold is counted in them here."""
    for name, case in _golden(real_data, "fastreid_evaluate_roc").items():
        scores, same = case["scores"].double(), case["labels"] == 0
        labels = [case[key] for key in ("q_pids", "g_pids", "q_camids", "g_camids")]
        rates = (0.0, 1e-3, 0.01, 0.1, 0.5, 0.99)
        found = tpr_at_fpr_from_distances(case["distmat"], *labels, fpr=rates, junk=None, unknown_camera=None)
        wanted = []
        for rate in rates:
            accepted = [scores <= t for t in (-torch.inf, *scores.unique().tolist())]
            wanted.append(max(float(a[same].double().mean()) for a in accepted if a[~same].double().mean() <= rate))
        assert found.tolist() == pytest.approx(wanted, abs=1e-12), name


def test_golden_trapezoid(real_data: Path) -> None:
    """layumi's, from inner products; its script divides by all queries, ours by the valid ones."""
    for name, case in _golden(real_data, "layumi_evaluate").items():
        arguments = [case[key] for key in ("q_feat", "g_feat", "q_pids", "g_pids", "q_camids", "g_camids")]
        result = rank_metrics(*arguments, metric="dot", ap="trapezoidal", max_rank=arguments[1].shape[0])
        assert torch.equal(result.valid, case["valid"]), name
        assert_close(result.ap[result.valid], case["ap_per_query"][result.valid], name, 1e-9)
        assert_close(result.cmc, case["cmc_per_query"][result.valid].double().mean(0), name, 1e-9)


def test_golden_from_features(real_data: Path) -> None:
    for name, case in _golden(real_data, "transreid_R1_mAP_eval", without=("rerank",)).items():
        count = int(case["num_query"])
        split = [part for key in ("feats", "pids", "camids") for part in (case[key][:count], case[key][count:])]
        result = rank_metrics(*split, metric="cosine" if bool(case["feat_norm"]) else "euclidean")
        assert_close(result.cmc, case["cmc"].double(), name, 1e-6)
        assert result.mAP == pytest.approx(float(case["mAP"]), abs=1e-6), name
