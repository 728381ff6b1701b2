"""Stage "tiles": where the table of tiles holds an estimate, others beside it; a wrong result has no time.

All candidates are first compiled by several processes at once, into Triton's cache on disk: compiling takes longer than
measuring. A candidate is put into the table itself, so that it also runs where autograd calls from a thread of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apd_kernels.kernels import _tuning
from apd_kernels.tuning import work_of
from benchmarks.cases import relative
from benchmarks.lines import ROOT
from benchmarks.timing import events
from benchmarks.units import Context, Unit
from benchmarks.workload import DEVICE, ON_GPU

HANDFUL = 7
COMPILERS = 12
DIMENSION = 2048
SECONDS = 0.15  # of measuring, for each candidate


def units(context: Context) -> list[Unit]:
    kernels = estimated()
    if context.toy:
        kernels = [kernel for kernel in kernels if kernel in ("distance.split", "distance.rows")]
    budget = max(2.0, min(15.0, 0.6 * context.left() / max(1, len(kernels))))
    found = [Unit(f"tiles of {k}", partial(compare, k, budget, context.toy), 4 * budget + 20) for k in kernels]
    if context.toy:
        return found
    limit = max(5.0, min(60.0, 0.4 * context.left()))
    return [Unit("compile tiles", partial(compile_all, kernels, limit, context), limit + 10), *found]


def current(kernel: str) -> tuple[int, _tuning.Tile]:
    """The row that this device runs, and its key."""
    rows = _tuning.TABLE[kernel]
    family = _tuning.family(torch.empty(0, device=DEVICE))
    key = family if family in rows else _tuning.CONSERVATIVE
    return key, rows[key]


def estimated() -> list[str]:
    """Kernels whose row no measurement speaks for. On tcgen05 a tile that does not fit traps: there none is tried."""
    if _tuning.family(torch.empty(0, device=DEVICE)) == 100:
        return []
    guesses = ("estimate", "not run")
    return [kernel for kernel in _tuning.TABLE if any(guess in current(kernel)[1].evidence for guess in guesses)]


def candidates(kernel: str) -> list[dict[str, int]]:
    """A handful, those first that change the least of the table's."""
    now = current(kernel)[1].options
    others = [dict(options) for options in _tuning.CANDIDATES[kernel] if dict(options) != dict(now)]
    return sorted(others, key=lambda options: sum(options.get(name) != value for name, value in now.items()))[:HANDFUL]


@contextmanager
def replaced(kernel: str, options: Mapping[str, int]) -> Iterator[None]:
    rows = _tuning.TABLE[kernel]
    key, before = current(kernel)
    rows[key] = _tuning.Tile(dict(options), "a candidate")
    try:
        yield
    finally:
        rows[key] = before


def _work(kernel: str, toy: bool) -> Callable[[], Any]:
    sizes = {"small": 24, "large": 24} if toy else {}
    return work_of(kernel, 40 if toy else DIMENSION, device=DEVICE, **sizes)


def compile_all(kernels: list[str], limit: float, context: Context) -> dict[str, Any]:
    """In processes of their own: a candidate that the compiler or the device chokes on takes only its own along."""
    count = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2, len(kernels)))
    code = "import sys; from benchmarks.gpu.tiles import compile_some; compile_some(sys.argv[1:])"
    began = time.time()
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *kernels[i::count]], cwd=ROOT, stdin=subprocess.DEVNULL)
        for i in range(count)
    ]
    while time.time() < began + limit and any(process.poll() is None for process in processes):
        time.sleep(0.2)
    late = [process for process in processes if process.poll() is None]
    for process in late:
        process.kill()
        process.wait()
    return {"processes": count, "late": len(late), "codes": [process.returncode for process in processes]}


def compile_some(kernels: list[str]) -> None:
    """The first handful of each kernel, by running them once."""
    for kernel in kernels:
        work = _work(kernel, toy=False)
        for options in [dict(current(kernel)[1].options), *candidates(kernel)]:
            print(kernel, options, _measured(kernel, options, work, None), flush=True)


def compare(kernel: str, budget: float, toy: bool) -> dict[str, Any]:
    """Milliseconds of the table's tile and of others, until the budget is spent."""
    key, tile = current(kernel)
    work = _work(kernel, toy)
    expected = [value.detach().clone() for value in _values(work())]
    table = _milliseconds(work)
    found: dict[str, Any] = {"kernel": kernel, "row": key, "evidence": tile.evidence, "table": dict(tile.options)}
    others: list[dict[str, Any]] = []
    end = time.time() + budget
    for options in candidates(kernel)[: 1 if toy else None]:
        if time.time() > end:
            break
        others.append({"options": options, **_measured(kernel, options, work, expected)})
    again = _milliseconds(work)  # what differs between two measurements of one tile is noise
    found |= {"table_ms": min(table, again), "noise": abs(table - again) / min(table, again), "others": others}
    timed = [other for other in others if "ms" in other]
    return {**found, "best": min(timed, key=lambda other: float(other["ms"])) if timed else None}


def _measured(
    kernel: str, options: dict[str, int], work: Callable[[], Any], expected: list[Tensor] | None
) -> dict[str, Any]:
    """Time and error of a candidate, or why it is refused; without `expected` it is only compiled."""
    with replaced(kernel, options):
        try:
            if expected is None:
                work()
                torch.cuda.synchronize()
                return {}
            error = relative(_values(work()), expected)
            # Other tiles sum in another order: in less than float32 grade another row may be the hardest.
            allowed = 1e-4 if kernel.endswith(("split", "rows")) else 5e-3
            return {"error": error} if not error <= allowed else {"ms": _milliseconds(work), "error": error}
        except Exception as error:
            if ON_GPU:
                torch.cuda.synchronize()  # raises where the device is lost: then the unit ends here
            return {"refused": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}


def _milliseconds(work: Callable[[], Any]) -> float:
    work()
    if not ON_GPU:
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return events([work], SECONDS, time.perf_counter() - began) / 1e3


def _values(found: Any) -> list[Tensor]:
    """What candidates must agree in: distances and scores; which of two equally far rows was chosen may differ."""
    if isinstance(found, Tensor):
        return [found]
    if hasattr(found, "mAP"):
        return [torch.tensor(found.mAP), found.cmc]
    if hasattr(found, "distances"):
        return _values(found.distances)
    return [value for part in found for value in _values(part)]
