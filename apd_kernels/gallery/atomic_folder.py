"""A saved object as a folder: data files, and a manifest that names them with their checksums.

Data files carry a fresh random part in their names, so a save never touches those of the save before it. The one moment
at which the folder changes is the replacement of ``manifest.json``, a single atomic rename: whoever loads, and whenever
the saving process is killed, finds the old object or the new one, complete. What an interrupted save left behind is
removed by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
_OURS = re.compile(r"[a-z]+[0-9]*-[0-9a-f]{16}\.[a-z]+")  # data files, and a manifest before it is renamed


class HashingWriter:
    """Passes bytes on to a file and remembers how many and their SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)
        return len(data)

    def summary(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    """The one text of a manifest: a file that differs in a single byte, white space included, is damaged."""
    return json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(manifest)).hexdigest()


def save_folder(
    path: Path,
    format: str,
    version: int,
    fields: Mapping[str, Any],
    files: Mapping[str, Callable[[HashingWriter], None]],
    error: type[ValueError],
) -> None:
    """Write or replace the folder.

    Args:
        path: the folder; made, with its parents, where it does not exist.
        format, version: what is saved, and the version of its layout.
        fields: JSON values for the manifest.
        files: for each data file, ``"<name>.<extension>"`` in lower-case letters (the name may end in digits), the
            function that writes it.
        error: raised when `path` is something else than such a folder, an empty folder or nothing.
    """
    check_replaceable(path, format, error)
    made = not path.exists()
    with exclusive(path):
        check_replaceable(path, format, error)
        try:
            _write(path, {"format": format, "version": version, **fields}, files)
        finally:
            _sweep(path)  # after a failure: the new files; after success: the old ones
        if made:
            flush_folder(path.parent)


def _write(path: Path, manifest: dict[str, Any], files: Mapping[str, Callable[[HashingWriter], None]]) -> None:
    token = secrets.token_hex(8)
    manifest["files"] = {}
    for name, write in files.items():
        stem, _, extension = name.partition(".")
        target = path / f"{stem}-{token}.{extension}"
        with target.open("xb") as file:
            keep_mode(file, path / MANIFEST)
            writer = HashingWriter(file)
            write(writer)
            _flush(file)
        manifest["files"][name] = {"name": target.name, **writer.summary()}
    manifest["seal"] = _seal(manifest)
    draft = path / f"manifest-{token}.json"
    with draft.open("xb") as file:
        keep_mode(file, path / MANIFEST)
        file.write(_rendered(manifest))
        _flush(file)
    flush_folder(path)  # the data files' names reach the disk before the manifest that points to them
    os.replace(draft, path / MANIFEST)
    flush_folder(path)


def _sweep(path: Path) -> None:
    """Remove data files that no manifest names."""
    named: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        named = {entry["name"] for entry in json.loads((path / MANIFEST).read_bytes())["files"].values()}
    for entry in path.iterdir():
        if _OURS.fullmatch(entry.name) and entry.name not in named:
            entry.unlink(missing_ok=True)


def load_folder(
    path: Path,
    format: str,
    version: int,
    read: Callable[[dict[str, Any], dict[str, Path]], Any],
    error: type[ValueError],
    *,
    verify: bool = True,
) -> Any:
    """``read(manifest, files)`` of a folder whose manifest and data files are complete and unchanged.

    Without `verify` only the sizes of the data files are compared, not their content. A reader is never blocked by a
    save; when one replaces the folder meanwhile, the reader starts again.
    """
    while True:
        sealed = _manifest_bytes(path, error)
        try:
            manifest = _checked_manifest(path, sealed, format, version, error)
            return read(manifest, _checked_files(path, manifest, error, verify))
        except (error, KeyError, TypeError, AttributeError) as failure:
            if _manifest_bytes(path, error) == sealed:
                if isinstance(failure, error):
                    raise
                raise error(f"{path / MANIFEST}: damaged: {failure!r}") from failure


def _manifest_bytes(path: Path, error: type[ValueError]) -> bytes:
    if not path.is_dir():
        raise error(f"{path}: {'expected a folder, found a file' if path.exists() else 'no such folder'}")
    try:
        if (path / MANIFEST).is_file():  # a pipe would be waited for without end
            return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        pass
    raise error(f"{path}: no {MANIFEST} in this folder: not saved by this library, or never completely")


