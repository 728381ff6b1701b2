"""Processes that start with the imports of a training done: forked from one that did them and nothing else.

Python's start and the imports of PyTorch and timm take six seconds, the trainings of these tests one or two. That the
commands start from nothing as well is for the tests that use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

with suppress(ImportError):
    import apd.data.loading  # noqa: F401  (it has a list of imports, too: the one below is to be the last)

START = "forkserver"
_context = multiprocessing.get_context(START)
# What is not installed is left out.
_context.set_forkserver_preload(["apd_kernels", "apd.training.train", "apd.data.worker_server"])


class Popen:
    """As ``subprocess.Popen`` for ``python -m module ...`` and ``python -c code ...``; its input is a pipe that closes
    when this process ends."""

    def __init__(
        self,
        command: list[str],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO[bytes] | None = None,
        cwd: Path | None = None,
        **_: object,
    ) -> None:
        assert command[0] == sys.executable
        ours, self._open = _context.Pipe(duplex=False)
        output = os.devnull if stdout is None else stdout.name
        arguments = command[1:], dict(env or os.environ), ours, output, cwd or Path.cwd()
        self._process = _context.Process(target=_run, args=arguments)
        self._process.start()
        ours.close()

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _run(command: list[str], environment: dict[str, str], standard_input: Connection, output: str, cwd: Path) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))  # read when PyTorch was loaded
    os.dup2(standard_input.fileno(), 0)
    with open(output, "ab") as file:
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    kind, what, *arguments = command
    sys.argv = [what, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})
