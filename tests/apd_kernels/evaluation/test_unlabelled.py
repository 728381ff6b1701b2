"""Images without identity and without camera: one rule for figures and lists, and none where projects have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend
from test_ranking import assert_same, distances, expected

from apd_kernels import (
    Gallery,
    RankAccumulator,
    RankMetrics,
    batch_hard,
    circle_loss,
    k_reciprocal_rerank,
    knn,
    rank_metrics,
    rank_metrics_from_distances,
    supervised_contrastive_loss,
    triplet_loss,
    weighted_pairs,
)

RULES = [
    pytest.param({}, id="-1 is nobody and nowhere"),
    pytest.param({"junk": None}, id="-1 is a person"),
    pytest.param({"unknown_camera": None}, id="-1 is a camera"),
    pytest.param({"junk": None, "unknown_camera": None}, id="as torchreid"),
    pytest.param({"junk": 3, "unknown_camera": 0}, id="other numbers"),
]


def case(seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-2, 3, (rows, 6), generator=draw).float() for rows in (25, 60))
    ids, cams = (torch.randint(-1, 6, (85,), generator=draw) for _ in range(2))
    return x, y, ids[:25], ids[25:], cams[:25], cams[25:] % 4 - 1


@pytest.mark.parametrize("rule", RULES)
def test_every_figure_has_one_rule(rule: dict[str, Any], backend: Backend) -> None:
    x, y, *labels = case()
    squared = distances(x, y, "euclidean")
    wanted = expected(squared, *labels, **rule)
    x, y, *labels = (values.to(backend.device) for values in (x, y, *labels))
    assert_same(rank_metrics(x, y, *labels, metric="euclidean", **rule), wanted)
    ranks = RankAccumulator(x, labels[0], labels[2], metric="euclidean", **rule)
    pieces = [(y[part], labels[1][part], labels[3][part]) for part in (slice(0, 7), slice(7, 60))]
    for step in (ranks.add_positives, ranks.count):
        for piece in pieces:
            step(*piece)
    assert_same(ranks.compute(), wanted)
    assert_same(rank_metrics_from_distances(squared.to(backend.device), *labels, **rule), wanted)


@pytest.mark.parametrize("rule", RULES)
def test_figures_of_reranked_lists(rule: dict[str, Any]) -> None:
    x, y, *labels = case()
    reranked = k_reciprocal_rerank(x, y, k1=6, k2=3)
    assert_same(reranked.rank_metrics(*labels, **rule), expected(reranked.dense(), *labels, **rule))


@pytest.mark.parametrize("rule", RULES)
def test_lists_follow_the_figures(rule: dict[str, Any], backend: Backend) -> None:
    """A query is right at rank 1 of the figures where its list without junk begins with its identity."""
    x, y, ids, gallery_ids, cams, gallery_cams = case()
    y = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) / 100  # no ties
    result: RankMetrics = rank_metrics(x, y, ids, gallery_ids, cams, gallery_cams, metric="euclidean", **rule)
    known = gallery_ids != rule.get("junk", -1) if rule.get("junk", -1) is not None else gallery_ids == gallery_ids
    on = [values.to(backend.device) for values in (ids, gallery_ids, cams, gallery_cams)]
    found = knn(
        x.to(backend.device),
        y.to(backend.device),
        1,
        metric="euclidean",
        exclude_same=tuple(on),
        mask=known.to(backend.device),
        **rule,
    )
    right = (gallery_ids[found.indices[:, 0].cpu()] == ids) & result.valid
    assert torch.equal(right, result.first_rank == 1)


@pytest.mark.parametrize(("name", "value"), [("junk", "x"), ("junk", True), ("unknown_camera", 0.5)])
def test_wrong_rules(name: str, value: object) -> None:
    pytest.importorskip("faiss")
    x, y, *labels = case()
    options: dict[str, Any] = {name: value}
    for call in (
        lambda: rank_metrics(x, y, *labels, **options),
        lambda: rank_metrics_from_distances(distances(x, y, "dot"), *labels, **options),
        lambda: knn(x, y, 1, exclude_same=tuple(labels), **options),
        lambda: Gallery(6).search(x, 1, **options),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: expected an int or None, got {type(value).__name__}$"):
            call()


LOSSES = [triplet_loss, supervised_contrastive_loss, circle_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_outliers_of_clustering_are_left_out(loss: Any, backend: Backend) -> None:
    """DBSCAN labels them −1, which is an ordinary label here: `y_valid` leaves them out, as anchors too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=draw).to(backend.device)
    labels = torch.randint(-1, 6, (40,), generator=draw).to(backend.device)
    clustered = labels >= 0
    a, b = (x.clone().requires_grad_() for _ in range(2))
    with_outliers, without = loss(a, labels, y_valid=clustered), loss(b[clustered], labels[clustered])
    with_outliers.backward()
    without.backward()
    torch.testing.assert_close(with_outliers, without)
    torch.testing.assert_close(a.grad, b.grad)
    assert not torch.allclose(loss(x, labels), without)


@pytest.mark.parametrize("mine", [batch_hard, weighted_pairs])
def test_outliers_are_not_mined(mine: Any, backend: Backend) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, generator=draw).to(backend.device)
    labels = (torch.arange(30) % 6 - 1).to(backend.device)
    mined, alone = mine(x, labels, y_valid=labels >= 0), mine(x[labels >= 0], labels[labels >= 0])
    assert torch.equal(mined.valid, labels >= 0)
    for one, other in zip(mined.distances, alone.distances, strict=True):
        torch.testing.assert_close(one[labels >= 0], other)
