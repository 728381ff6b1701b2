"""A gallery in several files, read piece by piece: it may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apd.errors import InputError
from apd.retrieval.features import FeatureSet, check_int64, check_same_model, load_features, map_array

_PIECE_BYTES = 1 << 26  # of a piece's features in float32; an evaluation holds a few copies of one piece
_LABELS = (".pids.npy", ".camids.npy")


@dataclass(frozen=True)
class GalleryShards:
    """The files of a gallery, and what is in them all.

    An ``.npz`` file is a feature file, of which the gallery rows count; it is in memory as a whole while its turn
    lasts. ``NAME.npy`` holds features (N, D) alone and is mapped; beside it lie ``NAME.pids.npy`` and
    ``NAME.camids.npy``, integers (N,).
    """

    paths: Sequence[Path]
    sizes: Sequence[int]  # images of each file
    identities: int  # junk apart
    cameras: int

    def __len__(self) -> int:
        return sum(self.sizes)

    def pieces(self) -> Iterator[FeatureSet]:
        """All rows in the order of the files, some 64 MB at a time.

        Raises:
            InputError: a file that cannot be read, or has changed since the gallery was opened.
        """
        for path, size in zip(self.paths, self.sizes, strict=True):
            shard = _read(path)
            if len(shard) != size:
                raise InputError(f"{path}: has changed while it was read: {size:,} images before, {len(shard):,} now")
            step = max(1, _PIECE_BYTES // (4 * shard.dim))
            for start in range(0, size, step):
                yield replace(shard.select(slice(start, start + step)), rows=f"from row {start:,} on")


def open_shards(paths: Sequence[Path], query: FeatureSet) -> GalleryShards:
    """The gallery that files and folders of files make up.

    Args:
        paths: ``.npz`` and ``.npy`` files, as `GalleryShards` says; of a folder all of its files, by name.
        query: what is searched in it.

    Raises:
        InputError: a file that is missing, damaged, given twice, without labels, or of other features than the queries.
    """
    files = [file for path in paths for file in _files(path)]
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise InputError(f"--gallery {file}: given twice; every image would count twice")
        seen.add(file.resolve())
    sizes = []
    identities: set[int] = set()
    cameras: set[int] = set()
    for file in files:
        shard = _read(file)
        check_same_model(query, shard)
        sizes.append(len(shard))
        identities.update(np.unique(shard.identities()).tolist())
        cameras.update(() if shard.camids is None else np.unique(shard.camids).tolist())
    return GalleryShards(files, sizes, len(identities - {-1}), len(cameras - {-1}))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [file for ending in ("*.npz", "*.npy") for file in path.glob(ending) if not file.name.startswith(".")]
    files = sorted(file for file in found if not file.name.endswith(_LABELS))
    if not files:
        raise InputError(f"--gallery {path}: no .npz and no .npy file in this folder")
    return files


def _read(path: Path) -> FeatureSet:
    return _mapped(path) if path.suffix == ".npy" else load_features(path).part("gallery")


def _mapped(path: Path) -> FeatureSet:
    features = map_array(path)
    if features.dtype.kind != "f" or features.ndim != 2 or 0 in features.shape:
        raise InputError(f"{path}: expected floating point features (N, D), got {features.dtype} {features.shape}")
    pids, camids = (path.with_name(path.stem + ending) for ending in _LABELS)
    cameras = _labels(camids, len(features)) if camids.exists() else None
    names = np.broadcast_to(np.array(""), len(features))  # takes no memory
    return FeatureSet(path, "all rows", features, names, _labels(pids, len(features)), cameras, None, named=False)


def _labels(path: Path, count: int) -> np.ndarray:
    values = map_array(path)
    if values.dtype.kind not in "iu" or values.shape != (count,):
        raise InputError(
            f"{path}: expected integers ({count},) as there are features, got {values.dtype} {values.shape}"
        )
    check_int64(str(path), values)
    return values
