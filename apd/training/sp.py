"""Stage 2: SP-Net, or the baseline, is trained on original and synthesized images (APD, section SP-Net)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apd.config.values import Config, TrainConfig
from apd.console import console
from apd.data.augmentation import Augmentation, training_transform
from apd.data.images import ImageStore
from apd.data.loading import Batch, device_batches, fits_on, training_batches
from apd.data.market import Sample
from apd.data.sampler import BatchOrder, DomainSampler, PKSampler, WithCounterparts
from apd.interrupt import asked_to_end, interrupted, whole_steps
from apd.models.spnet import build_spnet, parameter_groups
from apd.run import WEIGHTS, read_info, save_tensors, update_info
from apd.training.checkpoint import LOG, load_checkpoint, restoring, save_checkpoint
from apd.training.distributed import Unlogged, on_any, own_rows
from apd.training.engine import CheckpointClock, LossGuard, make_accelerator
from apd.training.log import StageLog
from apd.training.sources import Sources
from apd.training.step import TrainingStep
from apd.training.validation import Validation

STAGE = "sp"
_CHECKPOINT = {
    **{"model": {...: torch.Tensor}, "optimizer": dict, "scaler": dict},
    **{"log": LOG, "best": float, "spread?": (float, type(None))},
}
_MOMENTUM = 0.9
_COLLAPSED = 0.1  # of the first spread
_LN2 = math.log(2)  # the soft margin of a triplet whose two distances are equal


def total_steps(config: TrainConfig, images: int) -> int:
    """Steps of the training: as given, or as many as `epochs` passes over the images take."""
    return config.steps if config.steps is not None else round(config.epochs * images / config.batch_size)


def rate(step: int, warmup: float, steps: int) -> float:
    """Factor on the learning rate of step 0, 1, …: linear from 1 / warmup to 1, then half a cosine to 0."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; the learning rate is that of a batch of 64, scaled with the batch size."""
    groups = parameter_groups(model, config.lr * config.batch_size / 64, config.weight_decay, config.bias_lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM)
    return torch.optim.AdamW(groups)


def check_sp(sources: Sources, config: Config) -> None:
    """Raise now what would end stage 2 before its first step, and so waste a stage 1.

    Raises:
        InputError: too few identities, or too few for the processes; a backbone or weights that are not to be had.
    """
    own_rows(config.train)
    _sampler(sources, config)
    build_spnet(config.model, (config.data.height, config.data.width), sources.identities)


def _sampler(sources: Sources, config: Config) -> BatchOrder:
    """Originals are drawn as in a training without synthesized images, which come behind them in `sources`."""
    size, originals = (config.train.batch_size, config.train.instances), sources.originals
    labels, domains = sources.labels[:originals], sources.domains[:originals]
    order: BatchOrder = PKSampler(labels, *size, seed=config.seed)
    if config.train.sampler == "domain":
        order = DomainSampler(labels, domains, *size, seed=config.seed)
    if len(sources) == originals:
        return order
    first = round(config.data.synthesized_from * total_steps(config.train, originals))
    return WithCounterparts(order, originals, first, config.data.synthesized_probability, seed=config.seed)


def _batches(
    sources: Sources, config: Config, fill: Sequence[float], device: torch.device, own: slice, start: int, stop: int
) -> Generator[Batch, None, None]:
    """Augmented where the configuration says."""
    data = config.data
    augmentation = Augmentation.of(data, fill)
    order: dict[str, Any] = {"seed": config.seed, "start": start, "stop": stop, "rows": own}
    store = ImageStore(sources.paths, (data.height, data.width), cache=data.cache)
    if data.augment == "device" or (data.augment == "auto" and fits_on(device, store.bytes)):
        return device_batches(store.all().to(device), _sampler(sources, config), augmentation, **order)
    transform = training_transform(augmentation)
    return training_batches(store, _sampler(sources, config), transform, workers=data.workers, **order)


