"""Ties in expectation, self-exclusion, single-shot galleries, galleries in pieces."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from conftest import Backend
from test_ranking import assert_same, distances, expected, in_pieces
from torch import Tensor

from apd_kernels import (
    RankAccumulator,
    k_reciprocal_rerank,
    knn,
    positive_ranks,
    positive_ranks_from_distances,
    rank_metrics,
    rank_metrics_from_distances,
    tpr_at_fpr_from_distances,
)
from apd_kernels.evaluation import ranking
from apd_kernels.evaluation.retrieval_metrics import _expected_inverse_of_last, _expected_precisions


@pytest.mark.parametrize("ap", ["rectangular", "trapezoidal"])
def test_expected_ties(backend: Backend, ap: str) -> None:
    """Against the mean over all orders of the images at one distance."""
    for seed in range(12 if backend.interpreted else 40):
        generator = torch.Generator().manual_seed(seed)
        query, gallery = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (6, 12))
        query_ids, gallery_ids = (torch.randint(0, 3, (n,), generator=generator) for n in (6, 12))
        wanted = expected(
            distances(query, gallery, "sqeuclidean"), query_ids, gallery_ids, ap=ap, ties="expected", max_rank=9
        )
        arguments = [value.to(backend.device) for value in (query, gallery, query_ids, gallery_ids)]
        found = rank_metrics(*arguments, metric="euclidean", ap=ap, ties="expected", max_rank=9)
        assert_same(found, wanted, 1e-12)


def test_expected_sums_over_many_equal_distances() -> None:
    """Beyond 64 images at one distance sums are differences of ψ: against the sums, term by term."""
    draw = random.Random(0)
    for _ in range(200):
        a, b = draw.randint(1, 40), draw.randint(60, 3000)
        hits, negatives = draw.choice([(0, 0), (0, draw.randint(0, 50)), (draw.randint(1, 9), draw.randint(0, 9000))])
        size = a + b
        sums = []
        for before in (False, True):
            total = 0.0
            for r in range(size):
                above, below = hits + r * (a - 1) / (size - 1), hits + negatives + r
                total += (above / below if below else 1.0) if before else (above + 1) / (below + 1)
            sums.append(a / size * total)
        group = [torch.tensor([float(value)], dtype=torch.float64) for value in (a, b, hits, negatives)]
        assert float(_expected_precisions(*group)) == pytest.approx(sums[0], rel=1e-10)
        assert float(_expected_precisions(*group, before=True)) == pytest.approx(sums[1], rel=1e-10)
        ways, choices, last = math.comb(size, a), 1, 0.0
        for m in range(a, size + 1):  # choices: C(m − 1, a − 1)
            last += choices / ways / (hits + m)
            choices = choices * m // (m - a + 1)
        assert float(_expected_inverse_of_last(group[0], group[1], group[2])) == pytest.approx(last, rel=1e-10)


def test_a_collapsed_model() -> None:
    """Features that are all equal: nothing, everything, in expectation the share of positives."""
    x, ids = torch.ones(200, 8), torch.arange(200) // 4
    metrics = {
        ties: rank_metrics(x[::4], x, ids[::4], ids, ties=ties) for ties in ("pessimistic", "optimistic", "expected")
    }
    assert metrics["pessimistic"].cmc[0] == 0
    assert metrics["pessimistic"].mAP < 0.02
    assert metrics["optimistic"].mAP == 1
    assert float(metrics["expected"].cmc[0]) == pytest.approx(4 / 200)
    assert 0.02 < metrics["expected"].mAP < 0.05


def test_a_query_is_not_compared_with_itself(backend: Backend) -> None:
    """One camera: a data set is searched in itself."""
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randint(-2, 3, (40, 5), generator=generator).float(), torch.randint(0, 9, (40,), generator=generator)
    own = torch.arange(40)
    own[7] = -1
    wanted = expected(distances(x, x, "dot"), ids, ids, exclude=own)
    device = backend.device
    arguments = x.to(device), x.to(device), ids.to(device), ids.to(device)
    assert_same(rank_metrics(*arguments, metric="dot", exclude=own.to(device)), wanted)
    assert_same(in_pieces(*arguments, cuts=(3, 20), metric="dot", exclude=own.to(device)), wanted)
    matrix = distances(x, x, "dot").to(device)
    assert_same(rank_metrics_from_distances(matrix, *arguments[2:], exclude=own.to(device)), wanted)


def test_single_shot(backend: Backend) -> None:
    """Drawn galleries against a loop; AP of all images; the seed decides the draws."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 8, generator=generator) for n in (30, 60))
    query_ids, gallery_ids = (torch.randint(0, 12, (n,), generator=generator) for n in (30, 60))
    query_cams, gallery_cams = (torch.randint(0, 2, (n,), generator=generator) for n in (30, 60))
    arguments = [
        value.to(backend.device) for value in (query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    ]
    every = rank_metrics(*arguments, max_rank=10)
    shots = 60 if backend.interpreted else 300
    found = rank_metrics(*arguments, max_rank=10, single_shot=shots, seed=1)
    assert_same(found._replace(cmc=every.cmc), every, 0)
    matrix, hits, draws = distances(query, gallery, "cosine"), torch.zeros(10, dtype=torch.float64), 0
    draw = random.Random(0)
    for i, row in enumerate(matrix):
        kept = ~((gallery_ids == query_ids[i]) & (gallery_cams == query_cams[i]))
        if not (kept & (gallery_ids == query_ids[i])).any():
            continue
        images = [
            (kept & (gallery_ids == identity)).nonzero()[:, 0].tolist() for identity in gallery_ids[kept].unique()
        ]
        own, place = (gallery_ids == query_ids[i]).tolist(), row.tolist()
        for _ in range(300):
            chosen = [draw.choice(of_one) for of_one in images]
            rank = sorted(chosen, key=place.__getitem__).index(next(j for j in chosen if own[j]))
            hits[rank:] += 1
            draws += 1
    assert (found.cmc.cpu() - hits / draws).abs().max() < 0.04 * (300 / shots) ** 0.5  # 5 standard deviations
    # The same draws from distances, whatever the order of the queries.
    options: dict[str, Any] = {"max_rank": 10, "single_shot": shots, "seed": 1}
    assert_same(rank_metrics_from_distances(matrix, *(value.cpu() for value in arguments[2:]), **options), found)
    again, other = (rank_metrics(*arguments, max_rank=10, single_shot=2, seed=seed).cmc for seed in (1, 2))
    assert torch.equal(again, rank_metrics(*arguments, max_rank=10, single_shot=2, seed=1).cmc)
    assert not torch.equal(again, other)


def test_pieces_of_any_size() -> None:
    """Ones that are empty, or junk alone, or wider than a tile; float16 features; bit for bit the whole."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 48, generator=generator).half() for n in (70, 2000))
    gallery[1000:] = gallery[:1000]  # ties across pieces
    query_ids, gallery_ids = (torch.randint(0, 60, (n,), generator=generator) for n in (70, 2000))
    gallery_ids[500:600] = -1
    for metric in ("euclidean", "cosine", "dot"):
        options: dict[str, Any] = {"metric": metric, "ties": "expected"}
        whole = rank_metrics(query, gallery, query_ids, gallery_ids, **options)
        for cuts in ((0, 500, 600, 600, 1999), (1,), (384, 768, 769)):
            assert_same(in_pieces(query, gallery, query_ids, gallery_ids, cuts=cuts, **options), whole, 0)


def test_a_large_gallery_is_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the whole, draws among them, and no copy that is larger than the limit."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 48, generator=generator) for n in (70, 2000))
    gallery[1000:] = gallery[:1000]  # ties across pieces
    ids, cams = ([torch.randint(-1, n, (rows,), generator=generator) for rows in (70, 2000)] for n in (60, 3))
    same = ids[0][:, None] == ids[1]
    own = torch.where(same.any(1), same.int().argmax(1), -1)
    options: dict[str, Any] = {"single_shot": 3, "ties": "expected", "exclude": own}
    wanted = rank_metrics(query, gallery, *ids, *cams, metric="euclidean", **options)
    monkeypatch.setattr(ranking, "_PIECE_BYTES", 100_000)
    copied: list[int] = []
    shard_of = RankAccumulator.shard_of

    def counted(self: RankAccumulator, gallery: Tensor, *labels: Any) -> Any:
        copied.append(gallery.nbytes)
        return shard_of(self, gallery, *labels)

    monkeypatch.setattr(RankAccumulator, "shard_of", counted)
    assert_same(rank_metrics(query, gallery, *ids, *cams, metric="euclidean", **options), wanted, 0)
    assert max(copied) <= 100_000
    broken = gallery.index_put((torch.tensor([1500]),), torch.tensor(math.nan))
    with pytest.raises(ValueError, match=r"gallery: expected finite features, .* in 1 rows: 1500"):
        rank_metrics(query, broken, *ids, *cams)


def test_blocks_of_all_threads_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, gallery_ids = (torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(n)) for n in (64, 100))
    matrix = torch.rand(64, 100, generator=torch.Generator().manual_seed(0))
    wanted = rank_metrics_from_distances(matrix, ids, gallery_ids)
    monkeypatch.setattr(ranking, "_BLOCK_ELEMENTS", 1600)
    sizes: list[int] = []
    in_blocks = ranking.counts_of_blocks

    def noted(distances_of: Any, size: int, *arguments: Any, **options: Any) -> Any:
        sizes.append(size)
        return in_blocks(distances_of, size, *arguments, **options)

    monkeypatch.setattr(ranking, "counts_of_blocks", noted)
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            assert_same(rank_metrics_from_distances(matrix, ids, gallery_ids), wanted, 0)
    finally:
        torch.set_num_threads(before)
    assert sizes == [16, 4]


def test_passes_are_kept_apart() -> None:
    x, ids = torch.eye(4), torch.tensor([0, 0, 1, 1])
    ranks = RankAccumulator(x, ids)
    ranks.add_positives(x, ids)
    with pytest.raises(RuntimeError, match="got 4 images in add_positives and 0 in count"):
        ranks.compute()
    ranks.count(x, ids)
    assert ranks.compute().valid.all()
    with pytest.raises(RuntimeError, match="add_positives: expected before count"):
        ranks.add_positives(x, ids)
    with pytest.raises(RuntimeError, match="exchange: expected an initialised"):
        ranks.exchange()
    alone = RankAccumulator(x, ids + 5)
    alone.add_positives(x, ids)
    alone.count(x, ids)
    with pytest.raises(ValueError, match="query_ids: expected at least one query"):
        alone.compute()


def test_other_pieces_in_the_second_pass() -> None:
    """Of as many images: the metrics would be wrong without a word."""
    x, ids = torch.eye(6), torch.tensor([0, 0, 1, 1, 2, 2])
    ranks = RankAccumulator(x, ids)
    for piece in (slice(0, 3), slice(3, 6)):
        ranks.add_positives(x[piece], ids[piece])
    for _ in range(2):
        ranks.count(x[:3], ids[:3])
    with pytest.raises(RuntimeError, match="expected the same pieces of the gallery in both passes"):
        ranks.compute()


@pytest.mark.parametrize("operation", [rank_metrics, knn], ids=["rank_metrics", "knn"])
def test_modes_of_autograd(operation: Any) -> None:
    """Rows enough for several threads, which have modes of their own."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 512, generator=generator) for n in (2100, 5000))
    ids = [torch.randint(0, 50, (n,), generator=generator) for n in (2100, 5000)]

    def values(query: Tensor, gallery: Tensor) -> list[Any]:
        labels = ids if operation is rank_metrics else [5]
        return [str(value) for value in operation(query, gallery, *labels)]

    wanted = values(query, gallery)
    assert values(query.requires_grad_(), gallery.requires_grad_()) == wanted
    with torch.inference_mode():
        assert values(query, gallery) == wanted
        copies = query.clone(), gallery.clone()
    assert values(*copies) == wanted
    with torch.inference_mode():
        assert values(*copies) == wanted


def test_other_default_device() -> None:
    x, ids = torch.eye(6), torch.tensor([0, 0, 1, 1, 2, 2])
    wanted = rank_metrics(x, x, ids, ids, single_shot=2, ties="expected")
    with torch.device("meta"):
        found = rank_metrics(x, x, ids, ids, single_shot=2, ties="expected")
        reranked = k_reciprocal_rerank(x, x, k1=2, k2=1).rank_metrics(ids, ids)
    assert_same(found, wanted, 0)
    assert reranked.valid.all()


def test_ties_at_zero_where_denormals_are_flushed() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]).expand(8, 2).contiguous()
    ids = torch.tensor([7]), torch.tensor([7, 1, 2, 3, 4, 5, 6, 8])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        assert rank_metrics(x, y, *ids, metric="dot", ties="optimistic").mAP == 1
        assert rank_metrics(x, y, *ids, metric="dot", ties="pessimistic").mAP == 1 / 8
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ties": "random"}, ValueError, "ties: expected 'pessimistic'.* got 'random'"),
        ({"single_shot": 0}, ValueError, "single_shot: expected at least 1, got 0"),
        ({"single_shot": 1.5}, TypeError, "single_shot: expected an int, got float"),
        ({"seed": 2.5}, TypeError, "seed: expected an int, got float"),
        ({"seed": 2**70}, ValueError, "seed: expected .* of 64 bits, got 1180591620717411303424"),
        ({"exclude": torch.zeros(3).long()}, ValueError, r"exclude: expected shape \(4,\), got \(3,\)"),
        (
            {"exclude": torch.tensor([0, 1, 2, 4])},
            ValueError,
            "exclude: expected rows .*, 0 to 3, .* got 4",
        ),
        ({"exclude": torch.tensor([0, -2, 2, 3])}, ValueError, "exclude: expected rows .* got -2 for query 1"),
        (
            {"exclude": torch.tensor([0, 1, 1, 3])},
            ValueError,
            "exclude: .* image 1, of identity 0, for query 2, of 1",
        ),
    ],
)
def test_wrong_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, ids = torch.eye(4), torch.tensor([0, 0, 1, 1])
    with pytest.raises(error, match=message):
        rank_metrics(x, x, ids, ids, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"distances": torch.zeros(4)}, ValueError, r"distances: expected shape \(Q, G\), got \(4,\)"),
        ({"distances": torch.full((4, 4), math.nan)}, ValueError, "distances: expected no NaN, got one in row 0"),
        ({"distances": torch.zeros(4, 4).long()}, TypeError, "distances: expected"),
        ({"query_cams": torch.zeros(4).long()}, ValueError, "gallery_cams: expected with query_cams, got None"),
        ({"ap": "mean"}, ValueError, "ap: expected"),
    ],
)
def test_wrong_distances(change: dict[str, Any], error: type[Exception], message: str) -> None:
    ids = torch.tensor([0, 0, 1, 1])
    with pytest.raises(error, match=message):
        rank_metrics_from_distances(**{"distances": torch.zeros(4, 4), "query_ids": ids, "gallery_ids": ids, **change})


