"""What a spawned process runs as its program: the replacements, then the program itself. See workers.py."""

from __future__ import annotations

import json
import os
import runpy
from typing import Any

from apd_kernels import drop_in
from apd_kernels.drop_in.workers import CALLS, PROGRAM


def begin() -> dict[str, Any]:
    """The names of the program, under the name that a spawned process gives it."""
    for call in json.loads(os.environ.get(CALLS, "[]")):
        drop_in.apply(**call)
    path, module = json.loads(os.environ.get(PROGRAM, "[null, null]"))
    if path is not None:
        return runpy.run_path(path, run_name="__mp_main__")
    return {} if module is None else runpy.run_module(module, run_name="__mp_main__", alter_sys=True)


if __name__ == "__mp_main__":
    globals().update(begin())
