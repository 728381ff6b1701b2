"""A pytest plugin that records each test as a line when it ends: ``pytest -p benchmarks.recorder``.

Under pytest-xdist a worker that hangs in a test, or whose CUDA context a test has broken, ends itself: xdist then
names that test and starts another worker, and the tests after it are not lost.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.lines import Results

TEST_SECONDS = 90.0
BROKEN = re.compile(r"CUDA error: (an illegal|unspecified|misaligned|device-side|.*launch failure)|CUDA_ERROR_ILLEGAL")
HUNG_TEST, BROKEN_CONTEXT = 71, 72  # exit status of a worker


def environment_of(results: Results, stage: str, leave_out: Path) -> dict[str, str]:
    """What the plugin reads in the processes of a run."""
    return {
        "APD_GPU_RESULTS": str(results.path.resolve()),
        "APD_GPU_DEVICE": results.device,
        "APD_GPU_SOURCE": results.source,
        "APD_GPU_STAGE": stage,
        "APD_GPU_LEAVE_OUT": str(leave_out.resolve()),
    }


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(_Worker() if worker else _Recorder(), "apd-gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without what is recorded already; the list is made before the run, so that all workers find the same tests.

    Of the files in APD_GPU_SAMPLE, as "FILE:COUNT", a sample.
    """
    left_out = set(Path(os.environ["APD_GPU_LEAVE_OUT"]).read_text().splitlines())
    file, _, count = os.environ.get("APD_GPU_SAMPLE", "").partition(":")
    of_file = [item for item in items if file and item.path.name == file and item.get_closest_marker("gpu")]
    sampled = set(of_file[:: max(1, len(of_file) // int(count))][: int(count)]) if count else set()
    keep = [
        item
        for item in items
        if item.nodeid not in left_out and (not file or item.path.name != file or item in sampled)
    ]
    kept = set(keep)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = keep


class _Recorder:
    """In the process that starts the tests, which hears of all of them."""

    def __init__(self) -> None:
        names = [os.environ[f"APD_GPU_{name}"] for name in ("RESULTS", "DEVICE", "SOURCE")]
        self.results, self.stage = Results(Path(names[0]), *names[1:]), os.environ["APD_GPU_STAGE"]
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.failed:  # its worker ended because of it: the first report says why
            return
        if report.when == "call" or report.outcome != "passed":
            if report.outcome == "failed":
                self.failed.add(report.nodeid)
            status = {"passed": "ok"}.get(report.outcome, report.outcome)
            values = {"message": _message(report)} if status != "ok" else {}
            self.results.append(self.stage, report.nodeid, status, seconds=round(report.duration, 2), **values)


class _Worker:
    def __init__(self) -> None:
        self.watch: threading.Timer | None = None
        self.broken = False

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.watch = threading.Timer(TEST_SECONDS, self._give_up, (nodeid,))
        self.watch.daemon = True
        self.watch.start()

    def _give_up(self, nodeid: str) -> None:
        print(f"{nodeid} runs longer than {TEST_SECONDS:.0f} s: its worker ends", file=sys.stderr, flush=True)
        os._exit(HUNG_TEST)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.broken |= report.outcome == "failed" and bool(BROKEN.search(str(report.longrepr)))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
        if self.broken:
            os._exit(BROKEN_CONTEXT)


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, reason
        return str(report.longrepr[2])
    lines = [line[4:] for line in str(report.longrepr).splitlines() if line.startswith("E   ")]
    return " | ".join(lines or str(report.longrepr).splitlines()[-3:])[:600]
