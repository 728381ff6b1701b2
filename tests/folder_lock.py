"""A folder that somebody else is writing to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apd_kernels.gallery.atomic_folder import exclusive


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """As another process would hold it: locks of two openings of a folder exclude each other within one, too."""
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(folder):
            locked.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()
