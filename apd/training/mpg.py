"""Stage 1: MPG-Net's generator and discriminator are trained on the source images (APD, section MPG-Net)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apd.config.values import Config, MPGConfig
from apd.console import console
from apd.data.augmentation import as_floats
from apd.data.images import ImageStore
from apd.data.loading import images_in_order, training_batches
from apd.errors import InputError
from apd.interrupt import asked_to_end, interrupted, whole_steps
from apd.models.mpgnet import Discriminator, Generator, discriminator_loss, generator_losses
from apd.models.trunk import Trunk, build_trunk
from apd.run import GENERATOR, save_tensors, update_info
from apd.training.checkpoint import LOG, load_checkpoint, remove_checkpoints, restoring, save_checkpoint
from apd.training.engine import CheckpointClock, LossGuard, seed_step
from apd.training.log import StageLog
from apd.training.monitors import flipped_share, sample_grid, sample_images
from apd.training.sources import Sources

STAGE = "mpg"
_CHECKPOINT = {"log": LOG, "flipped": [float], "generator": dict, "discriminator": dict}
_STREAM = 1
_LINES = 3  # of the log, over which the share of flipped images is averaged


class NegativeSampler:
    """Every image once an epoch, each with M images of other identities of its own domain, drawn anew in each epoch.

    Args:
        labels, domains: of every image, int64 (N,).
        batch_size: B; images that do not fill a batch at the end of an epoch are left out.
        negatives: M.
        seed: with the epoch's number it decides the epoch.

    Raises:
        InputError: there are fewer images than a batch, or a domain has one identity.
    """

    def __init__(self, labels: np.ndarray, domains: np.ndarray, batch_size: int, negatives: int, seed: int) -> None:
        if len(labels) < batch_size:
            raise InputError(f"mpg.batch_size: expected at most the {len(labels)} training images, got {batch_size}")
        self._domains = domains
        self._members = [np.flatnonzero(domains == domain) for domain in range(int(domains.max()) + 1)]
        for members in self._members:
            if len(np.unique(labels[members])) < 2:
                raise InputError("training images: a source has one identity; negatives need another")
        self._labels = labels
        self._batch_size = batch_size
        self._negatives = negatives
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        return len(self._labels) // self._batch_size

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Batches of one epoch: B indices of images, and after them B·M of negatives, M for each image in turn."""
        random = np.random.default_rng((self._seed, number))
        order = random.permutation(len(self._labels))
        for start in range(0, self.steps_per_epoch * self._batch_size, self._batch_size):
            batch = order[start : start + self._batch_size]
            yield [*batch.tolist(), *self._drawn(batch, random).ravel().tolist()]

    def _drawn(self, batch: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """(B, M) images of other identities, uniform over those of the domain: drawn again where the identity fits."""
        drawn = np.empty((len(batch), self._negatives), dtype=np.int64)
        todo = np.ones(drawn.shape, dtype=bool)
        while todo.any():
            for domain, members in enumerate(self._members):
                here = todo & (self._domains[batch] == domain)[:, None]
                drawn[here] = random.choice(members, int(here.sum()))
            todo = self._labels[drawn] == self._labels[batch][:, None]
        return drawn

    def batches(self, start: int) -> Iterator[list[int]]:
        """The batches of all epochs from step `start` on."""
        first, skip = divmod(start, self.steps_per_epoch)
        for number in count(first):
            for i, batch in enumerate(self.epoch(number)):
                if number > first or i >= skip:
                    yield batch


def check_mpg(sources: Sources, config: Config) -> None:
    """Raise now what would end stage 1 before its first step, and so waste the training of its trunk.

    Raises:
        InputError: too few images for a batch, a source of one identity, or a trunk that is not to be had.
    """
    _sampler(sources, config)
    if config.mpg.trunk not in ("auto", "self"):
        build_trunk(config.mpg.trunk, config.mpg.trunk_weights)


def _sampler(sources: Sources, config: Config) -> NegativeSampler:
    options = config.mpg
    return NegativeSampler(sources.labels, sources.domains, options.batch_size, options.negatives, config.seed)


@torch.no_grad()
def deep_features(trunk: Trunk, store: ImageStore, batch_size: int, workers: int, device: torch.device) -> Tensor:
    """ψ of all images, (N, D): with a frozen trunk they are computed once, and negatives are rows of this bank."""
    return torch.cat([trunk(images.to(device)).deep for images in images_in_order(store, batch_size, workers)])


def train_mpg(run: Path, sources: Sources, trunk: Trunk, config: Config, device: str, apart: float | None) -> float:
    """Train, or go on training, and write the generator to the run.

    Args:
        run: the run's folder.
        sources: the training images.
        trunk: ψ and φ.
        config: of the run.
        device: ``"cpu"`` or ``"cuda"``.
        apart: how far φ of one person in two cameras is apart, of `camera_distance`.

    Returns:
        the seconds it took, those before a restart included.

    Raises:
        InputError: too few images, an unreadable one, or losses that are not finite.
    """
    options: MPGConfig = config.mpg
    store = ImageStore(sources.paths, (config.data.height, config.data.width), cache=config.data.cache)
    sampler = _sampler(sources, config)
    on = torch.device(device)
    # float16 would need its losses scaled, for two optimisers in turn; stage 1 then takes float32.
    autocast = torch.autocast(on.type, torch.bfloat16, enabled=config.precision == "bf16")

    torch.manual_seed(config.seed)
    generator = Generator(options.width, options.blocks)
    discriminator = Discriminator(options.discriminator_width, options.discriminator_layers)
    networks = {"generator": generator.to(on), "discriminator": discriminator.to(on)}
    optimizers = {
        name: torch.optim.Adam(network.parameters(), options.lr, betas=(options.beta1, 0.999))
        for name, network in networks.items()
    }
    start, logged = 0, None
    latest: list[float] = []  # flipped shares of the last lines
    checkpoint = load_checkpoint(run, STAGE, _CHECKPOINT)
    if checkpoint is not None:
        start, logged, latest = checkpoint["step"], checkpoint["log"], checkpoint["flipped"]
        with restoring(run, STAGE):
            if start > options.steps:
                raise ValueError(f"step {start} of {options.steps}")
            for name, network in networks.items():
                network.load_state_dict(checkpoint[name])
                optimizers[name].load_state_dict(checkpoint[f"{name}_optimizer"])

    trunk = trunk.to(on)
    bank = deep_features(trunk, store, options.batch_size, config.data.workers, on)
    labels = torch.from_numpy(sources.labels).to(on)
    samples = sample_images(store).to(on)
    batches = training_batches(
        store,
        sampler,
        as_floats,
        seed=config.seed,
        start=start,
        stop=options.steps,
        workers=config.data.workers,
    )
    log = StageLog(run, STAGE, "MPG-Net", start, options.steps, every=config.log_steps, state=logged)
    with log, whole_steps(), closing(batches):

        def save(step: int) -> None:
            guard.settle()
            state = {name: network.state_dict() for name, network in networks.items()}
            state |= {f"{name}_optimizer": optimizer.state_dict() for name, optimizer in optimizers.items()}
            log.flush()
            save_checkpoint(run, STAGE, step, {**state, "log": log.state(), "flipped": latest})

        guard = LossGuard(STAGE, sources.paths, list(networks.values()))
        clock = CheckpointClock(config.checkpoint_minutes, save)
        for step, batch in enumerate(batches, start + 1):
            seed_step(config.seed, _STREAM, step)
            images, negatives = batch.images.to(on, non_blocking=True).split(
                (options.batch_size, options.batch_size * options.negatives)
            )
            indices = batch.indices.to(on, non_blocking=True)
            rows = indices[options.batch_size :].view(options.batch_size, options.negatives)
            with autocast:
                with torch.no_grad():
                    original = trunk(images)
                # The generator learns from the discriminator and does not teach it.
                discriminator.requires_grad_(False)
                losses, made, deep = generator_losses(
                    generator, discriminator, trunk, images, original, bank, rows, options
                )
            optimizers["generator"].zero_grad(set_to_none=True)
            losses.total.backward()
            optimizers["generator"].step()

            discriminator.requires_grad_(True)
            with autocast:
                loss_d = discriminator_loss(discriminator, made, negatives)
            optimizers["discriminator"].zero_grad(set_to_none=True)
            loss_d.backward()
            optimizers["discriminator"].step()

            guard.watch(step, losses.total.detach() + loss_d.detach(), batch.indices[: options.batch_size])
            values = {
                "loss_g": losses.adversarial,
                "loss_d": loss_d,
                "loss_mp": losses.metric,
                "loss_c": losses.content,
                "loss_s": losses.consistency,
            }
            if apart:
                values["content"] = losses.content / apart
            facts = {"epoch": step / sampler.steps_per_epoch, "lr": options.lr}
            if log.due(step):
                guard.settle()
                facts["flipped"] = float(flipped_share(deep.detach(), indices[: options.batch_size], bank, labels))
                latest = [*latest, facts["flipped"]][-_LINES:]
            log.step(step, values, **facts)
            if step % options.sample_steps == 0 or step == options.steps:
                log.picture(step, "originals above what G makes of them", sample_grid(generator, samples))
            clock.tick(step)
            if asked_to_end():
                clock.save(step)
                raise interrupted(step)
            flipped = sum(latest) / _LINES
            if options.stop_flipped is not None and flipped >= options.stop_flipped:
                update_info(run, mpg_stopped={"step": step, "flipped": flipped})
                console.print(f"MPG-Net: stopped at step {step}: {flipped:.0%} of G(x) are nearest to another identity")
                break
        guard.settle()
    save_tensors(run / GENERATOR, generator)
    remove_checkpoints(run, STAGE)
    return log.seconds
