"""Nearest neighbors against a stable sort of a float64 distance matrix, ties on purpose."""

from __future__ import annotations

import importlib
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor

import apd_kernels.reference.neighbors as reference
from apd_kernels import Neighbors, knn, rank_metrics, use_backend
from apd_kernels._core.operands import METRICS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """float64, and equal for equal rows: sums over one row are taken in one order, whatever its place."""
    x, y = x.double()[:, None], y.double()[None]
    if metric == "dot":
        return 0 - (x * y).sum(-1)
    if metric == "cosine":
        x, y = (rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-300) for rows in (x, y))
        return 1 - (x * y).sum(-1)
    squared = (x - y).square().sum(-1)
    return squared.sqrt() if metric == "euclidean" else squared


def allowed(
    queries: int,
    images: int,
    *,
    exclude_same: tuple[Tensor, ...] | None = None,
    exclude_self: bool | Tensor = False,
    mask: Tensor | None = None,
    **_: object,
) -> Tensor:
    """The rows that each query may find, (Q, G)."""
    found = torch.ones(queries, images, dtype=torch.bool)
    if mask is not None:
        found &= mask
    if exclude_same is not None:
        a, b, c, d = exclude_same
        found &= ~((a[:, None] == b) & (c[:, None] == d) & (b != -1) & (d != -1))
    own = torch.arange(queries) if exclude_self is True else exclude_self
    if isinstance(own, Tensor):
        found &= own[:, None] != torch.arange(images)
    return found


def expected(distance: Tensor, found: Tensor, k: int, max_distance: float | None = None) -> Neighbors:
    distance = distance.double().masked_fill(~found, math.inf)
    if max_distance is not None:
        distance = distance.masked_fill(distance > max_distance, math.inf)
    distance = torch.nn.functional.pad(distance, (0, k), value=math.inf)
    value, index = distance.sort(dim=1, stable=True)
    return Neighbors(value[:, :k], index.masked_fill(value == math.inf, -1)[:, :k])


def assert_same(found: Neighbors, wanted: Neighbors, relative: float = 1e-6) -> None:
    assert torch.equal(found.indices.cpu(), wanted.indices)
    scale = wanted.distances.masked_fill(wanted.distances.isinf(), 0).abs().max().item() if len(wanted.distances) else 0
    torch.testing.assert_close(found.distances.cpu().double(), wanted.distances, rtol=0, atol=relative * scale)


def draw(*sizes: int, dimension: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, dimension, generator=generator).to(dtype) for size in sizes]


