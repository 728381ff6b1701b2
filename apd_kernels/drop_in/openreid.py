"""cluster-contrast, BAU and SpCL, of the open-reid family: their functions and classes, made of this library's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels import (
    ClusterMemory as Memory,
)
from apd_kernels import (
    batch_hard,
    jaccard_distance,
    k_reciprocal_rerank,
    pairwise_distance,
    positive_ranks,
    positive_ranks_from_distances,
    supervised_contrastive_loss,
    triplet_loss_from_distances,
)
from apd_kernels.drop_in import checking
from apd_kernels.drop_in._shared import FLOOR, evaluated, labels_of, re_ranking, tensor
from apd_kernels.drop_in.replacing import Replacement, original_of
from apd_kernels.evaluation.retrieval_metrics import PositiveRanks

SAME_LENGTH = 1e-3  # of the longest row: how much shorter another may be to be of the same length


def euclidean_dist(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (M, N), at least 1e-6."""
    return pairwise_distance(x, y).clamp(min=FLOOR)


def cosine_dist(x: Tensor, y: Tensor) -> Tensor:
    """1 − cos."""
    return pairwise_distance(x, y, metric="cosine")


class TripletLoss(torch.nn.Module):
    """BAU's: batch-hard, the anchor its own positive, any batch; None is the soft margin."""

    margin: float | None
    normalize_feature: bool

    def __init__(self, margin: float | None = None, normalize_feature: bool = False) -> None:
        super().__init__()
        self.margin, self.normalize_feature = margin, normalize_feature

    def forward(self, emb: Tensor, label: Tensor) -> Tensor:
        x = torch.nn.functional.normalize(emb) if self.normalize_feature else emb
        found = batch_hard(x, label, x, label)
        distances = (d.clamp(min=FLOOR) for d in found.distances)
        return triplet_loss_from_distances(*distances, valid=found.valid, margin=self.margin, reduction="mean_all")


class SoftTripletLoss(torch.nn.Module):
    """BAU's: the cross-entropy of (d_p, d_n), `margin` the share of the wrong one."""

    margin: float

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, emb: Tensor, label: Tensor) -> Tensor:
        positive, negative = (d.clamp(min=FLOOR) for d in batch_hard(emb, label, emb, label).distances)
        terms = (
            triplet_loss_from_distances(positive, negative, margin=None, reverse=reverse, reduction="mean_all")
            for reverse in (True, False)
        )
        of_wrong, of_right = terms
        return self.margin * of_wrong + (1 - self.margin) * of_right


class ClusterMemory(torch.nn.Module):
    """Cluster contrast's: the cross-entropy of a memory of centroids, which moves in the backward pass."""

    features: Tensor
    momentum: float
    temp: float
    use_hard: bool

    def __init__(
        self, num_features: int, num_samples: int, temp: float = 0.05, momentum: float = 0.2, use_hard: bool = False
    ) -> None:
        super().__init__()
        self.num_features, self.num_samples = num_features, num_samples
        self.momentum, self.temp, self.use_hard = momentum, temp, use_hard
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        rows = torch.nn.functional.normalize(inputs, dim=1).to(self.features.device)
        targets = targets.to(rows.device)
        centroids = self.features
        if rows.requires_grad:
            samples = rows.detach()  # a hook that held the rows themselves would keep their graph alive
            rows.register_hook(lambda _: _moved(centroids, samples, targets, self.momentum, self.use_hard))
        identity = torch.arange(len(centroids), device=rows.device)
        kept = centroids.to(rows.dtype, copy=True)  # as it is now, for the backward pass
        return supervised_contrastive_loss(rows, targets, kept, identity, temperature=self.temp, metric="dot")


class MemoryBank(torch.nn.Module):
    """BAU's: one row an identity, moved by each sample in turn; its `labels` are one number an identity."""

    features: Tensor
    momentum: float

    def __init__(self, num_features: int, num_samples: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.num_samples, self.momentum = num_features, num_samples, momentum
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.long))

    def momentum_update(self, inputs: Tensor, targets: Tensor) -> None:
        _moved(self.features, inputs, targets, self.momentum, False)


@torch.no_grad()
def _moved(centroids: Tensor, rows: Tensor, targets: Tensor, momentum: float, hardest: bool) -> None:
    """Move them in place, as a memory that has seen every identity."""
    memory = Memory(
        *centroids.shape, momentum=momentum, hardest=hardest, dtype=centroids.dtype, device=centroids.device
    )
    memory.centroids, memory.valid = centroids, torch.ones_like(memory.valid)
    memory.update(rows.detach().to(centroids.device), targets.to(centroids.device))


