"""Random searches against a loop over pairs in float64, and galleries that were prepared."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

from apd_kernels import knn, prepare_rows
from apd_kernels._core.operands import METRICS


def distance(x: Tensor, y: Tensor, metric: str) -> float:
    if metric == "dot":
        return 0.0 - float((x * y).sum())
    if metric == "cosine":
        lengths = float(x.norm()), float(y.norm())
        return 1 - float((x / lengths[0] * (y / lengths[1])).sum()) if all(lengths) else 1.0
    squared = float((x - y).square().sum())
    return math.sqrt(squared) if metric == "euclidean" else squared


def looped(query: Tensor, gallery: Tensor, k: int, options: dict[str, Any]) -> tuple[list[list[float]], Any]:
    """Distances and indices of the nearest rows, one pair after the other."""
    same, own, mask = (options.get(name) for name in ("exclude_same", "exclude_self", "mask"))
    if same is not None and len(same) == 2:
        same = same[0], same[0], same[1], same[1]
    distances, indices = [], []
    for i, x in enumerate(query.double()):
        found = []
        for j, y in enumerate(gallery.double()):
            if (own is True and i == j) or (isinstance(own, Tensor) and int(own[i]) == j):
                continue
            if mask is not None and not bool(mask[j] if mask.dim() == 1 else mask[i, j]):
                continue
            if same is not None:
                of_query, of_image = (int(same[0][i]), int(same[2][i])), (int(same[1][j]), int(same[3][j]))
                if of_query == of_image and -1 not in of_query:
                    continue
            d = distance(x, y, options["metric"])
            if d <= options.get("max_distance", math.inf):
                found.append((d, j))
        found = sorted(found)[:k] + [(math.inf, -1)] * (k - len(found))
        distances.append([d for d, _ in found])
        indices.append([j for _, j in found])
    return distances, indices


def random_case(seed: int) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Rows that are random and not exact, some of them several times; any mixture of options."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dimension, queries, images = choose.choice([3, 8, 17, 32]), choose.randint(1, 6), choose.randint(1, 24)
    distinct = torch.randn(images, dimension, generator=generator, dtype=torch.float64) + choose.choice([0, 2])
    gallery = distinct[torch.randint(0, choose.choice([1 + images // 3, images]), (images,), generator=generator)]
    query = torch.randn(queries, dimension, generator=generator, dtype=torch.float64)
    among_themselves = choose.random() < 0.25
    if among_themselves:
        query, queries = gallery, images

    def integers(count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    options: dict[str, Any] = {"metric": choose.choice(METRICS)}
    if choose.random() < 0.5:
        ids, cams = integers(images, -1, 3), integers(images, -1, 2)
        of_queries = integers(queries, -1, 3), integers(queries, -1, 2)
        options["exclude_same"] = (ids, cams) if among_themselves else (of_queries[0], ids, of_queries[1], cams)
    if choose.random() < 0.4:
        options["exclude_self"] = True if among_themselves else integers(queries, -1, images)
    if choose.random() < 0.5:
        shape = (images,) if choose.random() < 0.5 else (queries, images)
        options["mask"] = torch.rand(shape, generator=generator) < choose.choice([0.1, 0.6])
    if choose.random() < 0.3:
        limits = {"dot": [-1.0, 3.0], "cosine": [0.8, 1.3], "euclidean": [2.0, 5.0], "sqeuclidean": [9.0, 40.0]}
        options["max_distance"] = choose.choice(limits[options["metric"]])
    return query, gallery, choose.choice([1, 3, images, images + 4]), options


@pytest.mark.parametrize("tens", range(25))
def test_random_cases(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        query, gallery, k, options = random_case(seed)
        distances, indices = looped(query, gallery, k, options)
        found = knn(query, gallery, k, **options)
        assert found.indices.tolist() == indices, seed
        wanted = torch.tensor(distances, dtype=torch.float64).reshape(found.distances.shape)
        torch.testing.assert_close(found.distances, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_prepared_galleries(backend: Backend, dtype: torch.dtype, metric: str) -> None:
    """The same bits in every search, whatever the queries and masks; of unit rows up to their rounding."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    generator = torch.Generator().manual_seed(0)
    for dimension in (7, 64):
        gallery = torch.randn(60, dimension, generator=generator).to(dtype)[torch.arange(150) % 60].to(backend.device)
        kept = prepare_rows(gallery, metric=metric)
        for size in (1.0, 300.0, 1 / 300):
            query = (torch.randn(9, dimension, generator=generator) * size).to(dtype).to(backend.device)
            for mask in (None, torch.rand(150, generator=generator).to(backend.device) < 0.4):
                found, wanted = (knn(query, rows, 8, metric=metric, mask=mask) for rows in (kept, gallery))
                assert torch.equal(found.indices, wanted.indices)
                if metric == "cosine":
                    torch.testing.assert_close(found.distances, wanted.distances, rtol=0, atol=1e-6)
                else:
                    assert torch.equal(found.distances, wanted.distances)


def test_a_prepared_gallery_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    kept = prepare_rows(gallery)
    before = kept.nbytes()
    wanted = knn(gallery[:5], kept, 3, metric="euclidean")
    assert kept.nbytes() >= before + gallery.nbytes
    monkeypatch.setattr("apd_kernels.evaluation.neighbors._made_gallery_rows", None)
    assert all(map(torch.equal, knn(gallery[:5], kept, 3, metric="sqeuclidean").indices, wanted.indices))


def test_prepared_galleries_of_another_kind() -> None:
    x = torch.eye(4)
    for rows, options, message in (
        (prepare_rows(x), {}, "expected rows prepared for metric 'cosine', got 'euclidean'"),
        (prepare_rows(x.double(), metric="cosine"), {}, "expected torch.float32 as query"),
        (prepare_rows(x[None], metric="cosine"), {}, r"expected shape \(M, 4\), got \(1, 4, 4\)"),
        (prepare_rows(x[:, :3], metric="cosine"), {}, r"expected shape \(M, 4\), got \(4, 3\)"),
        (prepare_rows(x, metric="cosine", precision="bf16"), {"precision": "fp32"}, "prepared for precision 'fp32'"),
        (prepare_rows(x / 0), {"metric": "euclidean"}, "expected finite features"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^gallery: .*{message}"):
            knn(x, rows, 2, **options)
    kept = prepare_rows(x)
    knn(x, kept, 2, metric="euclidean")
    x += 1
    with pytest.raises(RuntimeError, match="gallery: its rows were changed in place"):
        knn(x, kept, 2, metric="euclidean")


def test_identities_and_cameras_of_one_set() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    ids, cams = torch.arange(20) % 5, torch.arange(20) % 2
    wanted = knn(x, x.clone(), 6, exclude_same=(ids, ids, cams, cams))
    assert all(map(torch.equal, knn(x, x, 6, exclude_same=(ids, cams)), wanted))
    assert all(map(torch.equal, knn(x, x.clone(), 6, exclude_same=(ids, cams), exclude_self=True), wanted))
    with pytest.raises(
        TypeError, match=r"exclude_same: .*\(ids, cams\) where query and gallery are one tensor .* got 2"
    ):
        knn(x, x.clone(), 6, exclude_same=(ids, cams))
