"""Data sets as they are named on a command line: ``NAME:PATH``, or a folder whose layout is recognised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from apd.data.datasets.layouts import read_pictures, warn
from apd.data.datasets.lists import has_splits, manifest_parts
from apd.data.datasets.registry import (
    DATASETS,
    MANIFEST,
    MARKET_LAYOUT,
    PICTURES,
    DataSet,
    dataset_named,
    recognised,
)
from apd.data.market import DISTRACTOR, FOLDERS, ReidFolder, Sample, folder_of, read_market
from apd.errors import InputError

_NAMED = re.compile(r"(?P<name>[^/\\:+]{2,})(/(?P<variant>[^/\\:+]+))?(?P<all>\+test)?:(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class DataSpec:
    """Which data set, where it is, and whether its test images are trained on as well.

    >>> DataSpec.parse("cuhk03/labeled+test:data/cuhk03-np")
    DataSpec(path=PosixPath('data/cuhk03-np'), name='cuhk03', variant='labeled', all_images=True)
    """

    path: Path
    name: str | None = None  # None: as the folder's layout says
    variant: str | None = None
    all_images: bool = False  # as a source: train on query and gallery too (protocols P1 and P3)

    @classmethod
    def parse(cls, data: str | Path | DataSpec) -> DataSpec:
        """From ``NAME[/VARIANT][+test]:PATH`` or a path.

        Raises:
            InputError: no data set has this name or variant.
        """
        if isinstance(data, DataSpec):
            return data
        match = _NAMED.fullmatch(str(data))
        if match is None or Path(data).exists():
            return cls(Path(data))
        dataset = dataset_named(match["name"])
        if dataset is None:
            raise InputError(f"{data}: no data set is called {match['name']!r}; {_suggestion(match['name'])}")
        variant = None if match["variant"] is None else match["variant"].lower()
        if variant is not None and variant not in dataset.variants:
            expected = ", ".join(dataset.variants) or "none"
            raise InputError(f"{data}: variants of {dataset.name}: expected {expected}, got {match['variant']!r}")
        return cls(Path(match["path"]), dataset.name, variant, match["all"] is not None)

    @property
    def dataset(self) -> DataSet:
        return recognised(self.path) if self.name is None else DATASETS[self.name]

    @property
    def folder(self) -> Path:
        """Where its layout lies, absolute: the same for a data set that is named in two ways."""
        return self.dataset.find(self.path, self.variant).resolve()

    def resolved(self) -> DataSpec:
        """The same with an absolute path."""
        return replace(self, path=self.path.resolve())

    def settled(self) -> DataSpec:
        """The same with the variant that is read where none is named."""
        dataset = self.dataset
        if self.variant is not None or dataset.variant_in is None:
            return self
        return replace(self, variant=dataset.variant_in(dataset.find(self.path)))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        if self.name is None:
            return str(self.path)
        return f"{self.name}{f'/{self.variant}' if self.variant else ''}{'+test' * self.all_images}:{self.path}"


def _suggestion(name: str) -> str:
    near = get_close_matches(name.lower(), DATASETS, 1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(DATASETS)}; a path needs no name"


def read_dataset(
    data: str | Path | DataSpec,
    parts: Iterable[str] = ("train", "query", "gallery"),
    *,
    cameras: bool = True,
    unlabelled: bool = False,
) -> ReidFolder:
    """List the images of a data set, by the name of its layout or as the folder's layout says.

    Args:
        data: ``NAME:PATH``, ``NAME/VARIANT:PATH``, or a path: a folder in the layout of Market-1501, or else of one of
            the known data sets, or a CSV file.
        parts: which of "train", "query" and "gallery" to read.
        cameras: with False, names in the layout of Market-1501 need not say a camera (`apd.data.market.read_market`).
        unlabelled: images are only described; a CSV file need not say who is on them (`read_manifest`).

    Returns:
        the parts; `path` is the folder that the names of its images are relative to.

    Warns:
        DataWarning: what is left out or looks wrong; a part whose size is not the published one, of a data set that is
            named, or recognised by a layout of its own.

    Raises:
        InputError: the data set has no such part, or a part cannot be read or holds no image.
    """
    spec = DataSpec.parse(data).settled()
    dataset, wanted = spec.dataset, tuple(dict.fromkeys(parts))
    if dataset is PICTURES and spec.name is None and len(wanted) > 1:
        dataset = MARKET_LAYOUT  # whose reader says what is missing
    for part in wanted:
        if part not in dataset.parts:
            raise InputError(f"{spec}: {dataset.title} has no part {part!r}, only {' and '.join(dataset.parts)}")
    if dataset is not MANIFEST and not spec.path.is_dir():
        raise InputError(
            f"{spec.path}: {'expected a folder, found a file' if spec.path.exists() else 'no such folder'}"
        )
    options: dict[str, Any] = {} if spec.variant is None else {"variant": spec.variant}
    if dataset is MANIFEST:
        options["unlabelled"] = unlabelled
    elif dataset.read in (read_market, read_pictures):
        options["cameras"] = cameras
    folder = dataset.read(dataset.find(spec.path, spec.variant), wanted, **options)
    folder = folder_of(folder.path, {part: getattr(folder, part) for part in wanted}, folder.junk)
    for part in wanted:
        if not getattr(folder, part):
            junk = f"; left out: {folder.junk:,} of junk (identity -1)" if folder.junk else ""
            raise InputError(f"{spec}: no images of the part {part!r}{junk}")
    for difference in differences(dataset, spec.variant, folder):
        warn(f"{folder.path}: {difference}")
    return folder


def read_source(data: str | Path | DataSpec) -> ReidFolder:
    """The images to train on, as `train`; with ``+test`` all of the data set, distractors left out, otherwise its
    training images, and query and gallery where it has some: they are evaluated, never trained on.
    """
    spec = DataSpec.parse(data)
    present = present_parts(spec)
    if not spec.all_images:
        tested = ("query", "gallery") if {"query", "gallery"} <= set(present) else ()
        return read_dataset(spec, ("train", *tested))
    folder = read_dataset(spec, present)
    images = (*folder.train, *folder.query, *folder.gallery)
    return replace(folder, train=tuple(s for s in images if s.pid != DISTRACTOR), query=(), gallery=())


def present_parts(data: str | Path | DataSpec, *, unlabelled: bool = False) -> list[str]:
    """The parts that a data set has; of a folder in the layout of Market-1501 those that are there.

    All of them if none is there: whoever reads them says what is missing. `unlabelled`: as for `read_dataset`.
    """
    spec = DataSpec.parse(data)
    dataset = spec.dataset
    if dataset is MANIFEST:
        return manifest_parts(spec.path, unlabelled)
    if dataset is PICTURES:
        return ["gallery"]
    if dataset is MARKET_LAYOUT:
        return [part for part in FOLDERS if (spec.path / FOLDERS[part]).is_dir()] or list(FOLDERS)
    return list(dataset.parts)


def has_parts(data: str | Path | DataSpec) -> bool:
    """Whether a data set says which images ask and which answer; a folder of pictures does not."""
    spec = DataSpec.parse(data)
    return spec.dataset is not PICTURES and (spec.dataset is not MANIFEST or has_splits(spec.path))


def ten_split_note(data: str | Path | DataSpec) -> str | None:
    """For a data set that papers test in ten splits: that its query and gallery as read are another test."""
    dataset = DataSpec.parse(data).dataset
    if dataset.splits is None:
        return None
    return (
        f"{dataset.title}: all images at once; published figures are means over ten splits of half of the identities, "
        "as apd protocol run makes them"
    )


def domains(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """The images of each domain, in the order of the domains' names; those of a data set without domains are one."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.domain, []).append(sample)
    for name in sorted(found):
        yield found[name]


def differences(dataset: DataSet, variant: str | None, folder: ReidFolder) -> list[str]:
    """Where the parts that were read are not what the data set's authors count."""
    found = []
    for part in FOLDERS:
        expected, samples = dataset.counts(part, variant), getattr(folder, part)
        if expected is None or not samples:
            continue
        pids = [sample.pid for sample in samples]
        distractors = pids.count(DISTRACTOR)
        got = (len(pids), len(set(pids) - {DISTRACTOR}), distractors)
        published = (expected.images, expected.identities, expected.distractors)
        if got != published:
            found.append(f"{dataset.name}, {part}: published are {_size(*published)}; here are {_size(*got)}")
    return found


def _size(images: int, identities: int, distractors: int) -> str:
    text = f"{images:,} images of {identities:,} identities"
    return f"{text}, {distractors:,} of them distractors" if distractors else text
