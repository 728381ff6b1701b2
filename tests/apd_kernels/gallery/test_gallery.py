"""The gallery against a float64 search by sorting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apd_kernels import Gallery, SearchResult, pairwise_distance
from apd_kernels._core.operands import METRICS
from apd_kernels.gallery import faiss_index
from apd_kernels.gallery import gallery as gallery_module

faiss = pytest.importorskip("faiss")


def _rows(n: int, d: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _integer_rows(n: int, d: int = 5, seed: int = 0) -> Tensor:
    """Few distinct values: many ties, and every metric but "cosine" is exact."""
    return torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def _distances(rows: Tensor, queries: Tensor, metric: str) -> Tensor:
    x, y = queries.float().double(), rows.float().double()
    if metric in ("euclidean", "sqeuclidean"):
        squared = ((x[:, None] - y[None]) ** 2).sum(-1)
        return squared.sqrt() if metric == "euclidean" else squared
    return pairwise_distance(x, y, metric=metric)


def _exact(rows: Tensor, queries: Tensor, k: int, metric: str, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest by a stable sort of float64 distances."""
    distances = _distances(rows, queries, metric)
    if left_out is not None:
        distances[left_out] = torch.inf
    distances, indices = distances.sort(dim=1, stable=True)
    indices[distances == torch.inf] = -1
    missing = max(0, k - len(rows))
    distances = torch.nn.functional.pad(distances[:, :k], (0, missing), value=torch.inf)
    return distances, torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1)


def _assert_same(found: SearchResult, expected: SearchResult) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [0, 1, 37, 199, 700])
@pytest.mark.parametrize("q", [0, 1, 37])
def test_equals_sorting(metric: str, n: int, q: int) -> None:
    rows, queries = _rows(n), _rows(q, seed=1)
    gallery = Gallery(24, metric)
    gallery.add(rows, torch.arange(n) + 100, torch.arange(n) % 6)
    assert len(gallery) == n
    for k in (1, 10, 250):
        found = gallery.search(queries, k)
        distances, indices = _exact(rows, queries, k, metric)
        assert found.distances.dtype == torch.float32
        assert found.distances.shape == (q, k)
        torch.testing.assert_close(found.distances.double(), distances, rtol=2e-6, atol=2e-6)
        assert torch.equal(found.indices < 0, indices < 0)
        # Where another row was found, it is one as near as float32 can tell.
        other = (found.indices != indices).nonzero().T
        of_found = _distances(rows, queries, metric)[other[0], found.indices[tuple(other)]]
        torch.testing.assert_close(of_found, distances[tuple(other)], rtol=2e-7, atol=2e-7)
        assert torch.equal(found.ids, torch.where(found.indices < 0, -1, found.indices + 100))
        assert torch.equal(found.cams, torch.where(found.indices < 0, -1, found.indices % 6))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "dot"])
@pytest.mark.parametrize("k", [1, 7, 120])
def test_ties_are_ordered_by_index(metric: str, k: int) -> None:
    """Integer rows: float32 distances are exact, so the order must be exactly that of a stable sort."""
    rows, queries = _integer_rows(900), _integer_rows(50, seed=1)
    gallery = Gallery(5, metric)
    gallery.add(rows)
    found = gallery.search(queries, k)
    distances, indices = _exact(rows, queries, k, metric)
    assert torch.equal(found.distances, distances.float())
    assert torch.equal(found.indices, indices)


@pytest.mark.parametrize("metric", METRICS)
def test_duplicated_rows_are_ordered_by_index(metric: str) -> None:
    rows = _rows(40, 300).repeat(25, 1)  # row i is also row i + 40, i + 80, …
    gallery = Gallery(300, metric)
    gallery.add(rows)
    indices = gallery.search(_rows(30, 300, seed=1), 60).indices
    groups = indices.reshape(30, -1)
    first = groups[:, :25]
    assert torch.equal(first, first[:, :1] + 40 * torch.arange(25))
    second = groups[:, 25:50]
    assert torch.equal(second, second[:, :1] + 40 * torch.arange(25))
    assert torch.equal(groups[:, 50:], groups[:, 50:51] + 40 * torch.arange(10))


