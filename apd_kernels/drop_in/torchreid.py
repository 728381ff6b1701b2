"""torchreid (deep-person-reid), from GitHub and from PyPI (``torchreid.reid``): its names, over our operations.

Other than there: identities need not have equal numbers of images, and an anchor without a negative adds 0 to the loss
(there an error); where fewer images are left than `max_rank` the CMC stays at its last value (there an error, or values
of other queries); half precision gives float32.
"""

from __future__ import annotations

import os.path
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apd_kernels._core.checks import check_choice
from apd_kernels.distance import pairwise_distance
from apd_kernels.drop_in import checking
from apd_kernels.drop_in._shared import (
    DRAWS,
    LazyDistances,
    batch_hard_triplet,
    curve,
    drawn_seed,
    evaluated,
    labels_of,
    re_ranking,
)
from apd_kernels.drop_in.replacing import Replacement
from apd_kernels.evaluation.ranking import rank_metrics
from apd_kernels.evaluation.rerank import k_reciprocal_rerank

__all__ = [
    "TripletLoss",
    "compute_distance_matrix",
    "cosine_distance",
    "euclidean_squared_distance",
    "evaluate",
    "evaluate_rank",
    "re_ranking",
]


class TripletLoss(nn.Module):
    """Batch-hard triplet loss with a hinge (``torchreid.losses.TripletLoss``).

    Args:
        margin: of the hinge, at least 0.

    >>> import torch
    >>> TripletLoss(margin=0.3)(torch.tensor([[0.0], [1.0], [1.5], [9.0]]), torch.tensor([7, 7, 8, 8]))
    tensor(2.0250)
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all anchors, each its own positive.

        Args:
            inputs: features, shape (N, D), floating.
            targets: identities, shape (N,), any integer dtype.

        Returns:
            A float32 scalar (float64 for float64).

        Raises:
            TypeError, ValueError: as `batch_hard`.
        """
        return batch_hard_triplet(inputs, targets, self.margin)


def euclidean_squared_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """Squared Euclidean distances of the rows, (N, M); see `pairwise_distance`."""
    return pairwise_distance(input1, input2, metric="sqeuclidean")


def cosine_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """1 − cos of the rows, (N, M); see `pairwise_distance`."""
    return pairwise_distance(input1, input2, metric="cosine")


def compute_distance_matrix(input1: Tensor, input2: Tensor, metric: str = "euclidean") -> Tensor:
    """Distances of all rows of one matrix to all of another (``torchreid.metrics.compute_distance_matrix``).

    Args:
        input1, input2: features, shapes (N, D) and (M, D).
        metric: ``"euclidean"``, which is the *square*, or ``"cosine"``, 1 − cos.

    Returns:
        (N, M), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as `pairwise_distance`; another metric.
    """
    check_choice("metric", metric, ("euclidean", "cosine"))
    return (euclidean_squared_distance if metric == "euclidean" else cosine_distance)(input1, input2)


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[np.ndarray, float]:
    """CMC and mAP of a distance matrix (``torchreid.metrics.evaluate_rank``).

    Args:
        distmat: distances, shape (Q, G); an array or a tensor. Equal ones rank in the order of the gallery.
        q_pids, g_pids, q_camids, g_camids: identities and cameras, shapes (Q,) and (G,), whole numbers; −1 is one as
            any other. Gallery images of the query's identity and camera are left out.
        max_rank: length of the CMC; at most G.
        use_metric_cuhk03: the CMC of single gallery images, the mean of ten draws. The draws are others than
            torchreid's, one for all queries; `numpy.random.seed` fixes them.
        use_cython: not read; there is one way here.

    Returns:
        ``(cmc, mAP)``: float32 (min(max_rank, G),), NumPy, and a float.

    Raises:
        TypeError, ValueError: as `rank_metrics_from_distances`, also where no query has an answer.
    """
    result = evaluated(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, use_metric_cuhk03)
    return curve(result), result.mAP


