"""Sparse and nested tensors are refused by name, wherever a tensor is taken; views of any kind serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import apd_kernels as ak

X, Y = (torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (12, 30))
IDS, GALLERY_IDS = torch.arange(12) % 4, torch.arange(30) % 4
MASK = torch.ones(30, dtype=torch.bool)
MAPS = X.view(4, 3, 6, 1)
DISTANCES = torch.cdist(X, Y)
SAME = {"query_ids": IDS, "gallery_ids": GALLERY_IDS, "query_cams": IDS * 0 + 9, "gallery_cams": GALLERY_IDS}
PAIRS = {"x": X, "labels": IDS, "y": Y, "y_labels": GALLERY_IDS, "own": IDS, "y_valid": MASK}
DOMAINS = {"domains": IDS, "y_domains": GALLERY_IDS, "positives": "across"}


def gallery() -> ak.Gallery:
    pytest.importorskip("faiss")
    filled = ak.Gallery(6, device="cpu")
    filled.add(Y, GALLERY_IDS, GALLERY_IDS)
    return filled


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pairwise_distance": (ak.pairwise_distance, {"x": X, "y": Y}),
    "paired_distance": (ak.paired_distance, {"x": X, "y": X}),
    "prepare_rows": (ak.prepare_rows, {"y": Y}),
    "batch_hard": (ak.batch_hard, PAIRS | DOMAINS),
    "triplet_loss": (ak.triplet_loss, PAIRS),
    "circle_loss": (ak.circle_loss, PAIRS),
    "supervised_contrastive_loss": (ak.supervised_contrastive_loss, PAIRS),
    "weighted_pairs": (ak.weighted_pairs, PAIRS),
    "indices": (lambda positive, negative: ak.triplet_loss(X, IDS, indices=(positive, negative)),
                {"positive": IDS, "negative": IDS}),
    "metric_perturb": (lambda **of: ak.metric_perturb(**of, epsilon=0.1),
                       {"x": X, "labels": IDS, "memory": Y, "memory_labels": GALLERY_IDS, "noise": X}),
    "negatives": (lambda **of: ak.metric_perturb(**of, epsilon=0.1, objective="negative"),
                  {"x": X, "labels": IDS, "negatives": X}),
    "metric_perturbation_loss": (ak.metric_perturbation_loss,
                                 {"perturbed": X, "negatives": Y, "original": X, "indices": IDS}),
    "ssd_mask": (lambda features, logits, permutation: ak.ssd_mask(features, [logits], permutation),
                 {"features": MAPS, "logits": MAPS, "permutation": torch.tensor([1, 0, 3, 2])}),
    "identity_derangement": (ak.identity_derangement, {"labels": IDS}),
    "CrossBatchMemory": (ak.CrossBatchMemory(8, 6).enqueue, {"x": X, "labels": IDS}),
    "ClusterMemory": (ak.ClusterMemory(4, 6).update, {"x": X, "labels": IDS}),
    "rank_metrics": (ak.rank_metrics, {"query": X, "gallery": Y, **SAME, "exclude": IDS}),
    "rank_metrics_from_distances": (ak.rank_metrics_from_distances, {"distances": DISTANCES, **SAME, "exclude": IDS}),
    "rank_metrics, reranked": (lambda **of: ak.k_reciprocal_rerank(X, Y).rank_metrics(**of), SAME),
    "knn": (lambda **of: ak.knn(**of, k=3), {"query": X, "gallery": Y, "mask": MASK, "exclude_self": IDS}),
    "k_reciprocal_rerank": (ak.k_reciprocal_rerank, {"query": X, "gallery": Y}),
    "from_distances": (ak.k_reciprocal_rerank_from_distances,
                       {"query_gallery": DISTANCES, "query_query": DISTANCES[:, :12], "gallery_gallery": Y @ Y.T}),
    "jaccard_distance": (ak.jaccard_distance, {"features": Y}),
    "query_expansion": (ak.query_expansion, {"query": X, "gallery": Y}),
    "Gallery.add": (lambda **of: gallery().add(**of),
                    {"features": X, "ids": IDS, "cams": IDS, "keys": torch.arange(100, 112)}),
    "Gallery.train": (lambda **of: gallery().train(**of), {"features": X}),
    "Gallery.remove": (lambda **of: gallery().remove(**of), {"keys": torch.arange(3)}),
    "Gallery.update": (lambda **of: gallery().update(**of),
                       {"keys": torch.arange(12), "features": X, "ids": IDS, "cams": IDS}),
    "Gallery.search": (lambda **of: gallery().search(**of, k=2), {"queries": X, "where": MASK}),
    "Gallery.positions": (lambda **of: gallery().positions(**of), {"keys": IDS}),
    "exclude_same": (lambda **of: gallery().search(X, 2, exclude_same=tuple(of.values())), {"0": IDS, "1": IDS}),
}  # fmt: skip


def others(values: Tensor) -> list[tuple[str, Tensor]]:
    nested = torch.nested.nested_tensor([values] if values.dim() == 1 else list(values))
    found = [("sparse_coo", values.to_sparse()), ("nested", nested)]
    return [*found, ("sparse_csr", values.to_sparse_csr())] if values.dim() == 2 else found


@pytest.mark.parametrize("name", CALLS)
def test_layouts(name: str) -> None:
    function, arguments = CALLS[name]
    function(**arguments)
    for argument, values in arguments.items():
        for kind, other in others(values) if isinstance(values, Tensor) else []:
            with pytest.raises(TypeError, match=rf"{argument}.*: expected a dense tensor, got a {kind} one"):
                function(**arguments | {argument: other})
        if isinstance(values, Tensor) and values.is_floating_point():
            function(**arguments | {argument: torch._neg_view(values)})  # negated when it is read
