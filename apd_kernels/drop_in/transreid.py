"""TransReID, CLIP-ReID and reid-strong-baseline: their functions and classes, made of this library's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels import (
    Pairing,
    RankMetrics,
    batch_hard,
    batch_hard_from_distances,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_distances,
    pairwise_distance,
    rank_metrics,
    supervised_contrastive_loss,
    triplet_loss_from_distances,
)
from apd_kernels.drop_in import checking
from apd_kernels.drop_in._shared import FLOOR, LazyDistances, curve, evaluated, labels_of, tensor
from apd_kernels.drop_in.replacing import Replacement


def normalize(x: Tensor, axis: int = -1) -> Tensor:
    """x / (‖x‖ + 1e-12) along an axis."""
    return x / (x.norm(dim=axis, keepdim=True) + 1e-12)


def euclidean_dist(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (M, N), at least 1e-6."""
    return pairwise_distance(x, y).clamp(min=FLOOR)


def cosine_dist(x: Tensor, y: Tensor) -> Tensor:
    """(1 − cos) / 2."""
    return pairwise_distance(x, y, metric="cosine") / 2


def hard_example_mining(dist_mat: Tensor, labels: Tensor, return_inds: bool = False) -> tuple[Tensor, ...]:
    """Distances to the farthest positive, the anchor itself included, and the nearest negative, of any batch."""
    found = batch_hard_from_distances(dist_mat, Pairing(labels, labels))
    return (*found.distances, *found.indices) if return_inds else tuple(found.distances)