def exact_case(seed: int, max_gallery: int) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
    """Random arguments whose products, norms and distances are exact in every dtype: ±1 in four places, times a power
    of two. Distances take few values, so most are ties; options, sizes and layouts vary."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dimension, queries, images = choose.choice([4, 7, 16, 33]), choose.randint(1, 40), choose.randint(1, max_gallery)

    def rows(count: int) -> Tensor:
        places = torch.rand(count, dimension, generator=generator).argsort(1)[:, :4]
        signs = torch.randint(0, 2, (count, 4), generator=generator) * 2.0 - 1
        scale = 2.0 ** torch.randint(-1, 3, (count, 1), generator=generator)
        x = (torch.zeros(count, dimension).scatter_(1, places, signs) * scale).to(DTYPES[seed % 4])
        return x if choose.random() < 0.7 else x.T.contiguous().T

    def integers(count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).to(choose.choice([torch.int32, torch.int64]))

    options: dict[str, Any] = {"metric": choose.choice(METRICS)}
    if choose.random() < 0.4:
        ids = integers(queries, -1, 3), integers(images, -1, 3)
        options["exclude_same"] = (*ids, integers(queries, -1, 2), integers(images, -1, 2))
    if choose.random() < 0.3:
        options["exclude_self"] = integers(queries, -1, images)
    if choose.random() < 0.4:
        shape = (images,) if choose.random() < 0.5 else (queries, images)
        options["mask"] = torch.rand(shape, generator=generator) < choose.choice([0.02, 0.5, 0.9])
    if choose.random() < 0.3:
        options["max_distance"] = choose.choice([0.0, 0.5, 1.0, 4.0])
    k = choose.choice([1, 2, 5, 20, 100, images, images + 3])
    return (rows(queries), rows(images), k), options


def check_exact_case(seed: int, device: str, max_gallery: int) -> None:
    arguments, options = exact_case(seed, max_gallery)
    query, gallery, k = arguments
    moved = {
        name: tuple(x.to(device) for x in value) if isinstance(value, tuple) else value
        for name, value in options.items()
    } | {name: value.to(device) for name, value in options.items() if isinstance(value, Tensor)}
    result = knn(query.to(device), gallery.to(device), k, **moved)
    distance = distances(query, gallery, options["metric"])
    found = allowed(len(query), len(gallery), **options)
    assert_same(result, expected(distance, found, k, options.get("max_distance")))


@pytest.mark.parametrize("tens", range(25))
def test_random_cases(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        check_exact_case(seed, "cpu", 300)


@pytest.mark.parametrize("seed", range(1000, 1016))
def test_random_cases_of_every_backend(backend: Backend, seed: int) -> None:
    if backend.name == "triton":  # float16 and float32: the interpreter multiplies bfloat16 wrongly
        seed = 4 * (seed - 1000) + 2 * (seed % 2)
    check_exact_case(seed, backend.device, 150)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(1, 1), (37, 199), (199, 37)], ids=str)
def test_random_features(backend: Backend, metric: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("not for this dtype")
    query, gallery = draw(*sizes, dimension=64, dtype=dtype)
    result = knn(query.to(backend.device), gallery.to(backend.device), 7, metric=metric)
    assert result.indices.dtype == torch.int64
    assert result.distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = expected(distances(query, gallery, metric), torch.ones(sizes, dtype=torch.bool), 7)
    assert_same(result, wanted, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [1, 3, 64, 255, 1000])
def test_equal_rows_are_ordered_by_index(metric: str, dimension: int, dtype: torch.dtype) -> None:
    """A gallery of a few distinct rows, at random places of many tiles."""
    distinct, query = draw(6, 300, dimension=dimension, seed=dimension, dtype=dtype)
    for images, k in ((40, 9), (1600, 400 if dimension < 255 else 40)):
        drawn = torch.from_numpy(np.random.default_rng(dimension).integers(0, 6, images))
        some = query[: min(images, 300)]
        if metric == "cosine" and dimension == 1:
            some = some.sign()  # in one dimension all angles are 0 or π: every row ties
            distance = (some != distinct[drawn].sign().T).double() * 2
        else:
            distance = distances(some, distinct, metric)[:, drawn]
        result = knn(some, distinct[drawn], k, metric=metric)
        assert_same(result, expected(distance, torch.ones_like(distance, dtype=torch.bool), k), 2e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equal_rows_are_ordered_by_index_on_every_backend(backend: Backend, metric: str, dtype: torch.dtype) -> None:
    distinct, query = draw(4, 37, dimension=50, seed=1, dtype=dtype)
    drawn = torch.randint(0, 4, (199,), generator=torch.Generator().manual_seed(1))
    distance = distances(query, distinct, metric)[:, drawn]
    for k in (3, 60):
        result = knn(query.to(backend.device), distinct[drawn].to(backend.device), k, metric=metric)
        assert_same(result, expected(distance, torch.ones_like(distance, dtype=torch.bool), k))


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_equal(backend: Backend, metric: str) -> None:
    """Nothing but the index decides, and every row reaches any bound."""
    row = draw(1, dimension=70)[0].to(backend.device)
    result = knn(row.expand(5, -1), row.expand(700, -1), 3, metric=metric)
    assert result.indices.tolist() == [[0, 1, 2]] * 5
    wanted = -float(row.double().square().sum()) if metric == "dot" else 0.0
    torch.testing.assert_close(result.distances.cpu(), torch.full((5, 3), wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rows_of_zero(backend: Backend, metric: str) -> None:
    """At a cosine distance of 1 from every row, and from each other."""
    gallery = draw(90, dimension=20)[0]
    gallery[3::5] = 0
    query = torch.cat([torch.zeros(2, 20), gallery[:6]])
    distance = distances(query, gallery, metric)
    result = knn(query.to(backend.device), gallery.to(backend.device), 60, metric=metric)
    assert_same(result, expected(distance, torch.ones_like(distance, dtype=torch.bool), 60))


def test_neighbors_of_near_duplicates(backend: Backend) -> None:
    """Distances far below the rounding of x·y − ½‖y‖² keep their digits."""
    query = draw(20, dimension=256)[0] + 10
    gallery = torch.cat([query + 2.0**-14 * noise for noise in draw(20, dimension=256, seed=1)] + [query])
    result = knn(query.to(backend.device), gallery.to(backend.device), 2, metric="euclidean")
    assert result.indices.cpu().tolist() == [[20 + i, i] for i in range(20)]
    assert result.distances[:, 0].tolist() == [0] * 20
    wanted = (query.double() - gallery[:20].double()).norm(dim=1)
    torch.testing.assert_close(result.distances[:, 1].cpu().double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_a_gallery_of_several_chunks(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    monkeypatch.setattr(reference, "CHUNK_COLUMNS", reference.TILE_ROWS + 128)
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-2, 3, (n, 8), generator=generator).float() for n in (300, 2000))
    distance = distances(query, gallery, metric)
    own = torch.arange(300) * 6
    for k in (1, 30, 500, 1500):
        result = knn(query, gallery, k, metric=metric, exclude_self=own)
        assert_same(result, expected(distance, allowed(300, 2000, exclude_self=own), k))


def test_many_neighbors() -> None:
    query, gallery = draw(50, 5000, dimension=16)
    distance = distances(query, gallery, "euclidean")
    result = knn(query, gallery, 2048, metric="euclidean")
    assert_same(
        Neighbors(result.distances, result.indices * 0),
        expected(distance, distance >= 0, 2048)._replace(indices=result.indices * 0),
    )
    assert (result.distances.diff(dim=1) >= 0).all()
    at = distance.gather(1, result.indices)
    torch.testing.assert_close(result.distances.double(), at, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_rows_on_other_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            test_equal_rows_are_ordered_by_index("cosine", 255, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e12, 1e15])
def test_any_finite_magnitude(backend: Backend, metric: str, dtype: torch.dtype, scale: float) -> None:
    """Squares of these features leave the range of float32 where the distances do not."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-4, 5, (n, 8), generator=generator).to(dtype) for n in (9, 60))
    if metric == "cosine":
        query[:], gallery[:] = query[0], gallery[0]
    if metric == "euclidean":
        scale = scale**2 * 10
    scale = 2.0 ** round(math.log2(scale))
    distance = distances(query, gallery, metric)
    wanted = expected(distance, torch.ones_like(distance, dtype=torch.bool), 60)
    result = knn((query * scale).to(backend.device), (gallery * scale).to(backend.device), 60, metric=metric)
    power = {"euclidean": 1, "cosine": 0}.get(metric, 2)
    assert_same(Neighbors(result.distances.double() / scale**power, result.indices), wanted)


