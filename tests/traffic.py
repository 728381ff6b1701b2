"""What kernels read and write, counted in Triton's interpreter: element by element, program by program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@dataclass(frozen=True)
class Count:
    """Of one tensor: accesses to each of its elements, and between which of the programs the first and last lie."""

    times: set[int]
    apart: int


@dataclass
class Traffic:
    """Addresses by launch order of the programs; several launches count on."""

    loads: list[tuple[int, Any]] = field(default_factory=list)
    stores: list[tuple[int, Any]] = field(default_factory=list)

    def read(self, x: torch.Tensor) -> Count:
        return _count(self.loads, x)

    def written(self, x: torch.Tensor) -> Count:
        return _count(self.stores, x)


def _count(accesses: list[tuple[int, Any]], x: torch.Tensor) -> Count:
    reach = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    assert reach == x.numel(), "expected a tensor without holes"
    times = np.zeros(x.numel(), dtype=np.int64)
    first, last = np.full(x.numel(), np.iinfo(np.int64).max), np.full(x.numel(), -1)
    for program, addresses in accesses:
        mine = addresses[(addresses >= x.data_ptr()) & (addresses < x.data_ptr() + x.nbytes)]
        at = (mine - x.data_ptr()) // x.itemsize
        np.add.at(times, at, 1)
        first[at] = np.minimum(first[at], program)
        last[at] = np.maximum(last[at], program)
    return Count(set(times.tolist()), int((last - first)[times > 0].max(initial=0)))


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the accesses of kernels that run in the interpreter inside the block; a grid has one axis."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def addresses(pointers: Any, mask: Any) -> Any:
        at, kept = np.broadcast_arrays(pointers.data, mask.data)
        return at[kept.astype(bool)].astype(np.int64).ravel()

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loads.append((self.grid_idx[0], addresses(pointers, mask)))
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stores.append((self.grid_idx[0], addresses(pointers, mask)))
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield traffic
