"""What is known of each row of a gallery beside its features: key, identity, camera, free metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from apd_kernels._core.checks import check_tensor
from apd_kernels.evaluation.retrieval_metrics import Unlabelled

METADATA_KINDS = "biufU"  # of NumPy's dtypes: booleans, numbers, strings


class Column:
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

    def keep(self, kept: np.ndarray) -> None:
        self._pieces = [self.values()[kept]]

    def replace(self, positions: np.ndarray, values: np.ndarray) -> None:
        before = self.values()
        after = before.astype(np.result_type(before.dtype, values.dtype))  # a copy; strings may be longer than before
        after[positions] = values
        self._pieces = [after]


class Columns:
    """The columns of a gallery, all of one length; keys are unique."""

    def __init__(self) -> None:
        self.keys, self.ids, self.cams = Column(np.int64), Column(np.int64), Column(np.int64)
        self.metadata: dict[str, Column] = {}
        self.next_key = 0
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys.values())

    def append(self, keys: np.ndarray, ids: np.ndarray, cams: np.ndarray, metadata: Mapping[str, np.ndarray]) -> None:
        if not len(self):
            self.metadata = {}  # an empty batch fixes no columns
        for name, values in metadata.items():
            self.metadata.setdefault(name, Column(values.dtype)).append(values)
        self.keys.append(keys)
        self.ids.append(ids)
        self.cams.append(cams)
        self.next_key = max(self.next_key, int(keys.max(initial=-1)) + 1)
        self._order = None

    def keep(self, kept: np.ndarray) -> None:
        for column in (self.keys, self.ids, self.cams, *self.metadata.values()):
            column.keep(kept)
        self._order = None

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys, of the same shape; −1 where there is no such key."""
        every = self.keys.values()
        if not len(every):
            return np.full(keys.shape, -1, np.int64)
        if self._order is None:
            self._order = np.argsort(every, kind="stable")
        at = np.searchsorted(every, keys, sorter=self._order).clip(max=len(every) - 1)
        positions = self._order[at]
        return np.where(every[positions] == keys, positions, -1)

    def positions(self, name: str, keys: Tensor | np.ndarray) -> np.ndarray:
        """Positions of the keys (K,); ValueError for a key that is not there or comes twice."""
        wanted = integers(name, keys, None)
        _reject_repeated(name, wanted)
        found = self.find(wanted)
        _reject_keys(name, wanted[found < 0], "keys of the gallery")
        return found

    def new_keys(self, keys: Tensor | np.ndarray | None, count: int) -> np.ndarray:
        """Keys for `count` more rows: those given, once they are found to be new, or running numbers."""
        largest = np.iinfo(np.int64).max
        if keys is None:
            if self.next_key + count > largest:
                raise ValueError(f"keys: expected keys of your own after {self.next_key - 1}, the largest possible")
            return np.arange(self.next_key, self.next_key + count)
        chosen = integers("keys", keys, count)
        _reject_keys("keys", chosen[chosen < 0], "numbers of at least 0")
        _reject_repeated("keys", chosen)
        _reject_keys("keys", chosen[self.find(chosen) >= 0], "keys that are not in the gallery yet")
        return chosen

    def checked_metadata(self, metadata: Mapping[str, Any], count: int, *, some: bool = False) -> dict[str, np.ndarray]:
        """As arrays; of the same columns as the rows before, or of `some` of them."""
        if (len(self) or some) and not (
            set(metadata) <= set(self.metadata) if some else set(metadata) == set(self.metadata)
        ):
            expected, found = sorted(self.metadata) or "none", sorted(metadata) or "none"
            raise ValueError(f"metadata: expected the columns of the rows before, {expected}, got {found}")
        columns = {}
        for name, values in metadata.items():
            column = np.asarray(values)
            if column.dtype.kind not in METADATA_KINDS and column.size:
                raise TypeError(f"metadata[{name!r}]: expected strings, numbers or booleans, got {column.dtype}")
            if column.shape != (count,):
                raise ValueError(f"metadata[{name!r}]: expected shape ({count},), got {column.shape}")
            before = self.metadata.get(name)
            if len(self) and count and before is not None and before.dtype.kind != column.dtype.kind:
                raise TypeError(f"metadata[{name!r}]: expected {before.dtype} as before, got {column.dtype}")
            if before is not None and len(self) and not count:
                column = column.astype(before.dtype)
            columns[name] = column
        return columns

    def checked_exclusion(self, exclude_same: Any, count: int, unlabelled: Unlabelled) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(exclude_same, tuple) or len(exclude_same) != 2:
            raise TypeError(f"exclude_same: expected a pair (ids, cams), got {type(exclude_same).__name__}")
        for name, column, missing in zip(("ids", "cams"), (self.ids, self.cams), unlabelled, strict=True):
            if missing == -1 and len(self) and (column.values() == -1).all():
                raise ValueError(f"exclude_same: expected a gallery with {name}; its rows were added without")
        ids, cams = exclude_same
        return integers("exclude_same[0]", ids, count), integers("exclude_same[1]", cams, count)

    def checked_where(self, where: Tensor | np.ndarray, queries: int) -> np.ndarray:
        """bool (N,) or (Q, N): the rows that may be found, from such a mask or from keys."""
        where = as_array("where", where)
        if where.dtype != np.bool_:
            if where.dtype.kind not in "iu":
                raise TypeError(f"where: expected a mask (bool) or keys (integers), got {where.dtype}")
            mask = np.zeros(len(self), bool)
            mask[self.positions("where", where)] = True
            return mask
        if where.shape not in ((len(self),), (queries, len(self))):
            raise ValueError(f"where: expected shape ({len(self)},) or ({queries}, {len(self)}), got {where.shape}")
        return where


def _reject_keys(name: str, keys: np.ndarray, expected: str, got: str = "") -> None:
    if keys.size:
        first = ", ".join(map(str, keys[:5].tolist())) + (", …" if keys.size > 5 else "")
        raise ValueError(f"{name}: expected {expected}, got {got}{first}")


def _reject_repeated(name: str, keys: np.ndarray) -> None:
    values, counts = np.unique(keys, return_counts=True)
    _reject_keys(name, values[counts > 1], "each key once", "more than once: ")


def as_array(name: str, values: object) -> np.ndarray:
    if isinstance(values, Tensor):
        check_tensor(name, values)
        values = values.detach().cpu().resolve_neg().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name}: expected a torch.Tensor or numpy array, got {type(values).__name__}")
    return values


def integers(name: str, values: object, count: int | None) -> np.ndarray:
    """int64 (count,); any number of them for a count of None."""
    array = as_array(name, values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an integer dtype, got {array.dtype}")
    if array.ndim != 1 or (count is not None and len(array) != count):
        raise ValueError(f"{name}: expected shape ({'K' if count is None else count},), got {array.shape}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected values that fit int64, got {array.max()}")
    return array.astype(np.int64)


def labels(name: str, values: object, count: int) -> np.ndarray:
    """As `integers`; −1 everywhere for None."""
    return np.full(count, -1, np.int64) if values is None else integers(name, values, count)


def check_notes(notes: object) -> None:
    try:
        if isinstance(notes, dict) and json.loads(json.dumps(notes, allow_nan=False)) == notes:
            return
    except (TypeError, ValueError, RecursionError):
        pass
    raise TypeError("notes: expected a dictionary with string keys of what JSON can hold: no tuples, arrays or NaN")
