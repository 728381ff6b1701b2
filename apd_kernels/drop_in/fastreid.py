"""fast-reid: its functions and classes, made of this library's operations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels import (
    Pairing,
    batch_hard,
    circle_loss,
    cosface_loss,
    jaccard_distance,
    k_reciprocal_rerank,
    pairwise_distance,
    query_expansion,
    triplet_loss_from_distances,
)
from apd_kernels.drop_in import checking
from apd_kernels.drop_in.arrays import CLAMP, curve, draws, evaluated, of_labels, ranked, reranked, tensor
from apd_kernels.drop_in.replacing import Replacement
from apd_kernels.drop_in.torchreid import re_ranking

ZERO = 1e-6  # that the weights of soft mining are divided by more than


def euclidean_dist(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (M, N), at least 1e-6."""
    return pairwise_distance(x, y).clamp(min=CLAMP)


def cosine_dist(x: Tensor, y: Tensor) -> Tensor:
    """2 − 2 cos."""
    return 2 * pairwise_distance(x, y, metric="cosine")


def triplet_loss(embedding: Tensor, targets: Tensor, margin: float, norm_feat: bool, hard_mining: bool) -> Tensor:
    """Triplets of the hardest or of softly weighted pairs; margin 0 is the soft margin.

    Soft mining keeps the 1e-6 beside its sums of exponentials, which takes negatives farther than about 14 for nearer
    ones; `apd_kernels.triplet_loss` with ``mining="weighted"`` does not.
    """
    if not hard_mining:
        distances = (cosine_dist if norm_feat else euclidean_dist)(embedding, embedding)
        same = (targets[:, None] == targets).to(distances.dtype)
        return _term(_softly(distances, same, 1), _softly(distances, 1 - same, -1), margin)
    if norm_feat:
        embedding = torch.nn.functional.normalize(embedding)
    found = batch_hard(embedding, targets, embedding, targets, metric="sqeuclidean" if norm_feat else "euclidean")
    positive, negative = found.distances
    if not norm_feat:
        positive, negative = positive.clamp(min=CLAMP), negative.clamp(min=CLAMP)
    return _term(positive, torch.where(found.valid, negative, 1e9), margin)  # without a negative: one at 1e9, as there


def _softly(distances: Tensor, mask: Tensor, sign: int) -> Tensor:
    """Σ w d with w = exp(±d) over their sum and 1e-6."""
    logits = sign * distances * mask
    weights = (logits - logits.amax(1, keepdim=True)).exp() * mask
    return (distances * mask * weights / (weights.sum(1, keepdim=True) + ZERO)).sum(1)


