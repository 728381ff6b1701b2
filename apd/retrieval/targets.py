"""Tests on unseen targets: a rule makes splits of a data set, and every model is tested on the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from apd.data.market import FOLDERS, NO_ANSWERS, ReidFolder, read_market, unanswered
from apd.data.splits import Split, camera_draws, two_camera_splits, write_splits
from apd.errors import InputError
from apd.files import replacing
from apd.retrieval.comparison import Chance, chance, retrieve
from apd.retrieval.evaluation import RANKS
from apd.retrieval.extraction import Extractor, extract_folder
from apd.retrieval.features import SPLITS, FeatureSet

FIGURES = (*(f"rank-{k}" for k in RANKS), "mAP")


@dataclass(frozen=True)
class Rule:
    """How a target is tested.

    ``two_cameras``   `identities` are drawn `repeats` times; camera 1 asks and camera 2 answers, and the reverse
    ``one_per_camera``   all identities; one image of each in each camera asks, drawn `repeats` times, the others answer
    ``own``   the data set's own query and gallery
    """

    rule: str
    identities: int | None = None
    repeats: int = 10
    seed: int = 0

    def splits(self, rows: FeatureSet) -> list[Split]:
        """The splits of a target.

        Args:
            rows: all images, with identities, cameras and split; features are not looked at.

        Raises:
            InputError: the images do not allow them.
        """
        return RULES[self.rule](self, rows)

    def describe(self) -> str:
        if self.rule == "own":
            return "its own query and gallery"
        if self.rule == "two_cameras":
            return f"{self.repeats} random splits of {self.identities} identities × both directions, seed {self.seed}"
        return f"all identities, one random query for each identity and camera, {self.repeats} draws, seed {self.seed}"


def _two_cameras(rule: Rule, rows: FeatureSet) -> list[Split]:
    assert rule.identities is not None
    there, back = (
        two_camera_splits(
            rows.identities(),
            rows.cameras(),
            identities=rule.identities,
            repeats=rule.repeats,
            seed=rule.seed,
            query_camera=query,
            gallery_camera=gallery,
        )
        for query, gallery in ((1, 2), (2, 1))
    )
    return [split for pair in zip(there, back, strict=True) for split in pair]


def _one_per_camera(rule: Rule, rows: FeatureSet) -> list[Split]:
    return camera_draws(rows.identities(), rows.cameras(), repeats=rule.repeats, seed=rule.seed)


def _own(rule: Rule, rows: FeatureSet) -> list[Split]:
    if rows.split is None or not {SPLITS["query"], SPLITS["gallery"]} <= set(rows.split.tolist()):
        raise InputError(f"{rows.path}: has no query and gallery of its own")
    return [Split(*(np.flatnonzero(rows.split == SPLITS[part]) for part in ("query", "gallery")))]


RULES: Mapping[str, Callable[[Rule, FeatureSet], list[Split]]] = {
    "two_cameras": _two_cameras,
    "one_per_camera": _one_per_camera,
    "own": _own,
}


@dataclass(frozen=True)
class Queries:
    """What every query of every split found, in the order of the splits: the same queries for every model."""

    identities: np.ndarray  # int64 (Q,)
    right: np.ndarray  # bool (Q,): rank-1
    ap: np.ndarray  # float64 (Q,)


@dataclass(frozen=True)
class Tested:
    """A model on a target."""

    figures: dict[str, float]  # of FIGURES: means over the splits
    queries: Queries


@dataclass(frozen=True)
class Target:
    """A data set that nothing is trained on: all of its images, whatever part they are in, and the splits."""

    name: str
    folder: ReidFolder
    rule: Rule
    names: tuple[str, ...]  # of all images, "folder/file", sorted
    splits: tuple[Split, ...]  # rows of `names`

    def digest(self) -> str:
        """Names the test: SHA-256 of rule, images and splits, shortened."""
        sha = hashlib.sha256(repr((asdict(self.rule), self.names)).encode(errors="surrogateescape"))
        for split in self.splits:
            for rows in (split.query, split.gallery):
                sha.update(f"{len(rows)} ".encode() + rows.astype("<i8").tobytes())
        return sha.hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the lists of the splits, as `apd.data.splits.write_splits`."""
        write_splits(path, self.splits, self.names)

    def chance(self) -> Chance:
        """What random rankings reach on average, over the splits."""
        rows = _labels(self.folder)
        found = [chance(_rows(rows, one.query, "query"), _rows(rows, one.gallery, "gallery")) for one in self.splits]
        return Chance(*np.mean(found, axis=0).tolist())

    def describe(self, extractor: Extractor) -> FeatureSet:
        """The descriptors of all images."""
        return self.arranged(extract_folder(extractor, self.folder))

    def arranged(self, rows: FeatureSet) -> FeatureSet:
        """Feature rows in the order of `names`; others are left out.

        Raises:
            InputError: an image of the target has no row.
        """
        places = {name: row for row, name in enumerate(rows.names.tolist())}
        if missing := [name for name in self.names if name not in places]:
            raise InputError(f"{rows.path}: names: {len(missing)} images of {self.name} have no row: {missing[0]}")
        return _rows(rows, np.array([places[name] for name in self.names]), "all images")

    def test(self, rows: FeatureSet) -> Tested:
        """Search the queries of each split in its gallery, by cosine distance.

        Args:
            rows: the descriptors of all images, of `describe` or `arranged`.

        Raises:
            InputError: a split has no query with an image of its identity in another camera.
        """
        found, figures = [], []
        for split in self.splits:
            query, gallery = _rows(rows, split.query, "query"), _rows(rows, split.gallery, "gallery")
            one = retrieve(query, gallery)
            figures.append([*(float((one.first_rank <= k).mean()) for k in RANKS), one.mAP])
            found.append(one)
        return Tested(
            figures=dict(zip(FIGURES, np.mean(figures, axis=0).tolist(), strict=True)),
            queries=Queries(*(np.concatenate([getattr(one, part) for one in found]) for part in _COLUMNS)),
        )


