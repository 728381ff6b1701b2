"""Imported by the process that forks data workers, and by no other: it and they outlive a SIGTERM to everybody.

Slurm sends it to every process of a job. The training goes on to the end of its step, for which it may need one more
batch, and then ends them all.
"""

from __future__ import annotations

import os
import signal


def _as_usual() -> None:
    """In processes that others fork here; data workers choose for themselves."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=_as_usual)
