"""Stage "goals": each operation's times beside its goal, checked against float64 first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, cases
from benchmarks.timing import all_times, rotations
from benchmarks.units import Context, Unit

SECONDS = 0.3  # for each kind of time


def units(context: Context) -> list[Unit]:
    seconds = 0.01 if context.toy else SECONDS
    return [Unit(case.name, partial(measure, case, "ours", case.ours, seconds), 40) for case in cases(context.toy)]


def measure(case: Case, candidate: str, work: Callable[..., Any], seconds: float) -> dict[str, Any]:
    """A wrong result has no time."""
    torch.manual_seed(0)
    inputs = case.inputs()
    error = case.error(inputs, work)
    found: dict[str, Any] = {"case": case.name, "candidate": candidate, "relative_error": error}
    if not error <= case.tolerance:
        return {**found, "status": "failed", "error": f"off by {error:.3g}, allowed {case.tolerance:.3g}: not timed"}
    several = [inputs, *(case.inputs() for _ in range(rotations(sum(_bytes(inputs))) - 1))]
    found["inputs"] = len(several)
    found |= all_times([partial(work, *given) for given in several], seconds=seconds, capture=case.capture)
    if candidate == "ours":
        found["goal"] = case.goal
        if case.floor is not None:
            floor = all_times([partial(case.floor, *given) for given in several], seconds=seconds, capture=False)
            key = "event_us" if "event_us" in floor else "wall_us"
            found["floor_us"] = floor[key]
            found["times_floor"] = found[key] / floor[key]
    return found


def _bytes(inputs: Inputs) -> Iterator[int]:
    for value in inputs:
        if isinstance(value, Tensor):
            yield value.numel() * value.element_size()