def cmc(
    distmat: Any,
    query_ids: Any = None,
    gallery_ids: Any = None,
    query_cams: Any = None,
    gallery_cams: Any = None,
    topk: int = 100,
    separate_camera_set: bool = False,
    single_gallery_shot: bool = False,
    first_match_break: bool = False,
) -> np.ndarray:
    """Their CMC; single images are drawn from NumPy's global generator."""
    distances = tensor("distmat", distmat)
    labels = _labels(distances, query_ids, gallery_ids, query_cams, gallery_cams)
    if separate_camera_set:  # infinitely far: behind every positive, which are of other cameras
        distances = distances.float().masked_fill(labels[2][:, None] == labels[3], float("inf"))
    if single_gallery_shot:
        of_query, of_gallery, cams, gallery_cams = labels
        found = evaluated(distances, of_query, of_gallery, cams, gallery_cams, topk, True).cmc.cpu().numpy()
        return np.pad(found, (0, topk - len(found)), mode="edge")
    return _ranks(distances, labels).cmc(topk, every_match=not first_match_break).cpu().numpy()


def mean_ap(
    distmat: Any, query_ids: Any = None, gallery_ids: Any = None, query_cams: Any = None, gallery_cams: Any = None
) -> float:
    """scikit-learn's average precision, the mean over the queries that have a match."""
    distances = tensor("distmat", distmat)
    labels = _labels(distances, query_ids, gallery_ids, query_cams, gallery_cams)
    return _mean_ap(_ranks(distances, labels, "grouped"))


