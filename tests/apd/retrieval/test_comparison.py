"""Chance, colour histograms and paired differences against values by hand."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from apd.retrieval.comparison import ColourHistogram, chance, nearest_is_right, paired_difference, retrieve
from apd.retrieval.features import FeatureSet
from apd_kernels import rank_metrics


def rows(pids: list[int], camids: list[int], features: np.ndarray | None = None) -> FeatureSet:
    values = np.eye(len(pids), dtype=np.float32) if features is None else features
    names = np.array([f"row {i}" for i in range(len(pids))])
    return FeatureSet(Path("drawn"), "all rows", values, names, np.array(pids), np.array(camids), None)


GALLERY = rows([7, 7, 7, 8, 9, -1, 0], [1, 2, 2, 1, 2, 2, 1])  # of person 7: one in camera 1, two in camera 2


def test_chance_by_hand() -> None:
    """Camera 1 asks for person 7: two right answers among five; the image of its camera and the junk image are out."""
    found = chance(rows([7], [1]), GALLERY)
    assert found.rank1 == pytest.approx(2 / 5)
    every = [
        np.mean([(i + 1) / (place + 1) for i, place in enumerate(sorted(order[:2]))])
        for order in permutations(range(5))
    ]
    assert found.mAP == pytest.approx(np.mean(every))


def test_chance_counts_what_has_an_answer() -> None:
    """Person 9 was seen by camera 2 only and 5 never: neither counts. Camera 2 asks for person 7: 1 of 4."""
    found = chance(rows([7, 9, 5, 7], [1, 2, 1, 2]), GALLERY)
    assert found.rank1 == pytest.approx((2 / 5 + 1 / 4) / 2)
    alone = chance(rows([3], [1]), rows([3], [2]))
    assert alone == (1.0, 1.0)


def test_chance_is_the_mean_of_random_rankings() -> None:
    random = np.random.default_rng(0)
    query, gallery = rows([1, 2, 3], [1, 1, 2]), rows([1, 1, 2, 3, 3, 3, 1, 2], [2, 1, 2, 1, 1, 2, 2, 1])
    found = [
        retrieve(
            rows([1, 2, 3], [1, 1, 2], random.standard_normal((3, 16))),
            rows([1, 1, 2, 3, 3, 3, 1, 2], [2, 1, 2, 1, 1, 2, 2, 1], random.standard_normal((8, 16))),
        )
        for _ in range(200)
    ]
    expected = chance(query, gallery)
    assert np.mean([one.rank1 for one in found]) == pytest.approx(expected.rank1, abs=0.05)
    assert np.mean([one.mAP for one in found]) == pytest.approx(expected.mAP, abs=0.04)


def test_retrieve_agrees_with_rank_metrics() -> None:
    random = np.random.default_rng(1)
    pids, camids = random.integers(-1, 9, (2, 60)), random.integers(1, 4, (2, 60))
    query, gallery = (
        rows(list(p), list(c), random.standard_normal((60, 3))) for p, c in zip(pids, camids, strict=True)
    )
    gallery.features[10] = gallery.features[11]  # a tie
    found = retrieve(query, gallery)
    columns = [torch.from_numpy(values) for values in (query.features, gallery.features, *pids, *camids)]
    expected = rank_metrics(*columns)
    assert found.rank1 == pytest.approx(float(expected.cmc[0]))
    assert found.mAP == pytest.approx(expected.mAP)
    assert found.queries.tolist() == expected.valid.nonzero().flatten().tolist()
    assert (found.identities == query.identities()[found.queries]).all()
    assert found.rank1_error == pytest.approx((found.rank1 * (1 - found.rank1) / len(found.right)) ** 0.5)


def test_retrieve_is_pessimistic_about_ties() -> None:
    """A wrong image at the distance of the right one comes first; the query's own camera does not count."""
    query = rows([1], [1], np.array([[1.0, 0.0]]))
    gallery = rows([1, 2, 1], [2, 2, 1], np.array([[0.6, 0.8], [0.6, 0.8], [1.0, 0.0]]))
    found = retrieve(query, gallery)
    assert found.right.tolist() == [False]
    assert found.ap.tolist() == [0.5]


def test_colour_histogram_by_hand() -> None:
    image = torch.zeros(1, 3, 2, 4)
    image[0, :, :, 1] = torch.tensor([1.0, 0.3, 0.6])[:, None]  # bins 3, 1 and 2
    histogram = ColourHistogram(False)(image)[0]
    assert histogram.shape == (64,)
    assert histogram[0] == pytest.approx(0.75**0.5)
    assert histogram[3 * 16 + 1 * 4 + 2] == pytest.approx(0.25**0.5)
    assert histogram.square().sum() == pytest.approx(1)


def test_normalized_colours_ignore_background_and_cast() -> None:
    """The outer quarters may change, and every channel be scaled and shifted."""
    random = torch.Generator().manual_seed(0)
    image = 0.2 + 0.4 * torch.rand(1, 3, 16, 8, generator=random)
    other = 0.05 + torch.tensor([0.9, 0.7, 1.2])[:, None, None] * image
    other[..., :2] = 1.0
    other[..., 6:] = 0.0
    normalized, plain = ColourHistogram(True), ColourHistogram(False)
    torch.testing.assert_close(normalized(image), normalized(other))
    assert (plain(image) - plain(other)).abs().max() > 0.1
    grey = normalized(torch.full((1, 3, 4, 4), 0.5))  # no spread to divide by
    assert grey.isfinite().all()


def test_nearest_is_right_leaves_out_the_own_original() -> None:
    originals, labels = torch.tensor([[0.0], [1.0], [5.0], [6.0], [9.0]]), torch.tensor([0, 0, 1, 1, 2])
    assert nearest_is_right(originals, originals, labels).tolist() == [True, True, True, True, False]
    moved = torch.tensor([[0.1], [4.0], [5.0], [8.0], [9.0]])
    assert nearest_is_right(moved, originals, labels).tolist() == [True, False, True, False, False]


def test_paired_difference_by_hand() -> None:
    """Two identities with the differences (1, 0) and (0, 0): mean ¼, sums of residuals ½ and −½."""
    found = paired_difference(np.array([1, 0, 1, 0]), np.array([0, 0, 1, 0]), np.array([5, 5, 3, 3]))
    assert found.mean == 0.25
    assert found.error == pytest.approx((2 * (0.25 + 0.25)) ** 0.5 / 4)
    assert (found.queries, found.identities) == (4, 2)
    assert not found.resolved


def test_paired_difference_of_single_queries_is_the_usual_error() -> None:
    random = np.random.default_rng(2)
    ours, theirs = random.random(50) + 0.3, random.random(50)
    found = paired_difference(ours, theirs, np.arange(50))
    assert found.error == pytest.approx((ours - theirs).std(ddof=1) / 50**0.5)
    assert found.resolved
    assert paired_difference(theirs, ours, np.arange(50)).resolved  # and worse is resolved, too
    doubled = paired_difference(*(np.repeat(values, 2) for values in (ours, theirs, np.arange(50))))
    assert doubled.error == pytest.approx(found.error)  # asking twice tells nothing new
    assert not paired_difference(ours, ours, np.arange(50)).resolved
