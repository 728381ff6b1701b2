"""Data sets that come as lists: MSMT17, and manifests of one's own."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from apd.data.datasets.layouts import warn
from apd.data.market import DISTRACTOR, FOLDERS, UNKNOWN, ReidFolder, Sample, first_of, folder_of
from apd.errors import InputError
from apd.files import reading

_MSMT17_LISTS = {
    "train": ("list_train.txt", "list_val.txt"),
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
_MSMT17_FOLDERS = {"v1": ("train", "test"), "v2": ("mask_train_v2", "mask_test_v2")}
# The camera is the third field: 0013/0013_003_01_0303morning_0164_1_ex.jpg is of camera 1.
_MSMT17_LINE = re.compile(r"(?P<file>[^\s_]+_[^\s_]+_(?P<camid>[0-9]{1,3})_\S+)\s+(?P<pid>[0-9]{1,4})")
_MSMT17_TEST = 10_000  # added to the identities of the test, which are numbered from 0 again

_COLUMNS = ("path", "pid", "camid", "split")
_WITHOUT = {"pid": "-1", "camid": "-1", "split": "gallery"}  # what an absent column says of images to describe
_LARGEST = 2**63 - 1  # what a feature file holds


def read_msmt17(root: Path, parts: Sequence[str], variant: str) -> ReidFolder:
    """MSMT17 (Wei et al. 2018), V1 (``train``, ``test``) or V2 (``mask_train_v2``, ``mask_test_v2``), by its lists.

    Training images are those of list_train.txt and list_val.txt together, as published tables count them (32,621). Both
    halves number their people from 0: they become 1, 2, … to train on, and 10001, 10002, … in query and gallery.

    Args:
        root: the folder of the lists.
        parts: to read.
        variant: ``"v1"`` or ``"v2"``.

    Warns:
        DataWarning: listed images that are not there, which are left out.

    Raises:
        InputError: a list or a folder is missing, or a line is no such line.
    """
    train, test = _MSMT17_FOLDERS[variant]
    for folder in dict.fromkeys(train if part == "train" else test for part in parts):
        if not (root / folder).is_dir():
            raise InputError(f"{root}: no folder {folder!r}, which MSMT17 {variant.upper()} has")
    found: dict[str, list[Sample]] = {}
    missing: set[Path] = set()
    for part in parts:
        folder, offset = (train, 1) if part == "train" else (test, _MSMT17_TEST + 1)
        listed = [
            Sample(root / folder / file, pid + offset, camid)
            for name in _MSMT17_LISTS[part]
            for file, pid, camid in _msmt17_lines(root / name)
        ]
        missing.update(absent(sample.path for sample in listed))
        found[part] = [sample for sample in listed if sample.path not in missing]
    if missing:
        of = "listed image is" if len(missing) == 1 else "listed images are"
        names = (path.relative_to(root).as_posix() for path in sorted(missing))
        warn(f"{root}: {len(missing)} {of} not there: {first_of(names)}")
    return folder_of(root, found)


def absent(paths: Iterable[Path]) -> list[Path]:
    """Which of these are no files, by one listing a folder instead of one look a file."""
    folders: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in folders[path.parent]:
            missing.append(path)
    return missing


def msmt17_variant(root: Path) -> str:
    """The one of which the images are there; ``"v1"`` where there are none."""
    there = (name for name, folders in _MSMT17_FOLDERS.items() if any((root / folder).is_dir() for folder in folders))
    return next(there, "v1")


def _msmt17_lines(path: Path) -> Iterator[tuple[str, int, int]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        match = _MSMT17_LINE.fullmatch(line.strip())
        if match is None or not int(match["camid"]):
            raise InputError(
                f"{path}: line {number}: expected <folder>/<identity>_<number>_<camera>_….jpg <identity>, got {line!r}"
            )
        yield match["file"], int(match["pid"]), int(match["camid"])


def read_manifest(path: Path, parts: Sequence[str], unlabelled: bool = False) -> ReidFolder:
    """A CSV file with a line an image: path, pid, camid, split, and perhaps domain.

    The first line names the columns. Paths are relative to the file's folder, and within it; cameras count from 1, and
    −1 is not known; split is train, query or gallery; identity −1 is junk, which is left out, and 0 a distractor of the
    gallery. Where there are several domains, an identity is a person only within its domain, and so is a camera: they
    are numbered on from those of the domain before (in the order of their names).

    Args:
        path: the file.
        parts: which of "train", "query" and "gallery" to read.
        unlabelled: images are only described. Then columns but path may be absent (−1, and gallery), and where no line
            has an identity none is junk.

    Warns:
        DataWarning: lines that are there twice, which count once; images that are listed with two identities or
            cameras; identities that are both in train and in query or gallery.

    Raises:
        InputError: the file is missing, or a line is no such line; the message has its number.
    """
    listed, notes = _distinct(_manifest_rows(path, unlabelled))
    for note in notes:
        warn(f"{path}: {note}")
    rows = [(split, sample) for split, sample, _ in listed]
    offsets = _domain_offsets(path, rows)
    keep_unknown = unlabelled and all(sample.pid == UNKNOWN for _, sample in rows)
    found: dict[str, list[Sample]] = {part: [] for part in FOLDERS}
    junk = 0
    for split, sample in rows:
        if split not in parts:
            continue
        if sample.pid == UNKNOWN and not keep_unknown:
            junk += 1
            continue
        pids, camids = offsets[sample.domain]
        pid = sample.pid + pids if sample.pid > DISTRACTOR else sample.pid
        camid = sample.camid + camids if sample.camid != UNKNOWN else UNKNOWN
        found[split].append(Sample(sample.path, pid, camid, sample.domain))
    tested = {sample.pid for sample in (*found["query"], *found["gallery"])} - {DISTRACTOR}
    both = sorted(tested.intersection(sample.pid for sample in found["train"]))
    if both:
        of = "identity is" if len(both) == 1 else "identities are"
        warn(f"{path}: {len(both)} {of} both in train and in query or gallery: {first_of(map(str, both))}")
    return folder_of(path.parent, found, junk)


def manifest_parts(path: Path, unlabelled: bool = False) -> list[str]:
    """The parts that a manifest has images of."""
    splits = {split for split, _, _ in _manifest_rows(path, unlabelled)}
    return [part for part in FOLDERS if part in splits]


def has_splits(path: Path) -> bool:
    """Whether a manifest says which images ask and which answer."""
    return "split" in (csv.DictReader(io.StringIO(_text(path), newline="")).fieldnames or ())


_Line = tuple[str, Sample, int]  # split, image, number of its line


def _distinct(rows: Iterator[_Line]) -> tuple[list[_Line], list[str]]:
    """Each line once, and what is to be said of the others."""
    kept: dict[tuple[str, Sample], _Line] = {}
    labels: dict[tuple[str, Path], _Line] = {}
    repeated, contradicting = [], []
    for line in rows:
        split, sample, number = line
        if (first := kept.setdefault((split, sample), line)) is not line:
            repeated.append(f"line {number} is line {first[2]}")
        elif (other := labels.setdefault((sample.domain, sample.path), line)) is not line and (
            (other[1].pid, other[1].camid) != (sample.pid, sample.camid)
        ):
            contradicting.append(f"{sample.path.name} in lines {other[2]} and {number}")
    notes = []
    if repeated:
        of = "line is" if len(repeated) == 1 else "lines are"
        notes.append(f"{len(repeated)} {of} there twice, and counted once: {first_of(repeated)}")
    if contradicting:
        of = "image is" if len(contradicting) == 1 else "images are"
        notes.append(f"{len(contradicting)} {of} listed with two identities or cameras: {first_of(contradicting)}")
    return list(kept.values()), notes


def _manifest_rows(path: Path, unlabelled: bool) -> Iterator[_Line]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        names = list(reader.fieldnames or [])
        _check_columns(path, names, _COLUMNS[:1] if unlabelled else _COLUMNS)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}: line {reader.line_num}: expected {len(names)} values, as the first line names"
                )
            where = f"{path}: line {reader.line_num}"
            yield *_manifest_row(path, where, {**_WITHOUT, **row} if unlabelled else row), reader.line_num
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error


def _check_columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: the column {repeated[0]!r} is named twice in the first line")
    absent = [column for column in wanted if column not in names]
    if not absent:
        return
    expected = f"expected {','.join(_COLUMNS)}[,domain] in the first line, got {','.join(names)[:200]!r}"
    hint = ""
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        hint = f"; values are separated by {other!r}, not by a comma"
    elif absent[0] in [name.strip().lower() for name in names]:
        hint = "; names are without spaces and capitals"
    raise InputError(f"{path}: no column {absent[0]!r}; {expected}{hint}")


def _manifest_row(path: Path, where: str, row: dict[str, str]) -> tuple[str, Sample]:
    file, split = Path(row["path"]), row["split"]
    if not row["path"] or file.is_absolute() or ".." in file.parts:
        raise InputError(f"{where}: path: expected one within the folder of the file, got {row['path']!r}")
    if split not in FOLDERS:
        raise InputError(f"{where}: split: expected {', '.join(FOLDERS)}, got {split!r}")
    pid, camid = _whole(where, "pid", row["pid"], -1), _whole(where, "camid", row["camid"], -1)
    if camid == 0:
        raise InputError(f"{where}: camid: expected a whole number from 1, got '0'; an unknown camera is -1")
    if pid == DISTRACTOR and split != "gallery":
        raise InputError(
            f"{where}: pid: 0 is a distractor, which only a gallery has, got split {split!r}; people count from 1"
        )
    return split, Sample(path.parent / file, pid, camid, row.get("domain") or "")


def _whole(where: str, column: str, text: str, least: int) -> int:
    if re.fullmatch(r"-?[0-9]{1,19}", text.strip()) and least <= int(text) <= _LARGEST:
        return int(text)
    raise InputError(f"{where}: {column}: expected a whole number from {least}, got {text!r}")


def _domain_offsets(path: Path, rows: Sequence[tuple[str, Sample]]) -> dict[str, tuple[int, int]]:
    """What is added to the identities and cameras of each domain."""
    offsets, pids, camids = {}, 0, 0
    for domain in sorted({sample.domain for _, sample in rows}):
        offsets[domain] = (pids, camids)
        own = [sample for _, sample in rows if sample.domain == domain]
        pids += max(0, *(sample.pid for sample in own))
        camids += max(0, *(sample.camid for sample in own))
    if max(pids, camids) > _LARGEST:
        raise InputError(f"{path}: pid, camid: too large to number the domains on: expected a sum below 2⁶³")
    return offsets


def _text(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path.parent}: no {path.name}")
    with reading(path, "not UTF-8 text (in spreadsheets: save as CSV UTF-8)"):
        return path.read_text(encoding="utf-8-sig")
