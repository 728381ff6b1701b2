"""Metric-learning kernels for person re-identification: Triton on CUDA, PyTorch everywhere else."""

from apd_kernels import nn
from apd_kernels._core.backend import use_backend
from apd_kernels.distance import pairwise_distance
from apd_kernels.gallery import Gallery, GalleryError, SearchResult
from apd_kernels.losses import triplet_loss
from apd_kernels.mining import HardPairs, Pair, batch_hard
from apd_kernels.perturb import metric_perturb
from apd_kernels.perturbation import metric_perturbation_loss
from apd_kernels.ranking import RankMetrics, rank_metrics
from apd_kernels.ssd import DisentangledMaps, identity_derangement, ssd_mask

__all__ = [
    "DisentangledMaps",
    "Gallery",
    "GalleryError",
    "HardPairs",
    "Pair",
    "RankMetrics",
    "SearchResult",
    "batch_hard",
    "identity_derangement",
    "metric_perturb",
    "metric_perturbation_loss",
    "nn",
    "pairwise_distance",
    "rank_metrics",
    "ssd_mask",
    "triplet_loss",
    "use_backend",
]