def test_an_image_of_another_identity_is_not_the_query_itself() -> None:
    ids, other = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 0])
    with pytest.raises(ValueError, match=r"exclude: .* got image 0, of identity 1, for query 0, of 0"):
        rank_metrics_from_distances(torch.zeros(4, 4), ids, other, exclude=torch.arange(4))
    junk = torch.tensor([-1, 0, 1, 1])  # is left out anyway
    own = torch.tensor([0, -1, -1, -1])
    distances = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    found = rank_metrics_from_distances(distances, ids, junk, exclude=own)
    assert_same(found, expected(distances, ids, junk))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_identities_of_every_integer_dtype(dtype: torch.dtype) -> None:
    """255 is an identity, though it has the bits of −1 in eight of them."""
    generator = torch.Generator().manual_seed(0)
    last = 255 if dtype == torch.uint8 else 127
    ids, gallery_ids = (torch.randint(last - 3, last + 1, (n,), generator=generator) for n in (12, 40))
    query, gallery = (torch.randn(n, 5, generator=generator) for n in (12, 40))
    matrix = distances(query, gallery, "dot")
    wanted = expected(matrix, ids, gallery_ids)
    short = ids.to(dtype), gallery_ids.to(dtype)
    assert_same(rank_metrics(query, gallery, *short, metric="dot"), wanted)
    assert_same(rank_metrics_from_distances(matrix, *short), wanted)
    reranked = k_reciprocal_rerank(query, gallery, k1=5, k2=2)
    assert_same(reranked.rank_metrics(*short), reranked.rank_metrics(ids, gallery_ids))
    draws = [rank_metrics(query, gallery, *labels, single_shot=4) for labels in (short, (ids, gallery_ids))]
    assert_same(*draws)


