"""How the threads of PyTorch's operations on the CPU wait for one another."""

from __future__ import annotations

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of OpenMP; of GNU's runtime; of Intel's and LLVM's


def let_waiting_threads_sleep() -> None:
    """Where the user has not said how threads wait: asleep. Without effect once PyTorch is loaded.

    Otherwise they turn in a loop for milliseconds at the end of every operation. Beside other busy processes that is
    the time of the thread that they wait for.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # GNU: a spin count of 0; Intel and LLVM: a block time of 0
