"""What never changes a figure: order, names, junk, pieces, precision, a common shift. Whatever the data, ties included.

Features are small integers, whose products are exact, or float16 numbers, which every dtype holds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_ranking import assert_same, expected

from apd_kernels import (
    Gallery,
    RankAccumulator,
    RankMetrics,
    jaccard_distance,
    k_reciprocal_rerank,
    knn,
    pairwise_distance,
    rank_metrics,
    rank_metrics_from_distances,
)

EFFORTS = pytest.mark.parametrize("examples", [120, pytest.param(2000, marks=pytest.mark.long)])
METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")
NOBODY = st.sampled_from([-1, None, 0])
ROUNDING = 4 * 2.0**-24  # of d², relative to (‖x‖ + ‖y‖)² about the centre


class Case(NamedTuple):
    query: Tensor
    gallery: Tensor
    labels: tuple[Tensor, Tensor, Tensor, Tensor]  # query_ids, gallery_ids, query_cams, gallery_cams
    options: dict[str, Any]


@st.composite
def cases(draw: Callable[..., Any], values: st.SearchStrategy[Any] | None = None) -> Case:
    queries, images, dimension = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 5))
    dtype = np.int8 if values is None else np.float16
    shape = queries + images
    x = draw(arrays.arrays(dtype, (shape, dimension), elements=st.integers(-3, 3) if values is None else values))
    ids = draw(arrays.arrays(np.int64, shape, elements=st.integers(-1, 3)))
    cams = draw(arrays.arrays(np.int64, shape, elements=st.integers(-1, 2)))
    rows, ids, cams = torch.from_numpy(x).float(), torch.from_numpy(ids), torch.from_numpy(cams)
    options = {"junk": draw(NOBODY), "unknown_camera": draw(NOBODY)}
    options["ties"] = draw(st.sampled_from(["pessimistic", "optimistic", "expected"]))
    options["ap"] = draw(st.sampled_from(["rectangular", "trapezoidal"]))
    labels = ids[:queries], ids[queries:], cams[:queries], cams[queries:]
    return Case(rows[:queries], rows[queries:], labels, options)


def check(examples: int, holds: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    options = settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    options(given(*strategies)(holds))()


def measured(function: Callable[..., Any], *arguments: Any, **options: Any) -> RankMetrics | None:
    """None where no query counts."""
    try:
        found: RankMetrics = function(*arguments, **options)
    except ValueError as error:
        if "expected at least one query" in str(error):
            return None
        raise
    return found


def assert_equal(found: RankMetrics | None, wanted: RankMetrics | None) -> None:
    """Every bit of every figure."""
    assert (found is None) == (wanted is None)
    for one, other in zip(found or (), wanted or (), strict=True):
        one, other = torch.as_tensor(one).nan_to_num(-1), torch.as_tensor(other).nan_to_num(-1)
        assert torch.equal(one, other), (found, wanted)


def in_pieces(query: Tensor, pieces: list[tuple[Tensor, ...]], ids: Tensor, cams: Tensor, **options: Any) -> Any:
    ranks = RankAccumulator(query, ids, cams, **options)
    for piece in pieces:
        ranks.add_positives(*piece)
    for piece in reversed(pieces):
        ranks.count(*piece)
    return ranks.compute()


@EFFORTS
@pytest.mark.parametrize("metric", METRICS)
def test_order_names_and_pieces(metric: str, examples: int) -> None:
    def holds(case: Case, seed: int, cuts: list[int]) -> None:
        query, gallery, (ids, gallery_ids, cams, gallery_cams), options = case
        wanted = measured(rank_metrics, *case[:2], *case.labels, metric=metric, **options)
        order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(seed))
        images = gallery[order], gallery_ids[order], gallery_cams[order]
        labels = ids, images[1], cams, images[2]
        assert_equal(measured(rank_metrics, query, images[0], *labels, metric=metric, **options), wanted)

        numbers, names = torch.arange(-1, 4), torch.tensor([-1, 7_000_000_000, 12, 2**62, 3])
        nobody = [torch.tensor([-1 if options[rule] is None else options[rule]]) for rule in ("junk", "unknown_camera")]
        names = torch.stack([torch.where(numbers == kept, numbers, names) for kept in nobody])
        renamed = [names[row][values + 1] for row, values in zip((0, 0, 1, 1), labels, strict=True)]
        assert_equal(measured(rank_metrics, query, images[0], *renamed, metric=metric, **options), wanted)

        bounds = [0, *sorted(cut % (len(gallery) + 1) for cut in cuts), len(gallery)]
        pieces = [tuple(part[a:b] for part in images) for a, b in pairwise(bounds)]
        assert_equal(measured(in_pieces, query, pieces, ids, cams, metric=metric, **options), wanted)

    check(examples, holds, cases(), st.integers(0, 99), st.lists(st.integers(0, 99), max_size=3))


@EFFORTS
@pytest.mark.parametrize("metric", METRICS)
def test_junk(metric: str, examples: int) -> None:
    """As near as may be, or beyond float32: images of nobody count neither for nor against, nor do queries."""

    def holds(case: Case, place: int, length: float) -> None:
        query, gallery, (ids, gallery_ids, cams, gallery_cams), options = case
        options["junk"] = -1
        wanted = measured(rank_metrics, *case[:2], *case.labels, metric=metric, **options)
        place %= len(gallery) + 1
        more = query * length

        def mixed(values: Tensor, junk: Tensor) -> Tensor:
            return torch.cat([values[:place], junk, values[place:]])

        nobody = torch.full_like(ids, -1)
        labels = ids, mixed(gallery_ids, nobody), cams, mixed(gallery_cams, cams)
        assert_equal(measured(rank_metrics, query, mixed(gallery, more), *labels, metric=metric, **options), wanted)
        asked = torch.cat([query, gallery]), torch.cat([ids, torch.full_like(gallery_ids, -1)])
        cameras = torch.cat([cams, gallery_cams])
        found = measured(
            rank_metrics, asked[0], gallery, asked[1], gallery_ids, cameras, gallery_cams, metric=metric, **options
        )
        if found is not None:
            found = found._replace(**{name: getattr(found, name)[: len(query)] for name in found._fields[3:]})
        assert_equal(found, wanted)

    check(examples, holds, cases(), st.integers(0, 99), st.sampled_from([0.0, 1.0, 1e18, 1e37]))


@EFFORTS
def test_definition_in_every_dtype(examples: int) -> None:
    """Integers are exact in all of them, and a common shift changes no difference."""

    def holds(case: Case, dtype: torch.dtype, shift: int) -> None:
        query, gallery, labels, options = case
        options["ties"] = "optimistic" if options["ties"] == "expected" else options["ties"]
        if dtype in (torch.float16, torch.bfloat16):
            shift %= 64
        exact = pairwise_distance(query.double(), gallery.double(), metric="sqeuclidean").round()
        wanted = measured(rank_metrics_from_distances, exact, *labels, **options)
        x, y = ((rows.double() + shift).to(dtype) for rows in (query, gallery))
        found = measured(rank_metrics, x, y, *labels, metric="euclidean", **options)
        assert_equal(found, wanted)
        if found is not None:
            assert_same(found, expected(exact, *labels, **options))

    dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    check(examples, holds, cases(), dtypes, st.sampled_from([0, 1, -37, 1000, -500_000, 8_000_000]))


@EFFORTS
def test_precision_stays_in_its_bound(examples: int) -> None:
    """Between what float64 says where all negatives come nearer by twice the rounding, and where they go farther."""

    def holds(case: Case) -> None:
        query, gallery, labels, options = case
        del options["ties"]
        options["metric"] = "euclidean"
        found = measured(rank_metrics, query, gallery, *labels, **options)
        assert_equal(measured(rank_metrics, query.half(), gallery.half(), *labels, **options), found)
        if found is None:
            return
        del options["metric"]
        x, y = query.double(), gallery.double()
        exact = (x[:, None] - y).square().sum(-1)
        widest = torch.cat([x, y]).amax(0) - torch.cat([x, y]).amin(0)  # no row is farther from the centre
        rounding = 2 * ROUNDING * 4 * widest.square().sum()
        negative = labels[0][:, None] != labels[1]
        bounds = [
            rank_metrics_from_distances(exact + sign * negative * rounding, *labels, ties=ties, **options)
            for sign, ties in ((-1, "pessimistic"), (1, "optimistic"))
        ]
        for name in ("ap", "inp"):
            low, value, high = (getattr(one, name)[found.valid] for one in (bounds[0], found, bounds[1]))
            assert ((low <= value) & (value <= high)).all()

    check(examples, holds, cases(st.floats(-8, 8, width=16)))


@EFFORTS
def test_lists(examples: int) -> None:
    """Of `knn` and `Gallery`: all but the images of the query's identity and camera, by distance and place."""
    pytest.importorskip("faiss")

    def holds(case: Case, k: int) -> None:
        query, gallery, labels, options = case
        ids, gallery_ids, cams, gallery_cams = labels
        rule = {name: options[name] for name in ("junk", "unknown_camera")}
        own = (ids[:, None] == gallery_ids) & (cams[:, None] == gallery_cams)
        for values, number in zip((ids, cams), rule.values(), strict=True):
            own &= torch.tensor([value != number for value in values.tolist()])[:, None]
        distance = (query[:, None] - gallery).square().sum(-1).masked_fill(own, torch.inf)
        distances, indices = (part[:, :k] for part in distance.sort(dim=1, stable=True))
        k = distances.shape[1]
        lists = [knn(query, gallery, k, metric="sqeuclidean", exclude_same=labels, **rule)]
        if all(
            number != -1 or (values != -1).any() for number, values in zip(rule.values(), labels[1::2], strict=True)
        ):
            kept = Gallery(gallery.shape[1], "sqeuclidean", device="cpu")
            kept.add(gallery, gallery_ids, gallery_cams)
            lists.append(kept.search(query, k, exclude_same=(ids, cams), **rule))
        for found in lists:
            assert torch.equal(found.distances, distances)
            assert torch.equal(found.indices, indices.masked_fill(distances.isinf(), -1))

    check(examples, holds, cases(), st.integers(1, 20))