def test_infinite_distances(backend: Backend) -> None:
    """Images that are infinitely far are still there, and tie with each other; what is left out is not counted."""
    far = math.inf
    ids, gallery_ids = torch.tensor([7]), torch.tensor([7, 7, 8, -1, -1, 9])
    for row in ([0.3, far, 0.5, 0.1, far, 0.2], [0.3, far, far, 0.1, far, far], [far, far, 0.5, -far, 0.1, -far]):
        matrix = torch.tensor([row])
        found = rank_metrics_from_distances(
            matrix.to(backend.device), *(x.to(backend.device) for x in (ids, gallery_ids))
        )
        assert_same(found, expected(matrix, ids, gallery_ids))
    query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0.1], [1e30, 0], [2, 0], [1, 0], [2e30, 0], [9, 0]])
    # Relative to the query these are beyond the range of squares: equally far, so the negative comes first.
    matrix = distances(query, gallery, "euclidean").where(gallery[:, 0] < 1e20, far)
    found = rank_metrics(*(x.to(backend.device) for x in (query, gallery, ids, gallery_ids)), metric="euclidean")
    assert_same(found, expected(matrix, ids, gallery_ids))


def _ranks_of(matrix: Tensor, labels: tuple[Tensor, ...], ties: str) -> list[tuple[int, int, int]]:
    """(query, rank, hit) of each positive, from sorted lists."""
    query_ids, gallery_ids, query_cams, gallery_cams = labels
    found = []
    for i, row in enumerate(matrix):
        kept = ((gallery_ids != query_ids[i]) | (gallery_cams != query_cams[i])) & (gallery_ids != -1)
        positive = (gallery_ids == query_ids[i]) & kept
        places = kept.nonzero()[:, 0].tolist()
        first = {"stable": 0, "optimistic": -1, "pessimistic": 1}[ties]
        order = sorted(places, key=lambda j: (float(row[j]), first * int(positive[j]), j))
        hits = 0
        for rank, j in enumerate(order, 1):
            if positive[j] and query_ids[i] != -1:
                hits += 1
                found.append((i, rank, hits))
    return found


