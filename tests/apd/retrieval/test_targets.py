"""Tests on unseen targets: which images, which figures, and real features against their known result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import draw_data_set

from apd.errors import InputError
from apd.retrieval.features import FeatureSet, load_features
from apd.retrieval.targets import Rule, Target, load_queries, load_target, save_queries

OWN, HALVES, DRAWS = Rule("own"), Rule("two_cameras", identities=3, repeats=4), Rule("one_per_camera", repeats=3)


def described(target: Target, path: Path) -> FeatureSet:
    """Features that name the identity, of the images in another order, with one that the target does not know."""
    names = [*target.names[::-1], "query/unknown.png"]
    labels = [Path(name).name for name in names[:-1]]
    pids = np.array([*(int(label[:4]) for label in labels), 77])
    camids = np.array([*(int(label[6]) for label in labels), 1])
    rows = FeatureSet(path, "all rows", np.eye(100)[pids], np.array(names), pids, camids, None)
    return target.arranged(rows)


@pytest.mark.parametrize(
    ("rule", "images", "splits", "queries"), [(OWN, 17, 1, 5), (HALVES, 21, 8, None), (DRAWS, 21, 3, 5)]
)
def test_all_parts_are_tested(tmp_path: Path, rule: Rule, images: int, splits: int, queries: int | None) -> None:
    """Seven identities in train, query and gallery; the own rule leaves train out, draws those without an answer."""
    target = load_target("drawn", draw_data_set(tmp_path / "drawn"), rule)
    assert (len(target.names), len(target.splits)) == (images, splits)
    found = target.test(described(target, tmp_path))
    assert set(found.figures.values()) == {1.0}
    assert found.queries.right.all()
    asked = [len(split.query) if queries is None else queries for split in target.splits]
    assert len(found.queries.right) == len(found.queries.ap) == len(found.queries.identities) == sum(asked)


def test_figures_are_means_over_splits(tmp_path: Path) -> None:
    target = load_target("drawn", draw_data_set(tmp_path / "drawn"), DRAWS)
    rows = described(target, tmp_path)
    random = replace(rows, features=np.random.default_rng(0).standard_normal(rows.features.shape))
    found = target.test(random)
    parts = [replace(target, splits=(split,)).test(random) for split in target.splits]
    for figure, value in found.figures.items():
        assert value == pytest.approx(np.mean([part.figures[figure] for part in parts]))
    assert found.figures["rank-1"] == pytest.approx(found.queries.right.mean())
    assert found.figures["mAP"] == pytest.approx(found.queries.ap.mean())
    assert found.figures["rank-1"] < found.figures["rank-5"] < 1


def test_a_digest_names_the_test(tmp_path: Path) -> None:
    path = draw_data_set(tmp_path / "drawn")
    digests = {
        load_target("drawn", path, rule).digest() for rule in (OWN, HALVES, DRAWS, replace(DRAWS, seed=1), DRAWS)
    }
    assert len(digests) == 4
    (path / "query" / "0001_c1s1_000000_00.png").unlink()
    assert load_target("drawn", path, DRAWS).digest() not in digests


def test_what_cannot_be_tested(tmp_path: Path) -> None:
    path = draw_data_set(tmp_path / "drawn")
    with pytest.raises(InputError, match=r"target drawn \(.*\): identities: expected 1 to 7, .*, got 8"):
        load_target("drawn", path, replace(HALVES, identities=8))
    target = load_target("drawn", path, DRAWS)
    rows = described(target, tmp_path / "rows.npz")
    with pytest.raises(InputError, match=r"rows\.npz: names: 1 images of drawn have no row: bounding_box_test/0000_c1"):
        target.arranged(replace(rows, names=np.array(["other", *rows.names[1:]])))


def test_queries_are_written_and_read(tmp_path: Path) -> None:
    target = load_target("drawn", draw_data_set(tmp_path / "drawn"), DRAWS)
    queries = target.test(described(target, tmp_path)).queries
    save_queries(tmp_path / "queries.npz", {"drawn": queries})
    again = load_queries(tmp_path / "queries.npz", ["drawn"])["drawn"]
    assert (again.identities == queries.identities).all()
    assert (again.ap == queries.ap).all()
    assert again.right.dtype == bool
    with pytest.raises(InputError, match=r"queries\.npz: cannot be read, or is cut off or damaged|no such file"):
        load_queries(tmp_path / "queries.npz", ["other"])


def test_osnet_on_viper(real_data: Path) -> None:
    """Its own split against the known 44.9 / 55.5; ten halves in both directions are near it."""
    features = load_features(real_data / "data/features/osnet_viper.npz")
    for rule, rank1, mAP, tolerance in ((OWN, 0.449, 0.555, 6e-4), (Rule("two_cameras", 316), 0.449, 0.555, 0.05)):
        target = load_target("viper", real_data / "data/reid/viper", rule)
        found = target.test(target.arranged(features)).figures
        assert found["rank-1"] == pytest.approx(rank1, abs=tolerance)
        assert found["mAP"] == pytest.approx(mAP, abs=tolerance)
