"""Every value that decides a training run: its default, its meaning, and where the default comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PAPER = "paper"  # Tan et al. 2025
TRANSREID = "TransReID"
OURS = "ours"  # the paper's readable part leaves it open, or it is a matter of engineering


def _value(default: Any, help: str, source: str, *, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "source": source, "choices": choices})


@dataclass(frozen=True)
class DataConfig:
    """Images."""

    height: int = _value(256, "height of the network's input, pixels", TRANSREID)
    width: int = _value(128, "width of the network's input, pixels", TRANSREID)
    flip: float = _value(0.5, "probability of a horizontal flip in stage 2", TRANSREID)
    pad: int = _value(10, "zero padding before the random crop in stage 2, pixels", TRANSREID)
    erasing: float = _value(0.5, "probability of random erasing in stage 2", TRANSREID)
    train_on: str = _value(
        "both",
        "images of stage 2 after a stage 1; the paper trains on the synthesized ones",
        OURS,
        choices=("both", "synthesized", "original"),
    )
    workers: int = _value(4, "processes that read images; 0 reads in the training process", OURS)
    cache: bool = _value(False, "keep the decoded, resized images in memory: height × width × 3 bytes each", OURS)


@dataclass(frozen=True)
class MPGConfig:
    """Stage 1: MPG-Net, which synthesizes hard-matching images."""

    steps: int = _value(20_000, "optimiser steps of generator and discriminator", OURS)
    batch_size: int = _value(32, "images in a step", OURS)
    negatives: int = _value(4, "M, images of other identities drawn for every image, anew in each epoch", OURS)
    weight_mp: float = _value(2.0, "λ1, weight of the metric perturbation loss (eq. 3)", PAPER)
    weight_s: float = _value(1.0, "λ2, weight of the self-consistency loss (eq. 5)", PAPER)
    weight_c: float = _value(1.0, "λ3, weight of the content loss (eq. 4)", PAPER)
    width: int = _value(64, "channels of the generator's stem", OURS)
    blocks: int = _value(6, "residual blocks of the generator", OURS)
    discriminator_width: int = _value(64, "channels of the discriminator's first layer", OURS)
    discriminator_layers: int = _value(3, "stride-2 layers of the discriminator", OURS)
    lr: float = _value(2e-4, "learning rate of both (Adam)", OURS)
    beta1: float = _value(0.5, "Adam's β1 of both", OURS)
    trunk: str = _value(
        "auto",
        "frozen network of ψ and φ: a timm name with ImageNet weights; auto (resnet50 as in the paper, else "
        "tf_efficientnet_lite0, else self); self (the baseline, trained on the source identities first); "
        "random:NAME (untrained, a control)",
        OURS,
    )
    trunk_weights: str | None = _value(
        None, "its weights: a local file of the timm model, or the run of a baseline for trunk=self", OURS
    )


@dataclass(frozen=True)
class ModelConfig:
    """Stage 2: SP-Net."""

    backbone: str = _value("vit_base_patch16_224", "vision transformer, by its timm name", TRANSREID)
    pretrained: str = _value("timm", "its weights: timm (cache or download), none, or a local file", TRANSREID)
    patch_size: int | None = _value(None, "pixels of a patch's side; none: as the backbone", OURS)
    embed_dim: int | None = _value(None, "channels of a token; none: as the backbone", OURS)
    depth: int | None = _value(None, "transformer blocks; none: as the backbone", OURS)
    heads: int | None = _value(None, "attention heads; none: as the backbone", OURS)
    drop_path: float = _value(0.1, "stochastic depth of the last block, growing linearly from 0", TRANSREID)
    ssd: str = _value(
        "sps",
        "none: the baseline; msp: attention on the patch embeddings; sds: also learns from what it leaves out; "
        "sps: also exchanges that between identities (all of SP-Net)",
        PAPER,
        choices=("none", "msp", "sds", "sps"),
    )
    msp_bias_init: float = _value(2.0, "first bias of the attention logits: K starts near 0.9 F; 0.0 is plain", OURS)
    descriptor: str = _value(
        "before_bn", "the class token before or after the batch norm", TRANSREID, choices=("before_bn", "after_bn")
    )


@dataclass(frozen=True)
class LossConfig:
    """Losses of stage 2."""

    weight_k: float = _value(1.0, "weight of L_K: keep identity", PAPER)
    weight_nk: float = _value(0.5, "weight of L_NK: irrelevant features without identity", PAPER)
    weight_kp: float = _value(0.1, "weight of L_K*: defend against the perturbation", PAPER)
    ramp_epochs: float = _value(5.0, "epochs over which the weights of L_NK and L_K* grow from 0", OURS)
    triplets: str = _value(
        "shared",
        "shared: L_K's mined triplets serve all three; own: each loss mines its own; reversed: as own, and L_NK takes "
        "the farthest other and the nearest same identity",
        OURS,
        choices=("shared", "own", "reversed"),
    )
    margin: float | None = _value(None, "margin of the triplet terms; none: the soft margin ln(1 + e^x)", PAPER)
    label_smoothing: float = _value(0.0, "label smoothing of the cross-entropy terms", TRANSREID)


@dataclass(frozen=True)
class LatentConfig:
    """Hard samples made from features instead of by a generator; with perturbation latent or both."""

    weight: float = _value(0.1, "λ_adv, weight of the loss on the perturbed features", OURS)
    epsilon: float = _value(0.1, "radius of the ball, relative to the feature's norm", OURS)
    steps: int = _value(5, "steps of metric_perturb", OURS)


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of stage 2."""

    batch_size: int = _value(64, "images in a step", TRANSREID)
    instances: int = _value(4, "images of an identity in a step", TRANSREID)
    epochs: float = _value(120.0, "length of the training in passes over the images", TRANSREID)
    steps: int | None = _value(None, "length of the training in steps; none: as epochs says", OURS)
    optimizer: str = _value("sgd", "sgd (momentum 0.9) or adamw", TRANSREID, choices=("sgd", "adamw"))
    lr: float = _value(0.008, "learning rate for a batch of 64; scaled with the batch size", TRANSREID)
    weight_decay: float = _value(1e-4, "weight decay", TRANSREID)
    bias_lr: float = _value(2.0, "factor on the learning rate of biases", TRANSREID)
    warmup_epochs: float = _value(5.0, "epochs over which the learning rate grows linearly; then cosine to 0", TRANSREID)
    clip: float | None = _value(None, "largest norm of the gradient; none: not clipped", OURS)
    validation_identities: int = _value(
        0, "identities of every source kept from training to choose the best weights by; 0: the last weights", OURS
    )
    validation_epochs: float = _value(5.0, "epochs between two validations", OURS)


@dataclass(frozen=True)
class Config:
    """A training run."""

    seed: int = _value(0, "seed of everything random", OURS)
    perturbation: str = _value(
        "generator",
        "where hard samples come from: generator (stage 1, MPG-Net), latent (metric_perturb on features), both, none",
        PAPER,
        choices=("generator", "latent", "both", "none"),
    )
    precision: str = _value("no", "mixed precision: no, bf16 or fp16", OURS, choices=("no", "bf16", "fp16"))
    checkpoint_minutes: float = _value(5.0, "most minutes between two checkpoints", OURS)
    log_steps: int = _value(10, "steps between two lines of metrics.csv", OURS)
    data: DataConfig = field(default_factory=DataConfig)
    mpg: MPGConfig = field(default_factory=MPGConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