@pytest.mark.parametrize("d", [1, 3, 17, 31, 100, 513])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_tie_wherever_they_lie(metric: str, d: int) -> None:
    """Rows of odd lengths start at every alignment; sums must not depend on it."""
    for seed in range(5):
        row = _rows(1, d, seed)
        gallery = Gallery(d, metric)
        gallery.add(row)
        gallery.add(row.repeat(70, 1))
        found = gallery.search(row.repeat(33, 1) + _rows(1, d, 9), 71)
        assert (found.distances == found.distances[0, 0]).all()
        assert torch.equal(found.indices, torch.arange(71).repeat(33, 1))


def test_collapsed_gallery_is_ordered_by_index() -> None:
    gallery = Gallery(64)
    gallery.add(torch.ones(3000, 64))
    found = gallery.search(torch.ones(3, 64), 20)
    assert torch.equal(found.indices, torch.arange(20).repeat(3, 1))
    assert (found.distances == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_query_does_not_depend_on_the_others(metric: str) -> None:
    """FAISS switches arithmetic with the number of queries; the result must not."""
    rows, queries = _rows(500, 513), _rows(64, 513, seed=1)
    gallery = Gallery(513, metric)
    gallery.add(rows)
    together = gallery.search(queries, 30)
    for i in (0, 13, 63):
        _assert_same(gallery.search(queries[i : i + 1], 30), SearchResult(*(part[i : i + 1] for part in together)))
    in_pieces = Gallery(513, metric)
    for piece in rows.split(71):
        in_pieces.add(piece)
    _assert_same(in_pieces.search(queries, 30), together)


def test_small_distances_keep_their_digits() -> None:
    """1 − x·y in float32 knows nothing below 6e-8."""
    x = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([3e-5, 1e-5, 2e-5])
    gallery = Gallery(2)
    gallery.add(torch.stack([angles.cos(), angles.sin()], 1))
    found = gallery.search(x, 3)
    assert found.indices.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(found.distances[0], angles.sort().values ** 2 / 2, rtol=1e-3, atol=0)


def test_zero_rows() -> None:
    """A zero row is at cosine distance 1 from everything, also from itself, and ranks there."""
    gallery = Gallery(2)
    gallery.add(torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.1, 1.0], [2.0, 0.0]]))
    found = gallery.search(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 4)
    assert found.indices.tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert found.distances[0, [0, 2, 3]].tolist() == [0, 1, 2]
    assert found.distances[1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("metric", METRICS)
def test_range(metric: str) -> None:
    """Rows of any size in "cosine"; elsewhere up to 1e18, beyond which squares overflow."""
    rows = _rows(50) * 1e17
    gallery = Gallery(24, metric)
    gallery.add(rows)
    found = gallery.search(rows, 50)
    assert found.distances.isfinite().all()
    assert metric == "dot" or torch.equal(found.indices[:, 0], torch.arange(50))
    huge = torch.full((3, 24), 1e30)
    if metric == "cosine":
        gallery.add(huge)
        assert len(gallery) == 53
    else:
        with pytest.raises(ValueError, match=r"features: expected finite rows, got a norm over 1e\+18"):
            gallery.add(huge)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_input_kinds(dtype: torch.dtype) -> None:
    """Tensors of any floating dtype, numpy arrays, strides, read-only memory: the same rows give the same result."""
    rows, queries = _rows(60).to(dtype), _rows(9, seed=1).to(dtype)
    plain = Gallery(24)
    plain.add(rows.float())
    expected = plain.search(queries.float(), 5)
    strided = Gallery(24)
    strided.add(rows.repeat(2, 2)[::2, :24][:30])  # rows 0, 2, 4, … and again
    assert torch.equal(strided.search(queries, 1).indices >= 0, torch.ones(9, 1, dtype=torch.bool))
    transposed = Gallery(24)
    transposed.add(rows.T.contiguous().T.requires_grad_())
    _assert_same(transposed.search(queries.T.contiguous().T, 5), expected)
    if dtype != torch.bfloat16:
        array = rows.numpy().copy()
        array.flags.writeable = False
        from_numpy = Gallery(24)
        from_numpy.add(array, np.arange(60, dtype=np.int32), np.zeros(60, np.uint8))
        _assert_same(from_numpy.search(np.asfortranarray(queries.numpy()), 5)[:2], expected[:2])
        assert array.tobytes() == rows.numpy().tobytes()


def test_rows_are_copied() -> None:
    rows = _rows(10)
    for metric in METRICS:
        gallery = Gallery(24, metric)
        gallery.add(rows)
        before = gallery.search(rows.clone(), 3)
        kept = rows.clone()
        rows.zero_()
        _assert_same(gallery.search(kept, 3), before)
        rows.copy_(kept)
        gallery.ids.fill_(5)
        assert (gallery.ids == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 5, 40, 300])
