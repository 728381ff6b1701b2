"""What a training writes down: metrics.csv, TensorBoard, and a progress bar."""

from __future__ import annotations

import csv
import io
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from apd.console import console
from apd.errors import InputError
from apd.files import reading, write_text
from apd.run import METRICS

COLUMNS = (
    *("stage", "step", "epoch", "seconds", "lr"),
    *("loss_g", "loss_d", "loss_mp", "loss_c", "loss_s", "flipped", "content"),
    *(
        "loss",
        "loss_k",
        "loss_nk",
        "loss_kp",
        "loss_latent",
        "accuracy",
        "spread",
        "validation_map",
        "validation_rank1",
    ),
)
_FLUSH_SECONDS = 10.0  # between two writings of metrics.csv
_QUIET_SECONDS = 60.0  # between two printed lines where the output is no terminal


class StageLog:
    """The log of one stage; a context.

    Values are averaged between two lines, on the device: only a line waits for it.

    Args:
        run: the run's folder.
        stage: ``"mpg"`` or ``"sp"``, first column of metrics.csv.
        title: of the progress bar.
        start, steps: steps done already, and in all.
        every: steps between two lines.
        state: what `state` said when the checkpoint was written from which the stage goes on.
    """

    def __init__(
        self,
        run: Path,
        stage: str,
        title: str,
        start: int,
        steps: int,
        *,
        every: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._stage = stage
        self._path = run / METRICS
        self._rows = _rows_before(self._path, stage, start)
        self._writer = SummaryWriter(run / "tensorboard" / stage, purge_step=start + 1)
        self._every = every
        self._steps = steps
        state = state or {"seconds": 0.0, "count": 0, "sums": {}}
        self._sums: dict[str, Tensor] = state["sums"]
        self._count: int = state["count"]
        self._began = time.perf_counter() - state["seconds"]
        self._printed = self._flushed = time.perf_counter()
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=steps, completed=start, values="")

    def __enter__(self) -> StageLog:
        self._progress.start()
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        return self

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard raises again in this thread what its own met, such as a folder that is gone."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        try:
            self._writer.close()
            self.flush()
        finally:
            threading.excepthook = self._hook

    @property
    def seconds(self) -> float:
        """Time that all steps of the stage took, those before a restart included."""
        return time.perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the time so far, and the sums since the last line."""
        return {"seconds": self.seconds, "count": self._count, "sums": dict(self._sums)}

    def due(self, step: int) -> bool:
        """Whether `step` steps done are worth a line."""
        return step % self._every == 0 or step == self._steps

    def step(self, step: int, values: dict[str, Tensor], **facts: float) -> None:
        """Take note of a step.

        Args:
            step: steps done.
            values: scalars of this step.
            facts: numbers for the line as they are: epoch, lr, …

        Raises:
            InputError: a value is not finite.
        """
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
        self._count += 1
        self._progress.advance(self._task)
        if self.due(step):
            names = list(self._sums)
            means = (torch.stack([self._sums[name] for name in names]) / self._count).tolist()
            self.line(step, **facts, **dict(zip(names, means, strict=True)))
            self._sums, self._count = {}, 0

    def line(self, step: int, **values: float) -> None:
        """Write one line, and the same to TensorBoard."""
        for name, value in values.items():
            if not torch.isfinite(torch.tensor(value)):
                raise InputError(
                    f"{self._stage}: {name} is {value} in the {self._every} steps before step {step}: "
                    "the training diverged; a lower learning rate or gradient clipping may keep it stable"
                )
            self._writer.add_scalar(name, value, step)
        row: dict[str, Any] = {"stage": self._stage, "step": step, "seconds": f"{self.seconds:.1f}"}
        self._rows.append(row | {name: f"{value:.6g}" for name, value in values.items()})
        if time.perf_counter() - self._flushed > _FLUSH_SECONDS:
            self.flush()
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if name not in ("epoch", "lr"))
        self._progress.update(self._task, values=shown)
        now = time.perf_counter()
        if not console.is_terminal and (now - self._printed > _QUIET_SECONDS or step == self._steps):
            console.print(f"{self._title} {step}/{self._steps}  {self.seconds:.0f} s  {shown}", soft_wrap=True)
            self._printed = now

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Show an image (3, H, W) in [0, 1] in TensorBoard."""
        self._writer.add_image(name, image.clamp(0, 1).cpu(), step)

    def flush(self) -> None:
        """Bring metrics.csv up to date, in one step."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._path, text.getvalue())
        self._writer.flush()
        self._flushed = time.perf_counter()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The lines of a metrics.csv; none where there is no such file.

    Raises:
        InputError: the file is no table of a training.
    """
    if not path.exists():
        return []
    with reading(path, "not the table of a training"), path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames
    if columns is not None and not {"stage", "step"} <= set(columns):
        raise InputError(f"{path}: not the table of a training: no columns stage and step")
    if any(not (row.get("stage") and (row.get("step") or "").isdecimal()) for row in rows):
        raise InputError(f"{path}: expected the columns stage and step in every line")
    return rows


def _rows_before(path: Path, stage: str, start: int) -> list[dict[str, Any]]:
    """The lines of other stages, and those of this one up to the step that it goes on from."""
    return [dict(row) for row in read_metrics(path) if row["stage"] != stage or int(row["step"]) <= start]
