"""Data sets in the layout of Market-1501: which files are taken, as whom, and what is said about the others."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from apd.data.datasets import read_source
from apd.data.images import FORMATS
from apd.data.market import ENDINGS, FOLDERS, Counts, count_samples, label_in_place, labels, read_market, unanswered
from apd.errors import DataWarning, InputError
from apd_kernels import rank_metrics

NOTHING_WRONG = {
    "train": ["0001_c1s1_000001_00.jpg", "0002_c2s1_000001_00.jpg"],
    "query": ["0010_c1s1_000001_00.jpg"],
    "gallery": ["0010_c2s1_000001_00.jpg", "0000_c1s1_000001_00.jpg"],
}


def _folder(path: Path, **parts: list[str]) -> Path:
    """A data set; `read_market` does not open the images, so they may be empty."""
    for part, names in {**NOTHING_WRONG, **parts}.items():
        (path / FOLDERS[part]).mkdir(parents=True)
        for name in names:
            (path / FOLDERS[part] / name).touch()
    return path


def _read_silently(path: Path) -> dict[str, list[tuple[str, int, int]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = read_market(path, strict=True)
    return {part: [(s.path.name, s.pid, s.camid) for s in getattr(folder, part)] for part in FOLDERS}


def test_parts(tmp_path: Path) -> None:
    assert _read_silently(_folder(tmp_path)) == {
        "train": [("0001_c1s1_000001_00.jpg", 1, 1), ("0002_c2s1_000001_00.jpg", 2, 2)],
        "query": [("0010_c1s1_000001_00.jpg", 10, 1)],
        "gallery": [("0000_c1s1_000001_00.jpg", 0, 1), ("0010_c2s1_000001_00.jpg", 10, 2)],
    }
    folder = read_market(str(tmp_path))
    assert folder.path == tmp_path
    assert [sample.path for sample in folder.query] == [tmp_path / "query" / "0010_c1s1_000001_00.jpg"]


@pytest.mark.parametrize(
    ("name", "pid", "camid"),
    [
        ("0005_c12s1_000005_00.jpg", 5, 12),
        ("12345_c1s1_000006_00.jpg", 12345, 1),
        ("0006_c1s1_000007_00.JPG", 6, 1),
        ("0006_c1s1_000007_00.JpEg", 6, 1),
        ("0006_c1s1_000007_00.png", 6, 1),
        ("0006_c1s1_000007_00.bmp", 6, 1),
        ("0006_c1s1_000007_00.webp", 6, 1),
        ("0006_c1s1_000007_00.TIF", 6, 1),
        ("0006_c1s1_000007_00.gif", 6, 1),
        ("1700000000123_c1s1_000007_00.jpg", 1700000000123, 1),
        ("7_c3s14_000007_00 é.jpg", 7, 3),
        ("0008_c6_f0046985.jpg", 8, 6),  # DukeMTMC-reID
    ],
)
def test_names_taken(tmp_path: Path, name: str, pid: int, camid: int) -> None:
    assert _read_silently(_folder(tmp_path, train=[name]))["train"] == [(name, pid, camid)]


IGNORED = [
    "-1_c1s1_000008_00.jpg",
    "0004_c1s1_000017_00.jpg.bak",
    "Thumbs.db",
    "._0001_c1s1_000001_00.jpg",
    ".0001_c1s1_000001_00.jpg",
]


@pytest.mark.parametrize("name", IGNORED)
@pytest.mark.parametrize("part", FOLDERS)
def test_names_ignored(tmp_path: Path, part: str, name: str) -> None:
    expected = _read_silently(_folder(tmp_path / "without"))
    folder = _folder(tmp_path / "with", **{part: [*NOTHING_WRONG[part], name]})
    (folder / FOLDERS[part] / "0007_c1s1_000018_00.jpg").mkdir()
    assert _read_silently(folder) == expected


UNREAD = ["0004_c1s1_000017_00.heic", "0004_c1s1_000017_00.AVIF", "IMG_1.psd", "0004_c1s1_000017_00"]


def test_pictures_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    expected = _read_silently(_folder(tmp_path / "without"))
    path = _folder(tmp_path / "with", query=[*NOTHING_WRONG["query"], *UNREAD])
    with pytest.warns(DataWarning) as warned:
        folder = read_market(path)
    assert {part: [(s.path.name, s.pid, s.camid) for s in getattr(folder, part)] for part in FOLDERS} == expected
    (warning,) = warned
    assert f"{path}: 4 files are left out, pictures of a kind that is not read" in str(warning.message)
    assert all(f"query/{name}" in str(warning.message) for name in UNREAD)
    with pytest.raises(InputError, match="4 files"):
        read_market(path, strict=True)


def test_every_ending_is_of_a_format_that_is_read() -> None:
    Image.init()
    assert {Image.registered_extensions()[ending] for ending in ENDINGS} <= set(FORMATS)


def test_names_without_a_camera(tmp_path: Path) -> None:
    """Only where cameras are ignored: otherwise a frame number would be a person."""
    names = ["0012_7.jpg", "0013.jpg", "0014_c2s1_000001_00.jpg", "0015_c0s1_000001_00.jpg", "IMG_2.jpg"]
    path = _folder(tmp_path, query=names)
    with pytest.warns(DataWarning, match="1 file is left out, not named <identity>_…"):
        folder = read_market(path, ("query", "gallery"), cameras=False)
    assert labels(folder.query) == [(12, -1), (13, -1), (14, 2), (15, -1)]
    with pytest.warns(DataWarning, match="4 files are left out"):
        assert labels(read_market(path, ("query",)).query) == [(14, 2)]
    path = _folder(tmp_path / "none", query=names[:2])
    with pytest.warns(DataWarning), pytest.raises(InputError, match=r"read by apd evaluate --ignore-cameras, and"):
        read_market(path)


def test_a_folder_for_each_person_is_no_part(tmp_path: Path) -> None:
    path = _folder(tmp_path, query=[])
    (path / "query" / "0010").mkdir()
    (path / "query" / "0010" / "1.jpg").touch()
    with pytest.raises(
        InputError, match=r"query: no images named .*; 0010 is a folder of images, perhaps of one person"
    ):
        read_market(path)


def _numbered(path: Path, train: list[int], test: list[int]) -> Path:
    names = {"train": [f"{pid:04}_c1_1.jpg" for pid in train], "query": [f"{pid:04}_c1_1.jpg" for pid in test]}
    return _folder(path, **names, gallery=[f"{pid:04}_c2_1.jpg" for pid in test])


@pytest.mark.filterwarnings("ignore::apd.errors.DataWarning")
def test_people_numbered_from_0_in_both_halves(tmp_path: Path) -> None:
    """MSMT17 in the layout of Market-1501: 0 is a person, and a number is two people."""
    path = _numbered(tmp_path, [0, 1, 2, 3], [0, 1, 2])
    with pytest.warns(DataWarning, match="people are numbered from 0 in both halves") as warned:
        folder = read_market(path)
    assert len(warned) == 1
    assert [s.pid for s in folder.train] == [1, 2, 3, 4]
    assert [s.pid for s in folder.query] == [s.pid for s in folder.gallery] == [10001, 10002, 10003]
    for part in FOLDERS:  # whatever is read with it
        assert getattr(read_market(path, (part,)), part) == getattr(folder, part)
    assert [label_in_place(s.path) for s in (*folder.train, *folder.gallery)] == labels(
        (*folder.train, *folder.gallery)
    )
    assert label_in_place(tmp_path / "0003_c1_1.jpg") == (3, 1)
    assert sorted({s.pid for s in read_source(f"market+test:{path}").train}) == [1, 2, 3, 4, 10001, 10002, 10003]


@pytest.mark.filterwarnings("ignore::apd.errors.DataWarning")
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([0, 1, 2, 3], [0, 10, 11, 12]),  # junk in train, distractors in the gallery
        ([0, 1], [0, 10]),
        ([1, 2, 3], [0, 1, 2]),  # train counts from 1
        ([0, 1, 2, 3, 4, 5], [0, 5, 10, 11, 12]),  # a fourth of the numbers is shared
        ([0], [0]),
    ],
)
def test_0_otherwise_stays_a_distractor(tmp_path: Path, train: list[int], test: list[int]) -> None:
    gallery = read_market(_numbered(tmp_path, train, test), ("gallery",)).gallery
    assert [s.pid for s in gallery] == test


@pytest.mark.parametrize(
    ("query", "gallery", "cameras", "lost"),
    [
        ([(1, 1), (2, 1)], [(1, 1), (2, 2)], True, 1),
        ([(1, 1), (2, 1)], [(1, 1), (2, 2)], False, 0),
        ([(1, -1), (2, 1), (3, 1)], [(1, -1), (2, -1), (4, 2)], True, 1),  # an unknown camera is no one's own
        ([(-1, 1)], [(-1, 2)], True, 1),
    ],
)
def test_unanswered(query: list[tuple[int, int]], gallery: list[tuple[int, int]], cameras: bool, lost: int) -> None:
    assert unanswered(query, gallery, cameras=cameras) == lost


MISNAMED = [
    "IMG_2041.jpg",
    "0003c1s1_000010_00.jpg",
    "0003_x1s1_000011_00.jpg",
    "0003_c_000012_00.jpg",
    "0003_c1x1_000012_00.jpg",
    "0003_c1s_000012_00.jpg",
    "abcd_c1s1_000013_00.jpg",
    "_c1s1_000014_00.jpg",
    "-2_c1s1_000015_00.jpg",
    "-1c1s1_000015_00.jpg",
    "0001_c0s1_000016_00.jpg",
    "x0001_c1s1_000016_00.jpg",
    "٣_c1s1_000016_00.jpg",  # a digit, but not one of a file name of this layout
    "0001_c-1s1_000016_00.jpg",
    "99999999999999999999_c1s1_000016_00.jpg",  # no integer of a tensor
    "0001_c99999999999999999999s1_000016_00.jpg",
]


@pytest.mark.parametrize("name", MISNAMED)
@pytest.mark.parametrize("part", FOLDERS)
def test_names_skipped(tmp_path: Path, part: str, name: str) -> None:
    expected = _read_silently(_folder(tmp_path / "without"))
    path = _folder(tmp_path / "with", **{part: [*NOTHING_WRONG[part], name]})
    with pytest.warns(DataWarning) as warned:
        folder = read_market(path)
    assert {part: [(s.path.name, s.pid, s.camid) for s in getattr(folder, part)] for part in FOLDERS} == expected
    (warning,) = warned
    assert str(warning.message).startswith(f"{path}: 1 file is left out")
    assert f"{FOLDERS[part]}/{name}" in str(warning.message)
    assert warning.filename == __file__  # points at the caller
    with pytest.raises(InputError, match=r": 1 file is left out") as error:
        read_market(path, strict=True)
    assert str(error.value) == str(warning.message)


def test_one_warning_counts_all(tmp_path: Path) -> None:
    path = _folder(tmp_path, **{part: NOTHING_WRONG[part] + MISNAMED for part in FOLDERS})
    with pytest.warns(DataWarning) as warned:
        read_market(path)
    (warning,) = warned
    message = str(warning.message)
    assert f"{3 * len(MISNAMED)} files are left out" in message
    assert message.count("bounding_box_train/") == 10
    assert message.endswith(", …")


@pytest.mark.parametrize(("part", "pids"), [("train", [1, 2]), ("query", [10])])
def test_distractors_are_no_class_and_no_query(tmp_path: Path, part: str, pids: list[int]) -> None:
    """As a query a distractor would find those of the gallery, and count as right."""
    names = ["0000_c1s1_000001_00.jpg", "0000_c1s1_000002_00.jpg"]
    path = _folder(tmp_path, **{part: NOTHING_WRONG[part] + names})
    with pytest.warns(DataWarning, match=rf"{FOLDERS[part]}: 2 images of identity 0 .* are left out") as warned:
        folder = read_market(path)
    assert len(warned) == 1  # nor is 0 an identity of both train and gallery
    assert [sample.pid for sample in getattr(folder, part)] == pids
    assert [sample.pid for sample in folder.gallery] == [0, 10]
    with pytest.raises(InputError, match="identity 0"):
        read_market(path, strict=True)


@pytest.mark.parametrize("part", ["query", "gallery"])
def test_overlap(tmp_path: Path, part: str) -> None:
    names = [f"{pid:04}_c1s1_000009_00.jpg" for pid in range(1, 14)]
    path = _folder(tmp_path, train=names, **{part: NOTHING_WRONG[part] + names[1:]})
    with pytest.warns(DataWarning, match=r"12 identities are both in train and in .*: 2, 3, 4, 5, .*, …$") as warned:
        folder = read_market(path)
    assert len(warned) == 1
    assert len(folder.train) == 13  # the user decides
    with pytest.raises(InputError, match="12 identities"):
        read_market(path, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_market(path, ("train",))  # what is not read cannot overlap
        read_market(path, ("query", "gallery"))


@pytest.mark.parametrize("part", FOLDERS)
@pytest.mark.parametrize("names", [[], ["Thumbs.db"], ["-1_c1s1_000001_00.jpg"]])
def test_no_images(tmp_path: Path, part: str, names: list[str]) -> None:
    path = _folder(tmp_path, **{part: names})
    junk = ".*; 1 image is left out as junk" if names[:1] == ["-1_c1s1_000001_00.jpg"] else ""
    with pytest.raises(InputError, match=f"{FOLDERS[part]}: no images named{junk}"):
        read_market(path)


@pytest.mark.filterwarnings("ignore::apd.errors.DataWarning")
@pytest.mark.parametrize("name", ["0000_c1s1_000001_00.jpg", "IMG_2041.jpg"])
def test_nothing_left_to_train_on(tmp_path: Path, name: str) -> None:
    path = _folder(tmp_path, train=[name])
    with pytest.raises(InputError, match="bounding_box_train: no images named"):
        read_market(path)


@pytest.mark.parametrize("part", FOLDERS)
def test_missing_folder(tmp_path: Path, part: str) -> None:
    path = _folder(tmp_path)
    (path / FOLDERS[part]).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{path}: no folder '{FOLDERS[part]}'; the layout .* is bounding_box_train"):
        read_market(path)
    others = tuple(other for other in FOLDERS if other != part)
    folder = read_market(path, others)
    assert getattr(folder, part) == ()
    assert all(getattr(folder, other) for other in others)
    (path / FOLDERS[part]).touch()
    with pytest.raises(InputError, match="expected a folder, found a file"):
        read_market(path)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path / 'x'}: no such folder$"):
        read_market(tmp_path / "x")
    (tmp_path / "x").touch()
    with pytest.raises(InputError, match="expected a folder, found a file"):
        read_market(tmp_path / "x")


def test_counts(tmp_path: Path) -> None:
    folder = read_market(_folder(tmp_path))
    assert count_samples(folder.train) == Counts(images=2, identities=2, cameras=2)
    assert count_samples(folder.gallery) == Counts(images=2, identities=1, cameras=2)
    assert count_samples(()) == Counts(images=0, identities=0, cameras=0)


# The real files


def test_broken_names(real_data: Path) -> None:
    with pytest.warns(DataWarning) as warned:
        folder = read_market(real_data / "data" / "broken" / "names")
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert "8 files are left out" in messages[0]
    for name in ("IMG_2041", "0003c1s1_", "0003_x1s1_", "0003_c_", "abcd_", "/_c1s1_", "-2_", "0001_c0s1_"):
        assert name in messages[0]
    assert "1 image of identity 0 (distractor) is left out" in messages[1]
    assert len(folder.train) == 7
    assert sorted({sample.pid for sample in folder.train}) == [1, 2, 5, 6, 12345]
    assert sorted({sample.camid for sample in folder.train}) == [1, 2, 3, 12]
    assert [sample.pid for sample in folder.query] == [10, 11, 12]
    assert [sample.pid for sample in folder.gallery] == [0, 0, 10, 10, 12, 13]

    query, gallery = folder.query, folder.gallery
    features = torch.randn(len(query) + len(gallery), 8, generator=torch.Generator().manual_seed(0))
    result = rank_metrics(
        features[: len(query)],
        features[len(query) :],
        *(torch.tensor([sample.pid for sample in part]) for part in (query, gallery)),
        *(torch.tensor([sample.camid for sample in part]) for part in (query, gallery)),
    )
    assert result.valid.tolist() == [True, False, False]


def test_broken_folders(real_data: Path) -> None:
    broken = real_data / "data" / "broken"
    with pytest.raises(InputError, match=r"no_query: no folder 'query'"):
        read_market(broken / "no_query")
    with pytest.warns(DataWarning, match=r"1 identity is both in train and in query or gallery: 1$"):
        read_market(broken / "overlap")


@pytest.mark.parametrize(
    ("name", "train", "query", "gallery"),
    [
        ("cuhk03", (7239, 743, 2), (200, 100, 2), (738, 100, 2)),
        ("cuhk01", (1940, 485, 2), (972, 486, 1), (972, 486, 1)),
        ("viper", (632, 316, 2), (316, 316, 1), (316, 316, 1)),
        ("pku", (592, 37, 2), (74, 37, 2), (518, 37, 2)),
        ("market_mini", (32, 16, 6), (32, 16, 6), (32, 16, 6)),
    ],
)
def test_real_counts(real_data: Path, name: str, train: tuple, query: tuple, gallery: tuple) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = read_market(real_data / "data" / "reid" / name, strict=True)
    parts = (folder.train, folder.query, folder.gallery)
    assert [count_samples(part) for part in parts] == [Counts(*counts) for counts in (train, query, gallery)]
