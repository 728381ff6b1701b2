"""Data sets in the layout of Market-1501."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apd.errors import DataWarning, InputError

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
DISTRACTOR = 0  # identity of gallery images that match nobody, one another included
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_JUNK = re.compile(r"-1_")
# <identity>_c<camera>s<sequence>_…; DukeMTMC-reID has no sequence. Digits are bounded so that they fit int32.
_NAME = re.compile(r"(?P<pid>[0-9]{1,9})_c(?P<camid>[0-9]{1,9})(s[0-9]+)?_")
_NAMED = 10  # files or identities that a message names


@dataclass(frozen=True)
class Sample:
    """An image with its identity and camera, as the data set says them; cameras count from 1."""

    path: Path
    pid: int
    camid: int
    domain: str = ""  # of a manifest that holds several; identities of two domains never share a number


@dataclass(frozen=True)
class ReidFolder:
    """A data set; the parts that were not read are empty."""

    path: Path
    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    junk: int = 0  # images of identity −1, which were left out


@dataclass(frozen=True)
class Counts:
    """Size of a part; distractors are images, but no identity."""

    images: int
    identities: int
    cameras: int


def label_of(name: str) -> tuple[int, int] | None:
    """(identity, camera) that the name of an image says; None where it is no such name. Identity 0 is a distractor."""
    match = _NAME.match(name)
    if match is None or not int(match["camid"]):
        return None
    return int(match["pid"]), int(match["camid"])


def count_samples(samples: Sequence[Sample]) -> Counts:
    """Images, identities and cameras of a part."""
    identities = {sample.pid for sample in samples} - {DISTRACTOR}
    return Counts(len(samples), len(identities), len({sample.camid for sample in samples}))


def read_market(
    path: Path | str, parts: Iterable[str] = ("train", "query", "gallery"), *, strict: bool = False
) -> ReidFolder:
    """List the images of a data set in the layout of Market-1501 (Zheng et al. 2015).

    The folders `bounding_box_train`, `query` and `bounding_box_test` (the
    gallery) hold images named ``<identity>_c<camera>s<sequence>_….jpg`` (or
    .jpeg, .png, .bmp, .webp). Junk images (identity −1), hidden files and folders are
    left out silently. The images themselves are not opened.

    Args:
        path: the folder that holds the three.
        parts: which of "train", "query" and "gallery" to read.
        strict: refuse what is otherwise a warning.

    Returns:
        the parts, each sorted by file name.

    Warns:
        DataWarning: files with another name, and distractors (identity 0) in train and query, which are left out;
            identities that are both in train and in query or gallery.

    Raises:
        InputError: a folder is missing, cannot be read, or holds no image; with `strict` also what is warned of.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: {'expected a folder, found a file' if root.exists() else 'no such folder'}")
    found: dict[str, list[Sample]] = {part: [] for part in FOLDERS}
    misnamed: list[str] = []
    junk = 0
    for part in dict.fromkeys(parts):
        found[part], wrong, unlabelled = _read_part(root, FOLDERS[part])
        misnamed += wrong
        junk += unlabelled
    if misnamed:
        of = "file is" if len(misnamed) == 1 else "files are"
        expected = "<identity>_c<camera>s<sequence>_…, camera from 1"
        _report(f"{root}: {len(misnamed)} {of} left out, not named {expected}: {first_of(misnamed)}", strict)

    for part in ("train", "query"):  # no class, and no query: as one it would match the gallery's distractors
        named = [sample for sample in found[part] if sample.pid != DISTRACTOR]
        if distractors := len(found[part]) - len(named):
            of = "image of identity 0 (distractor) is" if distractors == 1 else "images of identity 0 (distractors) are"
            _report(f"{root / FOLDERS[part]}: {distractors} {of} left out", strict)
        found[part] = named
    for part in dict.fromkeys(parts):
        if not found[part]:
            raise InputError(f"{root / FOLDERS[part]}: no images named <identity>_c<camera>s<sequence>_….jpg")

    tested = {sample.pid for sample in (*found["query"], *found["gallery"])}
    both = sorted(tested.intersection(sample.pid for sample in found["train"]))
    if both:
        of = "identity is" if len(both) == 1 else "identities are"
        _report(f"{root}: {len(both)} {of} both in train and in query or gallery: {first_of(map(str, both))}", strict)
    return folder_of(root, found, junk)


def folder_of(root: Path, parts: Mapping[str, Sequence[Sample]], junk: int = 0) -> ReidFolder:
    """A data set of these parts; the others are empty."""
    train, query, gallery = (tuple(parts.get(part, ())) for part in FOLDERS)
    return ReidFolder(root, train, query, gallery, junk)


def _read_part(root: Path, folder: str) -> tuple[list[Sample], list[str], int]:
    """The images of one folder, the files that look like images but are named otherwise, and how many are junk."""
    samples, misnamed, junk = [], [], 0
    for name in image_names(root, folder):
        if _JUNK.match(name):
            junk += 1
            continue
        label = label_of(name)
        if label is None:
            misnamed.append(f"{folder}/{name}")
        else:
            samples.append(Sample(root / folder / name, *label))
    return samples, misnamed, junk


def image_names(
    root: Path, folder: str, layout: str = f"the layout of Market-1501 is {', '.join(FOLDERS.values())}"
) -> list[str]:
    """The names of the images in a folder of a data set, sorted; hidden files are none.

    Raises:
        InputError: the folder is missing, which `layout` explains, is a file, or cannot be read.
    """
    try:
        with os.scandir(root / folder) as entries:
            found = [
                entry
                for entry in entries
                if entry.name.lower().endswith(_ENDINGS) and not entry.name.startswith(".") and not _is(entry.is_dir)
            ]
            files = sorted(entry.name for entry in found if _is(entry.is_file))
    except FileNotFoundError:
        raise InputError(f"{root}: no folder {folder!r}; {layout}") from None
    except NotADirectoryError:
        raise InputError(f"{root / folder}: expected a folder, found a file") from None
    except PermissionError:
        raise InputError(f"{root / folder}: no permission to read it") from None
    if len(files) < len(found):
        others = sorted({entry.name for entry in found} - set(files))
        what = "entries are no files (pipes, devices, links that lead nowhere) and"
        _report(f"{root / folder}: {len(others)} {what} left out: {first_of(others)}", strict=False)
    return files


def _is(asked: Callable[[], bool]) -> bool:
    try:
        return asked()
    except OSError:  # a link that leads to itself
        return False


def first_of(items: Iterable[str]) -> str:
    """The first few, as a message names them."""
    names = list(items)
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _report(message: str, strict: bool) -> None:
    if strict:
        raise InputError(message)
    warnings.warn(message, DataWarning, stacklevel=3)  # the line that called read_market
