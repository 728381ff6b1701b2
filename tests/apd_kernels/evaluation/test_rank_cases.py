"""Random evaluations against a float64 loop: every two choices of two options meet in some case."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from test_ranking import assert_same, distances, expected, in_pieces
from torch import Tensor

from apd_kernels import RankMetrics, rank_metrics, rank_metrics_from_distances, use_backend
from apd_kernels._core.backend import HAS_TRITON, INTERPRETED
from apd_kernels._core.operands import METRICS
from apd_kernels.evaluation import ranking
from apd_kernels.evaluation.retrieval_metrics import AVERAGE_PRECISIONS, TIES_OF_DISTANCES

OPTIONS: dict[str, tuple[Any, ...]] = {
    "metric": METRICS,
    "ap": AVERAGE_PRECISIONS,
    "ties": TIES_OF_DISTANCES,
    "exclude": (False, True),
    "cameras": (None, 1, 3),
    "single_shot": (None, 2),
    "backend": ("torch", "triton"),
    "dtype": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "max_rank": (1, 10, 300),
    "others": ("none", "junk", "distractors", "both"),  # gallery images of identity −1, and of one that no query has
    "pieces": ("whole", "cut", "accumulated", "distances"),
}
CASES = 500


def is_possible(chosen: dict[str, Any]) -> bool:
    """Kernels take no float64, draws are of one call, and only a matrix has an order of equal distances."""
    if chosen["backend"] == "triton" and chosen["dtype"] == torch.float64:
        return False
    if chosen["ties"] == "stable" and chosen["pieces"] != "distances":
        return False
    return chosen["single_shot"] is None or chosen["pieces"] != "accumulated"


def options_of(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    while True:
        chosen = {name: draw.choice(values) for name, values in OPTIONS.items()}
        chosen["backend"] = "triton" if draw.random() < 0.15 else "torch"
        if is_possible(chosen):
            return chosen


def test_every_two_choices_meet() -> None:
    missing = {
        (one, first, other, second)
        for one, other in itertools.combinations(OPTIONS, 2)
        for first, second in itertools.product(OPTIONS[one], OPTIONS[other])
        if is_possible(
            {"backend": "torch", "dtype": torch.float32, "single_shot": None, "ties": "grouped"}
            | {"pieces": "distances" if "stable" in (first, second) else "whole"}
            | {one: first, other: second}
        )
    }
    for seed in range(CASES):
        chosen = options_of(seed)
        missing -= {(one, chosen[one], other, chosen[other]) for one, other in itertools.combinations(OPTIONS, 2)}
    assert not missing


def case_of(seed: int, chosen: dict[str, Any]) -> tuple[list[Tensor | None], Tensor | None]:
    """Rows of ±1 in four places times a power of two, whose products are exact and often tie; ids and cameras."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    # The loop goes through all orders of the images at one distance.
    queries, images = (draw.randint(1, 6), 10) if chosen["ties"] == "expected" else (draw.randint(1, 20), 90)
    dimension = draw.choice([4, 16, 33])

    def rows(count: int) -> Tensor:
        places = torch.rand(count, dimension, generator=generator).argsort(1)[:, :4]
        signs = torch.randint(0, 2, (count, 4), generator=generator) * 2.0 - 1
        scale = 2.0 ** torch.randint(-1, 3, (count, 1), generator=generator)
        return (torch.zeros(count, dimension).scatter_(1, places, signs) * scale).to(chosen["dtype"])

    def integers(count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    query, gallery = rows(queries), rows(images)
    query_ids, gallery_ids = integers(queries, 1, 5), integers(images, 1, draw.choice([5, 40]))
    for identity, name in ((-1, "junk"), (0, "distractors")):
        if chosen["others"] in (name, "both"):
            gallery_ids[integers(images // 4, 1, images)] = identity
    gallery_ids[0] = query_ids[0] = 1  # one query counts
    cameras: tuple[Tensor | None, ...] = (None, None)
    if chosen["cameras"] is not None:
        query_cams, gallery_cams = (integers(count, 0, chosen["cameras"] + 1) for count in (queries, images))
        query_cams[0], gallery_cams[0] = 0, 1
        cameras = query_cams, gallery_cams
    exclude = None
    if chosen["exclude"]:  # an image of the query's identity, which the query itself is
        own = (query_ids[:, None] == gallery_ids).double()
        own[:, 0] = 0
        exclude = torch.where(own.any(1), own.argmax(1), -1)
    return [query, gallery, query_ids, gallery_ids, *cameras], exclude


@pytest.mark.parametrize("tens", range(CASES // 10))
def test_against_a_loop(tens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        chosen = options_of(seed)
        if chosen["backend"] == "triton" and not (HAS_TRITON and INTERPRETED):
            continue
        arguments, exclude = case_of(seed, chosen)
        query, gallery, *labels = arguments
        exact = distances(query, gallery, chosen["metric"])
        options = {name: chosen[name] for name in ("ap", "ties", "max_rank")} | {"exclude": exclude}
        wanted = expected(exact, *labels, **options)
        with monkeypatch.context() as patch, use_backend(chosen["backend"]):
            if chosen["pieces"] == "cut":
                patch.setattr(ranking, "_PIECE_BYTES", 1 << 11)
            if chosen["pieces"] == "distances":
                options |= {"single_shot": chosen["single_shot"], "seed": seed}
                found = rank_metrics_from_distances(exact, *labels, **options)
            elif chosen["pieces"] == "accumulated":
                found = in_pieces(
                    *arguments, cuts=(len(gallery) // 3, len(gallery) // 2), metric=chosen["metric"], **options
                )
            else:
                options |= {"metric": chosen["metric"], "single_shot": chosen["single_shot"], "seed": seed}
                found = rank_metrics(*arguments, **options)
        if chosen["single_shot"] is not None:
            check_draws(found.cmc, exact, labels, exclude, chosen)
            found = found._replace(cmc=wanted.cmc)
        assert_same(found, wanted)


def check_draws(
    cmc: Tensor, exact: Tensor, labels: list[Tensor], exclude: Tensor | None, chosen: dict[str, Any]
) -> None:
    """Between the CMC of the worst images that can be drawn and that of the best: equal for one image an identity."""
    options = {"ties": chosen["ties"], "max_rank": chosen["max_rank"]}
    worst, best = (extreme_draw(exact, *labels, exclude=exclude, sign=sign, **options).cmc for sign in (1, -1))
    assert (worst - 1e-12 <= cmc).all()
    assert (cmc <= best + 1e-12).all()
    assert (cmc.diff() >= -1e-12).all()


def extreme_draw(
    exact: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    exclude: Tensor | None,
    sign: int,
    **options: Any,
) -> RankMetrics:
    """Of each query's own identity the farthest (nearest for −1) image that is not removed, of others the nearest."""
    rows, ids = [], []
    for i, row in enumerate(exact.double()):
        of_query, kept = [], []
        for identity in (name for name in gallery_ids.unique().tolist() if name != -1):
            usable = gallery_ids == identity
            if identity == query_ids[i]:
                if query_cams is not None and gallery_cams is not None:
                    usable = usable & (gallery_cams != query_cams[i])
                if exclude is not None:
                    usable = usable & (torch.arange(len(usable)) != exclude[i])
            if usable.any():
                far = (sign > 0) == (identity == query_ids[i])
                of_query.append(float(row[usable].max() if far else row[usable].min()))
                kept.append(identity)
        rows.append(of_query)
        ids.append(kept)
    width = max(map(len, rows))
    matrix = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)
    each = [expected(matrix[[i], : len(rows[i])], query_ids[[i]], torch.tensor(ids[i]), **options)
            for i in range(len(rows)) if int(query_ids[i]) in ids[i]]  # fmt: skip
    return each[0]._replace(cmc=torch.stack([one.cmc for one in each]).mean(0))
