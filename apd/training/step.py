"""Losses and gradients of one step of stage 2: in one or several processes, at once or in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from apd.config import Config
from apd.models.spnet import Branches, SPNet
from apd.training.engine import seed_step
from apd.training.losses import latent_loss, spnet_losses
from apd.training.ranks import average_gradients, rank
from apd_kernels import gather_features

STREAM = 2  # of random numbers; stage 1 has another


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
        parts = list(zip(images.chunk(count), labels[own].chunk(count), strict=True))
        first = rank() * count  # place of the first part among those of all processes
        if count == 1:
            features, exchanged = self._part(step, first, *parts[0])
            losses = self._losses(features, exchanged, labels, ramp)
            self._accelerator.backward(losses["loss"])
        else:
            with torch.no_grad(), _buffers_restored(self._model):
                found = [self._part(step, first + i, *part) for i, part in enumerate(parts)]
            features = torch.cat([features for features, _ in found], 1).requires_grad_()
            exchanged = torch.cat([x for _, x in found if x is not None]) if found[0][1] is not None else None
            losses = self._losses(features, exchanged, labels, ramp)
            self._accelerator.backward(losses["loss"])
            assert features.grad is not None
            for i, (part, gradient) in enumerate(zip(parts, features.grad.chunk(count, 1), strict=True)):
                self._part(step, first + i, *part)[0].backward(gradient)
        average_gradients(self._model.parameters())
        return losses

    def _part(self, step: int, place: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        seed_step(self._config.seed, STREAM, step, place)
        with self._accelerator.autocast():
            return self._features(images, labels)

    def _losses(self, features: Tensor, exchanged: Tensor | None, labels: Tensor, ramp: float) -> dict[str, Tensor]:
        with self._accelerator.autocast():
            return training_losses(self._model, _gathered(self._model, features, exchanged), labels, self._config, ramp)


def training_losses(model: SPNet, branches: Branches, labels: Tensor, config: Config, ramp: float) -> dict[str, Tensor]:
    """The losses of a step by the names of their columns, and the accuracy of the classifier on K."""
    losses = spnet_losses(branches, labels, config.loss, ramp)
    if config.perturbation in ("latent", "both"):
        losses["loss_latent"] = latent_loss(branches.relevant.features, labels, model.heads, config.loss, config.latent)
        losses["loss"] = losses["loss"] + config.latent.weight * losses["loss_latent"]
    losses["accuracy"] = (branches.relevant.logits.detach().argmax(1) == labels).float().mean()
    return losses


def _gathered(model: SPNet, features: Tensor, exchanged: Tensor | None) -> Branches:
    """The branches of the images of all processes."""
    marks = torch.ones(features.shape[1], device=features.device) if exchanged is None else exchanged
    everybody = gather_features(features, marks.to(torch.uint8))  # what is gathered beside features is integers
    return model.classified(everybody.features, None if exchanged is None else everybody.labels.bool())


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Running statistics take note of each image once, not in both passes."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
