"""The drawn data set: its files, that it can be drawn again, and that counting colours does not solve it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apd.demo.pedestrians import DOMAINS, SOURCES, UNSEEN, Domain, draw_domain, draw_person, write_domain
from apd.errors import InputError
from apd.retrieval.comparison import ColourHistogram
from apd_kernels import rank_metrics

PARTS = ("bounding_box_train", "query", "bounding_box_test")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def _labels(folder: Path) -> list[tuple[int, int]]:
    """(pid, camid) of the files of one part."""
    found = []
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(\d{4})_c(\d)s1_(\d{6})_00\.png", path.name)
        assert match, path.name
        found.append((int(match[1]), int(match[2])))
    return found


def test_domains() -> None:
    assert (*SOURCES, UNSEEN) == DOMAINS
    assert len({domain.name for domain in DOMAINS}) == 4
    assert len({camera.background for domain in DOMAINS for camera in domain.cameras}) == 8


def test_layout(tmp_path: Path) -> None:
    write_domain(tmp_path / "set", SOURCES[0], 0, train_identities=3, test_identities=2, frames=4)
    labels = {part: _labels(tmp_path / "set" / part) for part in PARTS}
    assert labels["bounding_box_train"] == [(pid, cam) for pid in (1, 2, 3) for cam in (1, 2) for _ in range(4)]
    assert labels["query"] == [(pid, cam) for pid in (4, 5) for cam in (1, 2)]
    assert labels["bounding_box_test"] == [(pid, cam) for pid in (4, 5) for cam in (1, 2) for _ in range(3)]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    for path in (tmp_path / "set").rglob("*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (32, 64))


def test_no_training_identities(tmp_path: Path) -> None:
    write_domain(tmp_path / "set", UNSEEN, 0, train_identities=0, test_identities=1, frames=2)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["bounding_box_test", "query"]


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="set: exists already"):
        write_domain(tmp_path / "set", UNSEEN, 0)
    assert [path.name for path in tmp_path.rglob("*")] == ["set"]


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_domain(tmp_path / "set", UNSEEN, 0, train_identities=0, test_identities=1)
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_domain(tmp_path / name, DOMAINS[1], seed, train_identities=1, test_identities=1, frames=2)
    first, again, other = (_files(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first) == 8
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_an_image_does_not_depend_on_the_others(domain: Domain) -> None:
    drawn = {(d.pid, d.camid, d.frame): d.image for d in draw_domain(domain, 3, pids=range(1, 4), frames=2)}
    assert list(drawn) == [(pid, cam, frame) for pid in (1, 2, 3) for cam in (1, 2) for frame in (1, 2)]
    assert len({image.tobytes() for image in drawn.values()}) == len(drawn)
    np.testing.assert_array_equal(draw_person(domain, 3, 2, 2, 1), drawn[2, 2, 1])


@pytest.mark.parametrize("size", [(64, 32), (128, 64), (40, 40)])
def test_size(size: tuple[int, int]) -> None:
    image = draw_person(UNSEEN, 0, 1, 1, 1, size)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


@pytest.fixture(scope="module")
def unseen() -> dict[str, np.ndarray]:
    drawn = list(draw_domain(UNSEEN, 0, pids=range(1, 41), frames=3))
    return {
        "images": np.stack([drawing.image for drawing in drawn]),
        "pids": np.array([drawing.pid for drawing in drawn]),
        "camids": np.array([drawing.camid for drawing in drawn]),
        "query": np.array([drawing.frame == 1 for drawing in drawn]),
    }


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_cameras_differ_in_colour(domain: Domain) -> None:
    """By more than twice the standard error of the mean colours, and with the same people."""
    means = np.array([d.image.mean((0, 1)) for d in draw_domain(domain, 0, pids=range(1, 16), frames=2)])
    means = means.reshape(15, 2, 2, 3).mean(2)  # identity, camera, channel
    difference = means[:, 0] - means[:, 1]
    error = difference.std(0, ddof=1) / np.sqrt(len(difference))
    assert (abs(difference.mean(0)) > 2 * error).any()
    assert abs(difference.mean(0)).max() > 5  # of 255


def _rank1(features: np.ndarray, data: dict[str, np.ndarray], *, other_camera_only: bool) -> float:
    """Rank-1; with `other_camera_only` in a gallery without any image of the query's camera."""
    x, pids, camids = (torch.from_numpy(v) for v in (features.astype(np.float64), data["pids"], data["camids"]))
    query, shares = torch.from_numpy(data["query"]), []
    for camera in (1, 2):
        rows, gallery = query & (camids == camera), ~query
        if other_camera_only:
            gallery = gallery & (camids != camera)
        result = rank_metrics(x[rows], x[gallery], pids[rows], pids[gallery], camids[rows], camids[gallery])
        shares.append(float(result.cmc[0]))
    return sum(shares) / 2


@pytest.mark.parametrize("bins", [4, 8])
def test_colour_histograms_do_not_solve_it(unseen: dict[str, np.ndarray], bins: int) -> None:
    cells = unseen["images"] // (256 // bins) @ np.array([bins * bins, bins, 1])
    counts = np.stack([np.bincount(image.ravel(), minlength=bins**3) for image in cells])
    histograms = np.sqrt(counts / counts.sum(1, keepdims=True))  # their dot product is the Bhattacharyya coefficient
    assert _rank1(histograms, unseen, other_camera_only=False) < 0.1
    # Even where the cameras' backgrounds cannot mislead it:
    assert _rank1(histograms, unseen, other_camera_only=True) < 0.4


def test_normalized_colours_do_not_solve_it(unseen: dict[str, np.ndarray]) -> None:
    """Nor without the outer quarters of the width and without light and cast: the strongest ranker by colours."""
    images = torch.from_numpy(unseen["images"]).permute(0, 3, 1, 2).float() / 255
    histograms = ColourHistogram(normalized=True)(images).numpy()
    assert _rank1(histograms, unseen, other_camera_only=False) < 0.4


def test_identities_share_the_colours_of_their_domain() -> None:
    """40 identities, 6 colours: no garment colour belongs to one of them."""
    assert all(len(set(domain.colours)) == 6 for domain in DOMAINS)
