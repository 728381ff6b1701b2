"""SP-Net, the Semantic Purification Network: a vision transformer that identifies by the relevant part of its patches.

F is the map of patch embeddings of an image x. MSP and SSD (APD, section SP-Net) make of it

    K = ⅓ (σ(DC1 F) + σ(DC2 σ(DC3 F)) + σ(DC4 F)) ⊙ F,    NK = F − K,    K* = K + NK[permutation]

with dilated convolutions DC, and the transformer turns each of the three maps into a class token: f, f_n, f*. The
baseline is the same network with K = F and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from apd.config import ModelConfig
from apd.errors import InputError
from apd.models.exchange import exchanged_maps
from apd.models.normalize import Normalize
from apd.models.weights import load_weights, pretrained_model
from apd_kernels import ssd_mask


class MSP(nn.Module):
    """Multi-scale Semantic Perception (APD, eq. 6): three attention maps of one map size, as logits before the sigmoid.

    Args:
        channels: C of the feature map.
        bias_init: initial bias of the convolutions that end a path; with b, K starts near σ(b) F.
    """

    def __init__(self, channels: int, bias_init: float = 2.0) -> None:
        super().__init__()

        def dilated(kernel: int) -> nn.Conv2d:
            # Padded by half of the dilated span, so that the map keeps its size: 2 for kernel 3, 1 for kernel 2.
            return nn.Conv2d(channels, channels, kernel, padding=kernel - 1, dilation=2)

        self.dc1, self.dc2, self.dc3, self.dc4 = dilated(3), dilated(2), dilated(3), dilated(2)
        for last in (self.dc1, self.dc2, self.dc4):
            nn.init.constant_(_bias(last), bias_init)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Three logits (B, C, H, W) of features (B, C, H, W)."""
        return [self.dc1(features), self.dc2(self.dc3(features).sigmoid()), self.dc4(features)]


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


class Branch(NamedTuple):
    """What one of the three maps became."""

    features: Tensor  # (B, D), the class token after the last norm: triplets, and the descriptor before_bn
    logits: Tensor  # (B, number of identities)


class Branches(NamedTuple):
    """A training pass; a branch that the model does not have is None."""

    relevant: Branch  # of K, or of F in the baseline
    irrelevant: Branch | None  # of NK
    perturbed: Branch | None  # of K*
    exchanged: Tensor | None  # bool (B,): images whose K* holds the NK of another identity; None where there is no K*