def _term(positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    return triplet_loss_from_distances(positive, negative, margin=margin if margin > 0 else None)


def pairwise_circleloss(embedding: Tensor, targets: Tensor, margin: float, gamma: float) -> Tensor:
    """Circle loss, the mean over all anchors."""
    return circle_loss(embedding, targets, margin=margin, gamma=gamma, reduction="mean_all")


def pairwise_cosface(embedding: Tensor, targets: Tensor, margin: float, gamma: float) -> Tensor:
    """Circle loss without weights, the mean over all anchors."""
    return cosface_loss(embedding, Pairing(targets), margin=margin, gamma=gamma, reduction="mean_all")


def compute_euclidean_distance(features: Tensor, others: Tensor) -> np.ndarray:
    """Squared Euclidean distances as a NumPy matrix, none below 0."""
    return pairwise_distance(tensor(features), tensor(others), metric="sqeuclidean").cpu().numpy()


def compute_cosine_distance(features: Tensor, others: Tensor) -> np.ndarray:
    """1 − cos as a NumPy matrix."""
    return pairwise_distance(tensor(features), tensor(others), metric="cosine").cpu().numpy()


def compute_jaccard_distance(
    features: Tensor, k1: int = 20, k2: int = 6, search_option: int = 0, fp16: bool = False
) -> np.ndarray:
    """Jaccard distances among all rows, on the device of the features, whatever `search_option` is."""
    return jaccard_distance(tensor(features), k1=k1, k2=k2, dtype=torch.float16 if fp16 else None).cpu().numpy()


def build_dist(feat_1: Tensor, feat_2: Tensor, metric: str = "euclidean", **kwargs: Any) -> np.ndarray:
    """Distances (M, N) by name; ``"euclidean"`` are squares, ``"jaccard"`` takes k1 and k2."""
    if metric == "euclidean":
        return compute_euclidean_distance(feat_1, feat_2)
    if metric == "cosine":
        return compute_cosine_distance(feat_1, feat_2)
    if metric != "jaccard":
        raise ValueError(f"metric: expected 'cosine', 'euclidean' or 'jaccard', got {metric!r}")
    return jaccard_distance(tensor(feat_1), tensor(feat_2), k1=kwargs["k1"], k2=kwargs["k2"]).cpu().numpy()


def aqe(
    query_feat: Tensor, gallery_feat: Tensor, qe_times: int = 1, qe_k: int = 10, alpha: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Query expansion; a negative similarity counts as 0, where a fractional alpha gives NaN there."""
    found = query_expansion(query_feat, gallery_feat, k=qe_k, alpha=alpha, times=qe_times)
    return found.query, found.gallery


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[Any, ...]:
    """CMC, and AP and INP of each query that counts; with `use_metric_cuhk03` CMC and mAP, as there."""
    found = ranked(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, **draws(use_metric_cuhk03))
    cmc = curve(found, max_rank, len(tensor(g_pids)))
    if use_metric_cuhk03:
        return cmc, found.mAP
    return cmc, found.ap[found.valid].tolist(), found.inp[found.valid].tolist()


def evaluate_roc(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, use_cython: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of the pairs that count, those of one person first, and labels 0 and 1; by query, nearest first."""
    distances = tensor(distmat)
    ids, gallery_ids, cams, gallery_cams = of_labels(q_pids, g_pids, q_camids, g_camids, device=distances.device)
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i in range(len(distances)):
        same = gallery_ids == ids[i]
        for side, kept in zip(pairs, (same & (gallery_cams != cams[i]), ~same), strict=True):
            side.append(distances[i][kept].sort().values)
    genuine, impostor = (torch.cat(side).cpu().numpy() if side else np.zeros(0) for side in pairs)
    return np.concatenate([genuine, impostor]), np.repeat([0.0, 1.0], [len(genuine), len(impostor)])


class ReidEvaluator:
    """fast-reid's evaluator: only `evaluate` is replaced."""

    cfg: Any
    _num_query: int
    _predictions: list[dict[str, Tensor]]

    def evaluate(self) -> OrderedDict[str, float]:
        """From features to figures without a matrix of distances, but for TEST.ROC."""
        predictions = _gathered(self)
        if predictions is None:
            return OrderedDict()
        features, ids, cams = (torch.cat([one[key] for one in predictions]) for key in ("feats", "pids", "camids"))
        count, test = self._num_query, self.cfg.TEST
        query, gallery = features[:count], features[count:]
        labels = of_labels(ids[:count], ids[count:], cams[:count], cams[count:])
        if test.AQE.ENABLED:
            query, gallery = aqe(query, gallery, test.AQE.QE_TIME, test.AQE.QE_K, test.AQE.ALPHA)
        metric = {"euclidean": "sqeuclidean", "cosine": "cosine"}[test.METRIC]
        if test.RERANK.ENABLED:
            if metric == "cosine":
                query, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (query, gallery))
            options = {"k1": test.RERANK.K1, "k2": test.RERANK.K2, "lambda_value": test.RERANK.LAMBDA}
            found = k_reciprocal_rerank(query, gallery, **options, variant="fastreid", metric=metric)
            figures, distances = reranked(found, labels)
        else:
            figures, distances = evaluated(query, gallery, labels, metric)
        cmc = curve(figures, 50, len(gallery))
        results = OrderedDict((f"Rank-{rank}", cmc[rank - 1] * 100) for rank in (1, 5, 10) if rank <= len(cmc))
        results["mAP"], results["mINP"] = figures.mAP * 100, figures.mINP * 100
        results["metric"] = (figures.mAP + float(cmc[0])) / 2 * 100
        if test.ROC.ENABLED:
            from sklearn.metrics import roc_curve  # the project's own requirement

            ids, gallery_ids, cams, gallery_cams = labels
            scores, different = evaluate_roc(np.asarray(distances), ids, gallery_ids, cams, gallery_cams)
            fprs, tprs, _ = roc_curve(different, scores)
            for rate in (1e-4, 1e-3, 1e-2):  # of pairs of one person taken for two
                results[f"TPR@FPR={rate:.0e}"] = tprs[np.abs(fprs - rate).argmin()]
        self._results = results
        return OrderedDict(results)


def _gathered(evaluator: Any) -> list[dict[str, Tensor]] | None:
    """Of all processes, by the project's own communication; None in all but the first."""
    import importlib
    import sys

    name = next((c.__module__ for c in type(evaluator).__mro__ if c.__name__ == "ReidEvaluator"), "")
    comm = getattr(sys.modules.get(name), "comm", None)
    if comm is None:
        try:
            comm = importlib.import_module("fastreid.utils.comm")
        except ImportError:
            return evaluator._predictions
    if comm.get_world_size() == 1:
        return evaluator._predictions
    comm.synchronize()
    every = comm.gather(evaluator._predictions, dst=0)
    return [one for of_rank in every for one in of_rank] if comm.is_main_process() else None


_LOSSES, _UTILS = ("fastreid.modeling.losses.triplet_loss",), ("fastreid.modeling.losses.utils",)
_CIRCLE, _DIST = ("fastreid.modeling.losses.circle_loss",), ("fastreid.utils.compute_dist",)
_ROUNDING = "up to rounding"
REPLACEMENTS = (
    Replacement("fastreid", "distances", _UTILS, "euclidean_dist", euclidean_dist, _ROUNDING),
    Replacement("fastreid", "distances", _UTILS, "cosine_dist", cosine_dist, _ROUNDING),
    Replacement(
        "fastreid", "triplet", _LOSSES, "triplet_loss", triplet_loss, _ROUNDING,
        ("hard_example_mining", "weighted_example_mining", "softmax_weights"),
    ),
    Replacement("fastreid", "pairwise", _CIRCLE, "pairwise_circleloss", pairwise_circleloss, _ROUNDING),
    Replacement("fastreid", "pairwise", _CIRCLE, "pairwise_cosface", pairwise_cosface, _ROUNDING),
    Replacement("fastreid", "distances", _DIST, "compute_euclidean_distance", compute_euclidean_distance, _ROUNDING),
    Replacement("fastreid", "distances", _DIST, "compute_cosine_distance", compute_cosine_distance, _ROUNDING),
    Replacement(
        "fastreid", "rerank", _DIST, "compute_jaccard_distance", compute_jaccard_distance, f"{_ROUNDING}; any device",
        ("k_reciprocal_neigh",),
    ),
    Replacement(
        "fastreid", "rerank", _DIST, "build_dist", build_dist, _ROUNDING,
        ("compute_euclidean_distance", "compute_cosine_distance", "compute_jaccard_distance"),
    ),
    Replacement("fastreid", "rerank", ("fastreid.evaluation.rerank",), "re_ranking", re_ranking, _ROUNDING),
    Replacement(
        "fastreid", "evaluator", ("fastreid.evaluation.query_expansion",), "aqe", aqe,
        f"{_ROUNDING}; negative similarities as 0",
    ),
    Replacement(
        "fastreid", "evaluator", ("fastreid.evaluation.rank",), "evaluate_rank", evaluate_rank,
        "exact; ties stable; CUHK03 by other draws", ("evaluate_py", "eval_market1501", "eval_cuhk03"),
    ),
    Replacement(
        "fastreid", "evaluator", ("fastreid.evaluation.roc",), "evaluate_roc", evaluate_roc, "exact",
        ("evaluate_roc_py",),
    ),
    Replacement(
        "fastreid", "evaluator", ("fastreid.evaluation.reid_evaluation",), "ReidEvaluator.evaluate",
        ReidEvaluator.evaluate, "exact; ties against",
    ),
)  # fmt: skip


def _of_triplets(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    results = []
    for hard in (True, False):
        x = checking.features(generator, 64, 8).requires_grad_()
        loss = function(x, checking.labels(64), 0.3, False, hard)
        loss.backward()
        results += [loss, x.grad]
    return results


def _of_pairs(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    x = checking.features(generator, 64).requires_grad_()
    loss = function(x, checking.labels(64), 0.25, 32.0)
    loss.backward()
    return [loss, x.grad]


def _of_batch(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    return function(checking.features(generator, 64), checking.features(generator, 64))


def _of_ranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    distances, labels = checking.ranking(generator)
    return function(distances, *labels, use_cython=False)


def _of_reranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    query, gallery = checking.features(generator, 60), checking.features(generator, 240)
    pairs = (query, gallery), (query, query), (gallery, gallery)
    return function(*(torch.cdist(x, y).numpy() for x, y in pairs))


CASES: dict[str, checking.Case] = {
    "triplet_loss": _of_triplets,
    "euclidean_dist": _of_batch,
    "cosine_dist": _of_batch,
    "pairwise_circleloss": _of_pairs,
    "pairwise_cosface": _of_pairs,
    "compute_euclidean_distance": _of_batch,
    "compute_cosine_distance": _of_batch,
    "aqe": _of_batch,
    "evaluate_rank": _of_ranking,
    "evaluate_roc": _of_ranking,
    "re_ranking": _of_reranking,
}
