"""What each process of `test_training_distributed.py` does; torchrun starts it: data, folder, configuration."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from apd.config.files import load_config
from apd.run import Run
from apd.training.distributed import join, leave, on_first
from apd.training.train import start_run, train_run


def train(path: Path, sources: list[Path], values: list[str]) -> Run:
    on_first(lambda: start_run(path, load_config(None, values), sources))
    train_run(Run(path), "cpu")
    return Run(path)


def interrupted(whole: Path, path: Path) -> None:
    """The files of a run that was killed between the last two checkpoints."""
    shutil.copytree(whole, path)
    (path / "best.safetensors").unlink()
    sorted((path / "last").glob("sp-*.pt"))[-1].unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, sources, runs = Path(sys.argv[1]), [Path(path) for path in json.loads(sys.argv[2])], json.loads(sys.argv[3])
    join("cpu")
    for name, values in runs.items():
        train(folder / name, sources, values)
    last = folder / list(runs)[-1]
    on_first(lambda: interrupted(last, folder / "resumed"))
    train_run(Run(folder / "resumed"), "cpu")
    leave()