def test_a_large_common_offset_changes_nothing() -> None:
    query, gallery = (rows + 1000 for rows in draw(20, 300, dimension=64))
    distance = distances(query, gallery, "euclidean")
    result = knn(query, gallery, 10, metric="euclidean")
    assert_same(result, expected(distance, torch.ones_like(distance, dtype=torch.bool), 10))


def test_fewer_rows_than_k(backend: Backend) -> None:
    x = torch.eye(3, device=backend.device)
    result = knn(x, x, 5, metric="sqeuclidean", exclude_self=True)
    assert result.indices.tolist() == [[1, 2, -1, -1, -1], [0, 2, -1, -1, -1], [0, 1, -1, -1, -1]]
    assert result.distances[0].tolist() == [2, 2, math.inf, math.inf, math.inf]


@pytest.mark.parametrize(("queries", "images"), [(0, 4), (4, 0), (0, 0)])
def test_empty(backend: Backend, queries: int, images: int) -> None:
    query, gallery = (torch.zeros(n, 3, device=backend.device) for n in (queries, images))
    result = knn(query, gallery, 2)
    assert result.distances.tolist() == [[math.inf] * 2] * queries
    assert result.indices.tolist() == [[-1, -1]] * queries


@pytest.mark.parametrize("per_query", [False, True])
def test_nothing_to_search(backend: Backend, per_query: bool) -> None:
    x = torch.eye(3, device=backend.device)
    mask = torch.zeros((3, 3) if per_query else 3, dtype=torch.bool, device=backend.device)
    result = knn(x, x, 2, mask=mask, exclude_self=True)
    assert result.indices.tolist() == [[-1, -1]] * 3
    assert result.distances.isinf().all()


