"""A searchable, saved set of feature rows on FAISS."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_length, check_number
from apd_kernels._core.operands import METRICS
from apd_kernels.evaluation.neighbors import knn
from apd_kernels.evaluation.retrieval_metrics import checked_unlabelled
from apd_kernels.gallery.atomic_folder import check_replaceable
from apd_kernels.gallery.columns import Columns, as_array, check_notes, integers, labels
from apd_kernels.gallery.faiss_index import ApproximateIndex, import_faiss, search_device, search_parameters
from apd_kernels.gallery.folder import FORMAT, GalleryError, Stored, read_gallery, write_gallery
from apd_kernels.gallery.rows import SELECTED_SHARE, Filter, GalleryRows, checked_rows
from apd_kernels.gallery.sharing import Sharing, reads, writes

ENGINES = ("faiss", "fused")

# Candidates asked for beyond k, and how many times more for the queries whose answer they do not settle.
# On OSNet features (7,900 rows of 512; k = 1, 10, 100; cosine and Euclidean) the first round settles every query; on
# 19,732 random rows of 2048 in 750 identities all for k = 10, 99.5 % for k = 100. Time over FAISS alone: + 5 to 13 %.
SPARE, WIDENING = 16, 4
# Candidates handled at once: 40 bytes each.
BLOCK_CANDIDATES = 1 << 21
# An approximate index proposes so many rows for each of the k, which exact distances then rank.
RE_RANKED = 4
# Where fewer rows than this share may be found, all of them are compared: less work than ten times the candidates.
FEW = 0.1


class SearchResult(NamedTuple):
    """What `Gallery.search` found, nearest first; CPU tensors of shape (Q, k)."""

    distances: Tensor  # float32; inf where there is no further row
    indices: Tensor  # int64 keys: without keys of your own, rows in the order in which they were added; -1 for none
    ids: Tensor  # int64 identities; -1 where there is none
    cams: Tensor  # int64 cameras; -1 where there is none


class Gallery:
    """Feature rows with keys, identities and cameras, searched with FAISS and saved as a folder.

    FAISS proposes candidates; the distance of each candidate is then recomputed from the two rows. With the index
    ``"Flat"`` more candidates are asked for as long as rounding could hide a nearer row: the result is exact, and
    depends on the query and the rows alone, not on the device, the other queries of the call or the number of threads.
    Any other index may miss rows; its distances are exact all the same, and no filter is ever passed over.

    Args:
        dim: number of feature dimensions.
        metric: ``"cosine"``, ``"euclidean"``, ``"sqeuclidean"`` or ``"dot"``, as in `pairwise_distance`.
        index: a FAISS factory string, such as ``"Flat"``, ``"IVF1024,Flat"``, ``"HNSW32"`` or ``"PQ32"``. All but
            ``"Flat"`` are searched on the CPU, beside a copy of the rows in float32.
        engine: ``"faiss"``, or ``"fused"``: `knn` in place of FAISS, for the index ``"Flat"``; it finds the same up to
            the rounding of float32.
        device: ``"cpu"`` or ``"cuda"`` (``"cuda:1"``), where the engine searches; None takes a GPU where it finds one.
            The rows are also kept in main memory.
        fingerprint: names the model whose features these are. It is saved, and compared wherever one is given.

    Raises:
        ImportError: FAISS is not installed (``pip install 'apd-kernels[retrieval]'``).
        RuntimeError: `device` names a GPU that the engine does not find; at the first search: FAISS was built without
            code for it.
        TypeError, ValueError: an argument of the wrong type or choice, or a string that FAISS cannot build.

    Threads may share a gallery: any number of them search while nobody writes, and a search sees all of a change or
    nothing of it. Processes may share a folder: a save waits for another, and a load is never held up.

    The dictionary `notes` is saved with the gallery: anything about the gallery as a whole that JSON can hold, such as
    the model that made its rows.

    >>> import torch
    >>> from apd_kernels import Gallery
    >>> gallery = Gallery(2, metric="euclidean")
    >>> gallery.add(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), ids=torch.tensor([7, 8, 8]))
    >>> found = gallery.search(torch.tensor([[3.0, 4.0]]), k=2)
    >>> found.distances, found.indices, found.ids
    (tensor([[0., 5.]]), tensor([[1, 0]]), tensor([[8, 7]]))
    >>> gallery.remove(torch.tensor([0]))
    >>> gallery.search(torch.tensor([[3.0, 4.0]]), k=2, where=gallery.ids == 8, max_distance=4.0).indices
    tensor([[ 1, -1]])
    """

    def __init__(
        self,
        dim: int,
        metric: str = "cosine",
        *,
        index: str = "Flat",
        engine: str = "faiss",
        device: str | torch.device | None = None,
        fingerprint: str | None = None,
    ) -> None:
        _check_positive("dim", dim)
        check_choice("metric", metric, METRICS)
        check_choice("engine", engine, ENGINES)
        if fingerprint is not None and not isinstance(fingerprint, str):
            raise TypeError(f"fingerprint: expected a string, got {type(fingerprint).__name__}")
        import_faiss()
        self.dim, self.metric, self.index, self.engine, self.fingerprint = dim, metric, index, engine, fingerprint
        self.device = search_device(device, engine)
        self._approximate = None if index == "Flat" else ApproximateIndex(dim, index, metric)
        if engine == "fused" and index != "Flat":
            raise ValueError(f"index: expected 'Flat' with engine='fused', got {index!r}")
        self._sharing = Sharing()
        self._rows = GalleryRows(dim, metric, self.device)
        self._columns = Columns()
        self.notes: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        kind = f"index={self.index!r}, engine={self.engine!r}, device={str(self.device)!r}"
        return f"Gallery(dim={self.dim}, metric={self.metric!r}, {kind}): {len(self)} rows"

    @property
    @reads
    def keys(self) -> Tensor:
        """Key of every row, int64 (N,), in the order in which the rows were added."""
        return torch.from_numpy(np.array(self._columns.keys.values()))

    @property
    @reads
    def ids(self) -> Tensor:
        """Identity of every row, int64 (N,); −1 where none was given."""
        return torch.from_numpy(np.array(self._columns.ids.values()))

    @property
    @reads
    def cams(self) -> Tensor:
        """Camera of every row, int64 (N,); −1 where none was given."""
        return torch.from_numpy(np.array(self._columns.cams.values()))

    @property
    @reads
    def features(self) -> Tensor:
        """The rows, float32 (N, dim) on the CPU, a copy; with metric ``"cosine"`` at length 1."""
        return torch.from_numpy(self._rows.matrix().copy())

    @property
    @reads
    def metadata(self) -> dict[str, np.ndarray]:
        """The columns of free metadata, each an array of shape (N,)."""
        return {name: np.array(column.values()) for name, column in self._columns.metadata.items()}

    @reads
    def positions(self, keys: Tensor | np.ndarray) -> Tensor:
        """Where rows stand in `keys`, `ids`, `cams` and `metadata`.

        Args:
            keys: integers of any shape, such as the `indices` of a result.

        Returns:
            int64, shape as `keys`; −1 where the gallery has no such key.
        """
        flat = as_array("keys", keys if isinstance(keys, Tensor) else np.asarray(keys))
        return torch.from_numpy(self._columns.find(integers("keys", flat.reshape(-1), None)).reshape(flat.shape))

    @writes
    def train(self, features: Tensor | np.ndarray) -> None:
        """Train the index, and index the rows that are already there anew; without it, the first `add` trains.

        Args:
            features: shape (T, dim), alike in kind to those of the gallery; they are not added.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape, rows that are not finite, or too few: the
                message names how many the index needs. The gallery is then unchanged.
        """
        rows = checked_rows("features", features, self.dim, self.metric)
        if self._approximate is not None:
            self._approximate.train(rows, self._rows.matrix())

    @writes
    def add(
        self,
        features: Tensor | np.ndarray,
        ids: Tensor | np.ndarray | None = None,
        cams: Tensor | np.ndarray | None = None,
        metadata: Mapping[str, np.ndarray | Sequence[Any]] | None = None,
        *,
        keys: Tensor | np.ndarray | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Append rows; without `keys`, row i of the first call has key i, and later calls count on.

        Args:
            features: shape (N, dim), any floating dtype and device; kept as float32.
            ids: identity of each row, integers of shape (N,); −1 is unknown. Identities may repeat.
            cams: camera of each row, integers of shape (N,); −1 is unknown.
            metadata: named columns of N strings, numbers or booleans, such as file names. Every call names the same
                columns.
            keys: a number of at least 0 for each row, integers of shape (N,), each once in the gallery. None counts on
                from the largest key there ever was.
            fingerprint: of the model that made the features, to be compared with the gallery's.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape, a row that is not finite in float32, a key
                that is taken, another model, or too few rows to train the index. The gallery is then unchanged.
        """
        self._check_fingerprint(fingerprint)
        rows = checked_rows("features", features, self.dim, self.metric)
        count, start = len(rows), len(self)
        identities, cameras = labels("ids", ids, count), labels("cams", cams, count)
        columns = self._columns.checked_metadata(metadata or {}, count)
        new_keys = self._columns.new_keys(keys, count)
        if self._approximate is not None and count:
            if not self._approximate.is_trained:
                self._approximate.train(rows, self._rows.matrix())
            self._approximate.add(rows, np.arange(start, start + count), self._rows.matrix())
        self._rows.add(rows)
        self._columns.append(new_keys, identities, cameras, columns)

    @writes
    def remove(self, keys: Tensor | np.ndarray) -> None:
        """Remove rows; the others keep their keys and their order. Many keys at once cost as much as one.

        Args:
            keys: integers of shape (K,), each once.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, or keys that are not in the gallery, which is then unchanged.
        """
        kept = np.ones(len(self), bool)
        kept[self._columns.positions("keys", keys)] = False
        if kept.all():
            return
        self._rows.keep(kept)
        self._columns.keep(kept)
        if self._approximate is not None:
            self._approximate.renumber(kept)
            with contextlib.suppress(ValueError):  # NSG takes no fewer than 101 rows; then its old entries stay
                self._approximate.compact(self._rows.matrix(), share=0.5)

    @writes
    def update(
        self,
        keys: Tensor | np.ndarray,
        features: Tensor | np.ndarray | None = None,
        ids: Tensor | np.ndarray | None = None,
        cams: Tensor | np.ndarray | None = None,
        metadata: Mapping[str, np.ndarray | Sequence[Any]] | None = None,
        *,
        fingerprint: str | None = None,
    ) -> None:
        """Replace what is given of some rows, which keep their keys and places; None leaves a column as it is.

        Args:
            keys: integers of shape (K,), each once.
            features, ids, cams, metadata: as in `add`, K rows of each; of the metadata, any of its columns.
            fingerprint: as in `add`.

        Raises:
            TypeError, ValueError: as in `add`, or keys that are not in the gallery, which is then unchanged.
        """
        self._check_fingerprint(fingerprint)
        at = self._columns.positions("keys", keys)
        rows = None if features is None else checked_rows("features", features, self.dim, self.metric)
        if rows is not None and len(rows) != len(at):
            raise ValueError(f"features: expected shape ({len(at)}, {self.dim}), got {rows.shape}")
        given = (("ids", ids, self._columns.ids), ("cams", cams, self._columns.cams))
        changes = [(column, integers(name, values, len(at))) for name, values, column in given if values is not None]
        metadata = self._columns.checked_metadata(metadata or {}, len(at), some=True)
        changes += [(self._columns.metadata[name], values) for name, values in metadata.items()]
        if rows is not None and len(at):
            if self._approximate is not None:
                self._approximate.forget(at)
                self._approximate.add(rows, at, self._rows.matrix())
            self._rows.replace(at, rows)
            if self._approximate is not None:
                self._approximate.compact(self._rows.matrix(), share=0.5)
        for column, values in changes:
            column.replace(at, values)

    @reads
    def search(
        self,
        queries: Tensor | np.ndarray,
        k: int,
        *,
        exclude_same: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
        where: Tensor | np.ndarray | None = None,
        max_distance: float | None = None,
        parameters: Mapping[str, int] | None = None,
        fingerprint: str | None = None,
        junk: int | None = -1,
        unknown_camera: int | None = -1,
    ) -> SearchResult:
        """The k nearest rows of every query; equal distances are ordered by position.

        There are always k of them where the gallery has k that may be found: queries for which an approximate index
        proposes fewer, and filters that leave less than a tenth of the rows, are searched exactly.

        Args:
            queries: shape (Q, dim), any floating dtype and device; taken as float32.
            k: number of rows for each query; more than the gallery has are filled with "none".
            exclude_same: identities and cameras of the queries, integers of shape (Q,) each: rows with the query's
                identity *and* camera are left out, as in re-identification benchmarks.
            where: the rows that may be found: bool of shape (N,) in the order of `keys`, or (Q, N) with a choice for
                each query; or keys, integers of shape (K,).
            max_distance: farther rows are not found (open-set search); a row at exactly this distance is.
            parameters: of an approximate index, for this search: ``nprobe``, ``max_codes`` (IVF), ``efSearch`` (HNSW),
                ``k_factor`` (RFlat).
            fingerprint: of the model that made the queries, to be compared with the gallery's.
            junk, unknown_camera: the identity and the camera in `exclude_same` that equal nothing, as in
                `rank_metrics`.

        Returns:
            `SearchResult` ``(distances, indices, ids, cams)``. Where there is no further row: inf, −1, −1, −1.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype or shape, a query that is not finite in float32, a
                parameter that the index does not have, another model, or `exclude_same` on a gallery without
                identities or cameras.
        """
        self._check_fingerprint(fingerprint)
        rows = checked_rows("queries", queries, self.dim, self.metric)
        _check_positive("k", k)
        check_length("k", int(k), len(self))
        unlabelled = checked_unlabelled(junk, unknown_camera)
        same = None
        if exclude_same is not None:
            same = self._columns.checked_exclusion(exclude_same, len(rows), unlabelled)
        mask = None if where is None else self._columns.checked_where(where, len(rows))
        if max_distance is not None:
            check_number("max_distance", max_distance, minimum=-float("inf") if self.metric == "dot" else 0.0)
        search_parameters(None if self._approximate is None else self._approximate.index, parameters or {})
        allowed = Filter(mask, same, self._columns.ids.values(), self._columns.cams.values(), unlabelled)
        distances = np.full((len(rows), k), np.inf, np.float32)
        positions = np.full((len(rows), k), -1, np.int64)
        if len(self) and len(rows):
            if self.engine == "fused":
                self._search_fused(rows, allowed, distances, positions)
            else:
                left = np.arange(len(rows))
                if self._approximate is not None:
                    left = self._search_approximately(rows, allowed, parameters or {}, distances, positions)
                self._search_exactly(rows, left, allowed, distances, positions)
        if max_distance is not None:
            far = distances > max_distance
            distances[far], positions[far] = np.inf, -1
        missing, at = positions < 0, np.maximum(positions, 0)
        columns = (self._columns.keys, self._columns.ids, self._columns.cams)
        found = (np.where(missing, -1, column.values()[at] if len(self) else -1) for column in columns)
        return SearchResult(*map(torch.from_numpy, (distances, *found)))

    @writes
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery to a folder, or replace the gallery that the folder holds.

        The folder holds the FAISS index, the arrays, and ``manifest.json`` with the format's version, dimension,
        metric, number of rows, fingerprint and checksums. It changes at one atomic step: a save that fails, runs out of
        disk or is killed leaves the old gallery as it was. Nothing of removed rows is written.

        Args:
            path: the folder; made where it does not exist.

        Raises:
            GalleryError: `path` is a file or a folder with other content.
            OSError: the folder cannot be written.
            TypeError: `notes` holds something that JSON cannot give back.
            ValueError: after removals, FAISS cannot index the rows that are left (NSG: fewer than 101).
        """
        check_notes(self.notes)
        indexes = {"index": self._rows.index}
        if self._approximate is not None:
            self._approximate.compact(self._rows.matrix())
            indexes = {"index": self._approximate.index, "rows": self._rows.index}
        about = {"dim": self.dim, "metric": self.metric, "index": self.index, "fingerprint": self.fingerprint}
        about |= {"notes": self.notes, "largest_norm": self._rows.largest_norm}
        write_gallery(Path(path), about, indexes, self._rows.zero, self._columns)

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
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: str = "faiss",
        device: str | torch.device | None = None,
        fingerprint: str | None = None,
        mmap: bool = False,
        verify: bool = True,
    ) -> Gallery:
        """Load a gallery saved with `save`; every file is checked against its checksum first.

        Args:
            path: the folder.
            engine, device: as in `Gallery`.
            fingerprint: of the model that makes the queries; the gallery must have been made with it.
            mmap: leave index and arrays in their files, and read what a search needs; the first change of the gallery
                copies them to memory. The files are never written to.
            verify: False trusts the content of the files (their sizes are compared), which opens a large mapped gallery
                at once. A damaged FAISS index can then end the process.

        Raises:
            GalleryError: the folder does not exist, is damaged or incomplete, holds something else, was saved by a
                newer release, or was made with another model.
            ImportError, RuntimeError, ValueError: as in `Gallery`.
        """
        check_choice("engine", engine, ENGINES)
        chosen = search_device(device, engine)

        def make(stored: Stored) -> Gallery:
            if fingerprint is not None and stored.fingerprint != fingerprint:
                raise GalleryError(
                    f"{path}: expected a gallery made with the model {fingerprint!r}, got {stored.fingerprint!r}"
                )
            about = {"index": stored.index, "fingerprint": stored.fingerprint}
            gallery = cls(stored.dim, stored.metric, engine=engine, device=chosen, **about)  # type: ignore[arg-type]
            gallery._rows.adopt(stored.rows, mmap, stored.largest_norm, stored.zero)
            if verify and not (gallery._rows.finite() and np.isfinite(gallery._rows.largest_norm)):
                raise GalleryError(f"{path}: damaged: it holds rows that are not finite")
            if gallery._approximate is not None:
                gallery._approximate.adopt(stored.approximate, mmap)
            gallery._columns, gallery.notes = stored.columns, stored.notes
            return gallery

        gallery: Gallery = read_gallery(Path(path), make, mmap=mmap, verify=verify)
        return gallery

    def _search_exactly(
        self, rows: np.ndarray, unsettled: np.ndarray, allowed: Filter, distances: np.ndarray, positions: np.ndarray
    ) -> None:
        """Fill the results of these queries, and of more candidates where the first do not settle a query."""
        k = distances.shape[1]
        selected = allowed.share < SELECTED_SHARE
        candidates = k + SPARE
        while unsettled.size:
            candidates = min(candidates, len(self))
            left = []
            for block in _blocks(unsettled, candidates):
                d, p, settled = self._rows.nearest(rows[block], candidates, k, allowed.of(block), selected)
                distances[block, : d.shape[1]], positions[block, : p.shape[1]] = d, p
                left.append(block[~settled])
            unsettled = np.concatenate(left)
            candidates *= WIDENING

    def _search_approximately(
        self,
        rows: np.ndarray,
        allowed: Filter,
        parameters: Mapping[str, int],
        distances: np.ndarray,
        positions: np.ndarray,
    ) -> np.ndarray:
        """Fill the results, and name the queries for which too few rows were proposed.

        No selector is given to FAISS: PQ refuses one, HNSW finds next to nothing with a selective one.
        """
        assert self._approximate is not None
        k, every = distances.shape[1], np.arange(len(rows))
        share = allowed.share * len(self) / self._approximate.entries
        if share < FEW or k >= len(self):
            return every
        candidates = int((RE_RANKED * k + SPARE) / share)
        left = []
        for block in _blocks(every, candidates):
            proposed = self._approximate.search(rows[block], candidates, parameters)
            d, p = self._rows.ranked(rows[block], proposed, k, allowed.of(block))
            distances[block, : d.shape[1]], positions[block, : p.shape[1]] = d, p
            left.append(block[(p >= 0).sum(1) < k])
        return np.concatenate(left)

    def _search_fused(self, rows: np.ndarray, allowed: Filter, distances: np.ndarray, positions: np.ndarray) -> None:
        def there(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(values)).to(self.device)

        same = None
        if allowed.same is not None:
            same = (there(allowed.same[0]), there(allowed.ids), there(allowed.same[1]), there(allowed.cams))
        found = knn(
            there(rows),
            self._rows.tensor(),
            distances.shape[1],
            metric=self.metric,
            exclude_same=same,
            mask=None if allowed.allowed is None else there(allowed.allowed),
            precision="fp32",  # as exact as FAISS, whatever PyTorch's switch says
            **allowed.unlabelled._asdict(),
        )
        distances[:], positions[:] = found.distances.cpu().numpy(), found.indices.cpu().numpy()

    def _check_fingerprint(self, fingerprint: str | None) -> None:
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ValueError(f"fingerprint: expected {self.fingerprint!r} as the gallery, got {fingerprint!r}")


def _blocks(queries: np.ndarray, candidates: int) -> Iterator[np.ndarray]:
    size = max(1, BLOCK_CANDIDATES // candidates)
    for start in range(0, len(queries), size):
        yield queries[start : start + size]


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
