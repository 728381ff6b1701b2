"""What both stages share: device and precision, seeds, and when to save."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from apd.config import Config


def make_accelerator(config: Config, device: str) -> Accelerator:
    """Device placement and mixed precision.

    Args:
        config: its ``precision``.
        device: ``"cpu"`` or ``"cuda"``.
    """
    # Accelerate keeps device and precision for the whole process, and refuses other ones for a second training.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=config.precision)


def seed_step(seed: int, stage: int, step: int) -> None:
    """Make the random numbers of a step a function of the run's seed: a restart then draws the same ones."""
    torch.manual_seed(int(np.random.SeedSequence((seed, stage, step)).generate_state(1)[0]))


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