def test_exclude_same(metric: str, k: int) -> None:
    """Rows with the query's identity and camera never appear, and nothing else is missing."""
    generator = torch.Generator().manual_seed(3)
    rows, queries = _integer_rows(260, 6), _integer_rows(31, 6, seed=1)
    rows, queries = rows + 0.5, queries + 0.5  # no zero rows
    ids, cams = torch.randint(-1, 3, (260,), generator=generator), torch.randint(-1, 2, (260,), generator=generator)
    q_ids, q_cams = torch.randint(-1, 3, (31,), generator=generator), torch.randint(-1, 2, (31,), generator=generator)
    gallery = Gallery(6, metric)
    gallery.add(rows, ids, cams)
    found = gallery.search(queries, k, exclude_same=(q_ids, q_cams))
    same = (ids == q_ids[:, None]) & (cams == q_cams[:, None]) & (ids != -1) & (cams != -1)
    assert same.any()
    distances, indices = _exact(rows, queries, k, metric, same)
    torch.testing.assert_close(found.distances.double(), distances, rtol=2e-6, atol=2e-6)
    if metric != "cosine":
        assert torch.equal(found.indices, indices)
    missing = found.indices < 0
    assert not same.gather(1, found.indices.clamp(min=0))[~missing].any()
    assert (found.ids[missing] == -1).all()


def test_exclude_same_of_a_whole_gallery() -> None:
    gallery = Gallery(24)
    gallery.add(_rows(100), torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.int64))
    found = gallery.search(_rows(1), 3, exclude_same=(torch.tensor([0]), torch.tensor([1])))
    assert found.distances.tolist() == [[float("inf")] * 3]
    assert [part.tolist() for part in found[1:]] == [[[-1] * 3]] * 3


