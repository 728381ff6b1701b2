"""Batches of images, the same ones whatever the number of worker processes and wherever a run is taken up again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apd.data.augmentation import DRAWS, Augmentation, as_floats, augment_batch
from apd.data.images import ImageStore
from apd.data.sampler import BatchOrder
from apd.errors import InputError
from apd.interrupt import ignore_signals

ALL = slice(None)  # rows of a batch
# What starts workers: where there is such a thing, a process that has done the imports and nothing else. A worker that
# is forked from this process instead may wait for ever for a lock that one of its threads held.
_STARTER: Any = None
if "forkserver" in multiprocessing.get_all_start_methods():
    _STARTER = multiprocessing.get_context("forkserver")
    _STARTER.set_forkserver_preload([__name__, "apd.data.worker_server"])
_STREAM = 2  # augmentation and sampling (sampler.py) draw from different streams of one seed


class Batch(NamedTuple):
    """Images of one training step."""

    images: Tensor  # float32 (b, 3, H, W) in [0, 1], the rows of this process
    indices: Tensor  # int64 (B,), rows of the store: of the whole batch, on the CPU


class _Work(NamedTuple):
    """What a loader makes a batch of."""

    batch: list[int]
    rows: list[tuple[int, int]]  # (index, seed) of this process's images


def training_batches(
    store: ImageStore,
    sampler: BatchOrder,
    transform: Callable[[Tensor], Tensor],
    *,
    seed: int,
    start: int,
    stop: int,
    workers: int,
    rows: slice = ALL,
) -> Generator[Batch, None, None]:
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
        rows: those of each batch that this process trains on, where several share it.

    Raises:
        InputError: an image cannot be read.
    """
    steps = enumerate(islice(sampler.batches(start), stop - start), start)
    work = (_Work(batch, list(zip(batch, _seeds(seed, step, len(batch)), strict=True))[rows]) for step, batch in steps)
    return _loaded(_Augmented(store, transform), work, workers)


def device_batches(
    images: Tensor,
    sampler: BatchOrder,
    options: Augmentation,
    *,
    seed: int,
    start: int,
    stop: int,
    rows: slice = ALL,
) -> Generator[Batch, None, None]:
    """The batches of the steps `start` to `stop` − 1, made where all images lie already.

    As with `training_batches`, what is drawn for an image depends on the seed,
    the step and its place in the batch alone; but the numbers are other ones.

    Args:
        images: uint8 (N, 3, H, W), on any device.
        sampler: which images are in a batch.
        options: the augmentation.
        seed, start, stop, rows: as in `training_batches`.
    """
    for step, batch in enumerate(islice(sampler.batches(start), stop - start), start):
        draws = np.random.default_rng((_STREAM, seed, step)).random((len(batch), DRAWS))
        indices = torch.tensor(batch)
        own = indices[rows]
        if images.is_cuda:
            own = own.pin_memory().to(images.device, non_blocking=True)
        yield Batch(augment_batch(images[own], draws[rows], options), indices)


def fits_on(device: torch.device, size: int) -> bool:
    """Whether a device is a GPU with room for four times so many bytes: the network needs most of it."""
    return device.type == "cuda" and 4 * size <= torch.cuda.mem_get_info(device)[0]


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

    def __getitems__(self, work: _Work) -> Batch | InputError:
        try:
            with torch.random.fork_rng(devices=[]):
                images = [self._augmented(index, seed) for index, seed in work.rows]
                return Batch(torch.stack(images), torch.tensor(work.batch))
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


def _loaded(dataset: Dataset[Any], keys: Iterable[Any], workers: int) -> Generator[Any, None, None]:
    workers = min(workers, 8 * (os.cpu_count() or 1))
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=_STARTER if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else a seed for the workers is taken from torch's own random numbers
        worker_init_fn=_obey if workers else None,
    )
    for batch in loader:
        if isinstance(batch, InputError):  # handed over, because the loader would wrap it into a worker's traceback
            raise batch
        yield batch


def _obey(worker: int) -> None:
    """Slurm and a terminal send their signals to every process, and PyTorch ends a training whose worker ends."""
    ignore_signals()


def _as_it_is(batch: Any) -> Any:
    """The data sets make whole batches."""
    return batch