@pytest.mark.parametrize("ties", ["stable", "optimistic", "pessimistic"])
def test_positive_ranks(ties: str) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = (20, 50, 20, 50)
    labels = tuple(torch.randint(-1, 6, (n,), generator=generator) for n in sizes[:2])
    labels += tuple(torch.randint(0, 3, (n,), generator=generator) for n in sizes[2:])
    matrix = torch.randint(0, 8, (20, 50), generator=generator).double()
    found = positive_ranks_from_distances(matrix, *labels, ties=ties)
    wanted = _ranks_of(matrix, labels, ties)
    assert list(zip(found.query.tolist(), found.rank.tolist(), found.hit.tolist(), strict=True)) == wanted
    counts = torch.bincount(torch.tensor([i for i, _, _ in wanted]), minlength=20)
    assert torch.equal(found.positives, counts)
    metrics = rank_metrics_from_distances(matrix, *labels, ties=ties, max_rank=30)
    assert torch.allclose(found.cmc(30), metrics.cmc, rtol=0, atol=1e-12)
    assert torch.allclose(found.reciprocal_rank(), 1 / metrics.first_rank, rtol=0, atol=1e-12, equal_nan=True)
    behind = found.reciprocal_rank(3)
    assert torch.equal(behind[metrics.first_rank > 3], torch.zeros(int((metrics.first_rank > 3).sum())).double())
    for i in (counts > 0).nonzero()[:, 0].tolist():
        ranks = [rank for query, rank, _ in wanted if query == i]
        r = len(ranks)
        within = [hit / rank for hit, rank in enumerate(ranks, 1) if rank <= r]
        assert float(found.r_precision()[i]) == pytest.approx(len(within) / r)
        assert float(found.ap_at_r()[i]) == pytest.approx(sum(within) / r)
    assert found.r_precision()[counts == 0].isnan().all()
    if ties != "stable":
        unit = torch.eye(50, dtype=torch.float64)
        of_features = positive_ranks(-matrix, unit, *labels, metric="dot", ties=ties)
        assert all(torch.equal(one, other) for one, other in zip(of_features, found, strict=True))


