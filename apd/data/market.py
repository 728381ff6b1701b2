"""Data sets in the layout of Market-1501."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apd.errors import DataWarning, InputError

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
DISTRACTOR = 0  # identity of gallery images that match nobody, one another included
UNKNOWN = -1  # an identity or camera that nobody knows: it equals none, itself included
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".j2k"),
    *(".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Of pictures that are not read; they are named, where other files are passed over.
_UNREAD = (
    *(".avif", ".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".tga", ".pcx", ".ico", ".exr", ".hdr", ".qoi"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".mpo", ".apng", ".icns", ".dds", ".ras", ".sgi", ".xcf"),
)
NO_ANSWERS = (
    "no query has an image of its identity from another camera in the gallery; apd evaluate --ignore-cameras takes "
    "data without cameras, or with one"
)
_JUNK = re.compile(r"-1_")
# <identity>_c<camera>s<sequence>_…; DukeMTMC-reID has no sequence. Digits are bounded so that they fit int64.
_NAME = re.compile(r"(?P<pid>[0-9]{1,18})_c(?P<camid>[0-9]{1,9})(s[0-9]+)?_")
_NAME_ALONE = re.compile(r"(?P<pid>[0-9]{1,18})[_.-]")
_TEST_FROM_ZERO = 10_001  # added to the identities of query and gallery where both halves count from 0
_NAMED = 10  # files or identities that a message names


@dataclass(frozen=True)
class Sample:
    """An image with its identity and camera, as the data set says them; cameras count from 1, −1 is not known."""

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


def label_of(name: str, *, cameras: bool = True) -> tuple[int, int] | None:
    """(identity, camera) that the name of an image says; None where it is no such name. Identity 0 is a distractor.

    With `cameras` False a name need not say a camera, which is then −1.
    """
    match = _NAME.match(name)
    if match is not None and int(match["camid"]):
        return int(match["pid"]), int(match["camid"])
    alone = None if cameras else _NAME_ALONE.match(name)
    return None if alone is None else (int(alone["pid"]), UNKNOWN)


def count_samples(samples: Sequence[Sample]) -> Counts:
    """Images, identities and cameras of a part."""
    identities, cameras = ({getattr(sample, name) for sample in samples} for name in ("pid", "camid"))
    return Counts(len(samples), len(identities - {DISTRACTOR, UNKNOWN}), len(cameras - {UNKNOWN}))


def labels(samples: Iterable[Sample]) -> list[tuple[int, int]]:
    """(identity, camera) of each."""
    return [(sample.pid, sample.camid) for sample in samples]


def unanswered(query: Iterable[tuple[int, int]], gallery: Iterable[tuple[int, int]], *, cameras: bool = True) -> int:
    """How many queries have no gallery image of their identity; with `cameras`, none from another camera.

    Args:
        query, gallery: (identity, camera) of each image, as `labels` gives them; −1 is unknown.
        cameras: whether images of a query's own camera are no answers.
    """
    seen: dict[int, set[int]] = {}
    for pid, camid in gallery:
        seen.setdefault(pid, set()).add(camid)
    seen.pop(UNKNOWN, None)
    return sum(pid not in seen or (cameras and camid != UNKNOWN and seen[pid] == {camid}) for pid, camid in query)


def check_answers(folder: ReidFolder) -> None:
    """InputError where no query has an answer: before a test, not after its images are described."""
    if unanswered(labels(folder.query), labels(folder.gallery)) == len(folder.query):
        raise InputError(f"{folder.path}: {NO_ANSWERS}")


def read_market(
    path: Path | str,
    parts: Iterable[str] = ("train", "query", "gallery"),
    *,
    strict: bool = False,
    cameras: bool = True,
) -> ReidFolder:
    """List the images of a data set in the layout of Market-1501 (Zheng et al. 2015).

    The folders `bounding_box_train`, `query` and `bounding_box_test` (the
    gallery) hold images named ``<identity>_c<camera>s<sequence>_….jpg`` (or
    another of `ENDINGS`). Junk images (identity −1), hidden files and folders are
    left out silently. The images themselves are not opened.

    Where both halves number people from 0, and share at least half of their numbers, as MSMT17 in this layout does, 0
    is a person and a number is another person in each half: they become 1, 2, … and 10001, 10002, ….

    Args:
        path: the folder that holds the three.
        parts: which of "train", "query" and "gallery" to read.
        strict: refuse what is otherwise a warning.
        cameras: with False a name need not say a camera (``<identity>_….jpg``), which is then −1.

    Returns:
        the parts, each sorted by file name.

    Warns:
        DataWarning: files with another name, pictures of a kind that is not read, and distractors (identity 0) in train
            and query, which are left out; identities that are both in train and in query or gallery.

    Raises:
        InputError: a folder is missing, cannot be read, or holds no image; with `strict` also what is warned of.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: {'expected a folder, found a file' if root.exists() else 'no such folder'}")
    wanted = dict.fromkeys(parts)
    found: dict[str, list[Sample]] = {part: [] for part in FOLDERS}
    misnamed: list[str] = []
    unread: list[str] = []
    junk = dict.fromkeys(FOLDERS, 0)
    for part, folder in FOLDERS.items():
        if part in wanted:
            found[part], wrong, junk[part], unknown = _read_part(root, folder, cameras)
            misnamed += wrong
            unread += unknown
    form = "<identity>_c<camera>s<sequence>_…" if cameras else "<identity>_…"
    for names, why in ((misnamed, f"not named {form}, camera from 1"), (unread, _why_unread())):
        if names:
            _report(f"{root}: {_are(len(names), 'file')} left out, {why}: {first_of(names)}", strict)

    if _both_from_zero(root, found, wanted, cameras):
        _report(
            f"{root}: people are numbered from 0 in both halves, as in MSMT17: read as 1, 2, … to train on, and as "
            f"{_TEST_FROM_ZERO}, {_TEST_FROM_ZERO + 1}, … in query and gallery; 0 is no distractor",
            strict,
        )
        for part, samples in found.items():
            added = 1 if part == "train" else _TEST_FROM_ZERO
            found[part] = [replace(sample, pid=sample.pid + added) for sample in samples]
    for part in ("train", "query"):  # no class, and no query: as one it would match the gallery's distractors
        named = [sample for sample in found[part] if sample.pid != DISTRACTOR]
        if distractors := len(found[part]) - len(named):
            of = "image of identity 0 (distractor) is" if distractors == 1 else "images of identity 0 (distractors) are"
            _report(f"{root / FOLDERS[part]}: {distractors} {of} left out", strict)
        found[part] = named
    for part in wanted:
        if not found[part]:
            raise InputError(
                f"{root / FOLDERS[part]}: no images named <identity>_c<camera>s<sequence>_….jpg"
                f"{_hint(root / FOLDERS[part], junk[part], misnamed)}"
            )

    tested = {sample.pid for sample in (*found["query"], *found["gallery"])}
    both = sorted(tested.intersection(sample.pid for sample in found["train"]))
    if both:
        of = "identity is" if len(both) == 1 else "identities are"
        _report(f"{root}: {len(both)} {of} both in train and in query or gallery: {first_of(map(str, both))}", strict)
    return folder_of(root, found, sum(junk.values()))


