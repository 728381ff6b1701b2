"""Data sets that come as lists: MSMT17, and manifests of one's own."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from apd.data.datasets.layouts import warn
from apd.data.market import DISTRACTOR, FOLDERS, ReidFolder, Sample, first_of, folder_of
from apd.errors import InputError

_MSMT17_LISTS = {
    "train": ("list_train.txt", "list_val.txt"),
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
_MSMT17_FOLDERS = {"v1": ("train", "test"), "v2": ("mask_train_v2", "mask_test_v2")}
# The camera is the third field: 0013/0013_003_01_0303morning_0164_1_ex.jpg is of camera 1.
_MSMT17_LINE = re.compile(r"(?P<file>[^\s_]+_[^\s_]+_(?P<camid>[0-9]{1,3})_\S+) +(?P<pid>[0-9]{1,4})")
_MSMT17_TEST = 10_000  # added to the identities of the test, which are numbered from 0 again

_COLUMNS = ("path", "pid", "camid", "split")
_LARGEST = 2**31 - 1  # identities and cameras are int32 in feature files


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
    missing: list[str] = []
    folders: dict[Path, set[str]] = {}
    for part in parts:
        folder, offset = (train, 1) if part == "train" else (test, _MSMT17_TEST + 1)
        samples = []
        for name in _MSMT17_LISTS[part]:
            for file, pid, camid in _msmt17_lines(root / name):
                path = root / folder / file
                if path.parent not in folders:  # one listing a person instead of one look a file
                    folders[path.parent] = {p.name for p in path.parent.iterdir()} if path.parent.is_dir() else set()
                if path.name in folders[path.parent]:
                    samples.append(Sample(path, pid + offset, camid))
                else:
                    missing.append(f"{folder}/{file}")
        found[part] = samples
    if missing:
        of = "listed image is" if len(missing) == 1 else "listed images are"
        warn(f"{root}: {len(missing)} {of} not there: {first_of(missing)}")
    return folder_of(root, found)


def msmt17_variant(root: Path) -> str:
    """The one of which the images are there; ``"v1"`` where there are none."""
    there = (name for name, folders in _MSMT17_FOLDERS.items() if any((root / folder).is_dir() for folder in folders))
    return next(there, "v1")


def _msmt17_lines(path: Path) -> Iterator[tuple[str, int, int]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        match = _MSMT17_LINE.fullmatch(line.strip())
        if match is None or not int(match["camid"]):
            raise InputError(
                f"{path}: line {number}: expected <folder>/<identity>_<number>_<camera>_….jpg <identity>, got {line!r}"
            )
        yield match["file"], int(match["pid"]), int(match["camid"])


def read_manifest(path: Path, parts: Sequence[str]) -> ReidFolder:
    """A CSV file with a line an image: path, pid, camid, split, and perhaps domain.

    The first line names the columns. Paths are relative to the file's folder, and within it; cameras count from 1;
    split is train, query or gallery; identity −1 is junk, which is left out, and 0 a distractor of the gallery. Where
    there are several domains, an identity is a person only within its domain, and so is a camera: they are numbered on
    from those of the domain before (in the order of their names).

    Warns:
        DataWarning: identities that are both in train and in query or gallery.

    Raises:
        InputError: the file is missing, or a line is no such line; the message has its number.
    """
    rows = list(_manifest_rows(path))
    offsets = _domain_offsets(path, rows)
    found: dict[str, list[Sample]] = {part: [] for part in FOLDERS}
    junk = 0
    for split, sample in rows:
        if split not in parts:
            continue
        if sample.pid < 0:
            junk += 1
            continue
        pids, camids = offsets[sample.domain]
        pid = sample.pid + pids if sample.pid != DISTRACTOR else DISTRACTOR
        found[split].append(Sample(sample.path, pid, sample.camid + camids, sample.domain))
    tested = {sample.pid for sample in (*found["query"], *found["gallery"])} - {DISTRACTOR}
    both = sorted(tested.intersection(sample.pid for sample in found["train"]))
    if both:
        of = "identity is" if len(both) == 1 else "identities are"
        warn(f"{path}: {len(both)} {of} both in train and in query or gallery: {first_of(map(str, both))}")
    return folder_of(path.parent, found, junk)


def manifest_parts(path: Path) -> list[str]:
    """The parts that a manifest has images of."""
    splits = {split for split, _ in _manifest_rows(path)}
    return [part for part in FOLDERS if part in splits]


def _manifest_rows(path: Path) -> Iterator[tuple[str, Sample]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        names = reader.fieldnames or []
        absent = [column for column in _COLUMNS if column not in names]
        if absent:
            raise InputError(
                f"{path}: no column {absent[0]!r}; expected {','.join(_COLUMNS)}[,domain] in the first line"
            )
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}: line {reader.line_num}: expected {len(names)} values, as the first line names"
                )
            yield _manifest_row(path, f"{path}: line {reader.line_num}", row)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error


def _manifest_row(path: Path, where: str, row: dict[str, str]) -> tuple[str, Sample]:
    file, split = Path(row["path"]), row["split"]
    if not row["path"] or file.is_absolute() or ".." in file.parts:
        raise InputError(f"{where}: path: expected one within the folder of the file, got {row['path']!r}")
    if split not in FOLDERS:
        raise InputError(f"{where}: split: expected {', '.join(FOLDERS)}, got {split!r}")
    pid, camid = _whole(where, "pid", row["pid"], -1), _whole(where, "camid", row["camid"], 1)
    if pid == DISTRACTOR and split != "gallery":
        raise InputError(f"{where}: pid: 0 is a distractor, which only a gallery has, got split {split!r}")
    return split, Sample(path.parent / file, pid, camid, row.get("domain") or "")


def _whole(where: str, column: str, text: str, least: int) -> int:
    if re.fullmatch(r"-?[0-9]{1,10}", text.strip()) and least <= int(text) <= _LARGEST:
        return int(text)
    raise InputError(f"{where}: {column}: expected a whole number from {least}, got {text!r}")


def _domain_offsets(path: Path, rows: Sequence[tuple[str, Sample]]) -> dict[str, tuple[int, int]]:
    """What is added to the identities and cameras of each domain."""
    offsets, pids, camids = {}, 0, 0
    for domain in sorted({sample.domain for _, sample in rows}):
        offsets[domain] = (pids, camids)
        own = [sample for _, sample in rows if sample.domain == domain]
        pids += max(0, *(sample.pid for sample in own))
        camids += max(sample.camid for sample in own)
    if max(pids, camids) > _LARGEST:
        raise InputError(f"{path}: pid, camid: too large to number the domains on: expected a sum below 2³¹")
    return offsets


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
