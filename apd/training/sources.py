"""The training images of one or several source domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apd.data.market import UNKNOWN, Sample
from apd.errors import InputError


@dataclass(frozen=True)
class Sources:
    """Images with identities numbered through: number 7 of one domain is another person than number 7 of another."""

    paths: tuple[Path, ...]
    labels: np.ndarray  # int64 (N,), 0 … identities − 1
    domains: np.ndarray  # int64 (N,), place of the domain in the list of sources
    cameras: np.ndarray  # int64 (N,), as the domain numbers them
    identities: int
    originals: int  # images of an epoch: a run with synthesized images takes as many steps as one without

    def __len__(self) -> int:
        return len(self.paths)

    def with_synthesized(self, paths: Sequence[Path], train_on: str) -> Sources:
        """The images of stage 2.

        Args:
            paths: the synthesized image of each image.
            train_on: ``"both"``, ``"synthesized"`` or ``"original"``.
        """
        if train_on == "original":
            return self
        if train_on == "synthesized":
            return replace(self, paths=tuple(paths))
        return replace(
            self,
            paths=(*self.paths, *paths),
            labels=np.tile(self.labels, 2),
            domains=np.tile(self.domains, 2),
            cameras=np.tile(self.cameras, 2),
        )


def gather_sources(folders: Sequence[Sequence[Sample]], held_out: int, seed: int) -> tuple[Sources, list[list[Sample]]]:
    """Number the identities of the folders, and keep some of them for validation.

    Args:
        folders: the training images of each source.
        held_out: identities of every source that are kept from training; those drawn have images of two cameras.
        seed: of the draw.

    Returns:
        the images to train on, and those held out of each source.

    Raises:
        InputError: a source has too few identities seen by two cameras.
    """
    paths: list[Path] = []
    labels: list[int] = []
    domains: list[int] = []
    cameras: list[int] = []
    kept: list[list[Sample]] = []
    identities = 0
    for domain, samples in enumerate(folders):
        away = _drawn(samples, held_out, np.random.default_rng((seed, domain)))
        kept.append([sample for sample in samples if sample.pid in away])
        train = [sample for sample in samples if sample.pid not in away]
        numbers = {pid: identities + i for i, pid in enumerate(sorted({sample.pid for sample in train}))}
        identities += len(numbers)
        paths += [sample.path for sample in train]
        labels += [numbers[sample.pid] for sample in train]
        domains += [domain] * len(train)
        cameras += [sample.camid for sample in train]
    columns = [np.array(values, np.int64) for values in (labels, domains, cameras)]
    return Sources(tuple(paths), columns[0], columns[1], columns[2], identities, len(paths)), kept


def _drawn(samples: Sequence[Sample], count: int, random: np.random.Generator) -> set[int]:
    if not count:
        return set()
    cameras: dict[int, set[int]] = {}
    for sample in samples:
        seen = cameras.setdefault(sample.pid, set())
        if sample.camid != UNKNOWN:
            seen.add(sample.camid)
    usable = sorted(pid for pid, seen in cameras.items() if len(seen) > 1)
    if len(usable) <= count or len(cameras) - count < 2:
        raise InputError(
            f"train.validation_identities: expected fewer than the {len(usable)} identities (of {len(cameras)}) in "
            f"{samples[0].path.parent} that two cameras saw, got {count}"
        )
    return set(random.choice(usable, count, replace=False).tolist())


def split_validation(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Query and gallery of held-out images: an identity's first image in each known camera asks, and all answer.

    The evaluation leaves out the images of the query's identity in its own camera, and with them the query itself.
    """
    query: dict[tuple[int, int], Sample] = {}
    for sample in samples:
        if sample.camid != UNKNOWN:  # it would find itself
            query.setdefault((sample.pid, sample.camid), sample)
    return list(query.values()), list(samples)
