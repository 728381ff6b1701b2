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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apd.config.values import Config
from apd.errors import InputError
from apd.files import read_json, reading, write_bytes, write_json

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

        state = self._tensors(WEIGHTS)
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
        _load_state(generator, self._tensors(GENERATOR), path)
        return generator.eval().to(device)

    def content(self, name: str) -> bytes:
        """A file of weights, as it was when its stage ended; runs of older versions do not say.

        Raises:
            InputError: there is no such file, or it has changed since.
        """
        path = self._file(name)
        content = path.read_bytes()
        expected = self.info().get("weights", {}).get(name)
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise InputError(f"{path}: has changed since its training ended: another SHA-256 than in {INFO}")
        return content

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.path / name, self.content(name))

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{self.path}: no {name}: its training has not come to an end")
        return path


def sha256_of(path: Path) -> str:
    """Of a file's contents, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tensors(path: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of which the content may have been read; InputError where it is damaged."""
    from safetensors.torch import load

    with reading(path, "not a .safetensors file, or cut off or damaged"):
        return load(path.read_bytes() if content is None else content)


def save_tensors(path: Path, model: nn.Module) -> None:
    """Write the state of a model in one step."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}))


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: its tensors do not fit the run's {CONFIG}") from error


_INFO = {
    **{"data?": [str], "images?": str, "contents?": {...: str}, "files?": {...: str}, "weights?": {...: str}},
    **{
        "started?": str,
        "finished?": str,
        "versions?": {...: str},
        "threads?": int,
        "trunk_choice?": str,
        "trunk?": str,
    },
    **{"seconds?": {...: float}, "camera_distance?": (float, type(None)), "own_test?": {...: {...: {...: float}}}},
    **{"collapsed?": {"step": int, ...: float}, "mpg_stopped?": {...: float}, "extended?": bool},
}


def read_info(path: Path) -> dict[str, Any]:
    """The contents of run.json of a run folder; empty where there is none.

    Raises:
        InputError: it is damaged, or a value is of another kind than a training writes.
    """
    found: dict[str, Any] = read_json(path / INFO, _INFO) if (path / INFO).exists() else {}
    return found


def update_info(path: Path, **changes: Any) -> None:
    """Add to run.json of the run folder."""
    write_json(path / INFO, {**read_info(path), **changes})
