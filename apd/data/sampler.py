"""PK sampling: batches of P identities with K images each, drawn from all sources alike or evenly from each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, zip_longest
from typing import Protocol

import numpy as np
import torch

from apd.errors import InputError

_STREAM = 1  # sampling and augmentation (loading.py) draw from different streams of one seed
_COUNTERPARTS = 5


class BatchOrder(Protocol):
    """An endless sequence of batches that can be entered at any step."""

    def batches(self, start: int) -> Iterator[list[int]]:
        """The batches from step `start` on, as image indices."""
        ...


class PKSampler:
    """Batches of P identities with K images each, as in the field's RandomIdentitySampler (Hermans et al. 2017).

    In an epoch the images of an identity are shuffled and cut into groups of K;
    images that do not fill a group wait for another epoch, and an identity with
    fewer than K images fills its one group by repetition. P identities with
    groups left are drawn for each batch, until fewer than P identities remain.
    No image comes twice in an epoch, except by that repetition.

    Args:
        labels: identity of each image, integers (N,).
        batch_size: images in a batch, P × K.
        instances: K, images of an identity in a batch.
        seed: not negative; with the epoch's number it decides the epoch.

    Raises:
        InputError: `batch_size` is no multiple of `instances`, or there are fewer than P identities.
    """

    def __init__(
        self, labels: Sequence[int] | np.ndarray | torch.Tensor, batch_size: int, instances: int, *, seed: int
    ) -> None:
        self._identities = _identities(batch_size, instances)
        values = np.asarray(labels, dtype=np.int64)
        order = np.argsort(values, kind="stable")
        _, first = np.unique(values[order], return_index=True)
        self._images = np.split(order, first[1:]) if len(values) else []  # of each identity
        self._instances = instances
        self._seed = seed
        if len(self._images) < self._identities:
            raise InputError(
                f"training images: expected at least {self._identities} identities (batches of {batch_size}, "
                f"{instances} images of each), got {len(self._images)}"
            )

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of one epoch.

        Args:
            number: of the epoch, from 0.

        Returns:
            batches of image indices, the K of an identity side by side; epochs differ a little in length.
        """
        random = np.random.default_rng((_STREAM, self._seed, number))
        groups = [self._groups(images, random) for images in self._images]
        left = list(range(len(groups)))  # identities with groups left
        batches = []
        while len(left) >= self._identities:
            drawn = random.choice(len(left), self._identities, replace=False)
            batches.append([image for place in drawn for image in groups[left[place]].pop()])
            for place in sorted(drawn, reverse=True):  # from the end, so that the earlier places stay valid
                if not groups[left[place]]:
                    left[place] = left[-1]
                    left.pop()
        return batches

    def batches(self, start: int) -> Iterator[list[int]]:
        """The batches of all epochs, one after the other, from step `start` on."""
        for number in count():
            epoch = self.epoch(number)
            yield from epoch[start:]
            start = max(0, start - len(epoch))

    def _groups(self, images: np.ndarray, random: np.random.Generator) -> list[list[int]]:
        size = self._instances
        shuffled = random.permutation(images)
        if len(shuffled) < size:
            shuffled = np.resize(shuffled, size)  # repeats from the start: as evenly as it goes
        return [shuffled[i : i + size].tolist() for i in range(0, len(shuffled) - size + 1, size)]


class WithCounterparts:
    """Batches of an order in which images give their place to their counterparts, `offset` places further on.

    Args:
        order: batches of originals.
        offset: from an image to its counterpart.
        first: step from which counterparts join, counted from 0.
        probability: of each image.
        seed: with the step's number it decides which.
    """

    def __init__(self, order: BatchOrder, offset: int, first: int, probability: float, *, seed: int) -> None:
        self._order, self._offset, self._first = order, offset, first
        self._probability, self._seed = probability, seed

    def batches(self, start: int) -> Iterator[list[int]]:
        """The batches from step `start` on."""
        for step, batch in enumerate(self._order.batches(start), start):
            if step >= self._first:
                drawn = np.random.default_rng((_COUNTERPARTS, self._seed, step)).random(len(batch))
                batch = (np.array(batch) + self._offset * (drawn < self._probability)).tolist()
            yield batch


def _identities(batch_size: int, instances: int) -> int:
    """P; InputError where it is no whole number."""
    if instances < 1 or batch_size < 1 or batch_size % instances:
        raise InputError(
            f"batch size: expected a multiple of the {instances} images of an identity in a batch, got {batch_size}"
        )
    return batch_size // instances


class DomainSampler:
    """PK batches that take as many identities of each domain; where P is no multiple, the first ones give one more.

    Each domain has a `PKSampler` of its own, so that a small domain comes round
    more often than a large one. In a batch the domains take turns, identity by
    identity.

    Args:
        labels, domains: of each image, integers (N,).
        batch_size, instances: P × K and K.
        seed: not negative.

    Raises:
        InputError: `batch_size` is no multiple of `instances`, P is less than the number of domains, or a domain has
            too few identities.
    """

    def __init__(self, labels: np.ndarray, domains: np.ndarray, batch_size: int, instances: int, *, seed: int) -> None:
        members = [np.flatnonzero(domains == domain) for domain in np.unique(domains)]
        identities = _identities(batch_size, instances)
        if identities < len(members):
            raise InputError(
                f"train.sampler: domain needs an identity of each of the {len(members)} sources in a step, got batches "
                f"of {identities} identities"
            )
        self._members = members
        self._instances = instances
        self._samplers = []
        for number, images in enumerate(members):
            share = identities // len(members) + (number < identities % len(members))
            own_seed = int(np.random.SeedSequence((_STREAM, seed, number)).generate_state(1)[0])
            self._samplers.append(PKSampler(labels[images], share * instances, instances, seed=own_seed))

    def batches(self, start: int) -> Iterator[list[int]]:
        """The batches from step `start` on."""
        for parts in zip(*(sampler.batches(start) for sampler in self._samplers), strict=True):
            groups = [self._groups(images[part]) for images, part in zip(self._members, parts, strict=True)]
            turns = (group for turn in zip_longest(*groups) for group in turn if group is not None)
            yield [image for group in turns for image in group]

    def _groups(self, images: np.ndarray) -> list[list[int]]:
        return images.reshape(-1, self._instances).tolist()