def _both_from_zero(root: Path, found: Mapping[str, Sequence[Sample]], read: Iterable[str], cameras: bool) -> bool:
    """Whether 0 is a person: said by all folders that are there, so that it does not depend on the parts that are read.

    One folder of distractors (0000) in train alone shares no other number with the gallery's.
    """
    if not any(sample.pid == DISTRACTOR for samples in found.values() for sample in samples):
        return False
    pids = {part: {sample.pid for sample in found[part]} for part in read}
    for part in FOLDERS.keys() - pids.keys():
        names = _listed(root, FOLDERS[part])[0] if (root / FOLDERS[part]).is_dir() else []
        pids[part] = {label[0] for name in names if (label := label_of(name, cameras=cameras))}
    train, test = pids["train"], pids["query"] | pids["gallery"]
    shared = train & test
    return len(shared) > 1 and DISTRACTOR in shared and 2 * (len(shared) - 1) >= min(len(train), len(test)) - 1


def _hint(folder: Path, junk: int, misnamed: Sequence[str]) -> str:
    """What an empty part may come from."""
    if junk:
        return f"; {_are(junk, 'image')} left out as junk, named -1_…"
    own = [Path(name).name for name in misnamed if Path(name).parent.name == folder.name]
    if own and all(label_of(name, cameras=False) for name in own):
        return "; names that say an identity and no camera are read by apd evaluate --ignore-cameras"
    if inner := folders_with_images(folder):
        return (
            f"; {inner[0]} is a folder of images, perhaps of one person: only images of the folder itself are read. A "
            "CSV file with the columns path, pid, camid and split takes images from any folders"
        )
    return ""


