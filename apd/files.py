"""Reading and writing files."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from apd.errors import InputError, printable
from apd_kernels.gallery.atomic_folder import FolderBusy, exclusive, flush_folder, keep_mode


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes or replaces `path` in one step when the block ends without an error.

    Whoever reads `path` finds the old content or the new one, never half of it. A link is followed; a file keeps its
    mode and, where the system allows it, its owner; a device or a pipe is written to as it is, ``/dev/stdout`` and
    ``/dev/fd/N`` among them. What a process that was killed left behind is removed.
    """
    stream = _stream(path)
    if stream is not None:
        with stream:
            yield stream
        return
    path = path.resolve()
    if not path.parent.is_dir():  # else the error would name the draft
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    _sweep(path.parent)
    draft, file = _new_draft(path.parent)
    try:
        with file:
            keep_mode(file, path)  # before anything is in it
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(draft, path)  # while the lock is held: a draft without one is anybody's to remove
        if fcntl is None:
            os.replace(draft, path)  # Windows renames no open file
        flush_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


_STREAM = re.compile(r"/dev/(?:fd/(?P<number>\d+)|(?P<name>stdout|stderr))|/proc/self/fd/(?P<other>\d+)")


def _stream(path: Path) -> BinaryIO | None:
    """What is written to as it is; None for a file that is there or not."""
    if match := _STREAM.fullmatch(str(path)):
        number = {"stdout": 1, "stderr": 2}.get(match["name"]) or int(match["number"] or match["other"])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # what was said before stands before
        return os.fdopen(os.dup(number), "wb")  # opened by its name, a file would be begun anew
    if not path.exists() or path.is_file() or path.is_dir():
        return None
    return path.open("wb")


def check_destination(path: Path) -> None:
    """Raise now what would keep `replacing` from writing `path`.

    Raises:
        InputError: it is a folder or a socket, its folder is missing, its name is too long, its links lead in a circle,
            or there is no permission.
    """
    if _STREAM.fullmatch(str(path)):
        return
    try:
        mode: int | None = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:  # too long a name, links in a circle, a file where a folder should be
        raise InputError(f"{path}: {error.strerror}") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise InputError(f"{path}: expected a file name, got a folder")
    if mode is not None and not stat.S_ISREG(mode):
        if stat.S_ISSOCK(mode) or not os.access(path, os.W_OK):
            raise InputError(f"{path}: cannot be written to")
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {folder if path.is_symlink() else path.parent}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: no permission to write to {folder}")


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
        InputError: anything was raised within; or `path` is no file: a pipe could be waited for without end.
    """
    try:
        check_file(path)
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None
    except Exception as error:  # what parsers raise for damage is a long list: TokenError, RecursionError, csv.Error, …
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        reason = reason.replace(f" {str(path)!r}", "")  # Pillow names the file, too
        raise InputError(f"{path}: {what}: {printable(reason[:_LONGEST])}") from error


_LONGEST = 300  # characters of a parser's message, which may hold all that it could not understand


def check_file(path: Path) -> None:
    """InputError for a folder, a pipe, a device or a socket; OSError where nothing is there."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise InputError(f"{path}: expected a file, found {found}")


def read_json(path: Path, shape: Any) -> Any:
    """The contents of a JSON file, once they are found to have a shape (`misfit`).

    Raises:
        InputError: the file is missing or damaged, or has another shape; the message says where.
    """
    with reading(path, "damaged"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if found := misfit(content, shape):
            raise InputError(f"{path}: {found}")
    return content


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """What of a value has another shape than expected, in words; None where all of it fits.

    Args:
        value: what a file held.
        shape: a type, or a tuple of types, of which `float` is any finite number; ``[shape]``, a list of such; or a
            dictionary with the shapes of the values by key. There a key that ends in ``?`` may be absent, and `...`
            stands for all other keys, which may hold anything where it is not given.
        where: the name of the value.
    """
    if isinstance(shape, list) and isinstance(value, list):
        parts = [(f"{where}[{i}]", one, shape[0]) for i, one in enumerate(value)]
    elif isinstance(shape, dict) and isinstance(value, dict):
        if missing := [key for key in shape if key is not ... and not key.endswith("?") and key not in value]:
            return f"{where}: no {missing[0]!r}".removeprefix(": ")
        named = {key if key is ... else key.removesuffix("?"): one for key, one in shape.items()}
        shapes = ((key, named.get(key, named.get(..., object))) for key in value)
        parts = [(f"{where}.{key}".removeprefix("."), value[key], one) for key, one in shapes]
    else:
        kinds = shape if isinstance(shape, tuple) else (type(shape) if isinstance(shape, (list, dict)) else shape,)
        if not isinstance(shape, (list, dict)) and any(_is(value, kind) for kind in kinds):
            return None
        expected = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
        return f"{where}: expected {expected}, got {_KINDS.get(type(value), type(value).__name__)}".removeprefix(": ")
    return next((found for name, one, inner in parts if (found := misfit(one, inner, name))), None)


_KINDS: dict[type, str] = {
    **{str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"},
    **{list: "a list", dict: "keys with values"},
}


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def sample_of(path: Path) -> str:
    """Size of a file and checksum of its first 64 KB, for short.

    That is the whole of nearly every picture of a person, and costs little more than to open the file, so that a
    hundred thousand of them take seconds. A change behind the first 64 KB that keeps the size does not show. The time
    of the last change is left out: a copy of a data set, or a checkout of one, has other times.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return f"{os.fstat(file.fileno()).st_size:x}-{zlib.crc32(file.read(1 << 16)):08x}"


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
