"""Stage 2: SP-Net, or the baseline, is trained on original and synthesized images (APD, section SP-Net)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from apd.config import Config, TrainConfig
from apd.data.images import ImageStore
from apd.data.loading import training_batches, training_transform
from apd.data.market import Sample
from apd.data.sampler import PKSampler
from apd.models.spnet import SPNet, build_spnet, parameter_groups
from apd.run import WEIGHTS, save_tensors
from apd.training.checkpoint import load_checkpoint, save_checkpoint
from apd.training.engine import CheckpointClock, make_accelerator, seed_step
from apd.training.log import StageLog
from apd.training.losses import latent_loss, spnet_losses
from apd.training.sources import Sources, split_validation
from apd.training.validation import evaluate_samples

STAGE = "sp"
_STREAM = 2
_MOMENTUM = 0.9


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


def training_losses(model: SPNet, images: Tensor, labels: Tensor, config: Config, ramp: float) -> dict[str, Tensor]:
    """The losses of a step by the names of their columns, and the accuracy of the classifier on K."""
    branches = model.branches(images, labels)
    losses = spnet_losses(branches, labels, config.loss, ramp)
    if config.perturbation in ("latent", "both"):
        losses["loss_latent"] = latent_loss(branches.relevant.features, labels, model.heads, config.loss, config.latent)
        losses["loss"] = losses["loss"] + config.latent.weight * losses["loss_latent"]
    losses["accuracy"] = (branches.relevant.logits.detach().argmax(1) == labels).float().mean()
    return losses


def check_sp(sources: Sources, config: Config) -> None:
    """Raise now what would end stage 2 before its first step, and so waste a stage 1.

    Raises:
        InputError: too few identities, or a backbone or weights that are not to be had.
    """
    _sampler(sources, config)
    build_spnet(config.model, (config.data.height, config.data.width), sources.identities)


def _sampler(sources: Sources, config: Config) -> PKSampler:
    return PKSampler(sources.labels, config.train.batch_size, config.train.instances, seed=config.seed)


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
        InputError: too few identities, an unreadable image, or losses that are not finite.
    """
    options = config.train
    size = (config.data.height, config.data.width)
    accelerator = make_accelerator(config, device)
    checkpoint = load_checkpoint(run, STAGE)
    torch.manual_seed(config.seed)
    model = build_spnet(config.model, size, sources.identities, load=checkpoint is None)
    start, logged, best = 0, None, -1.0
    optimizer = make_optimizer(model, options)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint is not None:
        start, logged, best = checkpoint["step"], checkpoint["log"], checkpoint["best"]
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(checkpoint["scaler"])

    epoch = sources.originals / options.batch_size  # in steps
    steps = total_steps(options, sources.originals)
    warmup, ramp = options.warmup_epochs * epoch, config.loss.ramp_epochs * epoch
    held_out = [split_validation(samples) for samples in validation if samples]
    validation_steps = max(1, round(options.validation_epochs * epoch))
    labels = torch.from_numpy(sources.labels)
    batches = training_batches(
        ImageStore(sources.paths, size, cache=config.data.cache),
        _sampler(sources, config),
        training_transform(config.data.flip, config.data.pad, config.data.erasing, model.mean_colour),
        seed=config.seed,
        start=start,
        stop=steps,
        workers=config.data.workers,
    )
    title = "baseline" if config.model.ssd == "none" else "SP-Net"
    with StageLog(run, STAGE, title, start, steps, every=config.log_steps, state=logged) as log:

        def save(step: int) -> None:
            log.flush()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": {} if accelerator.scaler is None else accelerator.scaler.state_dict(),
            }
            save_checkpoint(run, STAGE, step, {**state, "log": log.state(), "best": best})

        clock = CheckpointClock(config.checkpoint_minutes, save)
        model.train()
        for step, batch in enumerate(batches, start + 1):
            seed_step(config.seed, _STREAM, step)
            factor = rate(step - 1, warmup, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            images = batch.images.to(accelerator.device, non_blocking=True)
            targets = labels[batch.indices].to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                losses = training_losses(model, images, targets, config, min(1.0, step / ramp) if ramp else 1.0)
            optimizer.zero_grad()
            accelerator.backward(losses["loss"])
            if options.clip is not None:
                accelerator.clip_grad_norm_(prepared.parameters(), options.clip)
            optimizer.step()
            log.step(step, losses, epoch=step / epoch, lr=optimizer.param_groups[0]["lr"])
            if held_out and (step % validation_steps == 0 or step == steps):
                found = [evaluate_samples(model, *parts, size, config.data.workers) for parts in held_out]
                model.train()
                score = sum(result.mAP for result in found) / len(found)
                rank1 = sum(float(result.cmc[0]) for result in found) / len(found)
                log.line(step, validation_map=score, validation_rank1=rank1)
                if score > best:
                    best = score
                    save_tensors(run / WEIGHTS, model)
            clock.tick(step)
        if start < steps:
            clock.save(steps)
    if not held_out:
        save_tensors(run / WEIGHTS, model)
    return log.seconds
