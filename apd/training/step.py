"""Losses and gradients of one step of stage 2: in one or several processes, at once or in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from apd.config.values import Config
from apd.models.spnet import Branches, SPNet
from apd.training.distributed import average_gradients, rank
from apd.training.engine import seed_step
from apd.training.losses import latent_loss, spnet_losses
from apd_kernels import gather_features

_NETWORK, _LOSSES = 2, 3  # streams of random numbers; stage 1 has another


class _Part(NamedTuple):
    """What goes through the network together."""

    step: int
    place: int  # among the parts of all processes
    images: Tensor
    labels: Tensor


class TrainingStep:
    """The gradients of the losses of a whole step.

    A step may be cut into parts (`train.accumulate`) where the images do not fit
    into memory at once. Losses that compare images are not sums over parts: a
    part alone has fewer and easier negatives, and other batch statistics. So the
    features of all parts come first, without a graph; the losses of the whole
    give the features' gradients; and each part is computed again, with a graph,
    to hand them on (gradient caching, Gao et al. 2021). Both passes draw the same
    random numbers. The NK of K* are exchanged within a part.

    Args:
        model: the network, in training mode.
        config: of the run.
        accelerator: precision and gradient scaling.
    """

    def __init__(self, model: SPNet, config: Config, accelerator: Accelerator) -> None:
        self._model = model
        self._config = config
        self._accelerator = accelerator
        self._features = model.branch_features
        if config.train.compile:
            self._features = torch.compile(model.branch_features)

    def backward(self, step: int, images: Tensor, own: slice, labels: Tensor, ramp: float) -> dict[str, Tensor]:
        """Add the gradients of a step to the parameters'.

        Args:
            step: from 1.
            images: (b, 3, H, W) of this process.
            own: their rows in the whole step.
            labels: of the whole step, int64 (B,).
            ramp: as in `spnet_losses`.

        Returns:
            the losses of the whole step by the names of their columns, and the accuracy of the classifier on K.
        """
        count = self._config.train.accumulate
        first = rank() * count  # place of the first part among those of all processes
        pieces = zip(images.chunk(count), labels[own].chunk(count), strict=True)
        parts = [_Part(step, first + i, *piece) for i, piece in enumerate(pieces)]
        losses = self._at_once(parts[0], labels, ramp) if count == 1 else self._in_parts(parts, labels, ramp)
        average_gradients(self._model.parameters())
        return losses

    def _at_once(self, part: _Part, labels: Tensor, ramp: float) -> dict[str, Tensor]:
        losses = self._losses(part.step, *self._described(part), labels, ramp)
        self._accelerator.backward(losses["loss"])
        return losses

    def _in_parts(self, parts: list[_Part], labels: Tensor, ramp: float) -> dict[str, Tensor]:
        with torch.no_grad(), _buffers_restored(self._model):
            described = [self._described(part) for part in parts]
        features = torch.cat([part_features for part_features, _ in described], 1).requires_grad_()
        marks = [exchanged for _, exchanged in described if exchanged is not None]
        losses = self._losses(parts[0].step, features, torch.cat(marks) if marks else None, labels, ramp)
        self._accelerator.backward(losses["loss"])
        assert features.grad is not None
        for part, gradient in zip(parts, features.grad.chunk(len(parts), 1), strict=True):
            self._described(part)[0].backward(gradient)
        return losses

    def _described(self, part: _Part) -> tuple[Tensor, Tensor | None]:
        seed_step(self._config.seed, _NETWORK, part.step, part.place)
        with self._accelerator.autocast():
            return self._features(part.images, part.labels)

    def _losses(
        self, step: int, features: Tensor, exchanged: Tensor | None, labels: Tensor, ramp: float
    ) -> dict[str, Tensor]:
        """Of the features of all processes, the same on each."""
        seed_step(self._config.seed, _LOSSES, step)
        marks = torch.ones(features.shape[1], device=features.device) if exchanged is None else exchanged
        everybody = gather_features(features, marks.to(torch.uint8))  # what is gathered beside features is integers
        exchanged = None if exchanged is None else everybody.labels.bool()
        with self._accelerator.autocast():
            branches = self._model.classified(everybody.features, exchanged)
            return training_losses(self._model, branches, labels, self._config, ramp)


def training_losses(model: SPNet, branches: Branches, labels: Tensor, config: Config, ramp: float) -> dict[str, Tensor]:
    """The losses of a step by the names of their columns, and the accuracy of the classifier on K."""
    losses = spnet_losses(branches, labels, config.loss, ramp)
    if config.perturbation in ("latent", "both"):
        losses["loss_latent"] = latent_loss(branches.relevant.features, labels, model.heads, config.loss, config.latent)
        losses["loss"] = losses["loss"] + config.latent.weight * losses["loss_latent"]
    # How far apart descriptions are; 0 when everybody looks alike.
    losses["spread"] = branches.relevant.features.detach().float().std(0).norm()
    losses["accuracy"] = (branches.relevant.logits.detach().argmax(1) == labels).float().mean()
    return losses


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Running statistics take note of each image once, not in both passes."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
