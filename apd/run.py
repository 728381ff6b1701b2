"""The folder of a training run, ``runs/NAME``.

config.yaml           every value of the configuration
run.json              data folders, versions, threads, seconds of each stage, results
metrics.csv           losses by step; tensorboard/ holds the same
generator.safetensors MPG-Net's generator, after stage 1
synthesized/          hard-matching images in the layout of their data sets
best.safetensors      SP-Net
last/                 checkpoints to resume from
baseline/             with ``trunk: self``: the run of the trunk
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apd.config.values import Config
from apd.errors import InputError
from apd.files import reading, write_bytes, write_json

if TYPE_CHECKING:
    from apd.models.spnet import SPNet

CONFIG, INFO, METRICS = "config.yaml", "run.json", "metrics.csv"
WEIGHTS, GENERATOR = "best.safetensors", "generator.safetensors"


class Describer(nn.Module):
    """What a run is used for: images (B, 3, H, W) in [0, 1] to L2-normalized descriptors (B, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.model(images).float())


class Run:
    """A finished or unfinished run.

    Args:
        path: its folder.

    Raises:
        InputError: the folder is missing, or has no configuration, or a damaged one.
    """

    def __init__(self, path: Path | str) -> None:
        from apd.config.files import load_config

        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise InputError(f"{path}: not the folder of a run: no {CONFIG}")
        self.config: Config = load_config(self.path / CONFIG)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images, pixels."""
        return self.config.data.height, self.config.data.width

    def info(self) -> dict[str, Any]:
        """The contents of run.json."""
        return read_info(self.path)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, hexadecimal."""
        return sha256_of(self._file(WEIGHTS))

    def load_network(self) -> SPNet:
        """SP-Net in evaluation mode, on the CPU."""
        from apd.models.spnet import build_spnet

        state = load_tensors(self._file(WEIGHTS))
        self._check_unchanged(WEIGHTS)
        classifier = state.get("heads.classifier.weight")
        if classifier is None or classifier.ndim != 2:
            raise InputError(f"{self.path / WEIGHTS}: no SP-Net: it lacks heads.classifier.weight")
        model = build_spnet(self.config.model, self.size, len(classifier), load=False)
        _load_state(model, state, self.path / WEIGHTS)
        return model.eval()

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """Images (B, 3, H, W) in [0, 1] to L2-normalized descriptors (B, D); in evaluation mode.

        Raises:
            InputError: the weights are missing, damaged, or do not fit the configuration.
        """
        return Describer(self.load_network()).eval().to(device)

    def load_generator(self, device: torch.device | str = "cpu") -> nn.Module:
        """MPG-Net's generator: images in [0, 1] to such.

        Raises:
            InputError: as `load_model`.
        """
        from apd.models.mpgnet import Generator

        generator = Generator(self.config.mpg.width, self.config.mpg.blocks)
        path = self.path / GENERATOR
        if not path.is_file():
            raise InputError(f"{self.path}: no {GENERATOR}: the run has no finished stage 1")
        state = load_tensors(path)
        self._check_unchanged(GENERATOR)
        _load_state(generator, state, path)
        return generator.eval().to(device)

    def _check_unchanged(self, name: str) -> None:
        """As it was when the training ended; runs of older versions do not say."""
        expected = self.info().get("weights", {}).get(name)
        if expected is not None and sha256_of(self._file(name)) != expected:
            raise InputError(f"{self.path / name}: has changed since the training of its run ended")

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{self.path}: no {name}: its training has not come to an end")
        return path


def sha256_of(path: Path) -> str:
    """Of a file's contents, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; InputError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise InputError(f"{path}: not a .safetensors file, or cut off or damaged") from error


def save_tensors(path: Path, model: nn.Module) -> None:
    """Write the state of a model in one step."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}))


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: its tensors do not fit the run's {CONFIG}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with reading(path, "damaged"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_info(path: Path) -> dict[str, Any]:
    """The contents of run.json of a run folder; empty where there is none."""
    return _read_json(path / INFO)


def update_info(path: Path, **changes: Any) -> None:
    """Add to run.json of the run folder."""
    write_json(path / INFO, {**_read_json(path / INFO), **changes})
