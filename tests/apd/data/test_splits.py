"""Random splits of test images: who is drawn, who asks, who answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apd.data.splits import Split, camera_draws, image_pair_splits, read_splits, two_camera_splits, write_splits
from apd.errors import InputError

# Identities 1 to 6 in both cameras with two images each, 7 in camera 1 and 8 in camera 2 alone, distractors, junk.
PIDS = np.array([*np.repeat(np.arange(1, 7), 4), 7, 8, 0, 0, -1, -1])
CAMIDS = np.array([*np.tile([1, 1, 2, 2], 6), 1, 2, 1, 2, 1, 2])


def labels(rows: np.ndarray) -> set[tuple[int, int]]:
    return {(int(PIDS[row]), int(CAMIDS[row])) for row in rows}


def test_two_camera_splits() -> None:
    splits = two_camera_splits(PIDS, CAMIDS, identities=3, repeats=10)
    assert len(splits) == 10
    for split in splits:
        asking = {pid for pid, _ in labels(split.query)}
        assert len(asking) == 3
        assert asking <= set(range(1, 7))
        assert labels(split.query) == {(pid, 1) for pid in asking}
        assert labels(split.gallery) == {(pid, 2) for pid in asking} | {(8, 2), (0, 2)}
        assert (len(split.query), len(split.gallery)) == (6, 8)
        assert (np.diff(split.query) > 0).all()
        assert (np.diff(split.gallery) > 0).all()
    assert len({tuple(split.query) for split in splits}) > 5
    shorter = two_camera_splits(PIDS, CAMIDS, identities=3, repeats=4)
    assert all((a.query == b.query).all() for a, b in zip(splits, shorter, strict=False))
    others = two_camera_splits(PIDS, CAMIDS, identities=3, seed=1)
    assert [split.query.tolist() for split in others] != [split.query.tolist() for split in splits]


@pytest.mark.parametrize("one_image", [False, True])
def test_both_directions_are_of_the_same_images(one_image: bool) -> None:
    there = two_camera_splits(PIDS, CAMIDS, identities=4, one_image=one_image)
    back = two_camera_splits(PIDS, CAMIDS, identities=4, query_camera=2, gallery_camera=1, one_image=one_image)
    for a, b in zip(there, back, strict=True):
        assert set(a.query) == {row for row in b.gallery if 1 <= PIDS[row] <= 6}
        assert set(b.query) == {row for row in a.gallery if 1 <= PIDS[row] <= 6}
        assert len(a.query) == (4 if one_image else 8)


def test_one_image_is_drawn_anew() -> None:
    splits = two_camera_splits(PIDS, CAMIDS, identities=6, one_image=True, repeats=30)
    assert all(len(set(PIDS[split.query])) == len(split.query) == 6 for split in splits)
    assert {int(row) for split in splits for row in split.query} == set(
        np.flatnonzero((CAMIDS == 1) & (PIDS < 7) & (PIDS > 0))
    )


def test_camera_draws() -> None:
    splits = camera_draws(PIDS, CAMIDS, repeats=10, seed=3)
    for split in splits:
        assert len(split.query) == 12
        assert labels(split.query) == {(pid, camera) for pid in range(1, 7) for camera in (1, 2)}
        assert sorted([*split.query, *split.gallery]) == list(np.flatnonzero(PIDS >= 0))
    assert len({tuple(split.query) for split in splits}) == 10


def test_lists_are_written_and_read(tmp_path: Path) -> None:
    names = [f"query/{row}.jpg" for row in range(len(PIDS))]
    splits = camera_draws(PIDS, CAMIDS, repeats=2)
    write_splits(tmp_path / "lists.json", splits, names)
    moved = names[::-1]  # the lists are of names, not of rows
    for split, again in zip(splits, read_splits(tmp_path / "lists.json", moved), strict=True):
        assert [names[row] for row in split.query] == [moved[row] for row in again.query]
        assert [names[row] for row in split.gallery] == [moved[row] for row in again.gallery]
    write_splits(tmp_path / "lists.json", [Split(np.array([0]), np.array([1]))], names)
    with pytest.raises(InputError, match=r"lists\.json: names 'query/0\.jpg', which is not among the 1 images"):
        read_splits(tmp_path / "lists.json", ["other"])
    (tmp_path / "lists.json").write_text("[{}")
    with pytest.raises(InputError, match=r"lists\.json: damaged: Expecting"):
        read_splits(tmp_path / "lists.json", names)


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="identities: expected 1 to 6, those seen by the cameras 1 and 2, got 7"):
        two_camera_splits(PIDS, CAMIDS, identities=7)
    with pytest.raises(InputError, match=r"gallery_camera: expected another camera than the query's \(2\)"):
        two_camera_splits(PIDS, CAMIDS, identities=2, query_camera=2, gallery_camera=2)
    with pytest.raises(InputError, match="pids: expected an identity with images of two cameras, got none"):
        camera_draws(np.array([1, 2, 0, 0]), np.array([1, 2, 1, 2]))


def test_image_pair_splits() -> None:
    """Cameras are not known: one image of each identity asks, another one answers."""
    pids = np.array([1, 1, 1, 2, 2, 3, 4, 4, 0, 0, -1, -1])
    splits = image_pair_splits(pids, identities=2)
    assert len(splits) == 10
    for split in splits:
        assert sorted(pids[split.query]) == sorted(pids[split.gallery])
        assert len(set(pids[split.query])) == 2
        assert set(pids[split.query]) <= {1, 2, 4}
        assert not set(split.query) & set(split.gallery)
    assert len({(*split.query, *split.gallery) for split in splits}) > 5
    assert [s.query.tolist() for s in image_pair_splits(pids, identities=2, seed=1)] != [
        s.query.tolist() for s in splits
    ]
    with pytest.raises(InputError, match="identities: expected 1 to 3, those with two images, got 4"):
        image_pair_splits(pids, identities=4)
