"""Checkpoints: ``last/STAGE-STEP.pt``, each written in one step; the two newest of a stage are kept."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from apd.errors import DataWarning, InputError
from apd.files import write_bytes

FOLDER = "last"
_KEPT = 2
_NAME = re.compile(r"(?P<stage>[a-z]+)-(?P<step>\d{8})\.pt")


def save_checkpoint(run: Path, stage: str, step: int, state: dict[str, Any]) -> Path:
    """Write what a stage needs to go on from a step.

    Args:
        run: the run's folder.
        stage: ``"mpg"`` or ``"sp"``.
        step: steps done.
        state: tensors, numbers, strings, and containers of such.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    content = io.BytesIO()
    torch.save({"stage": stage, "step": step, **state}, content)
    path = folder / f"{stage}-{step:08}.pt"
    write_bytes(path, content.getvalue())
    for _, old in _checkpoints(run, stage)[_KEPT:]:
        old.unlink()
    return path


def load_checkpoint(run: Path, stage: str) -> dict[str, Any] | None:
    """The newest checkpoint of a stage that can be read, on the CPU; None where there is none.

    A damaged one is named in a warning, and the one before it is taken.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    found = _checkpoints(run, stage)
    for step, path in found:
        state = _read(path)
        if state is not None and (state.get("stage"), state.get("step")) == (stage, step):
            return state
        warnings.warn(f"{path}: a damaged checkpoint; the one before it is used", DataWarning, stacklevel=2)
    if found:
        raise InputError(f"{run / FOLDER}: all checkpoints of stage {stage} are damaged; remove them to begin it again")
    return None


def newest_step(run: Path, stage: str) -> int | None:
    """Steps done in the newest checkpoint of a stage; None where there is none."""
    return next((step for step, _ in _checkpoints(run, stage)), None)


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint, or None where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip() is not None:
                return None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # PyTorch's unpickler may raise anything, IndexError for one
        return None
    return state if isinstance(state, dict) else None


def remove_checkpoints(run: Path, stage: str) -> None:
    """Remove those of a stage whose results are in the run."""
    for _, path in _checkpoints(run, stage):
        path.unlink()


def _checkpoints(run: Path, stage: str) -> list[tuple[int, Path]]:
    """(step, file) of a stage's checkpoints, newest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in (run / FOLDER).glob("*.pt"))
    found = [(int(match["step"]), path) for match, path in named if match and match["stage"] == stage]
    return sorted(found, reverse=True)
