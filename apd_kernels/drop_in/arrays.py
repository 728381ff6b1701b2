"""What the projects' functions take and return: NumPy or tensors, matrices that nobody may ever look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels import (
    PositiveRanks,
    RankMetrics,
    positive_ranks_from_distances,
    rank_metrics,
    rank_metrics_from_distances,
)
from apd_kernels.distance import pairwise_distance
from apd_kernels.evaluation.rerank import RerankedDistances

CLAMP = 1e-6  # of a distance, where the projects clamp its square at 1e-12


class LazyMatrix:
    """Distances of queries to a gallery that are computed when somebody looks: NumPy takes it as a matrix.

    Attributes of an array (``T``, ``argsort``, …), indices and arithmetic make the matrix, once.
    """

    def __init__(self, shape: tuple[int, int], make: Callable[[], np.ndarray]) -> None:
        self.shape, self._make = shape, make
        self._made: np.ndarray | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._made is None:
            self._made = self._make()
        made = self._made if dtype is None else self._made.astype(dtype, copy=False)
        return made.copy() if copy else made

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __repr__(self) -> str:
        return f"LazyMatrix(shape={self.shape})"


def tensor(values: Any) -> Tensor:
    """A tensor as it is, another array or list as one of the CPU."""
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))


def integers(values: Any, device: torch.device | str = "cpu") -> Tensor:
    """Identities or cameras, (N,) int64.

    Raises:
        TypeError: values that are not whole numbers.
    """
    found = tensor(values)
    if found.dtype == torch.bool or (found.is_floating_point() and bool((found != found.round()).any())):
        raise TypeError(f"ids: expected whole numbers, got {found.dtype}")
    return found.reshape(-1).to(device=device, dtype=torch.int64)


def of_labels(*labels: Any, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """(query_ids, gallery_ids, query_cams, gallery_cams) from the projects' q_pids, g_pids, q_camids, g_camids."""
    return tuple(integers(values, device) for values in labels)


def ranked(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, max_rank: int, **options: Any
) -> RankMetrics:
    """Figures of a matrix: −1 is an identity and a camera like others, equal distances are in the gallery's order."""
    distances = tensor(distmat)
    labels = of_labels(q_pids, g_pids, q_camids, g_camids, device=distances.device)
    return rank_metrics_from_distances(
        distances, *labels, ties="stable", max_rank=max_rank, junk=None, unknown_camera=None, **options
    )


def ranks(distmat: Any, labels: tuple[Tensor, ...], ties: str = "stable") -> PositiveRanks:
    return positive_ranks_from_distances(tensor(distmat), *labels, ties=ties, junk=None, unknown_camera=None)


def evaluated(
    query: Tensor, gallery: Tensor, labels: tuple[Tensor, ...], metric: str, max_rank: int = 50
) -> tuple[RankMetrics, LazyMatrix]:
    """Figures from features, without their matrix, and the matrix for who looks at it."""
    figures = rank_metrics(query, gallery, *labels, metric=metric, max_rank=max_rank, junk=None, unknown_camera=None)
    return figures, matrix(query, gallery, metric)


def reranked(
    distances: RerankedDistances, labels: tuple[Tensor, ...], max_rank: int = 50
) -> tuple[RankMetrics, LazyMatrix]:
    figures = distances.rank_metrics(*labels, max_rank=max_rank, junk=None, unknown_camera=None)
    return figures, LazyMatrix(distances.shape, lambda: np.asarray(distances))


def matrix(query: Tensor, gallery: Tensor, metric: str) -> LazyMatrix:
    shape = (query.shape[0], gallery.shape[0])
    return LazyMatrix(shape, lambda: pairwise_distance(query, gallery, metric=metric).cpu().numpy())


def draws(single_images: bool) -> dict[str, int]:
    """Options of `rank_metrics` for CUHK03's single images: ten draws, by a seed from where the projects draw."""
    if not single_images:
        return {}
    return {"single_shot": 10, "seed": int(np.random.randint(1 << 31))}  # noqa: NPY002 - NumPy's global generator


def curve(figures: RankMetrics, max_rank: int, images: int) -> np.ndarray:
    """The CMC as the projects return it: float32, no longer than the gallery."""
    return figures.cmc[: min(max_rank, images)].cpu().numpy().astype(np.float32)
