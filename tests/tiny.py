"""The smallest training: a data set of colours and a network of a thousandth of the usual size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from apd.run import Run

TINY = (
    *("data.height=32", "data.width=16", "data.pad=2", "data.workers=0", "data.cache=true"),
    *("mpg.steps=4", "mpg.batch_size=4", "mpg.negatives=2", "mpg.width=4", "mpg.blocks=1", "mpg.trunk=self"),
    *("mpg.discriminator_width=4", "mpg.discriminator_layers=2"),
    *("model.backbone=vit_tiny_patch16_224", "model.pretrained=none", "model.patch_size=8", "model.embed_dim=24"),
    *("model.depth=2", "model.heads=2", "train.batch_size=8", "train.instances=2", "train.steps=4"),
    *("train.optimizer=adamw", "train.lr=0.0005", "train.warmup_epochs=1", "train.bias_lr=1"),
    *("loss.ramp_epochs=1", "log_steps=2", "checkpoint_minutes=0.00001"),
)


def draw_training_set(folder: Path) -> Path:
    """8 identities × 2 cameras × 2 images of their own colours to train on, and 4 others to test on."""
    random = np.random.default_rng(0)
    for pid in range(1, 13):
        colour = random.integers(40, 215, 3)
        for camera in (1, 2):
            for frame in (1, 2):
                part = "bounding_box_train" if pid <= 8 else ("query", "bounding_box_test")[frame - 1]
                (folder / part).mkdir(parents=True, exist_ok=True)
                pixels = colour + random.integers(-40, 40, (32, 16, 3)) + 10 * camera
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(folder / part / f"{pid:04d}_c{camera}s1_{frame:06d}_00.png")
    return folder


def trained(path: Path, data: Path | Sequence[Path], *changes: str) -> Run:
    """A run of both stages in this process."""
    from apd.config.files import load_config
    from apd.training.train import start_run, train_run

    made = start_run(path, load_config(None, [*TINY, *changes]), [data] if isinstance(data, Path) else data)
    train_run(made, "cpu")
    return made
