"""Metric-learning kernels for person re-identification: Triton on CUDA, PyTorch everywhere else."""

from apd_kernels._core.backend import use_backend
from apd_kernels.distance import pairwise_distance
from apd_kernels.gallery import Gallery, GalleryError, SearchResult
from apd_kernels.losses import metric_perturbation_loss, triplet_loss
from apd_kernels.mining import HardPairs, Pair, batch_hard
from apd_kernels.perturb import metric_perturb

__all__ = [
    "Gallery",
    "GalleryError",
    "HardPairs",
    "Pair",
    "batch_hard",
    "metric_perturb",
    "metric_perturbation_loss",
    "pairwise_distance",
    "triplet_loss",
    "use_backend",
]