def train_sp(run: Path, sources: Sources, validation: list[list[Sample]], config: Config, device: str) -> float:
    """Train, or go on training, and write the network to the run.

    With identities held out for validation the weights of the best mAP on them are
    kept, otherwise the last ones; images of a target domain have no say.

    Args:
        run: the run's folder.
        sources: the training images.
        validation: held-out images of each source; empty lists for none.
        config: of the run.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        the seconds it took, those before a restart included.

    Raises:
        InputError: too few identities, or too few for the processes; an unreadable image; a loss that is not finite.
    """
    options = config.train
    own = own_rows(options)
    size = (config.data.height, config.data.width)
    accelerator = make_accelerator(config, device)
    checkpoint = load_checkpoint(run, STAGE, _CHECKPOINT)
    torch.manual_seed(config.seed)
    model = build_spnet(config.model, size, sources.identities, load=checkpoint is None).to(accelerator.device)
    start, logged, best = 0, None, -1.0
    spread: float | None = None  # of f, at the first line
    optimizer = accelerator.prepare(make_optimizer(model, options))
    steps = total_steps(options, sources.originals)
    if checkpoint is not None:
        start, logged, best = checkpoint["step"], checkpoint["log"], checkpoint["best"]
        spread = checkpoint.get("spread")
        with restoring(run, STAGE):
            if start > steps:
                raise ValueError(f"step {start} of {steps}")
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(checkpoint["scaler"])

    epoch = sources.originals / options.batch_size  # in steps
    warmup, ramp = options.warmup_epochs * epoch, config.loss.ramp_epochs * epoch
    every = max(1, round(options.validation_epochs * epoch))
    chosen = Validation(run, validation, size, every=every, workers=config.data.workers, best=best)
    labels = torch.from_numpy(sources.labels)
    batches = _batches(sources, config, model.mean_colour, accelerator.device, own, start, steps)
    collapsed = bool(read_info(run).get("collapsed"))
    work, guard = TrainingStep(model, config, accelerator), LossGuard(STAGE, sources.paths, [model])
    title = "baseline" if config.model.ssd == "none" else "SP-Net"
    writes = accelerator.is_main_process
    log = StageLog(run, STAGE, title, start, steps, every=config.log_steps, state=logged) if writes else Unlogged()
    with log, whole_steps(), closing(batches):

        def save(step: int) -> None:
            guard.settle()
            log.flush()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": {} if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            save_checkpoint(run, STAGE, step, {**state, "log": log.state(), "best": chosen.best, "spread": spread})

        clock = CheckpointClock(config.checkpoint_minutes, save)
        model.train()
        for step, batch in enumerate(batches, start + 1):
            factor = rate(step - 1, warmup, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            images = batch.images.to(accelerator.device, non_blocking=True)
            targets = labels[batch.indices].to(accelerator.device, non_blocking=True)
            optimizer.zero_grad()
            losses = work.backward(step, images, own, targets, min(1.0, step / ramp) if ramp else 1.0)
            guard.watch(step, losses["loss"], batch.indices)
            if options.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            if log.due(step) or chosen.due(step, steps):
                guard.settle()
            log.step(step, losses, epoch=step / epoch, lr=optimizer.param_groups[0]["lr"])
            if log.due(step):
                now = float(losses["spread"])
                spread = now if spread is None else spread
                if now < _COLLAPSED * spread and not collapsed:
                    collapsed = True
                    if writes:
                        _report_collapse(run, step, now, spread, float(losses["loss_k"]))
            if writes:
                if chosen.due(step, steps):
                    with accelerator.autocast():
                        chosen.validate(model, step, log)
                clock.tick(step)
            if on_any(asked_to_end()):
                if writes:
                    clock.save(step)
                raise interrupted(step)
            if collapsed and options.on_collapse == "stop":
                break
        guard.settle()
        if writes and start < steps:
            clock.save(steps)
    if writes and chosen.best < 0:  # nothing was held out, or there was no step after which to validate
        save_tensors(run / WEIGHTS, model)
    return log.seconds


def _report_collapse(run: Path, step: int, spread: float, start: float, loss: float) -> None:
    update_info(run, collapsed={"step": step, "spread": spread, "start": start})
    stuck = f"; L_K is {loss:.3f}, of which equal distances alone are ln 2 = {_LN2:.3f}" if loss > _LN2 else ""
    console.print(
        f"warning: collapsed at step {step}: the spread of f is {spread:.3g}, {start:.3g} at the first line: the "
        f"network describes everybody alike{stuck}",
        style="yellow",
        soft_wrap=True,
    )
