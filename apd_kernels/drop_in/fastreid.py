"""fast-reid, from GitHub and from PyPI: its names, over our operations.

Other than there: where fewer images are left than `max_rank` the CMC stays at its last value (there an error, or values
of other queries); negative similarities in `aqe` count as 0 (there NaN); half precision gives float32. Its functions of
pairs and masks (`hard_example_mining`, `weighted_example_mining`, `softmax_weights`) are one line of PyTorch each over
a matrix that is there already, and are not here: `triplet_loss`, which calls them, is.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice
from apd_kernels.contrastive import circle_loss, cosface_loss
from apd_kernels.distance import pairwise_distance
from apd_kernels.drop_in import checking
from apd_kernels.drop_in._shared import FLOOR, curve, evaluated, labels_of, re_ranking, tensor
from apd_kernels.drop_in.replacing import Replacement
from apd_kernels.evaluation.ranking import rank_metrics
from apd_kernels.evaluation.rerank import jaccard_distance, k_reciprocal_rerank, query_expansion
from apd_kernels.losses import triplet_loss_from_distances
from apd_kernels.mining import batch_hard
from apd_kernels.pairs import Pairing
from apd_kernels.weighting import weighted_pairs_from_distances

__all__ = [
    "aqe",
    "build_dist",
    "compute_cosine_distance",
    "compute_euclidean_distance",
    "compute_jaccard_distance",
    "cosine_dist",
    "euclidean_dist",
    "evaluate",
    "evaluate_rank",
    "evaluate_roc",
    "pairwise_circleloss",
    "pairwise_cosface",
    "re_ranking",
    "triplet_loss",
]

# Beside the sum of the weights in its weighted mining.
_WEIGHT = 1e-6


def euclidean_dist(x: Tensor, y: Tensor) -> Tensor:
    """‖x − y‖ of all rows, (N, M), at least 1e-6 (``fastreid.modeling.losses.utils``); see `pairwise_distance`."""
    return pairwise_distance(x, None if y is x else y).clamp(min=FLOOR)


def cosine_dist(x: Tensor, y: Tensor) -> Tensor:
    """2 − 2 cos of all rows, (N, M) (``fastreid.modeling.losses.utils``); see `pairwise_distance`."""
    return 2 * pairwise_distance(x, None if y is x else y, metric="cosine")


def triplet_loss(embedding: Tensor, targets: Tensor, margin: float, norm_feat: bool, hard_mining: bool) -> Tensor:
    """Triplet loss with hard or weighted mining (``fastreid.modeling.losses.triplet_loss``).

    Each anchor is its own positive; the mean is over all anchors. An anchor without a negative adds 0 with hard mining,
    and its distance to the positives with weighted mining. Weighted mining keeps fast-reid's 1e-6 beside the sum of the
    weights, with which the distance to negatives tends to 0 where all are farther than 14, and makes an (N, N) matrix.

    Args:
        embedding: shape (N, D), floating.
        targets: identities, shape (N,), any integer dtype.
        margin: of the hinge; 0 or less for the soft margin ln(1 + exp(d_p − d_n)), which is the hinge with margin 0.3
            where the exponential overflows.
        norm_feat: take 2 − 2 cos in place of the Euclidean distance.
        hard_mining: the hardest pairs, or means with the weights softmax(d) and softmax(−d).

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        TypeError, ValueError: as `batch_hard`.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    >>> triplet_loss(x, torch.tensor([7, 7, 8, 8]), 0.3, norm_feat=False, hard_mining=True)
    tensor(2.0250)
    """
    if hard_mining:
        mined = batch_hard(embedding, targets, metric="cosine" if norm_feat else "euclidean")
        positive, negative = (2 * d if norm_feat else d.clamp(min=FLOOR) for d in mined.distances)
        valid = mined.indices.negative >= 0
    else:
        d = (cosine_dist if norm_feat else euclidean_dist)(embedding, embedding)
        positive, negative = _weighted(d, targets)
        valid = torch.ones_like(positive, dtype=torch.bool)
    if margin > 0:
        return triplet_loss_from_distances(positive, negative, valid=valid, margin=margin, reduction="mean_all")
    soft, hinge = (
        triplet_loss_from_distances(positive, negative, valid=valid, margin=form, reduction="mean_all")
        for form in (None, 0.3)
    )
    largest = np.log(torch.finfo(positive.dtype).max)
    overflows = ((positive - negative).detach() * valid > largest).any()
    return torch.where(overflows, hinge, soft)


def _weighted(d: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means with 1e-6 beside the sums of exp(d − max d) and of exp(−d)."""
    means = weighted_pairs_from_distances(d, Pairing(targets, targets)).distances
    same = targets[:, None] == targets
    far = d.masked_fill(~same, 0)
    of_positive = (far - far.max(1, keepdim=True).values).exp().masked_fill(~same, 0).sum(1)
    of_negative = (-d).exp().masked_fill(same, 0).sum(1)
    return (
        means.positive * of_positive / (of_positive + _WEIGHT),
        means.negative * of_negative / (of_negative + _WEIGHT),
    )


