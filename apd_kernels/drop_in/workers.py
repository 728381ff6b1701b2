"""The replacements in processes that are spawned: they start anew, and import the program's file before they work.

A forked process has them already. A spawned one is told to take `spawned` for the program, which puts the
replacements in place and then runs the program's file under the name that a spawned process gives it.
"""

from __future__ import annotations

import json
import multiprocessing.spawn
import os
from typing import Any

CALLS = "APD_KERNELS_DROP_IN"  # the calls of `apply`, as JSON
PROGRAM = "APD_KERNELS_DROP_IN_PROGRAM"

_prepared = multiprocessing.spawn.get_preparation_data


def carry_over(calls: list[dict[str, Any]]) -> None:
    """From now on processes that are spawned make these calls of `apply`; none: as before."""
    if calls:
        os.environ[CALLS] = json.dumps(calls)
        multiprocessing.spawn.get_preparation_data = _preparation
    else:
        os.environ.pop(CALLS, None)
        multiprocessing.spawn.get_preparation_data = _prepared


def _preparation(name: str) -> dict[str, Any]:
    data = _prepared(name)
    path = data.pop("init_main_from_path", None)
    module = data.pop("init_main_from_name", None)
    os.environ[PROGRAM] = json.dumps([path, module])
    data["init_main_from_name"] = "apd_kernels.drop_in.spawned"
    return data