def _checked_manifest(path: Path, sealed: bytes, format: str, version: int, error: type[ValueError]) -> dict[str, Any]:
    try:
        manifest = json.loads(sealed)
    except (ValueError, RecursionError):
        raise error(f"{path / MANIFEST}: damaged: not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise error(f"{path / MANIFEST}: expected format {format!r}, got {found!r}")
    found = manifest.get("version")
    if type(found) is not int or found < 1:
        raise error(f"{path / MANIFEST}: damaged: expected a format version from 1 to {version}, got {found!r}")
    if found > version:
        raise error(f"{path}: saved in format version {found}, this release reads up to {version}: install a newer one")
    seal = manifest.pop("seal", None)
    if seal != _seal(manifest) or _rendered({**manifest, "seal": seal}) != sealed:
        raise error(f"{path / MANIFEST}: damaged: its content does not match its checksum")
    return cast(dict[str, Any], manifest)


def _checked_files(path: Path, manifest: dict[str, Any], error: type[ValueError], verify: bool) -> dict[str, Path]:
    files = {}
    for name, expected in manifest["files"].items():
        target = path / expected["name"]
        if not _OURS.fullmatch(expected["name"]):
            raise error(f"{path / MANIFEST}: damaged: {expected['name']!r} is not the name of a data file")
        try:
            found = target.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected["bytes"]:
                raise error(f"{target}: damaged: expected {expected['bytes']} bytes, found {found.st_size}")
            if verify and _sha256(target) != expected["sha256"]:
                raise error(f"{target}: damaged: its content does not match its checksum")
        except FileNotFoundError:
            raise error(f"{target}: missing") from None
        files[name] = target
    return files


def _sha256(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            content.update(piece)
    return content.hexdigest()


def check_replaceable(path: Path, format: str, error: type[ValueError]) -> None:
    """Nothing but our own is ever replaced: an empty folder, an unfinished first save, or the same format."""
    if not path.exists():
        return
    if not path.is_dir():
        raise error(f"{path}: expected a folder to save to, found a file")
    entries = {entry.name for entry in path.iterdir()}
    if MANIFEST not in entries:
        if all(_OURS.fullmatch(name) for name in entries):
            return
        raise error(f"{path}: not replaced: a folder with other content; name a new or an empty one")
    try:
        found = json.loads(_manifest_bytes(path, error))["format"]
    except (error, ValueError, RecursionError, TypeError, KeyError):
        raise error(f"{path}: not replaced: its {MANIFEST} cannot be read; remove the folder first") from None
    if found != format:
        raise error(f"{path}: not replaced: expected format {format!r}, got {found!r}; name another folder")


class FolderBusy(OSError):
    """Another process, or another thread, is writing to a folder."""


_held: dict[tuple[int, int, int], int] = {}  # descriptors of locked folders, by device, inode and thread


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """One writer of a folder at a time, where the file system has locks. A thread may lock what it has locked already.

    The system drops the lock of a process that ends, however it ends, and whatever processes it has forked.

    Args:
        path: the folder; made, with its parents, where it does not exist, and removed where it is still empty then.
        wait: for the one before; without, `FolderBusy` is raised.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    key, folder = _key(path.stat()), None
    if fcntl is not None and key not in _held:
        folder = _locked(path, wait)
        key = _key(os.fstat(folder))
        _held[key] = folder
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for empty in made:  # the innermost first
                empty.rmdir()
        if folder is not None and _held.pop(key, None) is not None:  # not in a process that was forked meanwhile
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_UN)  # also what a process that is being forked still holds
            os.close(folder)


def _key(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, threading.get_ident()


def _locked(path: Path, wait: bool) -> int:
    """Its descriptor; of the folder that is there once the lock is held, not of one removed while it was waited for."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            folder = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise FolderBusy(f"{path}: another process is writing to it; try again when it has ended") from None
        except OSError:  # some network file systems have no locks
            return folder
        except BaseException:  # Ctrl-C while it waits
            os.close(folder)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(folder), path.stat()):
                return folder
        os.close(folder)


def _let_go() -> None:
    """A forked process would keep its parent's locks beyond the parent's end."""
    for folder in _held.values():
        os.close(folder)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def keep_mode(file: BinaryIO, path: Path) -> None:
    """Give a new file the mode of the one that it will replace, and its owner where the system allows it."""
    if os.name != "posix" or not path.is_file():
        return
    before = path.stat()
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))


def flush_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
