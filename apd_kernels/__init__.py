"""Metric-learning kernels for person re-identification: Triton on CUDA, PyTorch everywhere else."""

from apd_kernels import nn
from apd_kernels._core.backend import use_backend
from apd_kernels._core.operands import PreparedRows
from apd_kernels.adversarial import metric_perturb
from apd_kernels.contrastive import circle_loss, cosface_loss, supervised_contrastive_loss
from apd_kernels.distance import pairwise_distance
from apd_kernels.distributed import GatheredBatch, gather_features
from apd_kernels.evaluation.neighbors import Neighbors, knn
from apd_kernels.evaluation.ranking import (
    PositiveRanks,
    RankAccumulator,
    RankMetrics,
    positive_ranks,
    positive_ranks_from_distances,
    rank_metrics,
    rank_metrics_from_distances,
    tpr_at_fpr_from_distances,
)
from apd_kernels.evaluation.rerank import (
    ExpandedFeatures,
    RerankedDistances,
    jaccard_distance,
    k_reciprocal_rerank,
    k_reciprocal_rerank_from_distances,
    query_expansion,
)
from apd_kernels.gallery.gallery import Gallery, GalleryError, SearchResult
from apd_kernels.losses import triplet_loss, triplet_loss_from_distances
from apd_kernels.memory import ClusterMemory, CrossBatchMemory
from apd_kernels.mining import (
    HardPairs,
    Pair,
    batch_hard,
    batch_hard_from_distances,
    ranked_pairs_from_distances,
    triplets_from_distances,
)
from apd_kernels.paired import paired_distance
from apd_kernels.pairs import Pairing, PairReducer, pair_reduce
from apd_kernels.perturbation_loss import metric_perturbation_loss
from apd_kernels.prepared import prepare_rows
from apd_kernels.ssd import DisentangledMaps, identity_derangement, ssd_mask
from apd_kernels.tuning import autotune, warmup
from apd_kernels.weighting import WeightedPairs, weighted_pairs, weighted_pairs_from_distances

__version__ = "0.1.0"
__all__ = [
    "ClusterMemory",
    "CrossBatchMemory",
    "DisentangledMaps",
    "ExpandedFeatures",
    "Gallery",
    "GalleryError",
    "GatheredBatch",
    "HardPairs",
    "Neighbors",
    "Pair",
    "PairReducer",
    "Pairing",
    "PositiveRanks",
    "PreparedRows",
    "RankAccumulator",
    "RankMetrics",
    "RerankedDistances",
    "SearchResult",
    "WeightedPairs",
    "autotune",
    "batch_hard",
    "batch_hard_from_distances",
    "circle_loss",
    "cosface_loss",
    "gather_features",
    "identity_derangement",
    "jaccard_distance",
    "k_reciprocal_rerank",
    "k_reciprocal_rerank_from_distances",
    "knn",
    "metric_perturb",
    "metric_perturbation_loss",
    "nn",
    "pair_reduce",
    "paired_distance",
    "pairwise_distance",
    "positive_ranks",
    "positive_ranks_from_distances",
    "prepare_rows",
    "query_expansion",
    "rank_metrics",
    "rank_metrics_from_distances",
    "ranked_pairs_from_distances",
    "ssd_mask",
    "supervised_contrastive_loss",
    "tpr_at_fpr_from_distances",
    "triplet_loss",
    "triplet_loss_from_distances",
    "triplets_from_distances",
    "use_backend",
    "warmup",
    "weighted_pairs",
    "weighted_pairs_from_distances",
]
