"""What the commands share: options, checks, and one line for every error that the user can act on."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from apd.errors import DataWarning, InputError, printable
from apd.interrupt import ending_by_signals


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")]


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that the user can act on become one line: exit code 2 for wrong input, 1 for a failure on the way.

    Warnings about data become one line each.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the command
                stream.reconfigure(errors="replace")
        with _safe_path(), warnings.catch_warnings():
            warnings.simplefilter("always", DataWarning)
            warnings.showwarning = _warnings_in_one_line(warnings.showwarning)
            try:
                with ending_by_signals():
                    command(*args, **kwargs)
            except KeyboardInterrupt as error:
                terminal = sys.modules.get("apd.console")  # nothing is imported now: an import may have been cut off
                if terminal is None or not terminal.console.quiet:  # of processes that train, the first one says it
                    typer.secho(line(error) or "interrupted", fg="yellow", err=True)
                raise typer.Exit(128 + getattr(error, "signum", signal.SIGINT)) from None
            except BrokenPipeError:  # `apd search … | head`; typer handles it
                raise
            except (ImportError, OSError, ValueError) as error:
                code = _exit_code(error)
                if code is None:
                    raise
                typer.secho(f"Error: {_message(error)}", fg="red", err=True)
                raise typer.Exit(code) from None

    return run


@contextmanager
def _safe_path() -> Iterator[None]:
    """Processes that a command starts, such as those that read images, import nothing from the current folder.

    Python before 3.11 does not look at the variable.
    """
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _warnings_in_one_line(otherwise: Callable[..., None]) -> Callable[..., None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        text: str | None = None,
    ) -> None:
        if issubclass(category, DataWarning):
            typer.secho(f"Warning: {line(message)}", fg="yellow", err=True)
        else:
            shown = line(message)
            otherwise(message if shown == str(message) else shown, category, filename, lineno, file, text)

    return show


def _exit_code(error: Exception) -> int | None:
    """None for an error that is none of the user's making and deserves its traceback."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, (ImportError, OSError)):
        return 1
    from apd_kernels import GalleryError

    return 2 if isinstance(error, GalleryError) else None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return line(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return line(error)


def line(message: object) -> str:
    """A message for the terminal, in one line, with the names of files escaped."""
    return " ".join(printable(part) for part in str(message).split(" ") if part.strip())


def torch_device(device: Device) -> str:
    import torch

    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    return device.value


def gallery_device(device: Device) -> str | None:
    if device is Device.cuda:
        import faiss

        if not faiss.get_num_gpus():
            raise InputError("--device cuda: FAISS finds no GPU here")
    return None if device is Device.auto else device.value


def check_file(path: Path | None, option: str, endings: tuple[str, ...] = ()) -> None:
    """The name of a file that can be written, not of a folder; where `endings` are given, with one of them.

    Called before the work, not after it.
    """
    from apd.files import check_destination

    if path is None:
        return
    if endings and path.suffix not in endings:
        raise InputError(f"{option} {path}: expected a name that ends in {' or '.join(endings)}")
    try:
        check_destination(path)
    except InputError as error:
        raise InputError(f"{option} {error}") from None