def test_a_row_at_the_largest_distance_is_found(backend: Backend) -> None:
    gallery = torch.tensor([[5.0], [1.0], [2.0]], device=backend.device)
    result = knn(gallery[:1] * 0, gallery, 3, metric="euclidean", max_distance=2.0)
    assert result.indices.tolist() == [[1, 2, -1]]
    assert result.distances.tolist() == [[1, 2, math.inf]]
    result = knn(gallery[:1], gallery, 3, metric="dot", max_distance=-10)
    assert result.indices.tolist() == [[0, 2, -1]]


def test_strided_masks(backend: Backend) -> None:
    query, gallery = (x.to(backend.device) for x in draw(7, 90, dimension=5))
    mask = torch.rand(90, 7, generator=torch.Generator().manual_seed(0)).to(backend.device) < 0.5
    found, wanted = (knn(query, gallery, 9, mask=x) for x in (mask.T, mask.T.contiguous()))
    assert torch.equal(found.indices, wanted.indices)
    assert mask.T.gather(1, found.indices).all()
    found, wanted = (knn(query, gallery, 9, mask=x) for x in (mask[:, 3], mask[:, 3][None].expand(7, -1)))
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.distances, wanted.distances)


@pytest.mark.parametrize("reverse", [False, True])
def test_buffers_that_are_too_small(backend: Backend, monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    """The nearest rows lie where the bound did not look, or one after the other: the kernel collects again."""
    if backend.name != "triton":
        pytest.skip("how the kernels work")
    kernels = importlib.import_module("apd_kernels.kernels.neighbors")
    calls = []
    collect = kernels.collect

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[0].shape[0])
        return collect(*arguments)

    monkeypatch.setattr(kernels, "collect", counted)
    sampled = torch.zeros(640, dtype=torch.bool)
    for tile in range(0, 10, 4):
        sampled[tile::10] = True
    place = torch.where(sampled, 1000.0, 0) + torch.arange(640) * (-1.0 if reverse else 1.0)
    gallery, query = place[:, None].to(backend.device), torch.tensor([[-1e3], [1e3], [500.0]], device=backend.device)
    distance = distances(query.cpu(), gallery.cpu(), "euclidean")
    assert_same(
        knn(query, gallery, 2, metric="euclidean"), expected(distance, torch.ones_like(distance, dtype=torch.bool), 2)
    )
    assert len(calls) > 1
    assert calls[0] == 3 > calls[1]


