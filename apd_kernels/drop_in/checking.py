"""Both sides on random inputs: how far they agree, and how much time each takes."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd_kernels.drop_in.replacing import PROJECTS, Row, rows

Case = Callable[[Callable[..., Any], Any, torch.Generator], Any]
"""``(function, module, generator) -> result``: calls the function, a method with an instance of its class."""


class Agreement(NamedTuple):
    """Of one function on random inputs, the original and what took its place."""

    function: str
    difference: float  # the largest, over the largest of the original's
    ratio: float  # the original's time over ours, the least of three each, in turns

    def __str__(self) -> str:
        return f"{self.function}: off by {self.difference:.1e}, {self.ratio:.2f} times as fast"


def check(project: str | None = None, *, seed: int = 0) -> list[Agreement]:
    """Compare what was replaced with the originals, on random inputs and on the CPU.

    Args:
        project: only its functions.
        seed: of the inputs.

    Returns:
        One `Agreement` for each function that was replaced by `apply` and whose module is loaded.

    Raises:
        ValueError: a project that there is none of.
    """
    if project is not None and project not in PROJECTS:
        raise ValueError(f"project: expected {' or '.join(map(repr, PROJECTS))}, got {project!r}")
    return [
        _compared(row, case, seed)
        for row in rows()
        if row.original is not None and project in (None, row.replacement.project)
        for case in (_case(row),)
        if case is not None
    ]


def _case(row: Row) -> Case | None:
    cases: dict[str, Case] = importlib.import_module(f"apd_kernels.drop_in.{row.replacement.project}").CASES
    return cases.get(row.replacement.name)


def _compared(row: Row, case: Case, seed: int) -> Agreement:
    assert row.original is not None
    module = sys.modules[row.module]
    sides = row.original, row.replacement.adapter
    results, times = [], []
    for function in sides:
        results.append(case(function, module, torch.Generator().manual_seed(seed)))
        times.append(float("inf"))
    for _ in range(3):
        for side, function in enumerate(sides):
            start = time.perf_counter()
            case(function, module, torch.Generator().manual_seed(seed))
            times[side] = min(times[side], time.perf_counter() - start)
    theirs, ours = (np.concatenate([*map(np.ravel, _numbers(result)), np.zeros(0)]) for result in results)
    difference = float("inf")
    if theirs.shape == ours.shape:
        largest = float(np.abs(theirs).max(initial=0)) or 1.0
        difference = float(np.abs(theirs - ours).max(initial=0)) / largest
    return Agreement(f"{row.module}:{row.replacement.name}", difference, times[0] / times[1])


def _numbers(result: Any) -> Iterator[np.ndarray]:
    if isinstance(result, Tensor):
        yield result.detach().double().cpu().numpy()
    elif isinstance(result, dict):
        for value in result.values():
            yield from _numbers(value)
    elif isinstance(result, (list, tuple)) and not isinstance(result, str):
        for value in result:
            yield from _numbers(value)
    elif isinstance(result, (int, float, np.ndarray, np.generic)) or hasattr(result, "__array__"):
        yield np.asarray(result, dtype=np.float64)


def features(generator: torch.Generator, count: int, dimension: int = 128, identities: int = 16) -> Tensor:
    """Rows about the centres of identities, row i about i % identities."""
    centres = torch.randn(identities, dimension, generator=generator)
    return centres[torch.arange(count) % identities] + torch.randn(count, dimension, generator=generator)


def labels(count: int, identities: int = 16) -> Tensor:
    return torch.arange(count) % identities


def ranking(generator: torch.Generator) -> tuple[np.ndarray, Sequence[np.ndarray]]:
    """Distances of 60 queries to 400 images, with identities and cameras."""
    distances = torch.rand(60, 400, generator=generator).numpy()
    ids, cams = (np.arange(n) % 16 for n in (60, 400)), (np.arange(n) // 16 % 3 for n in (60, 400))
    return distances, (*ids, *cams)


# Cases of several projects.


def of_batch(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    return function(features(generator, 64), features(generator, 64))


def of_ranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    distances, of_images = ranking(generator)
    return function(distances, *of_images)


def of_reranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    query, gallery = features(generator, 60), features(generator, 240)
    pairs = (query, gallery), (query, query), (gallery, gallery)
    return function(*(torch.cdist(x, y).numpy() for x, y in pairs))
