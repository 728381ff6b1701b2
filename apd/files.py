"""Writing result files."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from apd.errors import InputError
from apd_kernels.gallery.atomic_folder import FolderBusy, exclusive, flush_folder


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes or replaces `path` in one step when the block ends without an error.

    Whoever reads `path` finds the old content or the new one, never half of it. A link is followed, a file keeps its
    mode, and a device or a pipe is written to as it is. What a process that was killed left behind is removed.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as device:
            yield device
        return
    _sweep(path.parent)
    draft, file = _new_draft(path.parent)
    try:
        with file:
            yield file
            file.flush()
            if path.is_file() and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(draft, path)  # while the lock is held: a draft without one is anybody's to remove
        if fcntl is None:
            os.replace(draft, path)  # Windows renames no open file
        flush_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


_DRAFT = re.compile(r"\.apd-[0-9a-f]{16}\.tmp")  # not of the file's name, which may be as long as names can be
_swept: set[Path] = set()


def _new_draft(folder: Path) -> tuple[Path, BinaryIO]:
    """A file whose lock says that somebody is still writing, as far as the file system has locks."""
    while True:
        draft = folder / f".apd-{secrets.token_hex(8)}.tmp"
        file = draft.open("xb")
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return draft, file
        file.close()  # swept before it was locked


def _sweep(folder: Path) -> None:
    """Remove the drafts that nobody writes any more, once in a process."""
    if fcntl is None or folder in _swept:
        return
    _swept.add(folder)
    for draft in folder.iterdir():
        if _DRAFT.fullmatch(draft.name):
            with suppress(OSError), draft.open("rb") as file:  # OSError: gone, or somebody's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                draft.unlink()


@contextmanager
def reading(path: Path, what: str = "cannot be read, or is cut off or damaged") -> Iterator[None]:
    """Whatever goes wrong in a file that is read becomes one line that names it.

    Raises:
        InputError: anything was raised within.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: expected a file, found a folder") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None
    except Exception as error:  # what parsers raise for damage is a long list: TokenError, RecursionError, csv.Error, …
        raise InputError(f"{path}: {what}: {printable(str(error))}") from error


def sample_of(path: Path) -> str:
    """Size of a file and checksum of its first 4 KB, for short: another picture of one name shows in it, and a hundred
    thousand of them take seconds. A change of pixels behind the first 4 KB that keeps the size does not.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return f"{os.fstat(file.fileno()).st_size:x}-{zlib.crc32(file.read(4096)):08x}"


def printable(text: str) -> str:
    """Text for a terminal, which a file's name must not control: what is no sign of its own is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes: a gallery's, a run's, an ablation's. It is made, and removed if it stays
    empty.

    Raises:
        InputError: another process holds it, nothing has been done yet; or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder, found a file")
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder, wait=False))
        except FolderBusy as error:
            raise InputError(str(error)) from None
        yield


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