@EFFORTS
def test_reranked(examples: int) -> None:
    """No distance is negative; figures are those of the matrix; names do not matter."""

    def holds(case: Case, share: float) -> None:
        reranked = k_reciprocal_rerank(case.query, case.gallery, k1=5, k2=3, lambda_value=share)
        dense = reranked.dense()
        assert (dense >= 0).all()
        wanted = measured(rank_metrics_from_distances, dense, *case.labels, **case.options)
        assert_equal(measured(reranked.rank_metrics, *case.labels, **case.options), wanted)

    check(examples, holds, cases(), st.sampled_from([0.0, 0.3, 1.0]))


@EFFORTS
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_jaccard(metric: str, examples: int) -> None:
    def holds(case: Case, dtype: torch.dtype, k: int) -> None:
        x = torch.cat(case[:2]).to(dtype)
        dense = jaccard_distance(x, k1=2 * k, k2=k, metric=metric)
        assert ((dense >= 0) & (dense <= 1)).all()
        assert torch.equal(dense, dense.T)
        assert not dense.diagonal().any()
        sparse = jaccard_distance(x, k1=2 * k, k2=k, metric=metric, sparse=True)
        row = torch.repeat_interleave(sparse.crow_indices().diff())
        assert torch.equal(torch.ones_like(dense).index_put((row, sparse.col_indices()), sparse.values()), dense)

    dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    check(examples, holds, cases(), dtypes, st.integers(1, 4))