def _labels(distances: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Where one is None: numbers from 0 as identities, camera 0 for queries and 1 for the gallery."""
    counts = (*distances.shape, *distances.shape)
    others = (np.arange(counts[0]), np.arange(counts[1]), np.zeros(counts[2], int), np.ones(counts[3], int))
    ids, gallery_ids, cams, gallery_cams = (
        other if one is None else one for one, other in zip(given, others, strict=True)
    )
    return labels_of(ids, gallery_ids, cams, gallery_cams, distances.device)


def _ranks(distances: Tensor, labels: tuple[Tensor, ...], ties: str = "stable") -> PositiveRanks:
    return positive_ranks_from_distances(distances, *labels, ties=ties, junk=None, unknown_camera=None)


def _mean_ap(found: PositiveRanks) -> float:
    precision = found.hit / found.rank.double()
    total = torch.bincount(found.query, weights=precision, minlength=len(found.positives))
    counted = found.positives > 0
    return float((total[counted] / found.positives[counted]).mean())


def compute_jaccard_distance(
    target_features: Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    search_option: int = 0,
    use_float16: bool = False,
) -> np.ndarray:
    """Jaccard distances among all rows, on the device of the features, whatever `search_option` is.

    The project takes 2 − 2x·y for ‖x − y‖², so rows of one length. Others go to the project's own function where this
    one stands in for it.

    Raises:
        ValueError: rows of several lengths, and no original to turn to.
    """
    features = tensor("target_features", target_features)
    lengths = features.norm(dim=1)
    if len(features) and bool(lengths.amin() < (1 - SAME_LENGTH) * lengths.amax()):
        original = original_of(compute_jaccard_distance)
        if original is None:
            raise ValueError(
                f"target_features: expected rows of one length, got {float(lengths.amin()):g} to "
                f"{float(lengths.amax()):g}"
            )
        result: np.ndarray = original(target_features, k1, k2, print_flag, search_option, use_float16)
        return result
    dtype = torch.float16 if use_float16 else None
    return jaccard_distance(features, k1=k1, k2=k2, dtype=dtype).cpu().numpy()


class Evaluator:
    """Theirs, of which only `evaluate` is replaced."""

    model: Any

    def evaluate(
        self,
        data_loader: Any,
        query: Sequence[tuple[Any, int, int]],
        gallery: Sequence[tuple[Any, int, int]],
        cmc_flag: bool = False,
        rerank: bool = False,
        cmc_topk: Sequence[int] = (1, 5, 10),
    ) -> Any:
        """From features to figures without a matrix of distances; mAP, or with `cmc_flag` the CMC and mAP."""
        features, _ = _theirs(self, "extract_features")(self.model, data_loader)
        x, y = (torch.stack([features[name] for name, *_ in side]).flatten(1) for side in (query, gallery))
        ids, gallery_ids, cams, gallery_cams = (
            [part[place] for part in side] for place in (1, 2) for side in (query, gallery)
        )
        labels = labels_of(ids, gallery_ids, cams, gallery_cams, x.device)
        if rerank:  # the project squares its distances, which are squares already
            found = k_reciprocal_rerank(x, y, metric="sqeuclidean")
            matrix = found.dense()
            curve, mean = _ranks(matrix, labels).cmc(100), _mean_ap(_ranks(matrix, labels, "grouped"))
        else:
            options: dict[str, Any] = {"metric": "euclidean", "junk": None, "unknown_camera": None}
            curve = positive_ranks(x, y, *labels, **options).cmc(100)
            mean = _mean_ap(positive_ranks(x, y, *labels, ties="grouped", **options))
        print(f"mAP {mean:.1%}", *(f"rank-{rank} {curve[rank - 1]:.1%}" for rank in cmc_topk if cmc_flag), sep="  ")
        return (curve.cpu().numpy(), mean) if cmc_flag else mean


def _theirs(instance: Any, name: str) -> Any:
    """A function beside the class of an object."""
    import sys

    module = next(c.__module__ for c in type(instance).__mro__ if c.__name__ == "Evaluator")
    return getattr(sys.modules[module], name)


def _in(module: str, *projects: str) -> tuple[str, ...]:
    return tuple(f"{project}.{module}" for project in projects or ("clustercontrast", "bau", "spcl"))


_ROUNDING = "up to rounding"
_LOSSES = _in("loss.triplet", "bau")
REPLACEMENTS = (
    Replacement("openreid", "triplet", _LOSSES, "euclidean_dist", euclidean_dist, _ROUNDING),
    Replacement("openreid", "triplet", _LOSSES, "cosine_dist", cosine_dist, _ROUNDING),
    Replacement(
        "openreid", "triplet", _LOSSES, "TripletLoss.forward", TripletLoss.forward, _ROUNDING,
        ("TripletLoss.__init__", "euclidean_dist", "_batch_hard"),
    ),
    Replacement(
        "openreid", "triplet", _LOSSES, "SoftTripletLoss.forward", SoftTripletLoss.forward, _ROUNDING,
        ("SoftTripletLoss.__init__", "euclidean_dist", "_batch_hard"),
    ),
    Replacement(
        "openreid", "memory", _in("models.cm", "clustercontrast"), "ClusterMemory.forward", ClusterMemory.forward,
        _ROUNDING,
        ("ClusterMemory.__init__", "CM.forward", "CM.backward", "CM_Hard.forward", "CM_Hard.backward", "cm", "cm_hard"),
    ),
    Replacement(
        "openreid", "memory", _in("models.memory", "bau"), "MemoryBank.momentum_update", MemoryBank.momentum_update,
        _ROUNDING, ("MemoryBank.__init__",),
    ),
    Replacement("openreid", "evaluator", _in("evaluation_metrics.ranking"), "cmc", cmc, "exact; ties stable"),
    Replacement("openreid", "evaluator", _in("evaluation_metrics.ranking"), "mean_ap", mean_ap, "exact"),
    Replacement(
        "openreid", "evaluator", _in("evaluators"), "Evaluator.evaluate", Evaluator.evaluate, "exact; ties against",
        ("pairwise_distance", "evaluate_all"),
    ),
    Replacement("openreid", "rerank", _in("utils.rerank"), "re_ranking", re_ranking, _ROUNDING),
    Replacement(
        "openreid", "jaccard", _in("utils.faiss_rerank"), "compute_jaccard_distance", compute_jaccard_distance,
        f"{_ROUNDING}; any device", ("k_reciprocal_neigh",),
    ),
)  # fmt: skip


def _of_triplets(function: Callable[..., Any], module: Any, generator: torch.Generator) -> Any:
    x = checking.features(generator, 64).requires_grad_()
    kind = getattr(module, "SoftTripletLoss" if "Soft" in function.__qualname__ else "TripletLoss")
    loss = function(kind(margin=0.3), x, checking.labels(64))
    loss.backward()
    return [loss, x.grad]


def _of_bank(function: Callable[..., Any], module: Any, generator: torch.Generator) -> Any:
    bank = module.MemoryBank(128, 16)
    bank.features.copy_(torch.nn.functional.normalize(torch.randn(16, 128, generator=generator)))
    function(bank, checking.features(generator, 64), checking.labels(64))
    return bank.features


def _of_jaccard(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    rows = torch.nn.functional.normalize(checking.features(generator, 300))
    return function(rows, print_flag=False, search_option=3)


CASES: dict[str, checking.Case] = {
    "euclidean_dist": checking.of_batch,
    "cosine_dist": checking.of_batch,
    "TripletLoss.forward": _of_triplets,
    "SoftTripletLoss.forward": _of_triplets,
    "MemoryBank.momentum_update": _of_bank,
    "cmc": checking.of_ranking,
    "mean_ap": checking.of_ranking,
    "re_ranking": checking.of_reranking,
    "compute_jaccard_distance": _of_jaccard,
}
