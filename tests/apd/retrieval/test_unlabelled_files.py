"""−1 in feature files: nobody and nowhere in every figure and list, or a number like others where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from feature_files import draw_features

from apd.errors import InputError
from apd.retrieval.comparison import chance
from apd.retrieval.evaluation import (
    Conventions,
    Reranking,
    evaluate,
    evaluate_distances,
    evaluate_reranked,
    evaluate_shards,
    rerank,
)
from apd.retrieval.features import FeatureSet, load_features
from apd.retrieval.ranked_lists import RankedLists
from apd.retrieval.search import index_features, rank_reranked, search_features, search_reranked
from apd.retrieval.shards import open_shards
from apd_kernels import pairwise_distance, rank_metrics
from apd_kernels.evaluation.retrieval_metrics import Unlabelled

RULES = [Unlabelled(), Unlabelled(None, -1), Unlabelled(-1, None), Unlabelled(None, None), Unlabelled(2, 1)]
RERANKING = Reranking(k1=6, k2=3)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[FeatureSet, FeatureSet]:
    random = np.random.default_rng(3)
    arrays = draw_features(120, 8)
    arrays["pids"], arrays["camids"] = (random.integers(-1, 6, 120), random.integers(-1, 3, 120))
    arrays["split"] = 1 + (np.arange(120) >= 30)
    np.savez(tmp_path / "f.npz", **arrays)
    rows = load_features(tmp_path / "f.npz")
    return rows.part("query"), rows.part("gallery")


def tensors(query: FeatureSet, gallery: FeatureSet) -> list[torch.Tensor]:
    columns = (query.features, gallery.features, query.pids, gallery.pids, query.camids, gallery.camids)
    return [torch.from_numpy(values) for values in columns if values is not None]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_figures(tmp_path: Path, sides: tuple[FeatureSet, FeatureSet], rule: Unlabelled) -> None:
    query, _ = sides
    x, y, *labels = tensors(*sides)
    wanted = rank_metrics(x, y, *labels, max_rank=10, **rule._asdict())
    conventions = Conventions(unlabelled=rule)
    np.save(tmp_path / "d.npy", pairwise_distance(x, y, metric="cosine").numpy())
    for found in (
        evaluate(*sides, conventions),
        evaluate_shards(query, open_shards([query.path], query), conventions),
        evaluate_distances(tmp_path / "d.npy", *sides, conventions),
    ):
        assert (found.mAP, found.mINP, found.num_valid_queries) == (wanted.mAP, wanted.mINP, int(wanted.valid.sum()))
        assert found.as_json().items() >= rule._asdict().items()
    reranked = rerank(*sides, "cosine", RERANKING)
    found = evaluate_reranked(reranked, *sides, conventions)
    assert found.mAP == reranked.rank_metrics(*labels, **rule._asdict()).mAP
    assert evaluate(*sides, replace(conventions, reranking=RERANKING)).mAP == found.mAP


@pytest.mark.parametrize("dtype", [np.int64, np.int8])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_lists(sides: tuple[FeatureSet, FeatureSet], rule: Unlabelled, dtype: type) -> None:
    """Whatever the integers of the files are."""
    query, images = (replace(rows, pids=rows.pids.astype(dtype), camids=rows.camids.astype(dtype)) for rows in sides)
    _, _, ids, gallery_ids, cams, gallery_cams = tensors(*sides)
    removed = (ids[:, None] == gallery_ids) & (cams[:, None] == gallery_cams)
    if rule.junk is not None:
        removed &= (ids != rule.junk)[:, None]
    if rule.unknown_camera is not None:
        removed &= (cams != rule.unknown_camera)[:, None]
    gallery = index_features(images, "cosine", device="cpu")
    options = {"exclude_same_camera": True, "unlabelled": rule}
    reranked = rerank(*sides, "cosine", RERANKING)

    def listed(lists: RankedLists) -> torch.Tensor:
        found = torch.zeros_like(removed)
        for row, keys in enumerate(lists.found.indices.tolist()):
            found[row, [key for key in keys if key >= 0]] = True
        return found

    for lists in (
        search_features(query, gallery, 90, **options),
        search_reranked(query, gallery, 90, RERANKING, **options),
        rank_reranked(reranked, query, images, 90, "cosine", RERANKING, **options),
    ):
        assert torch.equal(listed(lists), ~removed)


def test_chance(sides: tuple[FeatureSet, FeatureSet]) -> None:
    """What features that say nothing reach in expectation."""
    _, _, *labels = tensors(*sides)
    alike = torch.ones(30, 1), torch.ones(90, 1)
    wanted = rank_metrics(*alike, *labels, ties="expected")
    found = chance(*sides)
    assert found.rank1 == pytest.approx(float(wanted.cmc[0]))
    assert found.mAP == pytest.approx(wanted.mAP)


@pytest.mark.parametrize("name", ["pids", "camids"])
def test_numbers_beyond_int64(tmp_path: Path, name: str) -> None:
    """They would become others: 2⁶⁴ − 1 is −1, nobody."""
    arrays = draw_features(12, 3)
    arrays[name] = arrays[name].astype(np.uint64)
    np.savez(tmp_path / "f.npz", **arrays)
    assert len(load_features(tmp_path / "f.npz")) == 12
    arrays[name][5] = 2**64 - 1
    np.savez(tmp_path / "f.npz", **arrays)
    message = rf"{name}: expected numbers below 2\*\*63, got 18446744073709551615"
    with pytest.raises(InputError, match=message):
        load_features(tmp_path / "f.npz")
    np.save(tmp_path / "g.npy", arrays["features"])
    for label in ("pids", "camids"):
        np.save(tmp_path / f"g.{label}.npy", arrays[label])
    del arrays[name]
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(InputError, match=rf"g\.{name}\.npy: expected numbers below"):
        open_shards([tmp_path / "g.npy"], load_features(tmp_path / "f.npz"))
