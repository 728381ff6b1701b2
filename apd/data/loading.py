"""Batches of images, the same ones whatever the number of worker processes and wherever a run is taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from apd.data.images import ImageStore
from apd.data.sampler import BatchOrder
from apd.errors import InputError

_STREAM = 2  # augmentation and sampling (sampler.py) draw from different streams of one seed


class Batch(NamedTuple):
    """Images of one training step."""

    images: Tensor  # float32 (B, 3, H, W) in [0, 1]
    indices: Tensor  # int64 (B,), rows of the store


class ShiftedCrop:
    """Zero padding on all four sides and a random crop of the image's own size.

    Args:
        pad: width of the padding, pixels.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, image: Tensor) -> Tensor:
        top, left = torch.randint(-self.pad, self.pad + 1, (2,)).tolist()
        # What lies outside the image is zero: no padded copy is needed.
        return v2.functional.crop(image, top, left, *image.shape[-2:])


def as_floats(images: Tensor) -> Tensor:
    """From uint8 to float32 in [0, 1], any shape."""
    return v2.functional.to_dtype(images, torch.float32, scale=True)


def training_transform(flip: float, pad: int, erasing: float, fill: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The field's augmentation: horizontal flip, zero padding and random crop, random erasing.

    Args:
        flip: probability of a flip.
        pad: width of the zero padding, pixels.
        erasing: probability that a rectangle is erased (Zhong et al. 2020; 2% to 33% of the image).
        fill: (3,) colour of the erased rectangle in [0, 1]; the network's mean colour, so that it is 0 to the network.

    Returns:
        a function from uint8 (3, H, W) to float32 (3, H, W) in [0, 1].
    """
    # Two plain calls: v2.ToDtype takes 32 µs where its function takes 11 (128×64, one CPU core).
    return v2.Compose(
        [v2.RandomHorizontalFlip(flip), ShiftedCrop(pad), as_floats, v2.RandomErasing(erasing, value=list(fill))]
    )


def training_batches(
    store: ImageStore,
    sampler: BatchOrder,
    transform: Callable[[Tensor], Tensor],
    *,
    seed: int,
    start: int,
    stop: int,
    workers: int,
) -> Iterator[Batch]:
    """The batches of the steps `start` to `stop` − 1.

    What is drawn for an image depends on the seed, the step and its place in
    the batch alone: neither the number of workers nor a restart changes a
    batch, and torch's own random numbers are left as they were.

    Args:
        store: the images.
        sampler: which images are in a batch.
        transform: as `training_transform`; its random numbers must come from torch.
        seed: not negative.
        start, stop: steps, counted from 0.
        workers: processes that read and transform images; 0: this process does.

    Raises:
        InputError: an image cannot be read.
    """
    steps = enumerate(islice(sampler.batches(start), stop - start), start)
    keys = (list(zip(batch, _seeds(seed, step, len(batch)), strict=True)) for step, batch in steps)
    return _loaded(_Augmented(store, transform), keys, workers)


def images_in_order(store: ImageStore, batch_size: int, workers: int) -> Iterator[Tensor]:
    """All images of a store, as they are.

    Args:
        store: the images.
        batch_size: images in a batch; the last one may have fewer.
        workers: processes that read images; 0: this process does.

    Returns:
        batches, float32 (B, 3, H, W) in [0, 1].

    Raises:
        InputError: an image cannot be read.
    """
    order = range(len(store))
    return _loaded(_Plain(store), (order[i : i + batch_size] for i in range(0, len(store), batch_size)), workers)


def _seeds(seed: int, step: int, size: int) -> list[int]:
    """One for each place in the batch; torch's generator on the CPU takes 32 bits."""
    return np.random.SeedSequence((_STREAM, seed, step)).generate_state(size).tolist()


class _Augmented(Dataset[Any]):
    def __init__(self, store: ImageStore, transform: Callable[[Tensor], Tensor]) -> None:
        self.store = store
        self.transform = transform

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | InputError:
        try:
            with torch.random.fork_rng(devices=[]):
                return Batch(
                    torch.stack([self._augmented(index, seed) for index, seed in keys]),
                    torch.tensor([index for index, _ in keys]),
                )
        except InputError as error:
            return error

    def _augmented(self, index: int, seed: int) -> Tensor:
        image = self.store[index]
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's random numbers as well
        return self.transform(image)


class _Plain(Dataset[Any]):
    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def __getitems__(self, indices: Sequence[int]) -> Tensor | InputError:
        try:
            images = torch.stack([self.store[index] for index in indices])
        except InputError as error:
            return error
        return as_floats(images)


def _loaded(dataset: Dataset[Any], keys: Iterable[Any], workers: int) -> Iterator[Any]:
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else a seed for the workers is taken from torch's own random numbers
    )
    for batch in loader:
        if isinstance(batch, InputError):  # handed over, because the loader would wrap it into a worker's traceback
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    """The data sets make whole batches."""
    return batch
