"""What a retrieval result is compared with: chance, colours alone, another model on the same queries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from apd.retrieval.evaluation import LABELS, features_tensor, integers_tensor, naming
from apd.retrieval.features import FeatureSet
from apd_kernels import pairwise_distance, rank_metrics

_BINS = 4  # in each channel; 8 and 16 rank worse on images of 64 × 32
_SPREAD = 2.5  # standard deviations on either side of the mean that the bins of normalized colours cover


@dataclass(frozen=True)
class Retrieval:
    """A retrieval run, query by query; queries without a right answer are left out."""

    identities: np.ndarray  # int64 (Q,)
    first_rank: np.ndarray  # float64 (Q,): rank of the nearest image of the query's identity, from 1
    ap: np.ndarray  # float64 (Q,): average precision
    queries: np.ndarray  # int64 (Q,): their rows among all queries

    @property
    def right(self) -> np.ndarray:
        """bool (Q,): the nearest gallery image is the query's identity."""
        return self.first_rank == 1

    @property
    def rank1(self) -> float:
        return float(self.right.mean())

    @property
    def mAP(self) -> float:
        return float(self.ap.mean())

    @property
    def rank1_error(self) -> float:
        """Standard error √(p (1 − p) / Q) of the rank-1."""
        return math.sqrt(self.rank1 * (1 - self.rank1) / len(self.right))


def retrieve(query: FeatureSet, gallery: FeatureSet) -> Retrieval:
    """Search every query by cosine distance, without the images of its identity in its own camera.

    Args:
        query, gallery: rows with identities and cameras.

    Raises:
        InputError: no query has an image of its identity in another camera.
    """
    x, y = features_tensor(query), features_tensor(gallery)
    columns = map(integers_tensor, _columns(query, gallery))
    with naming(query, gallery):
        result = rank_metrics(x, y, *columns, metric="cosine")
    counted = np.flatnonzero(result.valid.numpy())
    first, ap = result.first_rank.numpy()[counted], result.ap.numpy()[counted]
    return Retrieval(query.identities()[counted].astype(np.int64), first, ap, counted)


class Chance(NamedTuple):
    """What random rankings reach on average."""

    rank1: float
    mAP: float


def chance(query: FeatureSet, gallery: FeatureSet) -> Chance:
    """The expected rank-1 and mAP of a random ranking, exactly.

    With R right answers among N images a random ranking has P(rank-1) = R / N and, by summing precision over the places
    of a right answer, E[AP] = (H + (R − 1)(N − H) / (N − 1)) / N with H = 1 + 1/2 + … + 1/N.

    Args:
        query, gallery: rows with identities and cameras; features are not looked at.
    """
    same, removed = _pairs(query, gallery)
    rank1, ap = [], []
    for right, left in zip((same & ~removed).sum(1).tolist(), (~removed).sum(1).tolist(), strict=True):
        if right:
            harmonic = sum(1 / rank for rank in range(1, left + 1))
            others = (right - 1) / (left - 1) if left > 1 else 0.0
            rank1.append(right / left)
            ap.append((harmonic + others * (left - harmonic)) / left)
    return Chance(float(np.mean(rank1)), float(np.mean(ap)))


def _columns(query: FeatureSet, gallery: FeatureSet) -> tuple[np.ndarray, ...]:
    return query.identities(), gallery.identities(), query.cameras(), gallery.cameras()


def _pairs(query: FeatureSet, gallery: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    """bool (Q, G): of the same identity; removed from the ranking."""
    query_ids, gallery_ids, query_cams, gallery_cams = _columns(query, gallery)
    removed = LABELS.removed(query_ids[:, None], query_cams[:, None], gallery_ids, gallery_cams)
    return query_ids[:, None] == gallery_ids, removed | LABELS.is_junk(gallery_ids)


class ColourHistogram(nn.Module):
    """Colours without shapes or places: what a ranker that has learnt nothing finds.

    Square roots of an RGB histogram of 4 × 4 × 4 bins; their cosine is the histograms' Bhattacharyya coefficient.

    Args:
        normalized: leave out the outer quarters of the width, which are mostly background, and count each channel
            relative to its mean and standard deviation in the rest, so that light and colour cast of a camera go out.
    """

    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to (B, 64)."""
        if self.normalized:
            width = images.shape[3]
            images = images[..., width // 4 : width - width // 4]
            mean = images.mean((2, 3), keepdim=True)
            spread = images.std((2, 3), correction=0, keepdim=True).clamp(min=1e-6)
            images = ((images - mean) / spread + _SPREAD) / (2 * _SPREAD)
        levels = (images * _BINS).long().clamp(0, _BINS - 1).flatten(2)
        codes = (levels[:, 0] * _BINS + levels[:, 1]) * _BINS + levels[:, 2]
        return one_hot(codes, _BINS**3).float().mean(1).sqrt()


def nearest_is_right(moved: Tensor, originals: Tensor, labels: Tensor) -> Tensor:
    """Whether the nearest original of each moved image, other than its own, has its identity.

    Args:
        moved, originals: features of the same N images, (N, D).
        labels: their identities, int64 (N,).

    Returns:
        bool (N,).
    """
    return labels[pairwise_distance(moved, originals).fill_diagonal_(torch.inf).argmin(1)] == labels


class Difference(NamedTuple):
    """A mean difference of two models over the same queries."""

    mean: float
    error: float  # its standard error
    queries: int
    identities: int

    @property
    def resolved(self) -> bool:
        """Whether it is at least two standard errors from 0."""
        return abs(self.mean) >= 2 * self.error and self.mean != 0


def paired_difference(ours: np.ndarray, theirs: np.ndarray, identities: np.ndarray) -> Difference:
    """Mean of `ours` − `theirs`, with the standard error over identities.

    Queries of one identity show the same person and are not independent, so the error is that of a mean over clusters:
    √(m / (m − 1) Σ (Σ_q∈k (d_q − d))²) / Q over the m identities k.

    Args:
        ours, theirs: a value of each query, (Q,).
        identities: of each query, (Q,); at least two different ones.
    """
    values = ours.astype(np.float64) - theirs
    mean = float(values.mean())
    names, member = np.unique(identities, return_inverse=True)
    sums = np.bincount(member, values - mean)
    error = math.sqrt(len(names) / (len(names) - 1) * float(sums @ sums)) / len(values)
    return Difference(mean, error, len(values), len(names))
