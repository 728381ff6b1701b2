"""A gallery's folder: its FAISS indexes, a ``.npy`` file for each column, and the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apd_kernels.gallery.atomic_folder import HashingWriter, load_folder, save_folder
from apd_kernels.gallery.columns import METADATA_KINDS, Column, Columns
from apd_kernels.gallery.faiss_index import build, flat_index, import_faiss
from apd_kernels.gallery.rows import LARGEST_NORM

FORMAT = "apd-kernels gallery"
# 1: a flat index.faiss and arrays.npz, running numbers as keys. 2: any index, keys, arrays that can be mapped.
VERSION = 2


class GalleryError(ValueError):
    """A folder that cannot be loaded as a gallery, or must not be replaced by one."""


@dataclass(frozen=True)
class Stored:
    """What a folder holds."""

    dim: int
    metric: str
    index: str
    fingerprint: str | None
    notes: dict[str, Any]
    rows: Any  # the flat FAISS index
    approximate: Any  # FAISS index; None for "Flat"
    largest_norm: float | None  # None in version 1, as `zero`
    zero: np.ndarray | None
    columns: Columns


def write_gallery(path: Path, about: dict[str, Any], indexes: dict[str, Any], zero: Column, columns: Columns) -> None:
    """Nothing is written that `read_gallery` would refuse."""
    faiss = import_faiss()
    if any(index.ntotal != len(columns) for index in indexes.values()) or not _fit(len(columns), columns, zero):
        raise GalleryError(f"{path}: not saved: the gallery's index or columns do not fit each other")

    def index_writer(index: Any) -> Callable[[HashingWriter], None]:
        return lambda writer: faiss.write_index(index, faiss.PyCallbackIOWriter(writer.write))

    def array_writer(column: Column) -> Callable[[HashingWriter], None]:
        return lambda writer: np.save(writer, column.values(), allow_pickle=False)

    arrays = {"keys": columns.keys, "ids": columns.ids, "cams": columns.cams, "zero": zero}
    arrays |= {f"metadata{i}": column for i, column in enumerate(columns.metadata.values())}
    files = {f"{name}.faiss": index_writer(index) for name, index in indexes.items()}
    files |= {f"{name}.npy": array_writer(column) for name, column in arrays.items()}
    fields = {"count": len(columns), "next_key": columns.next_key, "metadata": list(columns.metadata)}
    save_folder(path, FORMAT, VERSION, about | fields, files, GalleryError)


def read_gallery(path: Path, make: Callable[[Stored], Any], *, mmap: bool, verify: bool) -> Any:
    """``make(what the folder holds)``; `mmap` and `verify` as in `Gallery.load`."""

    def read(manifest: dict[str, Any], files: dict[str, Path]) -> Any:
        try:
            stored = _stored(manifest, files, mmap)
        except (RuntimeError, OSError, ValueError, EOFError) as failure:
            raise GalleryError(f"{path}: damaged: {failure}") from failure
        if stored is None:
            raise GalleryError(f"{path}: damaged: its index or arrays do not fit its manifest")
        return make(stored)

    return load_folder(path, FORMAT, VERSION, read, GalleryError, verify=verify)


def _stored(manifest: dict[str, Any], files: dict[str, Path], mmap: bool) -> Stored | None:
    """None where the parts do not fit each other."""
    faiss = import_faiss()
    dim, metric, count = manifest["dim"], manifest["metric"], manifest["count"]
    flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0

    def index_of(name: str, empty: Any) -> Any:
        index = faiss.read_index(str(files[name]), flags)
        found = (type(index), index.d, index.metric_type, index.ntotal)
        return index if found == (type(empty), dim, empty.metric_type, count) else None

    def array_of(name: str) -> np.ndarray:
        # An array of no bytes cannot be mapped.
        array: np.ndarray = np.load(files[f"{name}.npy"], "r" if mmap and count else None, allow_pickle=False)
        return array

    kind = manifest.get("index", "Flat")
    rows = index_of("index.faiss" if kind == "Flat" else "rows.faiss", flat_index(dim, metric))
    approximate = None if kind == "Flat" else index_of("index.faiss", build(dim, kind, metric))
    if rows is None or (kind != "Flat" and approximate is None):
        return None
    if manifest["version"] == 1:
        with np.load(files["arrays.npz"], allow_pickle=False) as stored:
            arrays = {name.removeprefix("metadata."): values for name, values in stored.items()}
        keys, ids, cams, zero = np.arange(count), arrays.pop("ids"), arrays.pop("cams"), None
    else:
        keys, ids, cams, zero = (array_of(name) for name in ("keys", "ids", "cams", "zero"))
        arrays = {name: array_of(f"metadata{i}") for i, name in enumerate(manifest["metadata"])}
    notes = manifest.get("notes", {})  # none in a gallery saved before there were notes
    fingerprint, largest = manifest.get("fingerprint"), manifest.get("largest_norm")
    if not isinstance(notes, dict) or not isinstance(fingerprint, (str, type(None))):
        return None
    if largest is not None and not (isinstance(largest, float) and 0 <= largest <= LARGEST_NORM):
        return None
    columns = Columns()
    columns.keys, columns.ids, columns.cams = (Column(values.dtype, values) for values in (keys, ids, cams))
    columns.metadata = {name: Column(values.dtype, values) for name, values in arrays.items()}
    columns.next_key = manifest.get("next_key", count)
    if not _fit(count, columns, None if zero is None else Column(zero.dtype, zero)):
        return None
    return Stored(dim, metric, kind, fingerprint, notes, rows, approximate, largest, zero, columns)


def _fit(count: int, columns: Columns, zero: Column | None) -> bool:
    """Whether they are the columns of so many rows, with keys that are each there once."""
    numbers = (columns.keys, columns.ids, columns.cams)
    every = (*numbers, *columns.metadata.values(), *([] if zero is None else [zero]))
    if any(column.values().shape != (count,) for column in every):
        return False
    if any(column.dtype != np.int64 for column in numbers) or (zero is not None and zero.dtype != np.bool_):
        return False
    if any(column.dtype.kind not in METADATA_KINDS for column in columns.metadata.values()):
        return False
    keys, next_key = columns.keys.values(), columns.next_key
    once = len(np.unique(keys)) == count and int(keys.min(initial=0)) >= 0
    return once and isinstance(next_key, int) and int(keys.max(initial=-1)) < next_key <= 2**63
