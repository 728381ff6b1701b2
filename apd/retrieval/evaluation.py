"""Retrieval metrics of feature files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd.data.market import DISTRACTOR, NO_ANSWERS, UNKNOWN, unanswered
from apd.errors import DataWarning, InputError
from apd.retrieval.features import FeatureSet, check_same_model, map_array
from apd.retrieval.shards import GalleryShards
from apd_kernels import (
    RankAccumulator,
    RankMetrics,
    RerankedDistances,
    k_reciprocal_rerank,
    rank_metrics,
    rank_metrics_from_distances,
)
from apd_kernels.evaluation.retrieval_metrics import Unlabelled

RANKS = (1, 5, 10)
LABELS = Unlabelled()  # −1 is no identity and no camera


@dataclass(frozen=True)
class Reranking:
    """How lists are re-ranked, as in `apd_kernels.k_reciprocal_rerank`."""

    variant: str = "torchreid"
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3

    def __str__(self) -> str:
        return f"{self.variant}, k1 {self.k1}, k2 {self.k2}, lambda {self.lambda_value:g}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Conventions:
    """What code bases disagree on, and a result is worth nothing without.

    `metric`, `ap`, `ties`, `single_shot` and `seed` are those of `apd_kernels.rank_metrics`. With `exclude_self` only
    the query's own image is left out, instead of all images of its identity in its own camera; with `ignore_cameras`
    nothing is. `unlabelled` names the identity and the camera that are none.
    """

    metric: str = "cosine"
    ap: str = "rectangular"
    ties: str = "pessimistic"
    reranking: Reranking | None = None
    single_shot: int | None = None
    seed: int = 0
    exclude_self: bool = False
    ignore_cameras: bool = False
    unlabelled: Unlabelled = LABELS

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "ap": self.ap,
            "ties": self.ties,
            "re_ranking": False if self.reranking is None else self.reranking.as_json(),
            "single_shot": False if self.single_shot is None else {"draws": self.single_shot, "seed": self.seed},
            "exclude_self": self.exclude_self,
            "ignore_cameras": self.ignore_cameras,
            **self.unlabelled._asdict(),
        }


@dataclass(frozen=True)
class Evaluation:
    """The figures of one retrieval run."""

    cmc: dict[int, float]  # rank-k for the k of RANKS
    mAP: float
    mINP: float
    num_queries: int
    num_valid_queries: int
    conventions: Conventions

    @property
    def left_out(self) -> int:
        """Queries without a right answer, or of junk."""
        return self.num_queries - self.num_valid_queries

    def as_json(self) -> dict[str, Any]:
        return {
            "cmc": {str(k): value for k, value in self.cmc.items()},
            "mAP": self.mAP,
            "mINP": self.mINP,
            "num_queries": self.num_queries,
            "num_valid_queries": self.num_valid_queries,
            "num_left_out_queries": self.left_out,
            **self.conventions.as_json(),
        }


def evaluate(query: FeatureSet, gallery: FeatureSet, conventions: Conventions, *, device: str = "cpu") -> Evaluation:
    """Search every query in the gallery, leaving out images of its identity in its own camera.

    Args:
        query, gallery: rows with identities and cameras; without cameras for `exclude_self`.
        conventions: of the evaluation.
        device: where to compute.

    Raises:
        InputError: the two do not fit together, or no query has an image of its identity in another camera.
    """
    if conventions.reranking is not None:
        reranked = rerank(query, gallery, conventions.metric, conventions.reranking, device=device)
        return evaluate_reranked(reranked, query, gallery, conventions, device=device)
    check_same_model(query, gallery)
    labels = _labels(query, gallery, conventions, device)
    exclude = _own_places(query, gallery).to(device) if conventions.exclude_self else None
    with naming(query, gallery):
        result = rank_metrics(
            features_tensor(query, device),
            features_tensor(gallery, device),
            *labels,
            metric=conventions.metric,
            ap=conventions.ap,
            ties=conventions.ties,
            max_rank=max(RANKS),
            exclude=exclude,
            single_shot=conventions.single_shot,
            seed=conventions.seed,
            **conventions.unlabelled._asdict(),
        )
    return _figures(result, query, conventions)


def evaluate_shards(
    query: FeatureSet,
    gallery: GalleryShards,
    conventions: Conventions,
    *,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """`evaluate` of a gallery in pieces, bit for bit; every piece is read twice and forgotten.

    Args:
        query, gallery, device: as for `evaluate`.
        conventions: without `reranking`, `single_shot` and `exclude_self`, which need the gallery as a whole.
        advance: told how many images have been seen, in the end twice the gallery's.

    Raises:
        InputError: as `evaluate`.
    """

    def labels(rows: FeatureSet) -> tuple[Tensor, Tensor | None]:
        ids = integers_tensor(rows.identities(), device)
        return ids, None if conventions.ignore_cameras else integers_tensor(_cameras(rows), device)

    with naming(query):
        ranks = RankAccumulator(
            features_tensor(query, device),
            *labels(query),
            metric=conventions.metric,
            ap=conventions.ap,
            ties=conventions.ties,
            max_rank=max(RANKS),
            **conventions.unlabelled._asdict(),
        )
    for step in (ranks.add_positives, ranks.count):
        for piece in gallery.pieces():
            with naming(piece, where=f", {piece.rows}"):
                step(features_tensor(piece, device), *labels(piece))
            advance(len(piece))
    with naming(query):
        return _figures(ranks.compute(), query, conventions)


def evaluate_distances(distances: Path, query: FeatureSet, gallery: FeatureSet, conventions: Conventions) -> Evaluation:
    """`evaluate` of a matrix of distances that somebody else has computed; it is mapped and read in blocks.

    Args:
        distances: ``.npy`` file of floating point numbers, shape (queries, gallery images), smaller is nearer.
        query, gallery: identities and cameras of its rows and columns; the features are not looked at.
        conventions: without `reranking` and `single_shot`, which need the features; `metric` names the file.

    Raises:
        InputError: the file cannot be read, is of another shape or kind, or has NaN; and as `evaluate`.
    """
    matrix = _matrix(distances, (len(query), len(gallery)))
    labels = _labels(query, gallery, conventions, "cpu")
    exclude = _own_places(query, gallery) if conventions.exclude_self else None
    with naming(query, gallery, distances):
        result = rank_metrics_from_distances(
            torch.from_numpy(matrix),
            *labels,
            ap=conventions.ap,
            ties=conventions.ties,
            max_rank=max(RANKS),
            exclude=exclude,
            **conventions.unlabelled._asdict(),
        )
    return _figures(result, query, conventions)


def rerank(
    query: FeatureSet, gallery: FeatureSet, metric: str, reranking: Reranking, *, device: str = "cpu"
) -> RerankedDistances:
    """Distances re-ranked by k-reciprocal neighbours, without a matrix of them.

    Args:
        query, gallery: rows; identities and cameras are not looked at.
        metric, reranking: as in `apd_kernels.k_reciprocal_rerank`.
        device: where to compute.

    Raises:
        InputError: the two do not fit together, or the variant has another metric.
    """
    check_same_model(query, gallery)
    with naming(query, gallery):
        return k_reciprocal_rerank(
            features_tensor(query, device), features_tensor(gallery, device), metric=metric, **asdict(reranking)
        )


def evaluate_reranked(
    reranked: RerankedDistances,
    query: FeatureSet,
    gallery: FeatureSet,
    conventions: Conventions,
    *,
    device: str = "cpu",
) -> Evaluation:
    """The figures of re-ranked distances, straight from their blocks.

    Args:
        reranked: of the same rows on the same device, as `rerank` makes it.
        query, gallery: rows with identities and cameras.
        conventions: with what `rerank` was given.
        device: where the distances are.
    """
    labels = _labels(query, gallery, conventions, device)
    with naming(query, gallery):
        result = reranked.rank_metrics(
            *labels,
            ap=conventions.ap,
            ties=conventions.ties,
            max_rank=max(RANKS),
            **conventions.unlabelled._asdict(),
        )
    return _figures(result, query, conventions)


def warn_of_distractors(query: FeatureSet) -> None:
    """A gallery's identity 0 is nobody; as a query it would be matched with all of them."""
    count = int((query.identities() == DISTRACTOR).sum())
    if count:
        warnings.warn(
            f"{query.path}: pids: {count:,} of {len(query):,} queries have the identity 0, which stands for "
            "distractors in the layout of Market-1501; they are counted as one person. Give them -1 to leave them out",
            DataWarning,
            stacklevel=2,
        )


