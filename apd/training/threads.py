"""How many threads a training on the CPU takes: chosen when it begins, written down, and kept when it goes on.

Sums over other numbers of threads are rounded otherwise, so a run that goes on with another number has other bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from apd.config.values import Config
from apd.console import console, count

_GIVEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_VALUES = 150_000  # of the images of a step: what a thread must have so that it helps
_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """CPUs that this process may use, by its affinity and by the quota of its container."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        cpus = os.cpu_count() or 1
    return max(1, math.floor(min(cpus, _quota())))


def _quota() -> float:
    """CPUs of the container: quota and period, in one file (cgroups, version 2) or in two (version 1)."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        files = [_CGROUPS / name for name in names]
        if all(file.is_file() for file in files):
            quota, period = " ".join(file.read_text() for file in files).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
    return math.inf


def available_threads() -> int:
    """Threads to share out: PyTorch's, where the user has set their number; else at most the CPUs there are."""
    threads = torch.get_num_threads()
    return threads if _given() else min(threads, available_cpus())


def useful_threads(config: Config, at_most: int) -> int:
    """Threads for a training: a function of its size, so that a busy machine does not change it.

    Args:
        config: of the run.
        at_most: threads there are; all are taken where the user has set their number.
    """
    values = 3 * config.data.height * config.data.width * config.train.batch_size
    return at_most if _given() else max(1, min(at_most, values // _VALUES))


def _given() -> bool:
    return any(name in os.environ for name in _GIVEN)


@contextmanager
def training_threads(began: int | None) -> Iterator[None]:
    """Compute with the number of threads that a run began with, and say it; afterwards with as many as before.

    Args:
        began: the number; None for a run of an older version, which did not write it down: then as many as there are.
    """
    before = torch.get_num_threads()
    threads = began or before
    cpus = available_cpus()
    more = f", as the run began, on {count(cpus, 'CPU')}: slower, but to the same bits" if threads > cpus else ""
    console.print(f"{count(threads, 'thread')}{more}", soft_wrap=True)
    if began is not None:
        torch.set_num_threads(began)
    try:
        yield
    finally:
        torch.set_num_threads(before)
