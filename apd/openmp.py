"""How the threads of PyTorch's operations on the CPU wait for one another."""

from __future__ import annotations

import os

# Turns of a waiting loop in GNU's OpenMP; of every OpenMP: Intel's and LLVM's then wait 0 ms. In turns on
# 2 cores, 60 steps of the demo's baseline, median seconds of training: GNU's default of 300,000 turns takes 5.0, 4,000
# turns 5.1, 0 turns 6.95; beside two busy processes 4,000 turns take 11.9, 0 turns 13.1.
WAITING_BRIEFLY = {"GOMP_SPINCOUNT": "4000", "OMP_WAIT_POLICY": "PASSIVE"}
WAITING = (*WAITING_BRIEFLY, "KMP_BLOCKTIME")  # the last is of Intel's and LLVM's


def let_waiting_threads_sleep() -> None:
    """Where the user has not said how threads wait: briefly, then asleep. Without effect once PyTorch is loaded.

    Otherwise they turn in a loop for milliseconds at the end of every operation. Beside other busy processes that is
    the time of the thread that they wait for.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING_BRIEFLY)