class TripletLoss:
    """Batch-hard triplets; the loss and the distances, scaled by the hard factor.

    An anchor without a negative counts as 0, where the projects fail.
    """

    margin: float | None
    hard_factor: float

    def __init__(self, margin: float | None = None, hard_factor: float = 0.0) -> None:
        self.margin, self.hard_factor = margin, hard_factor

    def __call__(
        self, global_feat: Tensor, labels: Tensor, normalize_feature: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = normalize(global_feat) if normalize_feature else global_feat
        found = batch_hard(x, labels, x, labels)
        factor = getattr(self, "hard_factor", 0.0)  # strong-baseline has none
        positive = found.distances.positive.clamp(min=FLOOR) * (1 + factor)
        negative = found.distances.negative.clamp(min=FLOOR) * (1 - factor)
        loss = triplet_loss_from_distances(
            positive, negative, valid=found.valid, margin=self.margin, reduction="mean_all"
        )
        return loss, positive, negative


class SupConLoss(torch.nn.Module):
    """CLIP-ReID's contrast of texts and images; a text without an image does not count, where the project gives NaN."""

    def __init__(self, device: Any = None) -> None:
        super().__init__()
        self.device, self.temperature = device, 1.0

    def forward(self, text_features: Tensor, image_features: Tensor, t_label: Tensor, i_targets: Tensor) -> Tensor:
        return supervised_contrastive_loss(
            text_features, t_label, image_features, i_targets, temperature=self.temperature, metric="dot"
        )


def euclidean_distance(qf: Tensor, gf: Tensor) -> np.ndarray:
    """Squared Euclidean distances as a NumPy matrix, none below 0."""
    return pairwise_distance(tensor("qf", qf), tensor("gf", gf), metric="sqeuclidean").cpu().numpy()


def cosine_similarity(qf: Tensor, gf: Tensor) -> np.ndarray:
    """The angle, in spite of its name: the arccosine of the cosine within 1e-5 of 1."""
    cosine = 1 - pairwise_distance(tensor("qf", qf), tensor("gf", gf), metric="cosine")
    return cosine.clamp(-1 + 1e-5, 1 - 1e-5).arccos().cpu().numpy()


def eval_func(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, max_rank: int = 50
) -> tuple[np.ndarray, float]:
    """CMC and mAP."""
    found = evaluated(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, False)
    return curve(found), found.mAP


def re_ranking(
    probFea: Tensor,
    galFea: Tensor,
    k1: int,
    k2: int,
    lambda_value: float,
    local_distmat: Any = None,
    only_local: bool = False,
) -> np.ndarray:
    """Distances by k-reciprocal neighbours, with encodings in float16."""
    options: dict[str, Any] = {"k1": k1, "k2": k2, "lambda_value": lambda_value, "variant": "transreid"}
    query, gallery = tensor("probFea", probFea), tensor("galFea", galFea)
    if local_distmat is None:
        return np.asarray(k_reciprocal_rerank(query, gallery, **options))
    count = len(query)
    distances = tensor("local_distmat", local_distmat).to(query.device)
    if not only_local:
        distances = distances + pairwise_distance(torch.cat([query, gallery]), metric="sqeuclidean")
    parts = distances[:count, count:], distances[:count, :count], distances[count:, count:]
    return np.asarray(k_reciprocal_rerank_from_distances(*parts, **options))


class R1_mAP_eval:
    """Figures from features batch by batch; the matrix that `compute` returns is made when somebody looks at it."""

    def __init__(self, num_query: int, max_rank: int = 50, feat_norm: bool = True, reranking: bool = False) -> None:
        self.num_query, self.max_rank, self.feat_norm, self.reranking = num_query, max_rank, feat_norm, reranking
        self.reset()

    def reset(self) -> None:
        self.feats: list[Tensor] = []
        self.pids: list[Any] = []
        self.camids: list[Any] = []

    def update(self, output: tuple[Tensor, Any, Any]) -> None:
        feat, pid, camid = output
        self.feats.append(feat.cpu())
        self.pids.extend(np.asarray(pid))
        self.camids.extend(np.asarray(camid))

    def compute(self) -> tuple[np.ndarray, float, LazyDistances, list[Any], list[Any], Tensor, Tensor]:
        figures, distances, query, gallery = _figures(self, self.feat_norm, self.reranking, (50, 15))
        return curve(figures), figures.mAP, distances, self.pids, self.camids, query, gallery


class R1_mAP:
    """reid-strong-baseline's, a metric of ignite there: only `compute` is replaced."""

    num_query: int
    feat_norm: str
    feats: list[Tensor]
    pids: list[Any]
    camids: list[Any]

    def compute(self) -> tuple[np.ndarray, float]:
        figures, *_ = _figures(self, self.feat_norm == "yes", False, (20, 6))
        return curve(figures), figures.mAP


class R1_mAP_reranking(R1_mAP):
    """The same, re-ranked."""

    def compute(self) -> tuple[np.ndarray, float]:
        figures, *_ = _figures(self, self.feat_norm == "yes", True, (20, 6))
        return curve(figures), figures.mAP


def _figures(
    collected: Any, normalized: bool, reranking: bool, sizes: tuple[int, int]
) -> tuple[RankMetrics, LazyDistances, Tensor, Tensor]:
    """The CMC to rank 50, whatever the evaluator was given, as there."""
    features = torch.cat(collected.feats)
    if normalized:
        features = torch.nn.functional.normalize(features, dim=1)
    count = collected.num_query
    query, gallery = features[:count], features[count:]
    ids, cams = np.asarray(collected.pids), np.asarray(collected.camids)
    labels = labels_of(ids[:count], ids[count:], cams[:count], cams[count:], features.device)
    options: dict[str, Any] = {"max_rank": min(50, max(1, len(gallery))), "junk": None, "unknown_camera": None}
    shape = (len(query), len(gallery))
    if reranking:
        k1, k2 = sizes
        found = k_reciprocal_rerank(query, gallery, k1=k1, k2=k2, lambda_value=0.3, variant="transreid")
        return found.rank_metrics(*labels, **options), LazyDistances(shape, found.dense), query, gallery
    figures = rank_metrics(query, gallery, *labels, metric="sqeuclidean", **options)
    distances = LazyDistances(shape, lambda: pairwise_distance(query, gallery, metric="sqeuclidean"))
    return figures, distances, query, gallery


_LOSS, _METRICS = ("loss.triplet_loss", "layers.triplet_loss"), ("utils.metrics",)
_RERANKING = ("utils.reranking", "utils.re_ranking")
_HELPERS = ("euclidean_dist", "hard_example_mining", "normalize")
_ROUNDING = "up to rounding"

REPLACEMENTS = (
    Replacement("transreid", "triplet", _LOSS, "euclidean_dist", euclidean_dist, _ROUNDING),
    Replacement("transreid", "triplet", _LOSS[:1], "cosine_dist", cosine_dist, _ROUNDING),
    Replacement("transreid", "triplet", _LOSS, "hard_example_mining", hard_example_mining, "exact; any batch"),
    Replacement(
        "transreid", "triplet", _LOSS, "TripletLoss.__call__", TripletLoss.__call__, f"{_ROUNDING}; any batch",
        ("TripletLoss.__init__", *_HELPERS),
    ),
    Replacement(
        "transreid", "contrastive", ("loss.supcontrast",), "SupConLoss.forward", SupConLoss.forward, _ROUNDING,
        ("SupConLoss.__init__",),
        off="slower than the original on a CPU at 64 × 64 × 512: 0.59 times as fast",
    ),
    Replacement("transreid", "distances", _METRICS, "euclidean_distance", euclidean_distance, _ROUNDING),
    Replacement("transreid", "distances", _METRICS, "cosine_similarity", cosine_similarity, _ROUNDING),
    Replacement(
        "transreid", "evaluator", (*_METRICS, "data.datasets.eval_reid"), "eval_func", eval_func, "exact; ties stable"
    ),
    Replacement(
        "transreid", "evaluator", _METRICS, "R1_mAP_eval.compute", R1_mAP_eval.compute, "exact; ties against",
        ("R1_mAP_eval.__init__", "euclidean_distance", "eval_func"),
    ),
    Replacement(
        "transreid", "evaluator", ("utils.reid_metric",), "R1_mAP.compute", R1_mAP.compute, "exact; ties against",
        ("R1_mAP.__init__", "R1_mAP.update"),
    ),
    Replacement(
        "transreid", "evaluator", ("utils.reid_metric",), "R1_mAP_reranking.compute", R1_mAP_reranking.compute,
        "5e-4: sums in float16, as there", ("R1_mAP_reranking.__init__", "R1_mAP_reranking.update"),
    ),
    Replacement("transreid", "rerank", _RERANKING, "re_ranking", re_ranking, "5e-4: sums in float16, as there"),
)  # fmt: skip


def _of_triplets(function: Callable[..., Any], module: Any, generator: torch.Generator) -> Any:
    x = checking.features(generator, 64).requires_grad_()
    loss, *distances = function(module.TripletLoss(0.3), x, checking.labels(64))
    loss.backward()
    return [loss, *distances, x.grad]


def _of_reranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    return function(checking.features(generator, 60), checking.features(generator, 240), 20, 6, 0.3)


def _of_evaluator(function: Callable[..., Any], module: Any, generator: torch.Generator) -> Any:
    evaluator = module.R1_mAP_eval(60)
    evaluator.reset()
    evaluator.update((checking.features(generator, 460), np.arange(460) % 16, np.arange(460) // 16 % 3))
    return function(evaluator)[:2]


def _of_mining(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    x = checking.features(generator, 64)
    return function(torch.cdist(x, x), checking.labels(64), True)


CASES: dict[str, checking.Case] = {
    "euclidean_dist": checking.of_batch,
    "cosine_dist": checking.of_batch,
    "hard_example_mining": _of_mining,
    "TripletLoss.__call__": _of_triplets,
    "euclidean_distance": checking.of_batch,
    "cosine_similarity": checking.of_batch,
    "eval_func": checking.of_ranking,
    "R1_mAP_eval.compute": _of_evaluator,
    "re_ranking": _of_reranking,
}
