"""Writing result files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from apd.errors import InputError
from apd_kernels.gallery.atomic_folder import FolderBusy, exclusive


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes or replaces `path` in one step when the block ends without an error.

    Whoever reads `path` finds the old content or the new one, never half of it.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes: a gallery's, a run's, an ablation's. It is made, and removed if it stays
    empty.

    Raises:
        InputError: another process holds it; nothing has been done yet.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder, wait=False))
        except FolderBusy as error:
            raise InputError(str(error)) from None
        try:
            yield
        finally:
            if made and not any(folder.iterdir()):
                folder.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file in one step, as `replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write or replace a file of UTF-8 text, as `write_bytes`.

    File names may hold bytes that are no UTF-8; Python reads them as lone surrogates, which are written as ``\\udcff``:
    in JSON the same name again.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
