"""A searchable, saved set of feature rows on FAISS."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_features
from apd_kernels._core.folder import HashingWriter, check_replaceable, load_folder, save_folder
from apd_kernels.prepared import METRICS

FORMAT = "apd-kernels gallery"
VERSION = 1

# Rows longer than this overflow float32 in squared distances.
LARGEST_NORM = 1e18
# FAISS on a GPU returns at most so many neighbours.
GPU_LARGEST_K = 2048
# Candidates asked for beyond k, and how many times more for the queries whose answer they do not settle.
# On OSNet features (7,900 rows of 512; k = 1, 10, 100; cosine and Euclidean) the first round settles every query; on
# 19,732 random rows of 2048 in 750 identities all for k = 10, 99.5 % for k = 100. Time over FAISS alone: + 5 to 13 %.
SPARE, WIDENING = 16, 4
# Candidates handled at once: 40 bytes each.
BLOCK_CANDIDATES = 1 << 21


class GalleryError(ValueError):
    """A folder that cannot be loaded as a gallery, or must not be replaced by one."""


class SearchResult(NamedTuple):
    """What `Gallery.search` found, nearest first; CPU tensors of shape (Q, k)."""

    distances: Tensor  # float32; inf where there is no further row
    indices: Tensor  # int64, rows in the order in which they were added; -1 where there is none
    ids: Tensor  # int64 identities; -1 where there is none
    cams: Tensor  # int64 cameras; -1 where there is none


class Gallery:
    """Feature rows with identities and cameras, searched exactly with FAISS and saved as a folder.

    FAISS proposes candidates from products; the distance of each candidate is then recomputed from the two rows, and
    more candidates are asked for as long as rounding could hide a nearer row. So the result depends on the query and
    the rows alone: not on the device, the other queries of the call or the number of threads.

    Args:
        dim: number of feature dimensions.
        metric: ``"cosine"``, ``"euclidean"``, ``"sqeuclidean"`` or ``"dot"``, as in `pairwise_distance`.
        device: ``"cpu"`` or ``"cuda"`` (``"cuda:1"``), where FAISS searches; None takes a GPU where FAISS finds one.
            The rows are also kept in main memory.

    Raises:
        ImportError: FAISS is not installed (``pip install 'apd-kernels[retrieval]'``).
        RuntimeError: `device` names a GPU that FAISS does not find.
        TypeError, ValueError: an argument of the wrong type or choice.

    The dictionary `notes` is saved with the gallery: anything about the gallery as a whole that JSON can hold, such as
    the model that made its rows.

    >>> import torch
    >>> from apd_kernels import Gallery
    >>> gallery = Gallery(2, metric="euclidean")
    >>> gallery.add(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), ids=torch.tensor([7, 8, 8]))
    >>> found = gallery.search(torch.tensor([[3.0, 4.0]]), k=2)
    >>> found.distances, found.indices, found.ids
    (tensor([[0., 5.]]), tensor([[1, 0]]), tensor([[8, 7]]))
    """

    def __init__(self, dim: int, metric: str = "cosine", *, device: str | torch.device | None = None) -> None:
        _check_positive("dim", dim)
        check_choice("metric", metric, METRICS)
        faiss = _faiss()
        self.dim, self.metric = dim, metric
        self.device = _search_device(device)
        self._index = faiss.IndexFlatIP(dim) if metric in ("cosine", "dot") else faiss.IndexFlatL2(dim)
        self._gpu_index: Any = None
        self._ids, self._cams = _Column(np.int64), _Column(np.int64)
        self._metadata: dict[str, _Column] = {}
        self.notes: dict[str, Any] = {}
        self._largest_norm = 0.0
        self._zero_rows = _Column(np.int64)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def __repr__(self) -> str:
        return f"Gallery(dim={self.dim}, metric={self.metric!r}, device={str(self.device)!r}): {len(self)} rows"

    @property
    def ids(self) -> Tensor:
        """Identity of every row, int64 (N,); −1 where none was given."""
        return torch.from_numpy(self._ids.values().copy())

    @property
    def cams(self) -> Tensor:
        """Camera of every row, int64 (N,); −1 where none was given."""
        return torch.from_numpy(self._cams.values().copy())

    @property
    def metadata(self) -> dict[str, np.ndarray]:
        """The columns of free metadata, each an array of shape (N,)."""
        return {name: column.values().copy() for name, column in self._metadata.items()}

    def add(
        self,
        features: Tensor | np.ndarray,
        ids: Tensor | np.ndarray | None = None,
        cams: Tensor | np.ndarray | None = None,
        metadata: Mapping[str, np.ndarray | Sequence[Any]] | None = None,
    ) -> None:
        """Append rows; row i of the first call is index i, later calls count on.

        Args:
            features: shape (N, dim), any floating dtype and device; kept as float32.
            ids: identity of each row, integers of shape (N,); −1 is unknown. Identities may repeat.
            cams: camera of each row, integers of shape (N,); −1 is unknown.
            metadata: named columns of N strings, numbers or booleans, such as file names. Every call names the same
                columns.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape, or a row that is not finite in float32; the
                gallery is then unchanged.
        """
        rows = self._checked_rows("features", features)
        count = len(rows)
        identities, cameras = _integers("ids", ids, count), _integers("cams", cams, count)
        columns = self._checked_metadata(metadata or {}, count)
        start = len(self)
        if not start:
            self._metadata = {}  # an empty batch fixes no columns
        self._index.add(rows)
        self._ids.append(identities)
        self._cams.append(cameras)
        for name, column in columns.items():
            self._metadata.setdefault(name, _Column(column.dtype)).append(column)
        self._note(rows, start)

    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        *,
        exclude_same: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    ) -> SearchResult:
        """The k nearest rows of every query, exactly; equal distances are ordered by index.

        Args:
            queries: shape (Q, dim), any floating dtype and device; taken as float32.
            k: number of rows for each query; more than the gallery has are filled with "none".
            exclude_same: identities and cameras of the queries, integers of shape (Q,) each: rows with the query's
                identity *and* camera are left out, as in re-identification benchmarks. −1 equals nothing.

        Returns:
            `SearchResult` ``(distances, indices, ids, cams)``. Where there is no further row: inf, −1, −1, −1.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape, a query that is not finite in float32, or
                `exclude_same` on a gallery without identities or cameras.
        """
        rows = self._checked_rows("queries", queries)
        _check_positive("k", k)
        same = None if exclude_same is None else self._checked_exclusion(exclude_same, len(rows))
        distances = np.full((len(rows), k), np.inf, np.float32)
        indices = np.full((len(rows), k), -1, np.int64)
        unsettled = np.arange(len(rows))
        candidates = k + SPARE
        while unsettled.size and len(self):
            candidates = min(candidates, len(self))
            left = []
            for block in _blocks(unsettled, candidates):
                of_block = None if same is None else (same[0][block], same[1][block])
                d, i, settled = self._nearest(rows[block], candidates, k, of_block)
                distances[block, : d.shape[1]], indices[block, : i.shape[1]] = d, i
                left.append(block[~settled])
            unsettled = np.concatenate(left)
            candidates *= WIDENING
        missing = indices < 0
        found = np.where(missing, 0, indices)
        ids, cams = (
            np.where(missing, -1, column.values()[found] if len(self) else -1) for column in (self._ids, self._cams)
        )
        return SearchResult(*map(torch.from_numpy, (distances, indices, ids, cams)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery to a folder, or replace the gallery that the folder holds.

        The folder holds the FAISS index, the arrays, and ``manifest.json`` with the format's version, dimension,
        metric, number of rows and checksums. It changes at one atomic step: a save that fails, runs out of disk or is
        killed leaves the old gallery as it was.

        Args:
            path: the folder; made where it does not exist.

        Raises:
            GalleryError: `path` is a file or a folder with other content.
            OSError: the folder cannot be written.
            TypeError: `notes` holds something that JSON cannot give back.
        """
        faiss = _faiss()
        _check_notes(self.notes)
        arrays = {"ids": self._ids.values(), "cams": self._cams.values()}
        arrays |= {f"metadata.{name}": column.values() for name, column in self._metadata.items()}

        def write_index(writer: HashingWriter) -> None:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(writer.write))

        def write_arrays(writer: HashingWriter) -> None:
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]
            writer.write(buffer.getbuffer())

        fields = {"dim": self.dim, "metric": self.metric, "count": len(self), "notes": self.notes}
        files = {"index.faiss": write_index, "arrays.npz": write_arrays}
        save_folder(Path(path), FORMAT, VERSION, fields, files, GalleryError)

    @staticmethod
    def check_destination(path: str | os.PathLike[str]) -> None:
        """Raise what `save` would raise for what is at `path`: to ask before the work of filling a gallery.

        Args:
            path: the folder; it need not exist.

        Raises:
            GalleryError: `path` is a file or a folder with other content.
        """
        check_replaceable(Path(path), FORMAT, GalleryError)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> Gallery:
        """Load a gallery saved with `save`; every file is checked against its checksum first.

        Args:
            path: the folder.
            device: as in `Gallery`.

        Raises:
            GalleryError: the folder does not exist, is damaged or incomplete, holds something else, or was saved by a
                newer release.
            ImportError, RuntimeError: as in `Gallery`.
        """
        faiss = _faiss()
        chosen = _search_device(device)

        def read(manifest: dict[str, Any], files: dict[str, Path]) -> Gallery:
            try:
                gallery = cls(manifest["dim"], manifest["metric"], device=chosen)
                index = faiss.read_index(str(files["index.faiss"]))
                with np.load(files["arrays.npz"], allow_pickle=False) as stored:
                    arrays = dict(stored)
            except (RuntimeError, OSError, ValueError) as failure:
                raise GalleryError(f"{path}: damaged: {failure}") from failure
            found = (type(index), index.d, index.metric_type, index.ntotal)
            expected = (type(gallery._index), gallery.dim, gallery._index.metric_type, manifest["count"])
            notes = manifest.get("notes", {})  # none in a gallery saved before there were notes
            fitting = isinstance(notes, dict) and all(x.shape == (manifest["count"],) for x in arrays.values())
            if found != expected or not fitting:
                raise GalleryError(f"{path}: damaged: its index or arrays do not fit its manifest")
            gallery._index = index
            gallery.notes = notes
            gallery._ids.append(arrays.pop("ids"))
            gallery._cams.append(arrays.pop("cams"))
            for name, values in arrays.items():
                gallery._metadata[name.removeprefix("metadata.")] = _Column(values.dtype, values)
            gallery._note(gallery._rows(), 0)
            return gallery

        gallery: Gallery = load_folder(Path(path), FORMAT, VERSION, read, GalleryError)
        return gallery

    def _rows(self) -> np.ndarray:
        """The stored float32 rows, (N, dim), not copied: of length 1 (or 0) for "cosine". Valid until the next add."""
        if not len(self):
            return np.empty((0, self.dim), np.float32)
        rows: np.ndarray = _faiss().rev_swig_ptr(self._index.get_xb(), len(self) * self.dim)
        return rows.reshape(-1, self.dim)

    def _note(self, rows: np.ndarray, start: int) -> None:
        """Keep what the error bound and the cosine of zero rows need to know about new rows."""
        norms = _norms(rows)
        self._largest_norm = max(self._largest_norm, float(norms.max(initial=0)))
        self._zero_rows.append(start + np.flatnonzero(norms == 0))

    def _nearest(
        self, rows: np.ndarray, candidates: int, k: int, same: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances and indices (≤ k columns) from so many candidates, and whether they settle each query's answer."""
        scores, indices = self._searcher(candidates).search(rows, candidates)
        if self.metric == "cosine":
            scores = 1 - scores
        elif self.metric == "dot":
            scores = -scores
        distances = self._distances(rows, indices)
        if same is not None:
            ids, cams = self._ids.values()[indices], self._cams.values()[indices]
            excluded = (ids == same[0][:, None]) & (cams == same[1][:, None]) & (ids != -1) & (cams != -1)
            distances[excluded] = np.inf
            indices = np.where(excluded, len(self), indices)
        order = np.lexsort((indices, distances))[:, :k]
        distances, indices = (np.take_along_axis(values, order, 1) for values in (distances, indices))
        indices[indices == len(self)] = -1
        if candidates == len(self):
            return distances, indices, np.ones(len(rows), bool)
        # Any other row has a score of at least the last candidate's, and a distance that differs from its score by
        # rounding alone: D products and sums of relative error 2⁻²⁴ on either side.
        last = distances[:, -1].astype(np.float64)
        norms = _norms(rows)
        if self.metric == "euclidean":
            last = last**2
        scale = {"cosine": np.ones_like(norms), "dot": norms * self._largest_norm}.get(
            self.metric, (norms + self._largest_norm) ** 2
        )
        settled: np.ndarray = last + 4 * (self.dim + 8) * 2.0**-24 * scale < scores[:, -1]
        return distances, indices, settled

    def _distances(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """d(rows[q], stored row indices[q, c]), each from its two rows alone."""
        faiss = _faiss()
        distances = np.empty(indices.shape, np.float32)
        by_index = faiss.fvec_inner_products_by_idx if self.metric == "dot" else faiss.fvec_L2sqr_by_idx
        stored, at = self._index.get_xb(), np.ascontiguousarray(indices)
        by_index(faiss.swig_ptr(distances), faiss.swig_ptr(rows), stored, faiss.swig_ptr(at), self.dim, *at.shape)
        if self.metric == "dot":
            return 0 - distances
        if self.metric == "euclidean":
            return np.sqrt(distances)
        if self.metric == "cosine":  # of unit rows: ½‖x − y‖², which keeps the digits of small distances
            distances *= 0.5
            distances[_norms(rows) == 0] = 1
            distances[np.isin(indices, self._zero_rows.values())] = 1
        return distances

    def _searcher(self, candidates: int) -> Any:
        """The index to ask: on the GPU where it can give so many candidates."""
        if self.device.type == "cpu" or candidates > GPU_LARGEST_K:
            return self._index
        if self._gpu_index is None:
            faiss = _faiss()
            self._gpu_index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.device.index or 0, self._index)
        elif self._gpu_index.ntotal < len(self):
            self._gpu_index.add(self._rows()[self._gpu_index.ntotal :])
        return self._gpu_index

    def _checked_rows(self, name: str, features: Tensor | np.ndarray) -> np.ndarray:
        """Finite float32 rows (N, dim) in C order; of length 1 for "cosine"."""
        if isinstance(features, np.ndarray):
            if features.dtype.kind != "f":
                raise TypeError(f"{name}: expected a floating dtype, got {features.dtype}")
            with np.errstate(over="ignore"):  # reported below, by row
                features = torch.from_numpy(np.require(features, np.float32, ["C", "W"]))
        check_features(name, features, sets=False)
        if features.shape[1] != self.dim:
            raise ValueError(f"{name}: expected shape (N, {self.dim}), got {tuple(features.shape)}")
        x = features.detach().to("cpu", torch.float32).contiguous()
        _reject(name, ~torch.isfinite(x).all(1), "NaN or infinite values (as float32)")
        if self.metric == "cosine":
            return _unit_rows(x.numpy())
        too_long = torch.from_numpy(_norms(x.numpy()) > LARGEST_NORM)
        _reject(name, too_long, f"a norm over {LARGEST_NORM:g}, whose square overflows in float32,")
        return x.numpy()

    def _checked_metadata(self, metadata: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
        if len(self) and set(metadata) != set(self._metadata):
            expected, found = sorted(self._metadata) or "none", sorted(metadata) or "none"
            raise ValueError(f"metadata: expected the columns of the rows before, {expected}, got {found}")
        columns = {}
        for name, values in metadata.items():
            column = np.asarray(values)
            if column.dtype.kind not in "biufU" and column.size:
                raise TypeError(f"metadata[{name!r}]: expected strings, numbers or booleans, got {column.dtype}")
            if column.shape != (count,):
                raise ValueError(f"metadata[{name!r}]: expected shape ({count},), got {column.shape}")
            before = self._metadata.get(name)
            if len(self) and before is not None and before.dtype.kind != column.dtype.kind:
                raise TypeError(f"metadata[{name!r}]: expected {before.dtype} as before, got {column.dtype}")
            columns[name] = column
        return columns

    def _checked_exclusion(self, exclude_same: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(exclude_same, tuple) or len(exclude_same) != 2:
            raise TypeError(f"exclude_same: expected a pair (ids, cams), got {type(exclude_same).__name__}")
        for name, column in (("ids", self._ids), ("cams", self._cams)):
            if len(self) and (column.values() == -1).all():
                raise ValueError(f"exclude_same: expected a gallery with {name}; its rows were added without")
        ids, cams = exclude_same
        return _integers("exclude_same[0]", ids, count), _integers("exclude_same[1]", cams, count)


class _Column:
    """One value for each row, appended in pieces and joined when read."""

    def __init__(self, dtype: Any, values: np.ndarray | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._pieces = [np.empty(0, dtype) if values is None else values]

    def append(self, values: np.ndarray) -> None:
        self._pieces.append(values)

    def values(self) -> np.ndarray:
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0]


def _faiss() -> Any:
    """FAISS, imported on first use."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"Gallery needs FAISS, which could not be imported ({error}); install it with: "
            "pip install 'apd-kernels[retrieval]'"
        ) from error
    return faiss


def _search_device(device: str | torch.device | None) -> torch.device:
    gpus = _faiss().get_num_gpus()
    if device is None:
        return torch.device("cuda" if gpus else "cpu")
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {str(chosen)!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise RuntimeError(f"device: expected a GPU that FAISS can use, got {str(chosen)!r}; FAISS finds {gpus}")
    return chosen


def _blocks(queries: np.ndarray, candidates: int) -> Iterator[np.ndarray]:
    size = max(1, BLOCK_CANDIDATES // candidates)
    for start in range(0, len(queries), size):
        yield queries[start : start + size]


def _norms(rows: np.ndarray) -> np.ndarray:
    """‖row‖ in float64."""
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """x / ‖x‖ for any finite row, zero for a zero row; the same bits wherever a row lies and whatever is beside it.

    Sums over a row by numpy and PyTorch may depend on its alignment and on the shape; FAISS takes each row alone.
    """
    faiss = _faiss()
    largest = np.abs(rows).max(1, keepdims=True, initial=0)
    unit = rows / np.where(largest > 0, largest, 1)  # so that no square leaves the range of float32
    squares = np.empty((len(rows), 1), np.float32)
    faiss.fvec_norms_L2sqr(faiss.swig_ptr(squares), faiss.swig_ptr(unit), rows.shape[1], len(rows))
    unit /= np.sqrt(np.where(squares > 0, squares, 1))
    return unit


def _reject(name: str, rows: Tensor, what: str) -> None:
    """ValueError that names the first of the marked rows."""
    if rows.any():
        marked = rows.nonzero().flatten().tolist()
        first = ", ".join(map(str, marked[:5])) + (", …" if len(marked) > 5 else "")
        raise ValueError(f"{name}: expected finite rows, got {what} in {len(marked)} of {len(rows)} rows: {first}")


def _check_notes(notes: object) -> None:
    try:
        if isinstance(notes, dict) and json.loads(json.dumps(notes, allow_nan=False)) == notes:
            return
    except (TypeError, ValueError, RecursionError):
        pass
    raise TypeError("notes: expected a dictionary with string keys of what JSON can hold: no tuples, arrays or NaN")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _integers(name: str, values: Tensor | np.ndarray | None, count: int) -> np.ndarray:
    """int64 (count,); −1 everywhere for None."""
    if values is None:
        return np.full(count, -1, np.int64)
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name}: expected a torch.Tensor or numpy array, got {type(values).__name__}")
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an integer dtype, got {values.dtype}")
    if values.shape != (count,):
        raise ValueError(f"{name}: expected shape ({count},), got {values.shape}")
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected values that fit int64, got {values.max()}")
    return values.astype(np.int64)
