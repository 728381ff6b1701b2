"""Runs the units of one stage, each recorded when it begins and when it ends.

A process of its own: whatever happens in it, `benchmarks.gpu`, which starts it, goes on. It imports nothing heavy
itself; what a stage needs comes with the module that names its units.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lines import Results

LOST_DEVICE = 75  # exit status: after a fault every later call of this process fails; a new process goes on


@dataclass(frozen=True)
class Unit:
    """One result of a stage. `run` returns what is recorded; its "status" is "ok" where it names none."""

    name: str
    run: Callable[[], dict[str, Any]]
    limit: float = 60.0  # seconds


@dataclass(frozen=True)
class Context:
    """What a stage's ``units(context)`` may use."""

    results: Results
    stage: str
    toy: bool
    retry: float  # what ended badly before this time runs again
    deadline: float  # time.time() at which the stage is ended

    def left(self) -> float:
        return self.deadline - time.time()

    def done(self) -> set[str]:
        return self.results.ended(self.stage, self.retry)


class Skip(Exception):
    """Raised by a unit that cannot run here; the text says why."""


def run_units(context: Context, units: list[Unit]) -> None:
    done = context.done()
    for unit in units:
        if unit.name in done:
            continue
        context.results.append(context.stage, unit.name, "begun", limit=unit.limit)
        began = time.perf_counter()
        try:
            values = {"status": "ok", **unit.run()}
        except Skip as reason:
            values = {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()
            values = {"status": "failed", "error": _short(error)}
        status = values.pop("status")
        seconds = round(time.perf_counter() - began, 3)
        context.results.append(context.stage, unit.name, status, seconds=seconds, **values)
        print(f"{unit.name}: {status}, {seconds} s", flush=True)
        del values
        _clear()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:500]


def _clear() -> None:
    """Memory for the next unit; the process ends where the device does not answer any more."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device is lost: {error}", flush=True)
        os._exit(LOST_DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage")
    parser.add_argument("module")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--retry", type=float, default=0.0)
    given = parser.parse_args()
    results = Results(given.results, given.device, given.source)
    context = Context(results, given.stage, given.toy, given.retry, given.deadline)
    run_units(context, importlib.import_module(given.module).units(context))
