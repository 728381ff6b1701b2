"""How the small data sets are tested: the mean over ten splits of their images into query and gallery.

A function takes a data set and a seed, and returns splits whose rows count through its query and then its gallery.
"""

from __future__ import annotations

import numpy as np

from apd.data.datasets.matlab import read_variable
from apd.data.market import DISTRACTOR, ReidFolder
from apd.data.splits import Split, image_pair_splits, two_camera_splits
from apd.errors import InputError

SPLITS = 10
GRID_PARTITIONS = "features_and_partitions.mat"


def half_by_camera(folder: ReidFolder, seed: int) -> list[Split]:
    """Half of the identities that both cameras saw; camera 1 asks (VIPeR: 316 of 632; PRID: 100 of 200)."""
    pids, camids = _columns(folder)
    both = np.intersect1d(pids[camids == 1], pids[camids == 2])
    return two_camera_splits(pids, camids, identities=_half(len(both)), repeats=SPLITS, seed=seed)


def half_by_image(folder: ReidFolder, seed: int) -> list[Split]:
    """Half of the identities, an image of each asking and another answering (i-LIDS: 60 of 119)."""
    pids, _ = _columns(folder)
    _, images = np.unique(pids, return_counts=True)
    return image_pair_splits(pids, identities=_half(int((images > 1).sum())), repeats=SPLITS, seed=seed)


def grid_splits(folder: ReidFolder, seed: int) -> list[Split]:
    """GRID's own partitions, whatever the seed: the identities not trained on, and all distractors in each gallery.

    Raises:
        InputError: ``features_and_partitions.mat`` is missing or does not fit the images.
    """
    path = folder.path / GRID_PARTITIONS
    pids, _ = _columns(folder)
    known = set(pids.tolist()) - {DISTRACTOR}
    asking = np.arange(len(pids)) < len(folder.query)
    splits = []
    for number, partition in enumerate(read_variable(path, "trainIdxAll"), 1):
        trained = _trained(partition)
        if not trained or not trained < known:
            raise InputError(
                f"{path}: trainIdxAll, partition {number}: expected some of the {len(known)} identities of the images, "
                f"got {len(trained)}, {len(trained - known)} of them unknown"
            )
        tested = ~np.isin(pids, list(trained))
        splits.append(Split(np.flatnonzero(tested & asking), np.flatnonzero(tested & ~asking)))
    return splits


def _trained(partition: object) -> set[int]:
    """The identities that a partition trains on: the third field of its struct; empty where there is none."""
    try:
        *_, third = list(partition[0].values())[:3]  # type: ignore[index]
        return {int(pid) for pid in np.asarray(third, np.float64).ravel()}
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return set()


def _half(identities: int) -> int:
    return (identities + 1) // 2


def _columns(folder: ReidFolder) -> tuple[np.ndarray, np.ndarray]:
    samples = (*folder.query, *folder.gallery)
    return np.array([s.pid for s in samples], np.int64), np.array([s.camid for s in samples], np.int64)
