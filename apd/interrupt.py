"""SIGTERM and Ctrl-C: a command ends with one line, a training at the next step and with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from apd.errors import InputError, Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds in which a launcher such as torchrun may pass on a Ctrl-C that has come already
_received: tuple[int, float] | None = None  # signal and time


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that are ignored stay so, as for a program behind ``nohup``; only the main thread can take any."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        before = {signum: old for signum, old in before.items() if old not in (None, signal.SIG_IGN)}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _note(signum: int, frame: FrameType | None) -> None:
    global _received
    now = time.monotonic()
    if _received is None:
        _received = signum, now
    elif signum == signal.SIGINT and now - _received[1] > _ECHO:
        raise Interrupted(signum, "interrupted")


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Within, SIGTERM ends a command as Ctrl-C does: what is open is closed, and drafts are removed.

    Whatever is raised once a signal has come is its doing: a library whose import is cut off, or whose C++ calls Python
    back, makes an error of its own of it.
    """
    came: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        raise Interrupted(signum, "interrupted")

    with _handled(end):
        try:
            yield
        except Exception as error:
            if not came:
                raise
            raise Interrupted(came[0], "interrupted") from error


@contextmanager
def whole_steps() -> Iterator[None]:
    """Within, a signal waits until `asked_to_end` is looked at; a second Ctrl-C ends the program at once."""
    global _received
    with _handled(_note):
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a data worker that was just being started, and took the signal as well
            if _received is None:
                raise
            raise Interrupted(_received[0], "interrupted") from error
        finally:
            _received = None


def asked_to_end() -> bool:
    """Whether a signal has come."""
    return _received is not None


def interrupted(step: int) -> Interrupted:
    """What to raise once the checkpoint of a step is written."""
    return Interrupted(_received[0] if _received else signal.SIGTERM, f"interrupted at step {step}")


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Whoever is interrupted within is told how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(signum, f"{str(error) or 'interrupted'}; go on with: {how}") from None


def ignore_signals() -> None:
    """In a process that works for another one, which decides when both end."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
