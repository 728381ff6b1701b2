"""Feature files: what a model computed from the images of a data set.

An ``.npz`` archive with the arrays

- ``features`` (N, D), floating point;
- ``pids`` (N,), integers: the identity of each image, −1 for junk;
- ``camids`` (N,), integers: the camera of each image;
- ``split`` (N,), integers, optional: 0 train, 1 query, 2 gallery;
- ``names`` (N,), strings, optional: the image files.

Further arrays are left alone, but for those that ``apd extract`` writes to say how the features were made, and columns
that are asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from apd.errors import InputError
from apd.files import misfit, reading, replacing

SPLITS = {"train": 0, "query": 1, "gallery": 2}
ARRAYS = ("features", "pids", "camids", "split", "names")
# Of `apd.retrieval.extraction.Extractor.about`: what every extractor has, and what a run has besides.
ABOUT, ABOUT_RUN = ("model", "fingerprint", "image_size", "flip_test"), ("descriptor", "label_smoothing")


@dataclass(frozen=True)
class FeatureSet:
    """Rows of a feature file."""

    path: Path
    rows: str  # which rows of the file these are, in words
    features: np.ndarray
    names: np.ndarray  # the file's, or "row <number>"
    pids: np.ndarray | None
    camids: np.ndarray | None
    split: np.ndarray | None
    named: bool = True  # the names are the file's
    about: Mapping[str, Any] = field(default_factory=dict)  # how the features were made, as far as the file says it
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # further values of each row, by name

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        return int(self.features.shape[1])

    def identities(self) -> np.ndarray:
        return self._required("pids", self.pids)

    def cameras(self) -> np.ndarray:
        return self._required("camids", self.camids)

    def _required(self, name: str, values: np.ndarray | None) -> np.ndarray:
        if values is None:
            raise InputError(f"{self.path}: no array {name!r}")
        return values

    def part(self, name: str) -> FeatureSet:
        """The rows of one split ("train", "query", "gallery"); all rows of a file without the array ``split``."""
        if self.split is None:
            return self
        chosen = self.split == SPLITS[name]
        if not chosen.any():
            raise InputError(f"{self.path}: split: no {name} rows (value {SPLITS[name]})")
        return replace(self.select(chosen), rows=f"split {SPLITS[name]}, {name}", split=None)

    def select(self, rows: slice | np.ndarray) -> FeatureSet:
        """These rows: a slice, or a mask."""
        return replace(
            self,
            features=self.features[rows],
            names=self.names[rows],
            pids=None if self.pids is None else self.pids[rows],
            camids=None if self.camids is None else self.camids[rows],
            split=None if self.split is None else self.split[rows],
            columns={column: values[rows] for column, values in self.columns.items()},
        )


def load_features(path: Path, columns: Sequence[str] = ()) -> FeatureSet:
    """Read and check a feature file.

    Args:
        path: the ``.npz`` file; read without pickle, so it cannot run code.
        columns: further arrays to read, each with a string, number or boolean for every row.

    Raises:
        InputError: the file, or one of its arrays, is missing, damaged, or of another kind than described above.
    """
    with _opened(path) as archive:
        about = _check_headers(path, archive, columns)
        arrays: dict[str, np.ndarray] = {}
        for name in (*ARRAYS, *about, *columns):
            if name in archive.files:
                with reading(path, f"{name}: cannot be read"):
                    arrays[name] = archive[name]
    features = arrays["features"]
    broken = np.flatnonzero(~np.isfinite(features).all(1))
    if broken.size:
        first = ", ".join(map(str, broken[:5])) + (", …" if broken.size > 5 else "")
        raise InputError(f"{path}: features: NaN or infinite values in {broken.size} of {len(features)} rows: {first}")
    split = arrays.get("split")
    if split is not None and not np.isin(split, list(SPLITS.values())).all():
        unknown = sorted(set(split.tolist()) - set(SPLITS.values()))
        raise InputError(f"{path}: split: expected 0 (train), 1 (query) or 2 (gallery), got {unknown[0]}")
    for name in ("pids", "camids", *columns):
        if name in arrays:
            check_int64(f"{path}: {name}", arrays[name])
    names = arrays.get("names")
    return FeatureSet(
        path=path,
        rows="all rows",
        features=features,
        names=np.array([f"row {i}" for i in range(len(features))]) if names is None else names,
        pids=arrays.get("pids"),
        camids=arrays.get("camids"),
        split=split,
        named=names is not None,
        about=_about({name: arrays[name] for name in about}),
        columns={name: arrays[name] for name in columns},
    )


def _about(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `save_features` wrote of the model; nothing where another program's arrays have the same names."""
    found = {name: values.tolist() for name, values in arrays.items()}
    return found if misfit(found, _ABOUT) is None else {}


