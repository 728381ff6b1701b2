"""Feature files: what a model computed from the images of a data set.

An ``.npz`` archive with the arrays

- ``features`` (N, D), floating point;
- ``pids`` (N,), integers: the identity of each image, −1 for junk;
- ``camids`` (N,), integers: the camera of each image;
- ``split`` (N,), integers, optional: 0 train, 1 query, 2 gallery;
- ``names`` (N,), strings, optional: the image files.

Further arrays are left alone; ``apd extract`` writes some that say how the features were made.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from apd.errors import InputError
from apd.files import replacing

SPLITS = {"train": 0, "query": 1, "gallery": 2}

# What numpy raises for an archive that is not one, is cut off, or holds something else than plain arrays.
_UNREADABLE = (ValueError, EOFError, OSError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


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
        return replace(
            self,
            rows=f"split {SPLITS[name]}, {name}",
            features=self.features[chosen],
            names=self.names[chosen],
            pids=None if self.pids is None else self.pids[chosen],
            camids=None if self.camids is None else self.camids[chosen],
            split=None,
        )


def load_features(path: Path) -> FeatureSet:
    """Read and check a feature file.

    Args:
        path: the ``.npz`` file; read without pickle, so it cannot run code.

    Raises:
        InputError: the file, or one of its arrays, is missing, damaged, or of another kind than described above.
    """
    with _opened(path) as archive:
        arrays: dict[str, np.ndarray] = {}
        for name in ("features", "pids", "camids", "split", "names"):
            if name in archive.files:
                try:
                    arrays[name] = archive[name]
                except _UNREADABLE as error:
                    raise InputError(f"{path}: {name}: cannot be read: {error}") from error
    features = arrays.get("features")
    if features is None:
        raise InputError(f"{path}: no array 'features'; found {', '.join(sorted(archive.files)) or 'none'}")
    if features.dtype.kind != "f" or features.ndim != 2 or features.shape[1] < 1:
        raise InputError(f"{path}: features: expected floating point (N, D), got {features.dtype} {features.shape}")
    if not len(features):
        raise InputError(f"{path}: features: no rows")
    for name in ("pids", "camids", "split"):
        _check_column(path, name, arrays.get(name), "iu", "integers", len(features))
    _check_column(path, "names", arrays.get("names"), "U", "strings", len(features))
    broken = np.flatnonzero(~np.isfinite(features).all(1))
    if broken.size:
        first = ", ".join(map(str, broken[:5])) + (", …" if broken.size > 5 else "")
        raise InputError(f"{path}: features: NaN or infinite values in {broken.size} of {len(features)} rows: {first}")
    split = arrays.get("split")
    if split is not None and not np.isin(split, list(SPLITS.values())).all():
        unknown = sorted(set(split.tolist()) - set(SPLITS.values()))
        raise InputError(f"{path}: split: expected 0 (train), 1 (query) or 2 (gallery), got {unknown[0]}")
    names = arrays.get("names")
    return FeatureSet(
        path=path,
        rows="all rows",
        features=features,
        names=np.array([f"row {i}" for i in range(len(features))]) if names is None else names,
        pids=arrays.get("pids"),
        camids=arrays.get("camids"),
        split=split,
    )


def save_features(rows: FeatureSet, path: Path, about: Mapping[str, Any]) -> None:
    """Write or replace a feature file in one step.

    Args:
        rows: all rows of the file.
        path: the ``.npz`` file.
        about: how the features were made: strings, numbers and lists of numbers, each written as an array of its name.
    """
    columns = {"pids": rows.pids, "camids": rows.camids, "split": rows.split, "names": rows.names}
    arrays: dict[str, Any] = {name: values for name, values in columns.items() if values is not None}
    arrays |= {name: np.array(value) for name, value in about.items()}
    with replacing(path) as file:
        np.savez(file, features=rows.features, **arrays)


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: expected a file, found a folder") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None
    except _UNREADABLE as error:
        raise InputError(f"{path}: not an .npz file, or cut off or damaged") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: expected an .npz file with named arrays, got a single array")
    with archive:
        yield archive


def _check_column(path: Path, name: str, values: np.ndarray | None, kinds: str, what: str, count: int) -> None:
    if values is None:
        return
    if values.dtype.kind not in kinds:
        raise InputError(f"{path}: {name}: expected {what}, got {values.dtype}")
    if values.shape != (count,):
        raise InputError(f"{path}: {name}: expected shape ({count},) as features has rows, got {values.shape}")


def check_same_dim(query: FeatureSet, gallery: FeatureSet) -> None:
    if query.dim != gallery.dim:
        raise InputError(
            f"{gallery.path}: features: expected {query.dim} dimensions as in {query.path}, got {gallery.dim}"
        )
