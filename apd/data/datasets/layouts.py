"""Readers of data sets that say identity and camera by folder and file name, each in its own way.

Every reader takes the data set's folder and the parts to read ("train", "query", "gallery"), and lists at least those,
without opening images. Identities that a data set numbers twice, for different people, become different numbers here; 0
stays the identity of distractors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from apd.data.market import (
    FOLDERS,
    UNKNOWN,
    ReidFolder,
    Sample,
    first_of,
    folder_of,
    folders_with_images,
    image_names,
    label_of,
    read_market,
)
from apd.errors import DataWarning, InputError

Label = Callable[[re.Match[str]], tuple[int, int] | None]  # identity and camera of a name; None: it cannot be one

_PRID_IN_BOTH = 200  # people of PRID that both cameras saw
_PRID_IN_A = 385
CUHK03_VARIANTS = ("detected", "labeled")
CUHK02_PAIRS = ("P1", "P2", "P3", "P4", "P5")
_CUHK02_TEST = "P5"
_RAW_CUHK03 = ("cuhk-03.mat", "cuhk03_release/cuhk-03.mat")


class _Listing:
    """The images of some folders, and the names that fit no pattern: they are told of together."""

    def __init__(self, root: Path, layout: str) -> None:
        self.root = root
        self.layout = layout
        self._misnamed: list[str] = []

    def read(self, folder: str, pattern: str, label: Label) -> list[Sample]:
        """The images of a folder, sorted by name.

        Args:
            folder: within the root.
            pattern: of the beginning of their names.
            label: from a match to identity and camera.
        """
        samples = []
        for name in image_names(self.root, folder, self.layout):
            match = re.match(pattern, name)
            found = None if match is None else label(match)
            if found is None:
                self._misnamed.append(f"{folder}/{name}")
            else:
                samples.append(Sample(self.root / folder / name, *found))
        return samples

    def done(self, **parts: Sequence[Sample]) -> ReidFolder:
        """The data set.

        Warns:
            DataWarning: files with another name, which are left out.
        """
        if self._misnamed:
            of = "file is" if len(self._misnamed) == 1 else "files are"
            named = first_of(self._misnamed)
            warn(f"{self.root}: {len(self._misnamed)} {of} left out, not named as {self.layout}: {named}")
        return folder_of(self.root, parts)


def warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)


def read_pictures(root: Path, parts: Sequence[str], cameras: bool = True) -> ReidFolder:
    """A folder of images, all of them in every part: who is on them is known (−1: not) where a name says it.

    Args:
        root: the folder; those within it are not read.
        parts: "query" or "gallery".
        cameras: as for `apd.data.market.read_market`.

    Warns:
        DataWarning: images in folders within it, and pictures of a kind that is not read.

    Raises:
        InputError: it holds no image.
    """
    names = image_names(root, ".", "a folder of images is expected")
    inner = folders_with_images(root)
    if not names:
        raise InputError(f"{root}: no images in this folder{f', only in {first_of(inner)} within it' * bool(inner)}")
    if inner:
        warn(f"{root}: images in folders within it are not read: {first_of(inner)}")
    samples = [Sample(root / name, *(label_of(name, cameras=cameras) or (UNKNOWN, UNKNOWN))) for name in names]
    return folder_of(root, dict.fromkeys(parts, samples))


def _number(match: re.Match[str]) -> int:
    return int(match["pid"])


def read_cuhk03(root: Path, parts: Sequence[str], variant: str) -> ReidFolder:
    """CUHK03-NP (Zhong et al. 2017): folders ``detected`` and ``labeled``, each in the layout of Market-1501.

    Raises:
        InputError: the folder holds CUHK03's raw ``cuhk-03.mat``, which is not read, or not the variant, or the path is
            the folder of the other one.
    """
    folder = root / variant
    if not folder.is_dir():
        if any((root / name).is_dir() for name in FOLDERS.values()):
            folder = root  # the folder of a variant itself
            if root.name.lower() in CUHK03_VARIANTS and root.name.lower() != variant:
                raise InputError(f"{root}: expected the variant {variant!r}, got the folder of {root.name.lower()!r}")
        elif any((root / raw).is_file() for raw in _RAW_CUHK03):
            raise InputError(
                f"{root}: holds the raw cuhk-03.mat (MATLAB 7.3), which is not read; take CUHK03-NP, with the folders "
                f"detected and labeled of {', '.join(FOLDERS.values())}"
            )
        else:
            raise InputError(f"{root}: no folder {variant!r}; CUHK03-NP has the folders 'detected' and 'labeled'")
    return read_market(folder, parts)


def read_cuhk02(root: Path, parts: Sequence[str]) -> ReidFolder:
    """CUHK02 (Li and Wang 2013): ``P1/cam1/001_….png``; P1 to P4 train, P5 tests, camera 1 asking.

    Each pair numbers its people and cameras from 1: identity 17 of P3 becomes 30017, its cameras 5 and 6.
    """
    listing = _Listing(root, "CUHK02 names them, P1/cam1/<identity>_….png")
    found: dict[str, list[Sample]] = {part: [] for part in parts}
    for pair, folder in enumerate(CUHK02_PAIRS, 1):
        for camera in (1, 2):
            part = "train" if folder != _CUHK02_TEST else ("query", "gallery")[camera - 1]
            if part not in found:
                continue
            offset, camid = 10_000 * pair, 2 * (pair - 1) + camera
            found[part] += listing.read(
                f"{folder}/cam{camera}",
                r"(?P<pid>[0-9]{1,4})_",
                lambda match, offset=offset, camid=camid: (offset + _number(match), camid),  # type: ignore[misc]
            )
    return listing.done(**found)


_SYSU = {
    "cropped_images": (r"p(?P<pid>[0-9]{1,9})_s[0-9]+_", "p<identity>_s<scene>_<number>.jpg"),
    "cropped_image": (r"p(?P<pid>[0-9]{1,9})_n[0-9]+_s[0-9]+_", "p<identity>_n<number>_s<scene>_hard<0 or 1>.png"),
    "bounding_box_train": (r"(?P<pid>[0-9]{1,9})_c[0-9]+", "<identity>_c<camera>….jpg"),
}


def read_cuhk_sysu(root: Path, parts: Sequence[str]) -> ReidFolder:
    """CUHK-SYSU (Xiao et al. 2017) as Re-ID uses it: people cut out of the scenes, all of them to train on.

    In one of the forms in use: ``cropped_images/p11422_s16929_1.jpg``, ``cropped_image/p00001_n01_s00001_hard0.png``,
    or ``bounding_box_train/<identity>_c<camera>….jpg``. The camera is not known: it is 1 for all.
    """
    for folder, (pattern, form) in _SYSU.items():
        if (root / folder).is_dir():
            listing = _Listing(root, f"CUHK-SYSU names them, {folder}/{form}")
            return listing.done(
                train=listing.read(folder, pattern, lambda match: (_number(match), 1) if _number(match) else None)
            )
    raise InputError(f"{root}: none of the folders {', '.join(_SYSU)} of cut-out people; whole scenes are not read")


def read_prid(root: Path, parts: Sequence[str]) -> ReidFolder:
    """PRID 2011 (Hirzer et al. 2011), single shot: ``single_shot/cam_a/person_0001.png``; camera a asks, b answers.

    The first 200 people are in both cameras. From 201 on a number means one person in a, and another in b: those of b
    are numbered on from a's last.
    """
    listing = _Listing(root, "PRID names them, person_<identity>.png")
    pattern = r"person_(?P<pid>[0-9]{1,6})\."

    def in_b(match: re.Match[str]) -> tuple[int, int] | None:
        number = _number(match)
        return (number if number <= _PRID_IN_BOTH else number - _PRID_IN_BOTH + _PRID_IN_A, 2) if number else None

    return listing.done(
        query=listing.read("single_shot/cam_a", pattern, lambda match: (_number(match), 1) if _number(match) else None),
        gallery=listing.read("single_shot/cam_b", pattern, in_b),
    )


def read_grid(root: Path, parts: Sequence[str]) -> ReidFolder:
    """GRID (Loy et al. 2009): ``probe`` and ``gallery``, ``0001_1_….jpeg``: identity, camera; 0000 is a distractor."""
    listing = _Listing(root, "GRID names them, <identity>_<camera>_….jpeg")
    pattern = r"(?P<pid>[0-9]{1,9})_(?P<camid>[0-9]{1,9})_"

    def asking(match: re.Match[str]) -> tuple[int, int] | None:
        return answering(match) if _number(match) else None

    def answering(match: re.Match[str]) -> tuple[int, int] | None:
        return (_number(match), int(match["camid"])) if int(match["camid"]) else None

    return listing.done(
        query=listing.read("probe", pattern, asking), gallery=listing.read("gallery", pattern, answering)
    )


def read_viper(root: Path, parts: Sequence[str]) -> ReidFolder:
    """VIPeR (Gray et al. 2007): ``cam_a/000_45.bmp``, identity and angle; camera a asks, b answers.

    Identities count from 0 there, and from 1 here.
    """
    listing = _Listing(root, "VIPeR names them, <identity>_<angle>.bmp")
    pattern = r"(?P<pid>[0-9]{1,6})_[0-9]"
    return listing.done(
        query=listing.read("cam_a", pattern, lambda match: (_number(match) + 1, 1)),
        gallery=listing.read("cam_b", pattern, lambda match: (_number(match) + 1, 2)),
    )


def read_ilids(root: Path, parts: Sequence[str]) -> ReidFolder:
    """i-LIDS (Zheng et al. 2009), 119 people: ``Persons/0001001.jpg``, identity and number of the image.

    Cameras are not known, so each image of a person counts as of another camera, and an evaluation leaves out none. The
    first image of a person asks, the others answer.
    """
    listing = _Listing(root, "i-LIDS names them, <identity, 4 digits><number, 3 digits>.jpg")
    folder = "Persons" if (root / "Persons").is_dir() else "images"

    def label(match: re.Match[str]) -> tuple[int, int] | None:
        pid, number = _number(match), int(match["number"])
        return (pid, number) if pid and number else None

    samples = listing.read(folder, r"(?P<pid>[0-9]{4})(?P<number>[0-9]{3})\.", label)
    first: dict[int, Sample] = {}
    for sample in samples:
        first.setdefault(sample.pid, sample)
    query = list(first.values())
    return listing.done(query=query, gallery=[sample for sample in samples if sample is not first[sample.pid]])
