"""The feature rows of a gallery: kept as float32, searched exactly with FAISS.

FAISS proposes candidates from products; the distance of each is then taken from its two rows alone, and more are asked
for as long as rounding could hide a nearer row.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.checks import check_features
from apd_kernels.evaluation.retrieval_metrics import Unlabelled
from apd_kernels.gallery.columns import Column
from apd_kernels.gallery.faiss_index import GPU_LARGEST_K, flat_index, import_faiss, searched, to_gpu

# Rows longer than this overflow float32 in squared distances.
LARGEST_NORM = 1e18
# FAISS computes the distances of selected rows one by one, of all rows in products, which are some times faster.
SELECTED_SHARE = 0.5
_BLOCK = 4096  # rows that are checked at once
_gpu_searches = threading.Lock()  # FAISS on a GPU is not made for several threads, not even to search


@dataclass
class Filter:
    """Which rows a query may find."""

    allowed: np.ndarray | None  # bool (N,), or (Q, N) with a choice for each query
    same: tuple[np.ndarray, np.ndarray] | None  # (Q,) identities and cameras of the queries: their rows are left out
    ids: np.ndarray  # (N,)
    cams: np.ndarray  # (N,)
    unlabelled: Unlabelled

    @property
    def share(self) -> float:
        """Share of the rows that `allowed` leaves."""
        return 1.0 if self.allowed is None or not self.allowed.size else float(self.allowed.mean())

    def of(self, block: np.ndarray) -> Filter:
        """For some of the queries."""
        allowed = self.allowed if self.allowed is None or self.allowed.ndim == 1 else self.allowed[block]
        same = None if self.same is None else (self.same[0][block], self.same[1][block])
        return replace(self, allowed=allowed, same=same)

    def excluded(self, positions: np.ndarray) -> np.ndarray:
        """bool (Q, C): no row (−1), or one that the query may not find."""
        excluded = positions < 0
        if self.allowed is not None:
            if self.allowed.ndim == 1:
                excluded |= ~self.allowed[positions]
            else:
                excluded |= ~np.take_along_axis(self.allowed, np.maximum(positions, 0), 1)
        if self.same is not None:
            ids, cams = (values[:, None] for values in self.same)
            excluded |= self.unlabelled.removed(ids, cams, self.ids[positions], self.cams[positions])
        return excluded


class GalleryRows:
    """Rows of one metric, of length 1 (or 0) for "cosine", in a flat FAISS index; `device` is where it searches."""

    def __init__(self, dim: int, metric: str, device: torch.device) -> None:
        self.dim, self.metric, self.device = dim, metric, device
        self.index = flat_index(dim, metric)
        self.largest_norm = 0.0
        self.zero = Column(np.bool_)  # rows of length 0, whose cosine is defined apart
        self._gpu_index: Any = None
        self._tensor: Tensor | None = None
        self._shared = False

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def matrix(self) -> np.ndarray:
        """float32 (N, dim), not copied; valid until the next change."""
        if not len(self):
            return np.empty((0, self.dim), np.float32)
        rows: np.ndarray = import_faiss().rev_swig_ptr(self.index.get_xb(), len(self) * self.dim)
        return rows.reshape(-1, self.dim)

    def fault(self) -> str | None:
        """What is wrong with rows that did not come by `add`, or with what is kept of them; None where nothing is."""
        rows, zero, largest = self.matrix(), self.zero.values(), 0.0
        for start in range(0, len(self), _BLOCK):
            norms = norms_of(rows[start : start + _BLOCK])
            if not np.isfinite(norms).all():
                return "it holds rows that are not finite"
            if not np.array_equal(norms == 0, zero[start : start + _BLOCK]):
                return "its marks of rows of length 0 are not those of its rows"
            largest = max(largest, float(norms.max()))
        if not (1 - 1e-12) * largest <= self.largest_norm <= LARGEST_NORM:  # sums in another order differ by less
            return f"its largest norm, {self.largest_norm}, is not that of its rows, {largest}"
        return None

    def tensor(self) -> Tensor:
        """The same on `device`."""
        if self._tensor is None:
            self._tensor = torch.from_numpy(self.matrix()).to(self.device)
        return self._tensor

    def adopt(self, index: Any, shared: bool, largest_norm: float | None = None, zero: Any = None) -> None:
        """Take a loaded index, `shared` with a file that must not be written; what is not given is computed."""
        self.index, self._shared = index, shared
        if largest_norm is None or zero is None:
            norms = norms_of(self.matrix())
            largest_norm, zero = float(norms.max(initial=0)), norms == 0
        self.largest_norm, self.zero = largest_norm, Column(np.bool_, zero)

    def add(self, rows: np.ndarray) -> None:
        self._own()
        self.index.add(rows)
        self._tensor = None
        norms = norms_of(rows)
        self.largest_norm = max(self.largest_norm, float(norms.max(initial=0)))
        self.zero.append(norms == 0)

    def replace(self, positions: np.ndarray, rows: np.ndarray) -> None:
        self._own()
        self._gpu_index = self._tensor = None
        self.matrix()[positions] = rows
        norms = norms_of(rows)
        self.largest_norm = max(self.largest_norm, float(norms.max(initial=0)))
        self.zero.replace(positions, norms == 0)

    def keep(self, kept: np.ndarray) -> None:
        """Only the rows marked in bool (N,), in their order."""
        faiss = import_faiss()
        self._own()
        self._gpu_index = self._tensor = None
        self.index.remove_ids(faiss.IDSelectorBitmap(np.packbits(~kept, bitorder="little")))
        self.zero.keep(kept)

    def nearest(
        self, queries: np.ndarray, candidates: int, k: int, allowed: Filter, selected: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances and positions (≤ k columns) from so many candidates, and whether they settle each query's answer.

        With `selected` the candidates are taken among the allowed rows, otherwise those not allowed are left out after.
        """
        scores, positions = self._selected(queries, candidates, allowed) if selected else self._all(queries, candidates)
        if self.metric == "cosine":
            scores = 1 - scores
        elif self.metric == "dot":
            scores = -scores
        exhausted = positions[:, -1] < 0
        distances, positions = self.ranked(queries, positions, k, allowed)
        if candidates == len(self):
            return distances, positions, np.ones(len(queries), bool)
        # Any other row has a score of at least the last candidate's, and a distance that differs from its score by
        # rounding alone: D products and sums of relative error 2⁻²⁴ on either side.
        last = distances[:, -1].astype(np.float64)
        norms = norms_of(queries)
        if self.metric == "euclidean":
            last = last**2
        scale = {"cosine": np.ones_like(norms), "dot": norms * self.largest_norm}.get(
            self.metric, (norms + self.largest_norm) ** 2
        )
        settled: np.ndarray = last + 4 * (self.dim + 8) * 2.0**-24 * scale < scores[:, -1]
        return distances, positions, settled | exhausted

    def ranked(
        self, queries: np.ndarray, positions: np.ndarray, k: int, allowed: Filter
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of the candidates, (Q, ≤ k), ties by position; inf and −1 where none is left."""
        excluded = allowed.excluded(positions)
        distances = self._distances(queries, np.maximum(positions, 0))
        distances[excluded] = np.inf
        positions = np.where(excluded, len(self), positions)
        order = np.lexsort((positions, distances))[:, :k]
        distances, positions = (np.take_along_axis(values, order, 1) for values in (distances, positions))
        positions[positions == len(self)] = -1
        return distances, positions

    def _all(self, queries: np.ndarray, candidates: int) -> tuple[np.ndarray, np.ndarray]:
        on_cpu = self.device.type == "cpu" or candidates > GPU_LARGEST_K
        found: tuple[np.ndarray, np.ndarray]
        with nullcontext() if on_cpu else _gpu_searches:
            found = (self.index if on_cpu else self._on_gpu()).search(queries, candidates)
        return found

    def _selected(self, queries: np.ndarray, candidates: int, allowed: Filter) -> tuple[np.ndarray, np.ndarray]:
        """On the CPU: FAISS on a GPU ignores a selector silently."""
        faiss = import_faiss()
        masks = allowed.allowed
        assert masks is not None
        pieces = [(slice(None), masks)] if masks.ndim == 1 else [(slice(q, q + 1), m) for q, m in enumerate(masks)]
        scores = np.empty((len(queries), candidates), np.float32)
        positions = np.empty((len(queries), candidates), np.int64)
        for at, mask in pieces:
            bits = np.packbits(mask, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
            scores[at], positions[at] = searched(self.index, queries[at], candidates, parameters)
        return scores, positions

    def _distances(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """d(queries[q], stored row positions[q, c]), each from its two rows alone."""
        faiss = import_faiss()
        distances = np.empty(positions.shape, np.float32)
        by_index = faiss.fvec_inner_products_by_idx if self.metric == "dot" else faiss.fvec_L2sqr_by_idx
        stored, at = self.index.get_xb(), np.ascontiguousarray(positions)
        by_index(faiss.swig_ptr(distances), faiss.swig_ptr(queries), stored, faiss.swig_ptr(at), self.dim, *at.shape)
        if self.metric == "dot":
            return 0 - distances
        if self.metric == "euclidean":
            return np.sqrt(distances)
        if self.metric == "cosine":  # of unit rows: ½‖x − y‖², which keeps the digits of small distances
            distances *= 0.5
            distances[norms_of(queries) == 0] = 1
            distances[self.zero.values()[positions]] = 1
        return distances

    def _on_gpu(self) -> Any:
        """The index, copied there as far as it is not there yet."""
        if self._gpu_index is None:
            self._gpu_index = to_gpu(self.index, self.device.index or 0)
        elif self._gpu_index.ntotal < len(self):
            self._gpu_index.add(self.matrix()[self._gpu_index.ntotal :])
        return self._gpu_index

    def _own(self) -> None:
        """FAISS ends the process when an index in a mapped file is written to."""
        if self._shared:
            faiss = import_faiss()
            self.index, self._shared = faiss.deserialize_index(faiss.serialize_index(self.index)), False


def checked_rows(name: str, features: Tensor | np.ndarray, dim: int, metric: str) -> np.ndarray:
    """Finite float32 rows (N, dim) in C order; of length 1 for "cosine"."""
    if isinstance(features, np.ndarray):
        if features.dtype.kind != "f":
            raise TypeError(f"{name}: expected a floating dtype, got {features.dtype}")
        with np.errstate(over="ignore"):  # reported below, by row
            features = torch.from_numpy(np.require(features, np.float32, ["C", "W"]))
    check_features(name, features, sets=False)
    if features.shape[1] != dim:
        raise ValueError(f"{name}: expected shape (N, {dim}), got {tuple(features.shape)}")
    x = features.detach().to("cpu", torch.float32).resolve_neg().contiguous()
    _reject(name, ~torch.isfinite(x).all(1), "NaN or infinite values (as float32)")
    if metric == "cosine":
        return unit_rows(x.numpy())
    too_long = torch.from_numpy(norms_of(x.numpy()) > LARGEST_NORM)
    _reject(name, too_long, f"a norm over {LARGEST_NORM:g}, whose square overflows in float32,")
    return x.numpy()


def _reject(name: str, rows: Tensor, what: str) -> None:
    """ValueError that names the first of the marked rows."""
    if rows.any():
        marked = rows.nonzero().flatten().tolist()
        first = ", ".join(map(str, marked[:5])) + (", …" if len(marked) > 5 else "")
        raise ValueError(f"{name}: expected finite rows, got {what} in {len(marked)} of {len(rows)} rows: {first}")


def norms_of(rows: np.ndarray) -> np.ndarray:
    """‖row‖ in float64."""
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """x / ‖x‖ for any finite row, zero for a zero row; the same bits wherever a row lies and whatever is beside it.

    Sums over a row by numpy and PyTorch may depend on its alignment and on the shape; FAISS takes each row alone.
    """
    faiss = import_faiss()
    largest = np.abs(rows).max(1, keepdims=True, initial=0)
    unit = rows / np.where(largest > 0, largest, 1)  # so that no square leaves the range of float32
    squares = np.empty((len(rows), 1), np.float32)
    faiss.fvec_norms_L2sqr(faiss.swig_ptr(squares), faiss.swig_ptr(unit), rows.shape[1], len(rows))
    unit /= np.sqrt(np.where(squares > 0, squares, 1))
    return unit