_COLUMNS = ("identities", "right", "ap")


def load_target(name: str, path: Path, rule: Rule) -> Target:
    """Read a target, with the parts that it has, and make its splits.

    Args:
        name: of the target.
        path: a data set in the layout of Market-1501.
        rule: how it is tested.

    Raises:
        InputError: it cannot be read, or does not allow the splits, or one has no query with an answer.
    """
    # Own query and gallery are all that this rule looks at.
    wanted = ("query", "gallery") if rule.rule == "own" else tuple(FOLDERS)
    folder = read_market(path, [part for part in wanted if (path / FOLDERS[part]).is_dir()] or wanted)
    rows = _labels(folder)
    try:
        splits = rule.splits(rows)
    except InputError as error:
        raise InputError(f"target {name} ({path}): {error}") from error
    found = np.stack([rows.identities(), rows.cameras()], 1)
    for split in splits:
        query, gallery = (found[one].tolist() for one in (split.query, split.gallery))
        if unanswered(query, gallery) == len(query):
            raise InputError(f"target {name} ({path}): {NO_ANSWERS}")
    return Target(name, folder, rule, tuple(rows.names.tolist()), tuple(splits))


def _labels(folder: ReidFolder) -> FeatureSet:
    """All images of a data set by name, as rows without features."""
    found = sorted(
        (sample.path.relative_to(folder.path).as_posix(), sample.pid, sample.camid, SPLITS[part])
        for part in FOLDERS
        for sample in getattr(folder, part)
    )
    names, *columns = zip(*found, strict=True)
    pids, camids, split = (np.array(column, np.int64) for column in columns)
    return FeatureSet(folder.path, "all images", np.empty((len(found), 0)), np.array(names), pids, camids, split)


def _rows(rows: FeatureSet, chosen: np.ndarray, which: str) -> FeatureSet:
    return replace(
        rows,
        rows=which,
        features=rows.features[chosen],
        names=rows.names[chosen],
        pids=rows.identities()[chosen],
        camids=rows.cameras()[chosen],
        split=None,
    )


def save_queries(path: Path, queries: Mapping[str, Queries]) -> None:
    """Write what the queries of each target found, in one step."""
    arrays = {f"{target}/{part}": getattr(one, part) for target, one in queries.items() for part in _COLUMNS}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)


def load_queries(path: Path, targets: Sequence[str]) -> dict[str, Queries]:
    """What `save_queries` wrote.

    Raises:
        InputError: the file is missing or damaged, or lacks a target.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {target: Queries(*(archive[f"{target}/{part}"] for part in _COLUMNS)) for target in targets}
    except Exception as error:  # zipfile and numpy raise a dozen kinds for damage
        raise InputError(f"{path}: missing, cut off or damaged: {error}") from error