def why_no_figures(query: FeatureSet, gallery: FeatureSet, *, cameras: bool) -> str | None:
    """What the rows lack for an evaluation; None where there is nothing.

    Args:
        query, gallery: features are not looked at.
        cameras: whether images of a query's own camera are left out.
    """
    pairs = []
    for rows in (query, gallery):
        if rows.pids is None or (rows.pids == UNKNOWN).all():
            return f"{rows.path}: says the identity of no image"
        if cameras and rows.camids is None:
            return f"{rows.path}: no array 'camids'; --ignore-cameras evaluates without cameras"
        columns = (rows.pids, rows.pids if rows.camids is None else rows.camids)
        pairs.append(zip(*(column.tolist() for column in columns), strict=True))
    if unanswered(*pairs, cameras=cameras) == len(query):
        return f"{query.path}: {NO_ANSWERS if cameras else 'no query has an image of its identity in the gallery'}"
    return None


def features_tensor(rows: FeatureSet, device: str = "cpu") -> Tensor:
    """The features in float32, or in float64 where the file has it."""
    dtype = np.float64 if rows.features.dtype.itemsize >= 8 else np.float32
    return torch.from_numpy(rows.features.astype(dtype)).to(device)


def _labels(
    query: FeatureSet, gallery: FeatureSet, conventions: Conventions, device: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Identities of queries and gallery, and their cameras, where images of the query's own camera are left out."""
    ids, gallery_ids = (integers_tensor(rows.identities(), device) for rows in (query, gallery))
    if conventions.exclude_self or conventions.ignore_cameras:
        return ids, gallery_ids, None, None
    cams, gallery_cams = (integers_tensor(_cameras(rows), device) for rows in (query, gallery))
    return ids, gallery_ids, cams, gallery_cams


def _cameras(rows: FeatureSet) -> np.ndarray:
    if rows.camids is None:
        raise InputError(f"{rows.path}: no array 'camids'; --ignore-cameras evaluates without cameras")
    return rows.camids


def integers_tensor(values: np.ndarray, device: str = "cpu") -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _own_places(query: FeatureSet, gallery: FeatureSet) -> Tensor:
    """Where each query stands in the gallery itself, by its name, or by its row where one file is both; −1: nowhere."""
    both = query.path.resolve() == gallery.path.resolve()
    if not both and not (query.named and gallery.named):
        raise InputError(
            f"--exclude-self: {query.path} and {gallery.path} have no array 'names' both, by which a query could be "
            "found in the gallery"
        )
    order = np.argsort(gallery.names, kind="stable")
    names = gallery.names[order]
    if repeated := set(names[1:][names[1:] == names[:-1]].tolist()) & set(query.names.tolist()):
        raise InputError(f"{gallery.path}: names: {min(repeated)} is there more than once; which is the query itself?")
    places = np.searchsorted(names, query.names).clip(max=len(names) - 1)
    found = names[places] == query.names
    if not found.any():
        raise InputError(
            f"--exclude-self: none of the {len(query):,} queries is an image of the gallery, by its name; "
            f"{query.names[0]} for one"
        )
    return torch.from_numpy(np.where(found, order[places], -1))


def _matrix(path: Path, shape: tuple[int, int]) -> np.ndarray:
    matrix = map_array(path)
    if matrix.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: expected distances in float16, float32 or float64, got {matrix.dtype}")
    if matrix.shape != shape:
        raise InputError(f"{path}: expected shape {shape}, queries by gallery images, got {matrix.shape}")
    return matrix


@contextmanager
def naming(*sources: FeatureSet | Path, where: str = "") -> Iterator[None]:
    """What a metric does not accept becomes an error of the files that it comes from, and of the place in them."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        files = dict.fromkeys(str(source if isinstance(source, Path) else source.path) for source in sources)
        hint = ""
        if "from another camera" in str(error):
            hint = "; --ignore-cameras keeps the images of a query's own camera"
        raise InputError(f"{' and '.join(files)}{where}: {error}{hint}") from error


def _figures(result: RankMetrics, query: FeatureSet, conventions: Conventions) -> Evaluation:
    return Evaluation(
        cmc={k: float(result.cmc[k - 1]) for k in RANKS},
        mAP=result.mAP,
        mINP=result.mINP,
        num_queries=len(query),
        num_valid_queries=int(result.valid.sum()),
        conventions=conventions,
    )