def test_metadata() -> None:
    gallery = Gallery(24)
    gallery.add(torch.empty(0, 24), metadata={"name": [], "frame": []})
    gallery.add(_rows(2), metadata={"name": ["a", "é"], "frame": [1, 2]})
    gallery.add(_rows(1), metadata={"name": np.array(["longer name"]), "frame": np.array([7])})
    assert gallery.metadata["name"].tolist() == ["a", "é", "longer name"]
    assert gallery.metadata["frame"].tolist() == [1, 2, 7]
    for metadata, message in (
        (None, r"metadata: expected the columns of the rows before, \['frame', 'name'\], got none"),
        ({"name": ["x"], "frame": [1, 2]}, r"metadata\['frame'\]: expected shape \(1,\), got \(2,\)"),
        ({"name": ["x"], "frame": ["1"]}, r"metadata\['frame'\]: expected int64 as before"),
        ({"name": [{}], "frame": [1]}, r"metadata\['name'\]: expected strings, numbers or booleans, got object"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            gallery.add(_rows(1), metadata=metadata)
    assert len(gallery) == len(gallery.ids) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.add(_rows(3, 23)), ValueError, r"features: expected shape \(N, 24\), got \(3, 23\)"),
        (lambda g: g.add(_rows(3)[0]), ValueError, r"features: expected shape \(N, D\), got \(24,\)"),
        (lambda g: g.add(_rows(3).long()), TypeError, "features: expected float16, bfloat16, float32 or float64"),
        (lambda g: g.add(_rows(3).numpy().astype(int)), TypeError, "features: expected a floating dtype, got int64"),
        (lambda g: g.add([[0.0] * 24]), TypeError, r"features: expected a torch.Tensor, got list"),
        (lambda g: g.add(_rows(3), torch.arange(2)), ValueError, r"ids: expected shape \(3,\), got \(2,\)"),
        (lambda g: g.add(_rows(3), torch.arange(3.0)), TypeError, "ids: expected an integer dtype, got float32"),
        (
            lambda g: g.add(_rows(3), cams=[1, 2, 3]),
            TypeError,
            "cams: expected a torch.Tensor or numpy array",
        ),
        (lambda g: g.search(_rows(3, 23), 1), ValueError, r"queries: expected shape \(N, 24\), got \(3, 23\)"),
        (lambda g: g.search(_rows(3), 0), ValueError, "k: expected at least 1, got 0"),
        (lambda g: g.search(_rows(3), 2.0), TypeError, "k: expected an integer, got float"),
        (lambda g: g.search(_rows(3), True), TypeError, "k: expected an integer, got bool"),
        (lambda g: g.search(_rows(3), 1, exclude_same=torch.arange(3)), TypeError, "exclude_same: expected a pair"),
        (
            lambda g: g.search(_rows(3), 1, exclude_same=(torch.arange(3), torch.arange(3))),
            ValueError,
            "exclude_same: expected a gallery with ids; its rows were added without",
        ),
        (lambda g: Gallery(0), ValueError, "dim: expected at least 1, got 0"),
        (lambda g: Gallery(1 << 31), ValueError, "dim: expected at most 2,147,483,647, got 2,147,483,648"),
        (lambda g: Gallery(8, "l2"), ValueError, "metric: expected 'euclidean' or 'sqeuclidean' or 'cosine' or 'dot'"),
        (lambda g: Gallery(8, device="mps"), ValueError, "device: expected 'cpu' or 'cuda', got 'mps'"),
        (
            lambda g: Gallery(8, device="cuda:99"),
            RuntimeError,
            "device: expected a GPU that FAISS can use",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[Gallery], Any], error: type[Exception], message: str) -> None:
    gallery = Gallery(24)
    gallery.add(_rows(4))
    with pytest.raises(error, match=message):
        call(gallery)
    assert len(gallery) == len(gallery.ids) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("as_numpy", [False, True])
def test_rows_that_are_not_finite_are_named(value: float, as_numpy: bool) -> None:
    rows = _rows(20)
    rows[[3, 7], 5] = value
    gallery = Gallery(24)
    for name, call in (("features", gallery.add), ("queries", lambda x: gallery.search(x, 1))):
        with pytest.raises(ValueError, match=rf"{name}: expected finite rows, got .* in 2 of 20 rows: 3, 7"):
            call(rows.numpy() if as_numpy else rows)
    assert len(gallery) == 0


def test_float64_beyond_float32_is_named() -> None:
    rows = _rows(3, dtype=torch.float64)
    rows[1, 0] = 1e300
    for kind in (rows, rows.numpy()):
        with pytest.raises(ValueError, match="in 1 of 3 rows: 1"):
            Gallery(24).add(kind)