def test_positive_ranks_in_pieces_and_without_a_positive() -> None:
    x, ids = torch.eye(4), torch.tensor([0, 0, 1, 1])
    ranks = RankAccumulator(x, ids, exclude=torch.arange(4))
    for add in (ranks.add_positives, ranks.count):
        for piece in (slice(0, 3), slice(3, 4)):
            add(x[piece], ids[piece])
    whole = positive_ranks(x, x, ids, ids, exclude=torch.arange(4))
    assert all(torch.equal(one, other) for one, other in zip(ranks.positive_ranks(), whole, strict=True))
    with pytest.raises(ValueError, match="ties: expected one rank for a positive, got 'expected'"):
        RankAccumulator(x, ids, ties="expected").positive_ranks()
    with pytest.raises(ValueError, match="query_ids: expected at least one query"):
        positive_ranks_from_distances(torch.zeros(1, 2), torch.tensor([5]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="ties: expected 'pessimistic' or"):
        positive_ranks(x, x, ids, ids, ties="stable")


@pytest.mark.parametrize(("fpr", "kind", "message"), [
    ((1.0,), ValueError, "fpr: expected rates below 1, got 1.0"),
    ((-0.1,), ValueError, "fpr: expected a finite number of at least 0"),
    (("a",), TypeError, "fpr: expected a number, got str"),
    (0.1, TypeError, "fpr: expected a sequence of rates, got float"),
])  # fmt: skip
def test_wrong_rates(fpr: Any, kind: type[Exception], message: str) -> None:
    ids = torch.tensor([0, 1])
    with pytest.raises(kind, match=message):
        tpr_at_fpr_from_distances(torch.zeros(2, 2), ids, ids, fpr=fpr)


def test_verification_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks change nothing; junk is in no pair, and pairs of one camera are impostors, too."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(0, 40, (30, 60), generator=generator).float()
    ids, gallery_ids = (torch.randint(-1, 8, (n,), generator=generator) for n in (30, 60))
    cams, gallery_cams = (torch.randint(0, 3, (n,), generator=generator) for n in (30, 60))
    rates = (0.0, 0.02, 0.3)
    whole = tpr_at_fpr_from_distances(matrix, ids, gallery_ids, cams, gallery_cams, fpr=rates)
    monkeypatch.setattr(ranking, "_BLOCK_ELEMENTS", 300)
    assert torch.equal(tpr_at_fpr_from_distances(matrix, ids, gallery_ids, cams, gallery_cams, fpr=rates), whole)
    same = ids[:, None] == gallery_ids
    known = (ids[:, None] != -1) & (gallery_ids != -1)
    genuine, impostor = same & known & (cams[:, None] != gallery_cams), ~same & known
    for rate, found in zip(rates, whole.tolist(), strict=True):
        shares = [
            float((matrix[genuine] <= t).double().mean())
            for t in range(-1, 40)
            if (matrix[impostor] <= t).double().mean() <= rate
        ]
        assert found == pytest.approx(max(shares))
    with pytest.raises(ValueError, match="query_ids: expected pairs of one person and pairs of two, got 0 and 4"):
        tpr_at_fpr_from_distances(torch.zeros(2, 2), torch.tensor([1, 2]), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="distances: expected no NaN, got one"):
        tpr_at_fpr_from_distances(torch.full((1, 1), torch.nan), torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("impostors", [1, 3, 7, 10, 100, 1000])
def test_rates_reach_as_far_as_they_say(impostors: int) -> None:
    """k of n impostors for the rate k / n, though 0.29 · 100 is below 29."""
    distances = torch.arange(impostors, dtype=torch.float64)[None]
    ids = torch.tensor([8] * impostors + [7])
    for k in range(min(impostors, 100)):
        matrix = torch.cat([distances, torch.tensor([[k - 0.5]])], 1)  # accepted with k impostors, not with fewer
        arguments = matrix, torch.tensor([7]), ids
        assert tpr_at_fpr_from_distances(*arguments, fpr=(k / impostors,)).item() == 1
        assert k == 0 or tpr_at_fpr_from_distances(*arguments, fpr=((k - 0.5) / impostors,)).item() == 0
    assert tpr_at_fpr_from_distances(*arguments, fpr=()).shape == (0,)


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_wrong_places(value: Any) -> None:
    ranks = positive_ranks_from_distances(torch.zeros(1, 1), torch.tensor([1]), torch.tensor([1]))
    for name, call in (("max_rank", ranks.cmc), ("k", ranks.reciprocal_rank)):
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            call(value)
    with pytest.raises(ValueError, match="junk: expected a number of 64 bits, got"):
        rank_metrics_from_distances(torch.zeros(1, 1), torch.tensor([1]), torch.tensor([1]), junk=2**70)