def pairwise_circleloss(embedding: Tensor, targets: Tensor, margin: float, gamma: float) -> Tensor:
    """Circle loss, the mean over all anchors (``fastreid.modeling.losses.circle_loss``); see `circle_loss`.

    Args:
        embedding: shape (N, D), floating; rows are normalised.
        targets: identities, shape (N,), any integer dtype.
        margin, gamma: m and γ.

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        TypeError, ValueError: as `circle_loss`.
    """
    return circle_loss(embedding, targets, margin=margin, gamma=gamma, reduction="mean_all")


def pairwise_cosface(embedding: Tensor, targets: Tensor, margin: float, gamma: float) -> Tensor:
    """Pairwise CosFace, the mean over all anchors (``fastreid.modeling.losses.circle_loss``); see `cosface_loss`.

    Arguments, result and errors are those of `pairwise_circleloss`.
    """
    return cosface_loss(embedding, Pairing(targets), margin=margin, gamma=gamma, reduction="mean_all")


def compute_euclidean_distance(features: Tensor, others: Tensor) -> np.ndarray:
    """*Squared* Euclidean distances of all rows, (N, M), NumPy (``fastreid.utils.compute_dist``)."""
    return _matrix(features, others, "sqeuclidean")


def compute_cosine_distance(features: Tensor, others: Tensor) -> np.ndarray:
    """1 − cos of all rows, (N, M), NumPy (``fastreid.utils.compute_dist``)."""
    return _matrix(features, others, "cosine")


@torch.no_grad()
def _matrix(features: Tensor, others: Tensor, metric: str) -> np.ndarray:
    matrix: np.ndarray = pairwise_distance(features, others, metric=metric).cpu().numpy()
    return matrix


def compute_jaccard_distance(
    features: Tensor, k1: int = 20, k2: int = 6, search_option: int = 0, fp16: bool = False
) -> np.ndarray:
    """Jaccard distances of k-reciprocal encodings (``fastreid.utils.compute_dist``); see `jaccard_distance`.

    Args:
        features: shape (N, D), floating.
        k1, k2: as in `jaccard_distance`.
        search_option: below 3 the features go to a CUDA device where there is one, as in fast-reid.
        fp16: encodings and result in float16.

    Returns:
        (N, N), float32 (float16 with `fp16`), NumPy.

    Raises:
        TypeError, ValueError: as `jaccard_distance`.
    """
    return _jaccard(features, None, k1, k2, search_option, fp16)


def _jaccard(
    features: Tensor, gallery: Tensor | None, k1: int, k2: int, search_option: int = 0, fp16: bool = False
) -> np.ndarray:
    if search_option < 3 and torch.cuda.is_available():
        features, gallery = features.cuda(), None if gallery is None else gallery.cuda()
    dtype = torch.float16 if fp16 else None
    result = jaccard_distance(features, gallery, k1=k1, k2=min(k2, k1), dtype=dtype).cpu().numpy()
    return np.asarray(result, dtype=np.float16 if fp16 else np.float32)


