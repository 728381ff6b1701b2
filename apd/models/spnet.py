"""SP-Net, the Semantic Purification Network: it identifies people by the relevant part of a shallow map.

F is the map of patch embeddings of an image x, or that after a stage of a CNN. MSP and SSD (APD, section SP-Net) make
of it

    K = ⅓ (σ(DC1 F) + σ(DC2 σ(DC3 F)) + σ(DC4 F)) ⊙ F,    NK = F − K,    K* = K + NK[permutation]

with dilated convolutions DC, and the rest of the backbone turns each of the three maps into a vector: f, f_n, f*. It is
the transformer's class token, or the CNN's pooled map. The baseline is the same network with K = F and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from apd.config.values import ModelConfig
from apd.errors import InputError
from apd.models.backbone import build_backbone, run_weights
from apd.models.cnn import (
    CONTENT_REDUCTION,
    Steps,
    add_branch_statistics,
    batch_norms,
    find_steps,
    is_branch_statistic,
    statistics_of,
)
from apd.models.exchange import exchanged_maps
from apd.models.normalize import Normalize
from apd.models.weights import load_weights
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
        logits = self.dc1(features), self.dc2(self.dc3(features).sigmoid()), self.dc4(features)
        # Under autocast convolutions give half precision, also where F is float32, as after ConvNeXt's layer scale.
        return [logit.to(features.dtype) for logit in logits]


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


class Branch(NamedTuple):
    """What one of the three maps became."""

    features: Tensor  # (B, D): triplets, and the descriptor before_bn
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


class SPNet(nn.Module, ABC):
    """MSP, SSD and the heads of training, around a backbone: `TransformerSPNet` or `CNNSPNet`.

    Args:
        backbone: of timm, without a classifier of its own; its images are normalized as timm says.
        channels: C of the map F.
        dim: D of f.
        num_classes: identities to tell apart in training.
        ssd: ``"none"`` (the baseline), ``"msp"``, ``"sds"`` or ``"sps"``, see `apd.config.values.ModelConfig`.
        msp_bias_init: see `MSP`.
        descriptor: ``"before_bn"`` or ``"after_bn"``: which f `forward` returns.
    """

    backbone_name: ClassVar[str]  # in the state dict

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        dim: int,
        num_classes: int,
        *,
        ssd: str,
        msp_bias_init: float,
        descriptor: str,
    ) -> None:
        super().__init__()
        trained: Any = backbone.pretrained_cfg
        self.normalize = Normalize(trained["mean"], trained["std"])
        self.add_module(self.backbone_name, backbone)
        self.ssd = ssd
        self.descriptor = descriptor
        self.msp = None if ssd == "none" else MSP(channels, msp_bias_init)
        self.heads = Heads(dim, num_classes, _BRANCHES[ssd])

    @property
    def mean_colour(self) -> list[float]:
        """What the network sees as nothing, in [0, 1]: the fill of random erasing."""
        return self.normalize.mean.flatten().tolist()

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """F (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""

    @abstractmethod
    def encode(self, maps: Tensor) -> Tensor:
        """f (B, D) of maps (B, C, h, w), as the relevant branch takes them."""

    @abstractmethod
    def encode_branches(self, maps: Tensor, count: int) -> Tensor:
        """Vectors (count, B, D) of K, NK and K*, or the first `count` of them, of maps (count · B, C, h, w)."""

    @abstractmethod
    def shallow_and_deep(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """φ, a map of shallow content, and ψ, the baseline's f, of images (B, 3, H, W): it is MPG-Net's trunk."""

    def relevant_map(self, images: Tensor) -> Tensor:
        """K (B, C, h, w); F in the baseline."""
        features = self.embed(images)
        return features if self.msp is None else ssd_mask(features, self.msp(features), None).relevant

    def attention(self, images: Tensor) -> Tensor:
        """The three attention maps of MSP, each the mean of its channels; their mean is that of K / F.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, h, w) in [0, 1].
        """
        assert self.msp is not None, "the baseline has no attention"
        return torch.stack([logits.sigmoid().mean(1) for logits in self.msp(self.embed(images))], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors (B, D), not normalized, of images (B, 3, H, W) in [0, 1]: one pass, of the relevant part."""
        f = self.encode(self.relevant_map(images))
        return f if self.descriptor == "before_bn" else self.heads.norms[RELEVANT](f)

    def branches(self, images: Tensor, labels: Tensor) -> Branches:
        """A training pass of all three maps.

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
        return self.encode_branches(maps, _BRANCHES[self.ssd]), exchanged

    def classified(self, features: Tensor, exchanged: Tensor | None) -> Branches:
        """The rest of it, on the features of all images of the step: what `branch_features` returns."""
        found = [Branch(f, self.heads(f, i)) for i, f in enumerate(features.unbind())]
        relevant, irrelevant, perturbed = (*found, None, None)[:3]
        assert relevant is not None
        return Branches(relevant, irrelevant, perturbed, exchanged)


class TransformerSPNet(SPNet):
    """SP-Net of a timm vision transformer: F is its patch embeddings, before flattening and position embedding.

    Args:
        vit: the transformer, without a classifier of its own.
        num_classes, options: see `SPNet`.
    """

    backbone_name = "vit"
    vit: Any

    def __init__(self, vit: timm.models.VisionTransformer, num_classes: int, **options: Any) -> None:
        super().__init__(vit, vit.embed_dim, vit.num_features, num_classes, **options)

    def embed(self, images: Tensor) -> Tensor:
        return self.vit.patch_embed.proj(self.normalize(images))

    def tokens(self, maps: Tensor) -> Iterator[Tensor]:
        """The tokens (B, 1 + patches, D) after each block, then those after the last norm, of maps (B, C, h, w)."""
        vit = self.vit
        tokens = vit.patch_embed.norm(maps.flatten(2).transpose(1, 2))
        if vit.dynamic_img_size:  # timm then expects them as a map, and gives them back as tokens
            tokens = tokens.unflatten(1, maps.shape[2:])
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens)))
        for block in vit.blocks:
            tokens = block(tokens)
            yield tokens
        yield vit.norm(tokens)

    def encode(self, maps: Tensor) -> Tensor:
        *_, tokens = self.tokens(maps)
        return tokens[:, 0]

    def encode_branches(self, maps: Tensor, count: int) -> Tensor:
        return self.encode(maps).unflatten(0, (count, -1))  # layer norms: what else is in the batch changes nothing

    def shallow_and_deep(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens after half of the blocks, and the class token after the last norm."""
        tokens = list(self.tokens(self.embed(images)))
        blocks = len(tokens) - 1
        return tokens[max(blocks // 2, 1) - 1], tokens[-1][:, 0]


class CNNSPNet(SPNet):
    """SP-Net of a timm CNN: F is the map after one of its stages.

    Where the CNN has batch norms after F, each branch is a pass with statistics of its own; the weights are shared.

    Args:
        cnn: the network, without a classifier of its own.
        steps: its modules in order, and where F is.
        num_classes, options: see `SPNet`.
    """

    backbone_name = "cnn"
    cnn: Any

    def __init__(self, cnn: nn.Module, steps: Steps, num_classes: int, **options: Any) -> None:
        super().__init__(cnn, steps.channels, steps.dim, num_classes, **options)
        self.steps = steps
        before = {norm for name in steps.names[: steps.stage] for norm in batch_norms(cnn.get_submodule(name))}
        self.branch_norms = [norm for norm in batch_norms(cnn) if norm not in before]
        add_branch_statistics(self.branch_norms, _BRANCHES[self.ssd])

    def embed(self, images: Tensor) -> Tensor:
        return self._run(self.normalize(images), 0, self.steps.stage)

    def encode(self, maps: Tensor) -> Tensor:
        return self.cnn.forward_head(self._run(maps, self.steps.stage, None))

    def encode_branches(self, maps: Tensor, count: int) -> Tensor:
        if not self.branch_norms:
            return self.encode(maps).unflatten(0, (count, -1))
        vectors = []
        for branch, part in enumerate(maps.chunk(count)):
            with statistics_of(self.branch_norms, branch):
                vectors.append(self.encode(part))
        return torch.stack(vectors)

    def shallow_and_deep(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The map at reduction 8, and the pooled end."""
        if self.steps.content is None:
            raise InputError(f"mpg.trunk: expected a baseline with a stage at reduction {CONTENT_REDUCTION}")
        shallow = self._run(self.normalize(images), 0, self.steps.content)
        return shallow, self.cnn.forward_head(self._run(shallow, self.steps.content, None))

    def _run(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        for name in self.steps.names[start:stop]:
            x = self.cnn.get_submodule(name)(x)
        return x


def build_spnet(config: ModelConfig, size: tuple[int, int], num_classes: int, *, load: bool = True) -> SPNet:
    """SP-Net as configured.

    Args:
        config: section ``model``.
        size: height and width of the images, pixels.
        num_classes: identities to tell apart in training.
        load: whether to load pretrained weights; not where a run's own are loaded afterwards.

    Raises:
        InputError: the backbone is neither a vision transformer nor a CNN of timm that can be cut after the stage, a
            value does not fit it or the images, or its weights are not to be had.

    From another run all is taken that fits; heads of other identities, and parts that it lacks, are made anew.
    """
    backbone = build_backbone(config, size, load=load)
    options: dict[str, Any] = {
        "ssd": config.ssd,
        "msp_bias_init": config.msp_bias_init,
        "descriptor": config.descriptor,
    }
    model: SPNet
    if isinstance(backbone, timm.models.VisionTransformer):
        model = TransformerSPNet(backbone, num_classes, **options)
    else:
        steps = find_steps(backbone, config.backbone, config.stage, size)
        model = CNNSPNet(backbone, steps, num_classes, **options)
    if load and (path := run_weights(config)) is not None:
        load_weights(model, path, "model.pretrained", _of_training)
        if isinstance(model, CNNSPNet):
            add_branch_statistics(model.branch_norms, _BRANCHES[model.ssd])  # anew, of what was loaded
    return model


def _of_training(name: str) -> bool:
    """Whether a tensor depends on the identities or on ``model.ssd``, and need not be another run's."""
    return name.startswith(("heads.", "msp.")) or is_branch_statistic(name)


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