@torch.no_grad()
def evaluate(
    self: Any,
    dataset_name: str = "",
    query_loader: Any = None,
    gallery_loader: Any = None,
    dist_metric: str = "euclidean",
    normalize_feature: bool = False,
    visrank: bool = False,
    visrank_topk: int = 10,
    save_dir: str = "",
    use_metric_cuhk03: bool = False,
    ranks: tuple[int, ...] | list[int] = (1, 5, 10, 20),
    rerank: bool = False,
) -> tuple[float, float]:
    """`Engine._evaluate` of torchreid without a distance matrix: ``Engine._evaluate = drop_in.torchreid.evaluate``.

    Features are extracted by the engine, and ranked as they come. Where images of different identities are equally far
    from a query, the one of another identity comes first; after re-ranking, the order of the gallery decides. Pictures
    of ranked lists (`visrank`) still need the matrix, which is then made.

    Args:
        self: the engine. All others: as there.

    Returns:
        ``(rank-1, mAP)``.

    Raises:
        TypeError, ValueError: as `rank_metrics`; another metric.
    """
    check_choice("dist_metric", dist_metric, ("euclidean", "cosine"))
    sides = []
    for name, loader in (("query", query_loader), ("gallery", gallery_loader)):
        print(f"Extracting features from {name} set ...")
        parts, ids, cams = [], [], []
        spent = 0.0
        for data in loader:
            images, pids, camids = self.parse_data_for_eval(data)
            if self.use_gpu:
                images = images.cuda()
            start = time.perf_counter()
            features = self.extract_features(images)
            spent += time.perf_counter() - start
            parts.append(features.cpu())
            ids += pids.tolist()
            cams += camids.tolist()
        features = torch.cat(parts)
        print(f"Done, obtained {features.shape[0]}-by-{features.shape[1]} matrix, {spent / len(parts):.4f} sec/batch")
        sides.append((F.normalize(features, dim=1) if normalize_feature else features, ids, cams))
    (query, q_pids, q_camids), (gallery, g_pids, g_camids) = sides
    labels = labels_of(q_pids, g_pids, q_camids, g_camids, query.device)

    print("Computing CMC and mAP ...")
    metric = "sqeuclidean" if dist_metric == "euclidean" else "cosine"
    distances: Any = LazyDistances((len(query), len(gallery)), lambda: pairwise_distance(query, gallery, metric=metric))
    if rerank:
        distances = k_reciprocal_rerank(query, gallery, metric=metric)
        if not use_metric_cuhk03:
            result = distances.rank_metrics(*labels, ties="stable", junk=None, unknown_camera=None)
        else:
            result = evaluated(distances.dense(), *labels, 50, True)
    else:
        result = rank_metrics(
            query,
            gallery,
            *labels,
            metric=metric,
            single_shot=DRAWS if use_metric_cuhk03 else None,
            seed=drawn_seed() if use_metric_cuhk03 else 0,
            junk=None,
            unknown_camera=None,
        )
    cmc = curve(result)
    print("** Results **")
    print(f"mAP: {result.mAP:.1%}")
    print("CMC curve")
    for rank in ranks:
        print(f"Rank-{rank:<3}: {cmc[rank - 1]:.1%}")
    if visrank:
        # Where the engine's class is: "torchreid.engine.engine", or PyPI's "torchreid.reid.engine.engine".
        (module,) = {sys.modules[of.__module__] for of in type(self).__mro__ if "_evaluate" in vars(of)}
        module.visualize_ranked_results(
            distances,
            self.datamanager.fetch_test_loaders(dataset_name),
            self.datamanager.data_type,
            width=self.datamanager.width,
            height=self.datamanager.height,
            save_dir=os.path.join(save_dir, "visrank_" + dataset_name),
            topk=visrank_topk,
        )
    return cmc[0], result.mAP


def _in(module: str) -> tuple[str, ...]:
    """On GitHub, and in the package index."""
    return (f"torchreid.{module}", f"torchreid.reid.{module}")


_ROUNDING = "up to rounding"
REPLACEMENTS = (
    Replacement(
        "torchreid", "triplet", _in("losses.hard_mine_triplet_loss"), "TripletLoss.forward", TripletLoss.forward,
        f"{_ROUNDING}; any batch", ("TripletLoss.__init__",),
    ),
    Replacement(
        "torchreid", "distances", _in("metrics.distance"), "euclidean_squared_distance", euclidean_squared_distance,
        _ROUNDING,
    ),
    Replacement("torchreid", "distances", _in("metrics.distance"), "cosine_distance", cosine_distance, _ROUNDING),
    Replacement(
        "torchreid", "evaluator", _in("metrics.rank"), "evaluate_rank", evaluate_rank,
        "exact; ties stable; CUHK03 by other draws", ("evaluate_py", "eval_market1501", "eval_cuhk03"),
    ),
    Replacement(
        "torchreid", "evaluator", _in("engine.engine"), "Engine._evaluate", evaluate, "exact; ties against"
    ),
    Replacement("torchreid", "rerank", _in("utils.rerank"), "re_ranking", re_ranking, _ROUNDING),
)  # fmt: skip


def _of_triplets(function: Callable[..., Any], module: Any, generator: torch.Generator) -> Any:
    x = checking.features(generator, 64).requires_grad_()
    loss = function(module.TripletLoss(0.3), x, checking.labels(64))
    loss.backward()
    return [loss, x.grad]


CASES: dict[str, checking.Case] = {
    "TripletLoss.forward": _of_triplets,
    "euclidean_squared_distance": checking.of_batch,
    "cosine_distance": checking.of_batch,
    "evaluate_rank": checking.of_ranking,
    "re_ranking": checking.of_reranking,
}
