"""What is there of a data set, and what is wrong with it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from apd.data.datasets.lists import absent
from apd.data.datasets.registry import DataSet
from apd.data.datasets.specs import DataSpec, present_parts, read_dataset
from apd.data.images import load_image
from apd.data.market import (
    DISTRACTOR,
    FOLDERS,
    NO_ANSWERS,
    Counts,
    ReidFolder,
    Sample,
    count_samples,
    first_of,
    folder_of,
    labels,
    unanswered,
)
from apd.errors import DataWarning, InputError

_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class PartCounts:
    """What a part holds."""

    counts: Counts
    distractors: int


@dataclass(frozen=True)
class Report:
    """What a check found."""

    dataset: DataSet
    folder: ReidFolder
    parts: dict[str, PartCounts]
    findings: list[str]  # a sentence each; none if all is well
    unanswered: int | None  # queries without an image of their identity from another camera; None: no such test


def check_dataset(spec: DataSpec) -> Report:
    """Count a data set's images and collect all that looks wrong without opening one (`check_images`).

    Raises:
        InputError: there is no such data set, or nothing of it can be read.
    """
    folder, findings = _read_what_is_there(spec)
    parts = {
        part: PartCounts(count_samples(samples), sum(sample.pid == DISTRACTOR for sample in samples))
        for part in FOLDERS
        if (samples := getattr(folder, part))
    }
    lost = None
    if folder.query and folder.gallery:
        lost = unanswered(labels(folder.query), labels(folder.gallery))
    if lost is not None and lost == len(folder.query):
        findings.append(f"{folder.path}: {NO_ANSWERS}")
    return Report(spec.dataset, folder, parts, findings, lost)


def _read_what_is_there(spec: DataSpec) -> tuple[ReidFolder, list[str]]:
    """All parts, or, where one cannot be read, the others one by one; and the warnings and errors on the way."""
    parts = present_parts(spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        folder: ReidFolder | InputError = _attempt(spec, parts)
        errors = []
        if isinstance(folder, InputError):
            caught.clear()
            one_by_one = [_attempt(spec, [part]) for part in parts]
            errors = [str(result) for result in one_by_one if isinstance(result, InputError)]
            found = [result for result in one_by_one if isinstance(result, ReidFolder)]
            if not found:
                raise folder
            whole = {part: next((s for one in found if (s := getattr(one, part))), ()) for part in parts}
            folder = folder_of(found[0].path, whole, sum(one.junk for one in found))
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, DataWarning)]
    missing = absent(sample.path for part in FOLDERS for sample in getattr(folder, part))
    if missing:
        of = "image is" if len(missing) == 1 else "images are"
        errors.append(
            f"{folder.path}: {len(missing)} {of} not there: {first_of(_relative(p, folder.path) for p in missing)}"
        )
    return folder, [*errors, *dict.fromkeys(messages)]


def _attempt(spec: DataSpec, parts: Sequence[str]) -> ReidFolder | InputError:
    try:
        return read_dataset(spec, parts)
    except InputError as error:
        return error


def check_images(folder: ReidFolder, advance: Callable[[int], None] = lambda done: None) -> list[str]:
    """Images that cannot be read, and files of one content in two parts, or of two identities.

    Args:
        folder: the data set.
        advance: called with 1 for each image.
    """
    labelled = [(part, sample) for part in FOLDERS for sample in getattr(folder, part)]
    same: dict[str, list[tuple[str, Sample]]] = {}

    def look(entry: tuple[str, Sample]) -> tuple[str | None, str]:
        path = entry[1].path
        try:
            load_image(path, None)
            return None, hashlib.sha256(path.read_bytes()).hexdigest()
        except (InputError, OSError) as error:
            return str(error), ""

    findings = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for entry, (error, digest) in zip(labelled, pool.map(look, labelled), strict=True):
            advance(1)
            if error is not None:
                findings.append(error)
            else:
                same.setdefault(digest, []).append(entry)
    copies = [group for group in same.values() if len({(part, sample.pid) for part, sample in group}) > 1]
    if copies:
        pairs = (" = ".join(_relative(sample.path, folder.path) for _, sample in group) for group in copies)
        of = "image is" if len(copies) == 1 else "images are"
        findings.append(f"{folder.path}: {len(copies)} {of} in two parts, or of two identities: {first_of(pairs)}")
    return findings


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