_ABOUT = {
    **{"model": str, "fingerprint": str, "image_size": [int], "flip_test": bool},
    **{"descriptor?": str, "label_smoothing?": (float, type(None))},
}


def map_array(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, mapped: what is not asked for is not read, and nothing is ever written.

    Raises:
        InputError: there is no such file, or none with an array of numbers.
    """
    with reading(path, "not an .npy file of numbers, or cut off or damaged"):
        # Copy on write: PyTorch warns of arrays that are read-only.
        array: np.ndarray = np.lib.format.open_memmap(path, mode="c")
    return array


def save_features(rows: FeatureSet, path: Path) -> None:
    """Write or replace a feature file in one step; what is in ``about`` becomes an array of its name each.

    Args:
        rows: all rows of the file.
        path: the ``.npz`` file.
    """
    columns = {"pids": rows.pids, "camids": rows.camids, "split": rows.split, "names": rows.names}
    arrays: dict[str, Any] = {name: values for name, values in columns.items() if values is not None}
    arrays |= {name: np.array(value) for name, value in rows.about.items()}
    with replacing(path) as file:
        np.savez(file, features=rows.features, **arrays)


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    with reading(path, "not an .npz file, or cut off or damaged"):
        archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: expected an .npz file with named arrays, got a single array")
    with archive:
        yield archive


_Header = tuple[tuple[int, ...], np.dtype[Any]]  # shape and dtype
_LONGEST_NAME = 4096  # characters


def _check_headers(path: Path, archive: np.lib.npyio.NpzFile, columns: Sequence[str]) -> list[str]:
    """Refuse by shapes and dtypes, before anything is unpacked: a small file may hold large arrays.

    Returns:
        the arrays that say of the model what `save_features` wrote.
    """
    about = (*ABOUT, *ABOUT_RUN) if set(ABOUT) <= set(archive.files) else ()
    found: dict[str, _Header] = {}
    for name in (*ARRAYS, *about, *columns):
        if name in archive.files:
            assert archive.zip is not None
            with reading(path, f"{name}: cannot be read"), archive.zip.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                found[name] = shape, dtype
    if "features" not in found:
        raise InputError(f"{path}: no array 'features'; found {', '.join(sorted(archive.files)) or 'none'}")
    shape, dtype = found["features"]
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or shape[1] < 1:
        raise InputError(f"{path}: features: expected floating point (N, D), got {dtype} {shape}")
    if not shape[0]:
        raise InputError(f"{path}: features: no rows")
    for name in ("pids", "camids", "split"):
        _check_column(path, name, found.get(name), "iu", "integers", shape[0])
    _check_column(path, "names", found.get("names"), "U", "strings", shape[0])
    for name in columns:
        if name not in found:
            raise InputError(f"{path}: no array {name!r}")
        _check_column(path, name, found[name], "biufU", "strings, numbers or booleans", shape[0])
    known = [name for name in about if name in found]
    ours = all(np.prod(found[name][0]) <= 2 and found[name][1].itemsize <= 4 * _LONGEST_NAME for name in known)
    return known if ours else []


def _check_column(path: Path, name: str, header: _Header | None, kinds: str, what: str, count: int) -> None:
    if header is None:
        return
    shape, dtype = header
    if dtype.kind not in kinds:
        raise InputError(f"{path}: {name}: expected {what}, got {dtype}")
    if shape != (count,):
        raise InputError(f"{path}: {name}: expected shape ({count},) as features has rows, got {shape}")
    if dtype.itemsize > 4 * _LONGEST_NAME:
        raise InputError(f"{path}: {name}: expected strings of at most {_LONGEST_NAME:,} characters, got {dtype}")


def check_int64(where: str, values: np.ndarray) -> None:
    """InputError for numbers of 2⁶³ and more, which would become others."""
    if values.dtype == np.uint64 and values.max(initial=0) >= 2**63:
        raise InputError(f"{where}: expected numbers below 2**63, got {values.max()}")


def difference(about: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first of what `about` says in which two models differ; None where they are one, or one is not known."""
    if "fingerprint" not in about or "fingerprint" not in other:
        return None
    for name in ("fingerprint", "image_size", "flip_test", "descriptor"):
        if about.get(name) != other.get(name):
            return name
    return None


def check_same_model(query: FeatureSet, gallery: FeatureSet) -> None:
    """InputError for features of two dimensions, or of two models where both files name theirs."""
    if query.dim != gallery.dim:
        raise InputError(
            f"{gallery.path}: features: expected {query.dim} dimensions as in {query.path}, got {gallery.dim}"
        )
    if (name := difference(query.about, gallery.about)) is not None:
        raise InputError(
            f"{gallery.path}: {name}: expected {query.about.get(name)} as in {query.path}, got "
            f"{gallery.about.get(name)}; features that were made in two ways have no distance"
        )
