"""torchreid (deep-person-reid): its functions and classes, made of this library's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels import (
    batch_hard,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_distances,
    pairwise_distance,
    triplet_loss_from_distances,
)
from apd_kernels.drop_in import checking
from apd_kernels.drop_in.arrays import CLAMP, curve, draws, evaluated, of_labels, ranked, reranked, tensor
from apd_kernels.drop_in.replacing import Replacement


class TripletLoss(torch.nn.Module):
    """Batch-hard triplets, the anchor its own positive; an anchor without a negative counts as 0."""

    margin: float

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        found = batch_hard(inputs, targets, inputs, targets)
        distances = (d.clamp(min=CLAMP) for d in found.distances)
        return triplet_loss_from_distances(*distances, valid=found.valid, margin=self.margin, reduction="mean_all")


def compute_distance_matrix(input1: Tensor, input2: Tensor, metric: str = "euclidean") -> Tensor:
    """Distances (M, N); ``"euclidean"`` are squares, as there, but none below 0."""
    if metric == "euclidean":
        return euclidean_squared_distance(input1, input2)
    if metric == "cosine":
        return cosine_distance(input1, input2)
    raise ValueError(f"metric: expected 'euclidean' or 'cosine', got {metric!r}")


def euclidean_squared_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """‖x − y‖²."""
    return pairwise_distance(input1, input2, metric="sqeuclidean")


def cosine_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """1 − cos."""
    return pairwise_distance(input1, input2, metric="cosine")


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
    """CMC and mAP. CUHK03's CMC draws single images by a seed from NumPy's global generator, as the project draws."""
    found = ranked(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, **draws(use_metric_cuhk03))
    return curve(found, max_rank, len(tensor(g_pids))), found.mAP


def re_ranking(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> np.ndarray:
    """Distances by k-reciprocal neighbours, from matrices that are squared; NumPy, tensors or both."""
    matrices = (tensor(matrix) for matrix in (q_g_dist, q_q_dist, g_g_dist))
    first, *others = matrices
    others = [other.to(device=first.device, dtype=first.dtype) for other in others]
    found = k_reciprocal_rerank_from_distances(first, *others, k1=k1, k2=k2, lambda_value=lambda_value)
    return np.asarray(found, dtype=np.float32)


class Engine:
    """torchreid's engine: only `_evaluate` is replaced."""

    use_gpu: bool
    datamanager: Any
    parse_data_for_eval: Callable[[Any], tuple[Tensor, Any, Any]]
    extract_features: Callable[[Tensor], Tensor]

    def _evaluate(
        self,
        dataset_name: str = "",
        query_loader: Any = None,
        gallery_loader: Any = None,
        dist_metric: str = "euclidean",
        normalize_feature: bool = False,
        visrank: bool = False,
        visrank_topk: int = 10,
        save_dir: str = "",
        use_metric_cuhk03: bool = False,
        ranks: Sequence[int] = (1, 5, 10, 20),
        rerank: bool = False,
    ) -> tuple[float, float]:
        """From features to figures without a matrix of distances; rank-1 and mAP."""
        query, *of_query = _extracted(self, query_loader)
        gallery, *of_gallery = _extracted(self, gallery_loader)
        if normalize_feature:
            query, gallery = (torch.nn.functional.normalize(x, dim=1) for x in (query, gallery))
        metric = {"euclidean": "sqeuclidean", "cosine": "cosine"}.get(dist_metric)
        if metric is None:
            raise ValueError(f"dist_metric: expected 'euclidean' or 'cosine', got {dist_metric!r}")
        labels = of_labels(of_query[0], of_gallery[0], of_query[1], of_gallery[1])
        if rerank:
            # The project squares its distances, which are squares already.
            figures, distances = reranked(k_reciprocal_rerank(query, gallery, metric=metric), labels)
        else:
            figures, distances = evaluated(query, gallery, labels, metric)
        if use_metric_cuhk03:
            ids, gallery_ids, cams, gallery_cams = labels
            cmc, mean = evaluate_rank(distances, ids, gallery_ids, cams, gallery_cams, use_metric_cuhk03=True)
        else:
            cmc, mean = curve(figures, 50, len(gallery)), figures.mAP
        print(f"mAP {mean:.1%}", *(f"rank-{rank} {cmc[rank - 1]:.1%}" for rank in ranks if rank <= len(cmc)), sep="  ")
        if visrank:
            _show(self, np.asarray(distances), dataset_name, save_dir, visrank_topk)
        return cmc[0], mean


def _extracted(engine: Any, loader: Any) -> tuple[Tensor, list[Any], list[Any]]:
    features, ids, cams = [], [], []
    for batch in loader:
        images, of_ids, of_cams = engine.parse_data_for_eval(batch)
        features.append(engine.extract_features(images.cuda() if engine.use_gpu else images).cpu())
        ids.extend(of_ids.tolist())
        cams.extend(of_cams.tolist())
    return torch.cat(features), ids, cams


def _show(engine: Any, distances: np.ndarray, dataset: str, folder: str, k: int) -> None:
    """The project's own pictures of ranked lists."""
    import importlib
    import os

    module = next(m for m in type(engine).__mro__ if m.__name__ == "Engine").__module__  # torchreid, torchreid.reid
    show = importlib.import_module(module).visualize_ranked_results
    data = engine.datamanager
    show(
        distances,
        data.fetch_test_loaders(dataset),
        data.data_type,
        width=data.width,
        height=data.height,
        save_dir=os.path.join(folder, f"visrank_{dataset}"),
        topk=k,
    )


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
        "torchreid", "evaluator", _in("engine.engine"), "Engine._evaluate", Engine._evaluate, "exact; ties against"
    ),
    Replacement("torchreid", "rerank", _in("utils.rerank"), "re_ranking", re_ranking, _ROUNDING),
)  # fmt: skip


def _of_triplets(function: Callable[..., Any], module: Any, generator: torch.Generator) -> Any:
    x = checking.features(generator, 64).requires_grad_()
    loss = function(module.TripletLoss(0.3), x, checking.labels(64))
    loss.backward()
    return [loss, x.grad]


def _of_batch(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    return function(checking.features(generator, 64), checking.features(generator, 64))


def _of_ranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    distances, labels = checking.ranking(generator)
    return function(distances, *labels)


def _of_reranking(function: Callable[..., Any], _: Any, generator: torch.Generator) -> Any:
    query, gallery = checking.features(generator, 60), checking.features(generator, 240)
    pairs = (query, gallery), (query, query), (gallery, gallery)
    return function(*(torch.cdist(x, y).numpy() for x, y in pairs))


CASES: dict[str, checking.Case] = {
    "TripletLoss.forward": _of_triplets,
    "euclidean_squared_distance": _of_batch,
    "cosine_distance": _of_batch,
    "evaluate_rank": _of_ranking,
    "re_ranking": _of_reranking,
}
