"""SIGTERM and Ctrl-C in commands that train nothing: one line, the shell's exit code, no half output."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("faiss")

from command_line import run
from feature_files import draw_features, write

from apd import interrupt
from apd.interrupt import Interrupted, asked_to_end, ending_by_signals, going_on, interrupted, whole_steps

DEFAULTS = (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """A shell starts what runs in its background with Ctrl-C ignored, these tests too."""
    before = {signum: signal.signal(signum, default) for signum, default in DEFAULTS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


SIGNALS = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])


@SIGNALS
@pytest.mark.parametrize("command", ["index", "rerank"])
def test_no_half_output(command: str, signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes as the output is written."""
    file, before = write(tmp_path / "f.npz", draw_features()), signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.kill(os.getpid(), signum))
        said = run(command, "--features", file, "--output", tmp_path / "out.json", code=128 + signum)
    assert said.splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == [file]
    assert signal.getsignal(signum) == before


def test_a_signal_waits_for_the_end_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers pass it on to processes that have it already; a second Ctrl-C is meant, once some time has gone by."""
    now = time.monotonic()
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    with ending_by_signals(), whole_steps():
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert asked_to_end()
        with pytest.raises(Interrupted, match="interrupted at step 7; go on with: it") as caught, going_on("it"):
            raise interrupted(7)
        assert caught.value.signum == signal.SIGTERM
        now += 3
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert not asked_to_end()


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the background of a script."""
    handlers: dict[int, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(interrupt.signal, "getsignal", handlers.__getitem__)
    monkeypatch.setattr(interrupt.signal, "signal", handlers.__setitem__)
    with ending_by_signals():
        assert handlers[signal.SIGINT] == signal.SIG_IGN
        assert callable(handlers[signal.SIGTERM])
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}


@SIGNALS
@pytest.mark.parametrize("within", [ending_by_signals, whole_steps], ids=["command", "step"])
def test_what_a_library_makes_of_a_signal_is_the_signal(within: Any, signum: int) -> None:
    """An import that is cut off, or C++ that calls Python back, raises an error of its own; without one it is that."""

    def library() -> None:
        try:
            os.kill(os.getpid(), signum)
            time.sleep(0)
        except KeyboardInterrupt:
            pass
        raise RuntimeError("partially initialized")

    with pytest.raises(Interrupted) as caught, ending_by_signals(), within():
        library()
    assert caught.value.signum == signum
    with pytest.raises(RuntimeError, match="its own"), ending_by_signals(), within():
        raise RuntimeError("its own")
