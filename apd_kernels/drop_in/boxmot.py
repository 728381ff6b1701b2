"""BoxMOT's re-identification training and evaluation: its names, over our operations.

Other than there: an anchor without a negative adds 0 to the triplet loss (there an error); where fewer images are left
than `max_rank` the CMC stays at its last value (there an error); half precision gives float32. Not here: its weighted
triplet loss, which is faster there on the CPU, and its own variant of re-ranking.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apd_kernels.contrastive import circle_loss
from apd_kernels.drop_in._shared import batch_hard_triplet, curve, evaluated, labels_of
from apd_kernels.drop_in._shared import tensor as tensor_of

__all__ = ["CircleLoss", "TripletLoss", "evaluate_ranking"]


class TripletLoss(nn.Module):
    """Batch-hard triplet loss (``boxmot.reid.training.losses.TripletLoss``).

    Args:
        margin: at least 0.
        soft_margin: take ln(1 + exp(d_p − d_n + margin)) instead of the hinge.
    """

    def __init__(self, margin: float = 0.3, soft_margin: bool = False) -> None:
        super().__init__()
        self.margin, self.soft_margin = margin, soft_margin

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over all anchors, each its own positive; arguments and errors as torchreid's `TripletLoss`."""
        return batch_hard_triplet(inputs, targets, self.margin, self.soft_margin)


class CircleLoss(nn.Module):
    """Circle loss (``boxmot.reid.training.losses.CircleLoss``): the mean over anchors that have both kinds of pairs.

    Args:
        margin, gamma: m and γ.
    """

    def __init__(self, margin: float = 0.25, gamma: float = 64.0) -> None:
        super().__init__()
        self.margin, self.gamma = margin, gamma

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Arguments, result and errors are those of `TripletLoss`."""
        return circle_loss(inputs, targets, margin=self.margin, gamma=self.gamma)


def evaluate_ranking(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, max_rank: int = 50
) -> tuple[np.ndarray, float]:
    """CMC and mAP of a distance matrix (``boxmot.reid.training.evaluator.evaluate_ranking``).

    Args:
        distmat: distances, shape (Q, G); an array or a tensor. Equal ones rank in the order of the gallery.
        q_pids, g_pids, q_camids, g_camids: identities and cameras, shapes (Q,) and (G,), whole numbers; −1 is one as
            any other. Gallery images of the query's identity and camera are left out.
        max_rank: length of the CMC; at most G.

    Returns:
        ``(cmc, mAP)``: float32 (min(max_rank, G),), NumPy, and a float; zeros where no query has an answer, as there.

    Raises:
        TypeError, ValueError: as `rank_metrics_from_distances`.
    """
    distances = tensor_of("distmat", distmat)
    q_ids, g_ids, q_cams, g_cams = labels = labels_of(q_pids, g_pids, q_camids, g_camids, distances.device)
    if distances.shape == (len(q_ids), len(g_ids)) and not _has_answer(q_ids, g_ids, q_cams, g_cams):
        return np.zeros(min(max_rank, len(g_ids))), 0.0
    result = evaluated(distances, *labels, max_rank, False)
    return curve(result), result.mAP


def _has_answer(q_ids: Tensor, g_ids: Tensor, q_cams: Tensor, g_cams: Tensor) -> bool:
    """Whether an image of a query's identity is from another camera."""
    return any(
        bool((g_cams[g_ids == identity] != camera).any())
        for identity, camera in torch.stack([q_ids, q_cams], 1).unique(dim=0).tolist()
    )