def folders_with_images(folder: Path) -> list[str]:
    """The folders within a folder that hold images, sorted."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if _is(entry.is_dir) and any(name.lower().endswith(ENDINGS) for name in os.listdir(entry))
    )


def folder_of(root: Path, parts: Mapping[str, Sequence[Sample]], junk: int = 0) -> ReidFolder:
    """A data set of these parts; the others are empty."""
    train, query, gallery = (tuple(parts.get(part, ())) for part in FOLDERS)
    return ReidFolder(root, train, query, gallery, junk)


def _read_part(root: Path, folder: str, cameras: bool) -> tuple[list[Sample], list[str], int, list[str]]:
    """The images of one folder, those that are named otherwise, how many are junk, and those that are not read."""
    samples, misnamed, junk = [], [], 0
    names, unread = _listed(root, folder)
    for name in names:
        if _JUNK.match(name):
            junk += 1
            continue
        label = label_of(name, cameras=cameras)
        if label is None:
            misnamed.append(f"{folder}/{name}")
        else:
            samples.append(Sample(root / folder / name, *label))
    return samples, misnamed, junk, unread


def image_names(root: Path, folder: str, layout: str) -> list[str]:
    """The names of the images in a folder of a data set, sorted; hidden files are none.

    Warns:
        DataWarning: pictures of a kind that is not read.

    Raises:
        InputError: the folder is missing, which `layout` explains, is a file, or cannot be read.
    """
    names, unread = _listed(root, folder, layout)
    if unread:
        _report(f"{root}: {_are(len(unread), 'file')} left out, {_why_unread()}: {first_of(unread)}", False)
    return names


def _listed(
    root: Path, folder: str, layout: str = f"the layout of Market-1501 is {', '.join(FOLDERS.values())}"
) -> tuple[list[str], list[str]]:
    """The names of a folder's images, and, with the folder, those of pictures that are not read."""
    names: list[str] = []
    unread: list[str] = []
    no_files: list[str] = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or _is(entry.is_dir):
                    continue
                if entry.name.lower().endswith(ENDINGS):
                    (names if _is(entry.is_file) else no_files).append(entry.name)
                elif entry.name.lower().endswith(_UNREAD) or (_NAME.match(entry.name) and "." not in entry.name):
                    unread.append((Path(folder) / entry.name).as_posix())
    except FileNotFoundError:
        raise InputError(f"{root}: no folder {folder!r}; {layout}") from None
    except NotADirectoryError:
        raise InputError(f"{root / folder}: expected a folder, found a file") from None
    except PermissionError:
        raise InputError(f"{root / folder}: no permission to read it") from None
    if no_files:
        what = "entries are no files (pipes, devices, links that lead nowhere) and"
        _report(f"{root / folder}: {len(no_files)} {what} left out: {first_of(sorted(no_files))}", False)
    return sorted(names), sorted(unread)


def _why_unread() -> str:
    return f"pictures of a kind that is not read (read are {' '.join(ENDINGS)})"


def _are(count: int, noun: str) -> str:
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


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
