"""What the modules of several projects need: arrays of NumPy, the evaluation of a matrix, matrices made when read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apd_kernels.evaluation.ranking import RankMetrics, rank_metrics_from_distances
from apd_kernels.evaluation.rerank import k_reciprocal_rerank_from_distances
from apd_kernels.losses import triplet_loss_from_distances
from apd_kernels.mining import batch_hard

# The projects take roots of squares of at least 1e-12.
FLOOR = 1e-6
# Draws of single gallery images in the first protocol of CUHK03.
DRAWS = 10


def tensor(name: str, values: Any) -> Tensor:
    """A tensor of a tensor, an array or a list; an array's memory is shared where PyTorch can.

    Raises:
        TypeError: what no tensor can hold, with the argument's name.
    """
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected numbers, got {array.dtype}")
    # PyTorch knows no negative strides.
    return torch.from_numpy(array.copy() if any(step < 0 for step in array.strides) else array)


def labels_of(
    q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Identities and cameras as tensors."""
    named = {"q_pids": q_pids, "g_pids": g_pids, "q_camids": q_camids, "g_camids": g_camids}
    q_ids, g_ids, q_cams, g_cams = (tensor(name, values).to(device) for name, values in named.items())
    return q_ids, g_ids, q_cams, g_cams


def drawn_seed() -> int:
    """A seed out of NumPy's global generator, from which the projects draw: `numpy.random.seed` fixes the draws."""
    return int(np.random.randint(2**31))  # noqa: NPY002


def evaluated(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, max_rank: int, single_shot: bool
) -> RankMetrics:
    """`rank_metrics_from_distances` as torchreid and fast-reid rank: a stable order, −1 a number as others."""
    distances = tensor("distmat", distmat)
    return rank_metrics_from_distances(
        distances,
        *labels_of(q_pids, g_pids, q_camids, g_camids, distances.device),
        ties="stable",
        max_rank=min(max_rank, max(1, distances.shape[-1])),
        single_shot=DRAWS if single_shot else None,
        seed=drawn_seed() if single_shot else 0,
        junk=None,
        unknown_camera=None,
    )


def curve(result: RankMetrics) -> np.ndarray:
    """The CMC as the projects return it: float32, NumPy."""
    return result.cmc.cpu().numpy().astype(np.float32)


def batch_hard_triplet(x: Tensor, labels: Tensor, margin: float, soft: bool = False) -> Tensor:
    """Open-reid's batch-hard loss: the mean over all anchors, each its own positive, roots from 1e-6.

    An anchor that is alone in its identity has the distance 0 to its positive, as to itself. `soft`: softplus in place
    of the hinge.
    """
    mined = batch_hard(x, labels)
    near, far = (d.clamp(min=FLOOR) for d in mined.distances)
    valid = mined.indices.negative >= 0
    return triplet_loss_from_distances(near, far, valid=valid, margin=margin, soft=soft, reduction="mean_all")


def re_ranking(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> np.ndarray:
    """Distances after k-reciprocal re-ranking (Zhong et al., 2017), as torchreid, fast-reid and open-reid compute them.

    Args:
        q_g_dist, q_q_dist, g_g_dist: distances, shapes (Q, G), (Q, Q), (G, G); arrays or tensors, also mixed, of any
            floating dtypes. They are squared here.
        k1, k2, lambda_value: as in `k_reciprocal_rerank_from_distances`.

    Returns:
        (Q, G), float32, NumPy.

    Raises:
        TypeError, ValueError: as `k_reciprocal_rerank_from_distances`.
    """
    named = {"q_g_dist": q_g_dist, "q_q_dist": q_q_dist, "g_g_dist": g_g_dist}
    matrices = [tensor(name, values) for name, values in named.items()]
    dtype = matrices[0].dtype
    for matrix in matrices[1:]:
        dtype = torch.promote_types(dtype, matrix.dtype)
    matrices = [matrix.to(device=matrices[0].device, dtype=dtype) for matrix in matrices]
    reranked = k_reciprocal_rerank_from_distances(*matrices, k1=k1, k2=k2, lambda_value=lambda_value)
    return np.asarray(reranked, dtype=np.float32)


class LazyDistances:
    """A distance matrix that is computed once, when it is read: ``numpy.asarray(it)``, ``it[rows]``, ``it.T``."""

    def __init__(self, shape: tuple[int, int], compute: Callable[[], Tensor]) -> None:
        """`compute` gives the matrix, of that shape."""
        self.shape, self._compute = shape, compute
        self._made: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"LazyDistances(shape={self.shape})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self._made is None:
            self._made = self._compute().cpu().numpy()
        made = np.asarray(self._made, dtype=dtype)
        return made.copy() if copy else made

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)
