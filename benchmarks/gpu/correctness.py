"""Stage "correctness": the tests marked `gpu` on all cores, the riskiest kernels first, each recorded as it ends."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

from benchmarks.lines import ROOT
from benchmarks.recorder import environment_of
from benchmarks.units import Context, Unit

WORKERS, GB_A_WORKER, MOST_FAILURES = 14, 4, 40
SSD_CASES = 20


class Group(NamedTuple):
    name: str
    files: tuple[str, ...]
    sample: str = ""  # "FILE:COUNT": so many tests of that file


# TMA, WGMMA, promotion, tickets between programs, graphs first; then what their sums are made into.
GROUPS = (
    Group(
        "tests: risky",
        ("test_float32_grade", "test_prepared", "test_mining_routes", "test_training_rules"),
    ),
    Group(
        "tests: operations",
        ("test_losses", "test_mining", "test_adversarial_solver", "test_adversarial", "test_distance", "test_ranking",
         "test_neighbors", "test_ssd"),
        f"test_ssd.py:{SSD_CASES}",
    ),
    Group(
        "tests: others",
        ("test_contrastive", "test_weighting", "test_memory", "test_perturbation_loss", "test_paired",
         "test_neighbors_cases", "test_rank_options", "test_gallery", "test_rerank", "test_tuning", "test_ssd"),
    ),
)  # fmt: skip
TOY = Group("tests: toy", ("test_prepared.py::test_no_rows",))
NO_TESTS = 5  # pytest's exit status


def units(context: Context) -> list[Unit]:
    groups = [TOY] if context.toy else GROUPS
    return [Unit(group.name, partial(run, group, context), 3600) for group in groups]


def _path(name: str) -> str:
    """The test file of this name, or one test in it, wherever under ``tests/`` it lies."""
    file, *test = name.removesuffix(".py").split(".py::")
    return "::".join([str(next((ROOT / "tests").rglob(f"{file}.py")).relative_to(ROOT)), *test])


def workers() -> int:
    """As many as cores and memory serve, each with a CUDA context of its own."""
    import torch

    if importlib.util.find_spec("xdist") is None:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 8.0
    return max(1, min(WORKERS, cores - 2, int(free // GB_A_WORKER)))


def run(group: Group, context: Context) -> dict[str, Any]:
    before = context.results.last(context.stage)
    leave_out = context.results.path.with_name("leave_out.txt")
    leave_out.write_text("\n".join(context.done()) + "\n")
    files = [_path(name) for name in group.files]
    command = [sys.executable, "-m", "pytest", *files, "-p", "benchmarks.recorder", "-p", "no:cacheprovider", "-q"]
    command += [*(() if context.toy else ("-m", "gpu")), f"--maxfail={MOST_FAILURES}", "--tb=short", "-rf"]
    command += ["-o", "faulthandler_timeout=60"]
    count = 1 if context.toy else workers()
    command += ["-n", str(count), "--max-worker-restart=20"] if count else []
    names = {**os.environ, **environment_of(context.results, context.stage, leave_out)}
    names |= {"APD_GPU_SAMPLE": group.sample, "OMP_NUM_THREADS": "1"}
    names.pop("APD_KERNELS_BACKEND", None)  # each test names its own
    code = subprocess.run(command, cwd=ROOT, env=names, check=False).returncode
    lines = context.results.last(context.stage)
    new = [line for unit, line in lines.items() if "::" in unit and before.get(unit) != line]
    found: dict[str, Any] = {"workers": count, "code": code}
    found |= {status: sum(line["status"] == status for line in new) for status in ("ok", "failed", "skipped")}
    if code in (0, NO_TESTS):
        return found
    if code in (1, 2) and found["failed"] >= MOST_FAILURES:  # 2 with workers; the next call goes on behind these
        return {**found, "status": "cut", "error": f"{found['failed']} tests failed, stopped there"}
    if code != 1 or not found["failed"]:
        return {**found, "status": "failed", "error": f"pytest ended with exit status {code}: see run.log"}
    return {**found, "status": "failed", "error": f"{found['failed']} tests failed"}