def test_import_without_faiss() -> None:
    """`import apd_kernels` leaves FAISS alone; the first use without it names the extra."""
    script = """
import sys
import apd_kernels
assert "faiss" not in sys.modules
sys.modules["faiss"] = None
try:
    apd_kernels.Gallery(8)
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'apd-kernels[retrieval]'" in run.stdout


# GPU


class _PretendGpuIndex:
    """Stands for GpuIndexFlat: other rounding, another order of ties, at most 2048 neighbours."""

    def __init__(self, index: Any) -> None:
        self.index = faiss.clone_index(index)
        self.asked: list[int] = []

    @property
    def ntotal(self) -> int:
        return int(self.index.ntotal)

    def add(self, rows: np.ndarray) -> None:
        self.index.add(rows)

    def search(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert k <= 2048
        self.asked.append(k)
        scores, indices = self.index.search(rows, self.ntotal)
        scores = scores + np.random.default_rng(0).uniform(-1e-6, 1e-6, scores.shape).astype(np.float32)
        sign = -1 if self.index.metric_type == faiss.METRIC_INNER_PRODUCT else 1
        order = np.argsort(sign * scores, 1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_PretendGpuIndex]]:
    made: list[_PretendGpuIndex] = []

    def to_gpu(resources: object, device: int, index: Any) -> _PretendGpuIndex:
        made.append(_PretendGpuIndex(index))
        return made[-1]

    monkeypatch.setattr(faiss_index, "check_gpu", lambda number: None)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    return made


@pytest.mark.parametrize("metric", METRICS)
def test_routing_to_a_gpu(metric: str, pretend_gpu: list[_PretendGpuIndex]) -> None:
    """A GPU is used, follows later additions and does not change the result; over 2048 neighbours come from the CPU."""
    rows, queries = _rows(3000, 8), _rows(11, 8, seed=1)
    rows[2900:] = rows[:100]
    gallery, on_cpu = Gallery(8, metric), Gallery(8, metric, device="cpu")
    assert (gallery.device.type, on_cpu.device.type) == ("cuda", "cpu")
    for piece in rows.split(1600):
        gallery.add(piece)
        on_cpu.add(piece)
        _assert_same(gallery.search(queries, 10), on_cpu.search(queries, 10))
    assert len(pretend_gpu) == 1
    assert pretend_gpu[0].ntotal == 3000
    calls = len(pretend_gpu[0].asked)
    _assert_same(gallery.search(queries, 2500), on_cpu.search(queries, 2500))
    assert len(pretend_gpu[0].asked) == calls


@pytest.mark.parametrize("metric", METRICS)
def test_rounding_cannot_hide_a_row(
    metric: str, pretend_gpu: list[_PretendGpuIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among rows closer to each other than the rounding of FAISS, the nearest are still those of a full comparison."""
    rows = torch.nn.functional.normalize(_rows(1, 8) + 1e-7 * _rows(500, 8, seed=1))
    queries = torch.nn.functional.normalize(_rows(40, 8, seed=2))
    gallery = Gallery(8, metric)
    gallery.add(rows)
    found = gallery.search(queries, 10)
    assert max(pretend_gpu[0].asked) > 10 + gallery_module.SPARE
    monkeypatch.setattr(gallery_module, "SPARE", len(rows))
    _assert_same(found, gallery.search(queries, 10))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 100, 2048, 5000])
def test_same_on_gpu_and_cpu(metric: str, k: int) -> None:
    if not faiss.get_num_gpus():
        pytest.skip("FAISS finds no GPU")
    rows, queries = _rows(6000, 200), _rows(300, 200, seed=1)
    rows[5000:] = rows[:1000]
    on_gpu, on_cpu = Gallery(200, metric, device="cuda"), Gallery(200, metric, device="cpu")
    for piece in rows.split(3500):
        on_gpu.add(piece.cuda())
        on_cpu.add(piece)
        _assert_same(on_gpu.search(queries.cuda(), k), on_cpu.search(queries, k))


def test_real_features(real_data: Path) -> None:
    """First neighbours in another camera give the reference rank-1."""
    with np.load(real_data / "data" / "features" / "osnet_cuhk03.npz") as file:
        features, pids, camids, split = (file[name] for name in ("features", "pids", "camids", "split"))
    gallery = Gallery(512)
    gallery.add(features[split == 2], pids[split == 2], camids[split == 2])
    queries, ids, cams = features[split == 1], pids[split == 1], camids[split == 1]
    found = gallery.search(queries, 1, exclude_same=(ids, cams))
    assert (found.ids[:, 0].numpy() == ids).sum() / 199 == pytest.approx(0.316583, abs=1e-6)
    distances, indices = _exact(torch.from_numpy(features[split == 2]), torch.from_numpy(queries), 20, "cosine")
    found = gallery.search(queries, 20)
    torch.testing.assert_close(found.distances.double(), distances, rtol=0, atol=1e-6)
    assert (found.indices == indices).float().mean() > 0.999


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, queries = Gallery(24), _rows(50, seed=3)
    gallery.add(_rows(199))
    expected = gallery.search(queries, 20)
    monkeypatch.setattr(gallery_module, "BLOCK_CANDIDATES", 100)
    _assert_same(gallery.search(queries, 20), expected)
