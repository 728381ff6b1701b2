"""Small data sets and untrained runs, drawn for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apd.config.values import Config

SIZE = (32, 16)  # height and width of the images and of the run


def draw_data_set(path: Path, *, seed: int = 0) -> Path:
    """5 identities of their own colours, in cameras 1 and 2; 2 others in train; two distractors in the gallery."""
    random = np.random.default_rng(seed)
    colours = random.integers(30, 225, (10, 3))
    rows = [("query", pid, 1, 0) for pid in range(1, 6)]
    rows += [("bounding_box_test", pid, camera, 1) for pid in range(1, 6) for camera in (1, 2)]
    rows += [("bounding_box_test", 0, camera, camera) for camera in (1, 2)]
    rows += [("bounding_box_train", pid, camera, 0) for pid in (8, 9) for camera in (1, 2)]
    for folder, pid, camera, frame in rows:
        (path / folder).mkdir(parents=True, exist_ok=True)
        noise = random.integers(-25, 25, (*SIZE, 3))
        image = np.clip(colours[pid] + noise + 10 * (camera - 1), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(path / folder / f"{pid:04d}_c{camera}s1_{frame:06d}_00.png")
    return path


def write_run(path: Path, *, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """The folder of a run whose network was never trained."""
    from apd.config.files import save_config
    from apd.models.spnet import build_spnet
    from apd.run import CONFIG, WEIGHTS, save_tensors

    default = Config()
    config = replace(
        default,
        perturbation="none",
        data=replace(default.data, height=size[0], width=size[1]),
        model=replace(
            default.model,
            backbone="vit_tiny_patch16_224",
            pretrained="none",
            patch_size=8,
            embed_dim=24,
            depth=1,
            heads=2,
        ),
    )
    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_spnet(config.model, size, 7)
    save_config(config, path / CONFIG)
    save_tensors(path / WEIGHTS, model)
    return path
