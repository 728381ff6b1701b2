"""Seeded random splits of test images into query and gallery, as small data sets are evaluated.

The images of a data set are the rows of two columns, identity and camera. Rows keep their order in every split, so that
feature files and image lists can both be cut by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apd.data.market import DISTRACTOR
from apd.errors import InputError
from apd.files import read_json, write_json


@dataclass(frozen=True)
class Split:
    """A test: which rows ask, and among which they are searched."""

    query: np.ndarray  # int64 (Q,), row numbers, ascending
    gallery: np.ndarray  # int64 (G,)


def two_camera_splits(
    pids: np.ndarray,
    camids: np.ndarray,
    *,
    identities: int,
    repeats: int = 10,
    seed: int = 0,
    query_camera: int = 1,
    gallery_camera: int = 2,
    one_image: bool = False,
) -> list[Split]:
    """The ten-split rule of VIPeR, PRID and i-LIDS: identities are drawn, one camera asks, the other answers.

    Drawn from the identities that both cameras saw. Identities that only the gallery's camera saw, and distractors
    (identity 0) there, are in every gallery (PRID: 649 images for 100 queries). Split r depends on the seed and r
    alone, and the two directions of one seed draw the same identities.

    Args:
        pids, camids: identity and camera of N images, integers (N,); junk (identity −1) is left out.
        identities: how many are drawn for a split; VIPeR 316, PRID 100, i-LIDS 60.
        repeats: number of splits.
        seed: of the draws.
        query_camera, gallery_camera: two different cameras.
        one_image: draw one image of each identity in each camera; otherwise all of them ask and answer.

    Returns:
        `repeats` splits.

    Raises:
        InputError: the cameras are equal, or saw fewer identities in common.

    >>> splits = two_camera_splits(np.array([1, 1, 2, 2, 3, 3]), np.array([1, 2] * 3), identities=2, repeats=1)
    >>> splits[0].query.tolist(), splits[0].gallery.tolist()
    ([2, 4], [3, 5])
    """
    if query_camera == gallery_camera:
        raise InputError(f"gallery_camera: expected another camera than the query's ({query_camera})")
    asks, answers = camids == query_camera, (camids == gallery_camera) & (pids >= 0)
    both = np.intersect1d(pids[asks & (pids > DISTRACTOR)], pids[answers])
    if not 1 <= identities <= len(both):
        raise InputError(
            f"identities: expected 1 to {len(both)}, those seen by the cameras {query_camera} and {gallery_camera}, "
            f"got {identities}"
        )
    always = answers & ~np.isin(pids, both)
    splits = []
    for repeat in range(repeats):
        random = np.random.default_rng((seed, repeat))
        drawn = np.isin(pids, random.choice(both, identities, replace=False))
        chosen = {
            camera: np.flatnonzero((camids == camera) & drawn) for camera in sorted((query_camera, gallery_camera))
        }
        if one_image:  # in the order of the cameras: both directions draw the same images
            chosen = {camera: _one_each(rows, pids, random) for camera, rows in chosen.items()}
        gallery = np.concatenate([chosen[gallery_camera], np.flatnonzero(always)])
        splits.append(Split(chosen[query_camera], np.sort(gallery)))
    return splits


def image_pair_splits(pids: np.ndarray, *, identities: int, repeats: int = 10, seed: int = 0) -> list[Split]:
    """The ten-split rule of i-LIDS, whose cameras are not known: of each identity drawn one image asks, one answers.

    Args:
        pids: identity of N images, integers (N,).
        identities: how many are drawn for a split; i-LIDS 60.
        repeats: number of splits.
        seed: of the draws; split r depends on the seed and r alone.

    Returns:
        `repeats` splits.

    Raises:
        InputError: fewer identities have two images.

    >>> (split,) = image_pair_splits(np.array([1, 1, 2, 2, 3]), identities=2, repeats=1)
    >>> len(split.query), len(split.gallery), set(split.query) & set(split.gallery)
    (2, 2, set())
    """
    named, images = np.unique(pids[pids > DISTRACTOR], return_counts=True)
    usable = named[images > 1]
    if not 1 <= identities <= len(usable):
        raise InputError(f"identities: expected 1 to {len(usable)}, those with two images, got {identities}")
    splits = []
    for repeat in range(repeats):
        random = np.random.default_rng((seed, repeat))
        drawn = np.flatnonzero(np.isin(pids, random.choice(usable, identities, replace=False)))
        query = _one_each(drawn, pids, random)
        splits.append(Split(query, _one_each(np.setdiff1d(drawn, query), pids, random)))
    return splits


def camera_draws(pids: np.ndarray, camids: np.ndarray, *, repeats: int = 10, seed: int = 0) -> list[Split]:
    """All identities: one image of each in each camera asks, drawn at random, and all other images answer.

    Identities that one camera saw, and distractors (identity 0), do not ask, but are in every gallery. A query whose
    identity has no further image in another camera has no answer; evaluations leave it out. Split r depends on the seed
    and r alone.

    Args:
        pids, camids: identity and camera of N images, integers (N,); junk (identity −1) is left out.
        repeats: number of splits.
        seed: of the draws.

    Returns:
        `repeats` splits; in each the gallery holds no query.

    Raises:
        InputError: no identity has two cameras.

    >>> splits = camera_draws(np.array([1, 1, 1, 2]), np.array([1, 2, 2, 1]), repeats=1)
    >>> splits[0].query.tolist(), splits[0].gallery.tolist()
    ([0, 2], [1, 3])
    """
    cameras_of: dict[int, set[int]] = {}
    for pid, camid in zip(pids.tolist(), camids.tolist(), strict=True):
        cameras_of.setdefault(pid, set()).add(camid)
    asking = [pid for pid, cameras in cameras_of.items() if pid > DISTRACTOR and len(cameras) > 1]
    if not asking:
        raise InputError("pids: expected an identity with images of two cameras, got none")
    rows = np.flatnonzero(np.isin(pids, asking))
    _, group = np.unique(np.stack([pids, camids]), axis=1, return_inverse=True)
    splits = []
    for repeat in range(repeats):
        query = _one_each(rows, group.reshape(-1), np.random.default_rng((seed, repeat)))
        splits.append(Split(query, np.setdiff1d(np.flatnonzero(pids >= 0), query)))
    return splits


def _one_each(rows: np.ndarray, group: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One of the rows of each group, at random, ascending."""
    shuffled = random.permutation(rows)
    _, first = np.unique(group[shuffled], return_index=True)
    return np.sort(shuffled[first])


def write_splits(path: Path, splits: Sequence[Split], names: Sequence[str]) -> None:
    """Write the lists of query and gallery images of each split, as JSON.

    Args:
        path: the file.
        splits: of N rows.
        names: of the N images, all different.
    """
    lists = [{side: [names[row] for row in getattr(split, side)] for side in ("query", "gallery")} for split in splits]
    write_json(path, lists)


def read_splits(path: Path, names: Sequence[str]) -> list[Split]:
    """The splits that `write_splits` wrote, as rows of `names`.

    Raises:
        InputError: the file is damaged, holds no split, or names an image that is not there.
    """
    places = {name: row for row, name in enumerate(names)}
    lists = read_json(path, [{"query": [str], "gallery": [str]}])
    try:
        splits = [
            Split(*(np.array([places[name] for name in one[side]], np.int64) for side in ("query", "gallery")))
            for one in lists
        ]
    except KeyError as error:
        raise InputError(f"{path}: names {str(error)[:200]}, which is not among the {len(places)} images") from None
    if not splits:
        raise InputError(f"{path}: expected a list of splits, got an empty one")
    return splits