def test_a_bound_that_is_too_high(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name != "triton":
        pytest.skip("how the kernels work")
    kernels = importlib.import_module("apd_kernels.kernels.neighbors")
    group_maxima = kernels.group_maxima
    monkeypatch.setattr(kernels, "group_maxima", lambda *arguments: group_maxima(*arguments) + 0.01)
    query, gallery = draw(20, 100, dimension=8)
    distance = distances(query, gallery, "cosine")
    result = knn(query.to(backend.device), gallery.to(backend.device), 5)
    assert_same(result, expected(distance, torch.ones_like(distance, dtype=torch.bool), 5))


def test_blocks_of_queries(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name != "triton":
        pytest.skip("how the kernels work")
    kernels = importlib.import_module("apd_kernels.kernels.neighbors")
    monkeypatch.setattr(kernels, "WORKING_BYTES", 1)
    check_exact_case(2, backend.device, 100)
    query, gallery = draw(130, 40, dimension=8)
    own = torch.arange(130) % 40
    distance = distances(query, gallery, "cosine")
    arguments = (x.to(backend.device) for x in (query, gallery))
    result = knn(*arguments, 3, exclude_self=own.to(backend.device))
    assert_same(result, expected(distance, allowed(130, 40, exclude_self=own), 3))


def test_no_gradient_is_recorded() -> None:
    x = torch.eye(3, requires_grad=True)
    assert not knn(x, x, 2).distances.requires_grad


def test_autocast_is_ignored() -> None:
    query, gallery = draw(30, 500, dimension=40)
    result = knn(query, gallery, 10)
    with torch.autocast("cpu", torch.bfloat16):
        other = knn(query, gallery, 10)
    assert torch.equal(result.distances, other.distances)
    assert torch.equal(result.indices, other.indices)


def test_called_from_compiled_code() -> None:
    """It runs as it is; a graph without breaks is refused with the reason."""
    x = torch.eye(4)

    def nearest(x: Tensor) -> Tensor:
        return knn(x * 2, x, 2).distances + 1

    assert torch.equal(torch.compile(nearest, backend="eager")(x), nearest(x))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads its data"):
        torch.compile(nearest, backend="eager", fullgraph=True)(x)


_X, _IDS = torch.eye(4), torch.tensor([0, 0, 1, 1])
_NAN = torch.eye(4).index_put((torch.tensor([1, 3]), torch.tensor([0, 0])), torch.tensor(math.nan))
_WRONG: list[tuple[str, type[Exception], str, dict[str, Any]]] = [
    ("query", TypeError, "expected float16", {"query": _X.long()}),
    ("query", ValueError, r"expected shape \(N, D\)", {"query": _X[None]}),
    ("query", ValueError, "expected finite features, got NaN or infinity in 2 rows: 1, 3", {"query": _NAN}),
    ("gallery", ValueError, "expected finite features, .* in 4 rows: 0, 1, 2, 3", {"gallery": _X / 0}),
    ("gallery", TypeError, "expected torch.float32 as query", {"gallery": _X.double()}),
    ("gallery", ValueError, r"expected shape \(G, 4\), got \(4, 3\)", {"gallery": _X[:, :3]}),
    ("k", ValueError, "expected at least 1, got 0", {"k": 0}),
    ("k", TypeError, "expected an int, got float", {"k": 5.0}),
    ("k", TypeError, "expected an int, got bool", {"k": True}),
    ("metric", ValueError, "expected 'euclidean' or", {"metric": "l2"}),
    (
        "exclude_same",
        TypeError,
        r"expected a tuple \(query_ids, .*, got 2 values",
        {"exclude_same": (_IDS, _IDS), "gallery": _X.clone()},
    ),
    ("exclude_same", TypeError, r"expected a tuple \(query_ids, .*, got Tensor", {"exclude_same": _IDS}),
    ("exclude_same: gallery_cams", ValueError, r"expected shape \(4,\)", {"exclude_same": (*[_IDS] * 3, _IDS[1:])}),
    ("exclude_same: query_ids", TypeError, "expected an integer", {"exclude_same": (_IDS.float(), *[_IDS] * 3)}),
    ("exclude_self", ValueError, "expected as many queries", {"exclude_self": True, "query": _X[:3]}),
    ("exclude_self", ValueError, r"expected shape \(4,\)", {"exclude_self": _IDS[1:]}),
    ("exclude_self", TypeError, "expected a torch.Tensor, got int", {"exclude_self": 1}),
    ("exclude_self", ValueError, "expected rows of the gallery, .* got 4 for query 2", {"exclude_self": _IDS + 3}),
    ("mask", TypeError, "expected torch.bool, got torch.int64", {"mask": _IDS}),
    ("mask", TypeError, "expected a torch.Tensor, got list", {"mask": [True] * 4}),
    ("mask", ValueError, r"expected shape \(4,\) or \(3, 4\), got \(4, 4\)", {"mask": _X > 0, "query": _X[:3]}),
    ("max_distance", ValueError, "expected a finite number of at least 0, got -1", {"max_distance": -1}),
    ("max_distance", TypeError, "expected a number, got str", {"max_distance": "1"}),
    ("precision", ValueError, "expected 'fp32'", {"precision": "fp8"}),
]


@pytest.mark.parametrize(("name", "error", "message", "change"), _WRONG)
def test_wrong_arguments(name: str, error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{name}: {message}"):
        knn(**({"query": _X, "gallery": _X, "k": 2} | change))


def test_a_backend_named_for_float64_does_not_fall_back() -> None:
    pytest.importorskip("triton")
    with use_backend("triton"), pytest.raises(TypeError, match="float64"):
        knn(_X.double(), _X.double(), 1)


@pytest.mark.gpu
def test_refused_while_a_graph_is_captured() -> None:
    x = _X.cuda()
    with pytest.raises(RuntimeError, match="outside CUDA graph capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        knn(x, x, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 100, 2048])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_on_a_gpu(metric: str, precision: str, k: int) -> None:
    """Tiles of tensor-core products, at sizes that the interpreter does not reach."""
    distinct, query = draw(3, 1000, dimension=333)
    drawn = torch.randint(0, 3, (40_000,), generator=torch.Generator().manual_seed(0))
    result = knn(query.cuda(), distinct[drawn].cuda(), k, metric=metric, precision=precision)
    # Every query finds one distinct row k times: its first k places, in order.
    which = drawn[result.indices.cpu()]
    assert (which == which[:, :1]).all()
    places = torch.stack([(drawn == i).nonzero()[:k, 0] for i in range(3)])
    assert torch.equal(result.indices.cpu(), places[which[:, 0]])
    if precision == "fp32":
        assert torch.equal(which[:, 0], distances(query, distinct, metric).argmin(1))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", ["cuhk03", "viper", "market_mini"])
def test_real_features(real_data: Path, name: str, metric: str) -> None:
    """Rank-1 is the nearest row after the query's identity and camera are removed."""
    file = np.load(real_data / "data" / "features" / f"osnet_{name}.npz")
    features, ids, cams = (torch.from_numpy(file[key]) for key in ("features", "pids", "camids"))
    query, gallery = (torch.from_numpy(file["split"] == split) for split in (1, 2))
    same = (ids[query], ids[gallery], cams[query], cams[gallery])
    result = knn(features[query], features[gallery], 20, metric=metric, exclude_same=same)
    right = ids[gallery][result.indices[:, 0]] == ids[query]
    ranked = rank_metrics(features[query], features[gallery], *same, metric=metric)
    assert right[ranked.valid].double().mean().item() == pytest.approx(float(ranked.cmc[0]), abs=1e-12)
    distance = distances(features[query][:5], features[gallery], metric)
    wanted = expected(distance, allowed(5, len(same[1]), exclude_same=(same[0][:5], same[1], same[2][:5], same[3])), 20)
    torch.testing.assert_close(result.distances[:5].double(), wanted.distances, rtol=1e-5, atol=1e-6)