def build_dist(feat_1: Tensor, feat_2: Tensor, metric: str = "euclidean", **kwargs: Any) -> np.ndarray:
    """Distances of all rows of two matrices (``fastreid.utils.compute_dist``).

    Args:
        feat_1, feat_2: shapes (N, D) and (M, D), floating.
        metric: ``"euclidean"``, which is the *square*; ``"cosine"``, 1 − cos; or ``"jaccard"``, of both sets together,
            without the matrix of both.
        kwargs: for ``"jaccard"`` `k1` and `k2`.

    Returns:
        (N, M), float32 (float64 for float64, but for "jaccard"), NumPy.

    Raises:
        TypeError, ValueError: as `pairwise_distance` and `jaccard_distance`; another metric.
    """
    check_choice("metric", metric, ("cosine", "euclidean", "jaccard"))
    if metric == "jaccard":
        return _jaccard(feat_1, feat_2, kwargs["k1"], kwargs["k2"])
    return (compute_euclidean_distance if metric == "euclidean" else compute_cosine_distance)(feat_1, feat_2)


def aqe(
    query_feat: Tensor, gallery_feat: Tensor, qe_times: int = 1, qe_k: int = 10, alpha: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Query expansion of queries and gallery (``fastreid.evaluation.query_expansion``); see `query_expansion`.

    Args:
        query_feat, gallery_feat: shapes (Q, D) and (G, D), floating.
        qe_times: how often. qe_k: neighbours in a mean. alpha: exponent of the similarity.

    Returns:
        Both after expansion, not normalised.

    Raises:
        TypeError, ValueError: as `query_expansion`.
    """
    expanded = query_expansion(query_feat, gallery_feat, k=qe_k, alpha=alpha, times=qe_times)
    return expanded.query, expanded.gallery


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
    """CMC, and AP and INP of each query (``fastreid.evaluation.rank``).

    Args:
        distmat: distances, shape (Q, G); an array or a tensor. Equal ones rank in the order of the gallery.
        q_pids, g_pids, q_camids, g_camids: identities and cameras, shapes (Q,) and (G,), whole numbers; −1 is one as
            any other. Gallery images of the query's identity and camera are left out.
        max_rank: length of the CMC; at most G.
        use_metric_cuhk03: the CMC of single gallery images, the mean of ten draws. The draws are others than
            fast-reid's, one for all queries; `numpy.random.seed` fixes them.
        use_cython: not read; there is one way here.

    Returns:
        ``(cmc, all_AP, all_INP)``: float32 (min(max_rank, G),), NumPy, and two lists of the queries that have an
        answer. With `use_metric_cuhk03` ``(cmc, mAP)``, as there.

    Raises:
        TypeError, ValueError: as `rank_metrics_from_distances`, also where no query has an answer.
    """
    result = evaluated(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, use_metric_cuhk03)
    if use_metric_cuhk03:
        return curve(result), result.mAP
    return curve(result), *(list(of[result.valid].cpu().numpy()) for of in (result.ap, result.inp))


def evaluate_roc(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, use_cython: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all pairs and whether they are of two persons (``fastreid.evaluation.roc``).

    Args:
        distmat, q_pids, g_pids, q_camids, g_camids, use_cython: as in `evaluate_rank`.

    Returns:
        ``(scores, labels)``, NumPy: the pairs of one person (label 0) by query, nearest first, then those of two (1.0).

    Raises:
        TypeError: what is not a matrix, or labels, of numbers.
    """
    distances = tensor("distmat", distmat)
    q_ids, g_ids, q_cams, g_cams = labels_of(q_pids, g_pids, q_camids, g_camids, distances.device)
    same = q_ids[:, None] == g_ids
    sorted_distances, order = distances.sort(dim=1, stable=True)
    kept = ~(same & (q_cams[:, None] == g_cams))
    same, kept = same.gather(1, order), kept.gather(1, order)
    sides = [sorted_distances[same & kept], sorted_distances[~same]]
    labels = np.repeat([0.0, 1.0], [len(side) for side in sides])
    return torch.cat(sides).cpu().numpy(), labels


@torch.no_grad()
def evaluate(self: Any) -> dict[str, Any]:
    """`ReidEvaluator.evaluate` of fast-reid without a distance matrix: ``ReidEvaluator.evaluate = evaluate``.

    Features are ranked as they come. Where images of different identities are equally far from a query, the one of
    another identity comes first; after re-ranking, the order of the gallery decides. With ``TEST.ROC`` on, which needs
    the distances of all pairs at once, the matrix is made for it.

    Args:
        self: the evaluator.

    Returns:
        The figures that fast-reid prints, in per cent: ``Rank-1``, ``Rank-5``, ``Rank-10``, ``mAP``, ``mINP``,
        ``metric``, and with ``TEST.ROC`` ``TPR@FPR=…``. Empty in all processes but the first.

    Raises:
        TypeError, ValueError: as `rank_metrics`; another metric.
    """
    from fastreid.utils import comm

    predictions = self._predictions
    if comm.get_world_size() > 1:
        comm.synchronize()
        predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
        if not comm.is_main_process():
            return {}
    features, pids, camids = (torch.cat([part[name] for part in predictions]) for name in ("feats", "pids", "camids"))
    count, test = self._num_query, self.cfg.TEST
    query, gallery = features[:count], features[count:]
    labels = pids[:count], pids[count:], camids[:count], camids[count:]
    if test.AQE.ENABLED:
        query, gallery = aqe(query, gallery, test.AQE.QE_TIME, test.AQE.QE_K, test.AQE.ALPHA)
    check_choice("cfg.TEST.METRIC", test.METRIC, ("cosine", "euclidean"))
    metric = "sqeuclidean" if test.METRIC == "euclidean" else "cosine"
    rerank = test.RERANK
    if rerank.ENABLED:
        options: dict[str, Any] = {"k1": rerank.K1, "k2": rerank.K2, "lambda_value": rerank.LAMBDA}
        distances = k_reciprocal_rerank(query, gallery, variant="fastreid", metric=metric, **options)
        result = distances.rank_metrics(*labels, ties="stable", junk=None, unknown_camera=None)
    else:
        result = rank_metrics(query, gallery, *labels, metric=metric, junk=None, unknown_camera=None)
    cmc = curve(result)
    self._results = OrderedDict({f"Rank-{rank}": cmc[rank - 1] * 100 for rank in (1, 5, 10)})
    self._results["mAP"] = result.mAP * 100
    self._results["mINP"] = result.mINP * 100
    self._results["metric"] = (result.mAP + cmc[0]) / 2 * 100
    if test.ROC.ENABLED:
        from sklearn.metrics import roc_curve

        matrix = distances.dense() if rerank.ENABLED else pairwise_distance(query, gallery, metric=metric)
        scores, different = evaluate_roc(matrix, *labels)
        rates, accepted, _ = roc_curve(different, scores)
        for rate in (1e-4, 1e-3, 1e-2):
            self._results[f"TPR@FPR={rate:.0e}"] = accepted[np.argmin(np.abs(rates - rate))]
    return OrderedDict(self._results)


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
        evaluate, "exact; ties against",
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


def _of_ranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    distances, labels = checking.ranking(generator)
    return function(distances, *labels, use_cython=False)


CASES: dict[str, checking.Case] = {
    "triplet_loss": _of_triplets,
    "euclidean_dist": checking.of_batch,
    "cosine_dist": checking.of_batch,
    "pairwise_circleloss": _of_pairs,
    "pairwise_cosface": _of_pairs,
    "compute_euclidean_distance": checking.of_batch,
    "compute_cosine_distance": checking.of_batch,
    "aqe": checking.of_batch,
    "evaluate_rank": _of_ranking,
    "evaluate_roc": _of_ranking,
    "re_ranking": checking.of_reranking,
}