class Heads(nn.Module):
    """One classifier for all branches, and one batch norm for each: f's running statistics never see f* or f_n.

    TransReID's: the norm's bias stays 0, the classifier has none and starts with a deviation of 0.001.
    """

    def __init__(self, dim: int, num_classes: int, branches: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(branches))
        for norm in self.norms:
            norm.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, features: Tensor, branch: int, *, track: bool = True) -> Tensor:
        """Logits (B, classes) of features (B, D); `track`: whether the running statistics take note of them."""
        norm: Any = self.norms[branch]
        if self.training and not track:
            normed = batch_norm(features, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        else:
            normed = norm(features)
        return self.classifier(normed)


RELEVANT = 0  # K's place among the branches; NK and K* follow
_BRANCHES = {"none": 1, "msp": 1, "sds": 2, "sps": 3}


class SPNet(nn.Module):
    """A timm vision transformer with MSP, SSD and the heads of training.

    Args:
        vit: the transformer, without a classifier of its own.
        num_classes: identities to tell apart in training.
        ssd: ``"none"`` (the baseline), ``"msp"``, ``"sds"`` or ``"sps"``, see `apd.config.ModelConfig`.
        msp_bias_init: see `MSP`.
        descriptor: ``"before_bn"`` or ``"after_bn"``: which class token `forward` returns.
    """

    def __init__(
        self,
        vit: nn.Module,
        num_classes: int,
        *,
        ssd: str = "sps",
        msp_bias_init: float = 2.0,
        descriptor: str = "before_bn",
    ) -> None:
        super().__init__()
        vit_: Any = vit
        self.normalize = Normalize(vit_.pretrained_cfg["mean"], vit_.pretrained_cfg["std"])
        self.vit = vit_
        self.ssd = ssd
        self.descriptor = descriptor
        self.msp = None if ssd == "none" else MSP(vit_.embed_dim, msp_bias_init)
        self.heads = Heads(vit_.num_features, num_classes, _BRANCHES[ssd])

    @property
    def mean_colour(self) -> list[float]:
        """What the network sees as nothing, in [0, 1]: the fill of random erasing."""
        return self.normalize.mean.flatten().tolist()

    def embed(self, images: Tensor) -> Tensor:
        """F, the map of patch embeddings (B, C, H / patch, W / patch), before flattening and position embedding."""
        return self.vit.patch_embed.proj(self.normalize(images))

    def tokens(self, maps: Tensor) -> Iterator[Tensor]:
        """The tokens (B, 1 + patches, D) after each block, then those after the last norm, of maps (B, C, H, W)."""
        vit = self.vit
        tokens = vit.patch_embed.norm(maps.flatten(2).transpose(1, 2))
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens)))
        for block in vit.blocks:
            tokens = block(tokens)
            yield tokens
        yield vit.norm(tokens)

    def encode(self, maps: Tensor) -> Tensor:
        """The class token (B, D) after the last norm, of maps (B, C, H, W)."""
        *_, tokens = self.tokens(maps)
        return tokens[:, 0]

    def relevant_map(self, images: Tensor) -> Tensor:
        """K (B, C, H / patch, W / patch); F in the baseline."""
        features = self.embed(images)
        return features if self.msp is None else ssd_mask(features, self.msp(features), None).relevant

    def attention(self, images: Tensor) -> Tensor:
        """The three attention maps of MSP, each the mean of its channels; their mean is that of K / F.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, H / patch, W / patch) in [0, 1].
        """
        assert self.msp is not None, "the baseline has no attention"
        return torch.stack([logits.sigmoid().mean(1) for logits in self.msp(self.embed(images))], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors (B, D), not normalized, of images (B, 3, H, W) in [0, 1]: one pass, of the relevant part."""
        f = self.encode(self.relevant_map(images))
        return f if self.descriptor == "before_bn" else self.heads.norms[RELEVANT](f)

    def branches(self, images: Tensor, labels: Tensor) -> Branches:
        """A training pass: the three maps go through the transformer as one batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            labels: identity of each image, int64 (B,): K* takes its NK from an image of another one.
        """
        return self.classified(*self.branch_features(images, labels))

    def branch_features(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part of a training pass that several processes share.

        Returns:
            features of the branches, (branches, B, D), and `Branches.exchanged`.
        """
        features = self.embed(images)
        exchanged = None
        if self.msp is None:
            maps = features
        elif self.ssd == "msp":
            maps = ssd_mask(features, self.msp(features), None).relevant
        elif self.ssd == "sds":
            maps = ssd_mask(features, self.msp(features), None, stacked=True)
        else:
            maps, exchanged = exchanged_maps(features, self.msp(features), labels)
        return self.encode(maps).unflatten(0, (-1, len(images))), exchanged

    def classified(self, features: Tensor, exchanged: Tensor | None) -> Branches:
        """The rest of it, on the features of all images of the step: what `branch_features` returns."""
        found = [Branch(f, self.heads(f, i)) for i, f in enumerate(features.unbind())]
        relevant, irrelevant, perturbed = (*found, None, None)[:3]
        assert relevant is not None
        return Branches(relevant, irrelevant, perturbed, exchanged)


def build_spnet(config: ModelConfig, size: tuple[int, int], num_classes: int, *, load: bool = True) -> SPNet:
    """SP-Net as configured.

    Args:
        config: section ``model``.
        size: height and width of the images, pixels.
        num_classes: identities to tell apart in training.
        load: whether to load pretrained weights; not where a run's own are loaded afterwards.

    Raises:
        InputError: the backbone is no vision transformer of timm, its patches do not fill the images, or its weights
            are not to be had.
    """
    changes: dict[str, Any] = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    options = {name: value for name, value in changes.items() if value is not None}
    options |= {"img_size": size, "num_classes": 0, "drop_path_rate": config.drop_path}
    try:
        if load and config.pretrained == "timm":
            vit = pretrained_model(config.backbone, **options)
        else:
            vit = timm.create_model(config.backbone, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"model.backbone: {error}") from error
        raise InputError(
            f"model.backbone: expected a vision transformer that takes {options}, got {config.backbone}: {error}"
        ) from error
    _check_backbone(vit, config.backbone, size)
    if load and config.pretrained not in ("timm", "none"):
        load_weights(vit, Path(config.pretrained), "model.pretrained")
    return SPNet(vit, num_classes, ssd=config.ssd, msp_bias_init=config.msp_bias_init, descriptor=config.descriptor)


def _check_backbone(vit: Any, name: str, size: tuple[int, int]) -> None:
    plain = isinstance(vit, timm.models.VisionTransformer) and isinstance(vit.patch_embed, timm.layers.PatchEmbed)
    if not plain or vit.cls_token is None:
        raise InputError(
            f"model.backbone: expected a vision transformer with a class token and patches of the image, got {name}"
        )
    for side, pixels, patch in zip(("height", "width"), size, vit.patch_embed.patch_size, strict=True):
        if pixels % patch:  # the convolution would leave out the rest of the image without a word
            raise InputError(f"data.{side}: expected a multiple of {name}'s patches of {patch} pixels, got {pixels}")


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, bias_lr: float) -> list[dict[str, Any]]:
    """Optimizer groups as in TransReID: biases learn `bias_lr` times as fast.

    A group remembers its learning rate as ``"base_lr"``, which the schedule multiplies.
    """
    named: Sequence[tuple[str, nn.Parameter]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    biases = [p for n, p in named if n.endswith("bias")]
    others = [p for n, p in named if not n.endswith("bias")]
    return [
        {"params": others, "lr": lr, "base_lr": lr, "weight_decay": weight_decay},
        {"params": biases, "lr": lr * bias_lr, "base_lr": lr * bias_lr, "weight_decay": weight_decay},
    ]
