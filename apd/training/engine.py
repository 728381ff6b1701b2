"""What both stages share: device and precision, seeds, and when to save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from apd.config.values import Config
from apd.errors import InputError

_NAMED = 4  # images that a message names


def check_precision(config: Config, device: str) -> None:
    """Raise InputError where the device cannot train in the precision."""
    if device == "cpu" and config.precision == "fp16":
        raise InputError("precision: expected no or bf16 on the CPU, got fp16")


def make_accelerator(config: Config, device: str) -> Accelerator:
    """Device placement and mixed precision.

    Args:
        config: its ``precision``.
        device: ``"cpu"`` or ``"cuda"``.
    """
    # Accelerate keeps device and precision for the whole process, and refuses other ones for a second training.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=config.precision)


def seed_step(seed: int, stage: int, step: int, place: int = 0) -> None:
    """Make the random numbers of a step a function of the run's seed: a restart then draws the same ones.

    `place` is that of a part of the step among the parts of all processes.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, stage, step, place)).generate_state(1)[0]))


class LossGuard:
    """Ends a training whose loss or weights are not finite, and names the step and its images.

    On a GPU a look at a loss waits for it. There the losses of several steps are looked at together, at the latest
    before anything of them is written; the weights on every device only then.

    Args:
        stage: for the message.
        paths: the training images.
        networks: what is trained.
    """

    def __init__(self, stage: str, paths: Sequence[Path], networks: Sequence[nn.Module]) -> None:
        self._stage = stage
        self._paths = paths
        self._networks = networks
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._last: tuple[int, Tensor] | None = None  # step and images whose weights are not looked at yet

    def watch(self, step: int, loss: Tensor, indices: Tensor) -> None:
        """Take note of a step.

        Args:
            step: steps done with it.
            loss: a scalar.
            indices: of its images, int64 (B,).

        Raises:
            InputError: the loss, or one before it, is not finite.
        """
        self._waiting.append((step, loss.detach(), indices))
        self._last = step, indices
        if not loss.is_cuda:
            self._look_at_losses()

    def settle(self) -> None:
        """Look at the losses of all steps since the last look, and at the weights.

        Raises:
            InputError: one is not finite.
        """
        self._look_at_losses()
        if self._last is None:
            return
        step, indices = self._last
        weights = [weight.isfinite().all() for network in self._networks for weight in network.parameters()]
        if not torch.stack(weights).all():
            raise self._error(f"the weights after step {step} are not finite", indices)
        self._last = None

    def _look_at_losses(self) -> None:
        waiting, self._waiting = self._waiting, []
        losses = torch.stack([loss for _, loss, _ in waiting]).tolist() if waiting else []
        for (step, _, indices), loss in zip(waiting, losses, strict=True):
            if not math.isfinite(loss):
                raise self._error(f"the loss of step {step} is {loss}", indices)

    def _error(self, what: str, indices: Tensor) -> InputError:
        images = list(dict.fromkeys(str(self._paths[i]) for i in indices.tolist()))
        return InputError(
            f"{self._stage}: {what}: the training diverged; a lower learning rate or gradient clipping may keep it "
            f"stable. The step's {len(images)} images: {', '.join(images[:_NAMED])}{', …' * (len(images) > _NAMED)}"
        )


class CheckpointClock:
    """Says when a checkpoint is due: every so many minutes, the first after a quarter of that.

    Args:
        minutes: between two checkpoints; 0: one whenever asked.
        save: writes one.
    """

    def __init__(self, minutes: float, save: Callable[[int], None]) -> None:
        self._seconds = 60 * minutes
        self._save = save
        self._last = time.perf_counter() - 0.75 * self._seconds

    def tick(self, step: int) -> None:
        """Save when it is time."""
        if time.perf_counter() - self._last >= self._seconds:
            self.save(step)

    def save(self, step: int) -> None:
        """Save now."""
        self._save(step)
        self._last = time.perf_counter()
