"""SIGTERM and Ctrl-C: a training ends at the next step, with a checkpoint."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from apd.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: int | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, the first signal waits until `asked_to_end` is looked at; a second one ends the program at once.

    Only the main thread can take signals: in others nothing changes.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}

    def note(signum: int, frame: FrameType | None) -> None:
        global _received
        _received = signum
        for other in _SIGNALS:
            signal.signal(other, before[other])

    for signum in _SIGNALS:
        signal.signal(signum, note)
    try:
        yield
    finally:
        _received = None
        for signum in _SIGNALS:
            signal.signal(signum, before[signum])


def asked_to_end() -> bool:
    """Whether a signal has come."""
    return _received is not None


def interrupted(run: Path, step: int) -> Interrupted:
    """What to raise once the checkpoint of a step is written."""
    assert _received is not None
    return Interrupted(_received, f"interrupted at step {step}; go on with: apd train --resume {shlex.quote(str(run))}")
