"""open-metric-learning (OML): its miner of the hardest triplets, over our operations.

Other than there: an anchor without a positive or a negative is left out (there an error). Not here, as OML is the
faster one on the CPU: its search of neighbours in batches.
"""

from __future__ import annotations

from typing import Any

import torch
from oml.miners import inbatch_hard_tri
from torch import Tensor

from apd_kernels.mining import HardPairs, batch_hard, batch_hard_from_distances
from apd_kernels.pairs import Pairing

__all__ = ["HardTripletsMiner"]


class HardTripletsMiner(inbatch_hard_tri.HardTripletsMiner):
    """`HardTripletsMiner` by `batch_hard`, without a matrix; of several at the same distance the lowest index."""

    def _sample(self, features: Tensor, labels: Any) -> tuple[list[int], list[int], list[int]]:
        """Anchors, their farthest positives and their nearest negatives.

        Args:
            features: shape (N, D), floating.
            labels: identities, a list or tensor of N whole numbers.

        Raises:
            TypeError, ValueError: as `batch_hard`.
        """
        return _lists(batch_hard(features.detach(), torch.as_tensor(labels, device=features.device)))

    @staticmethod
    def _sample_from_distmat(distmat: Tensor, labels: Any) -> tuple[list[int], list[int], list[int]]:
        """The same of a matrix of distances, (N, N)."""
        return _lists(batch_hard_from_distances(distmat, Pairing(torch.as_tensor(labels, device=distmat.device))))


def _lists(mined: HardPairs) -> tuple[list[int], list[int], list[int]]:
    anchors = mined.valid.nonzero()[:, 0]
    positive, negative = (index[anchors].tolist() for index in mined.indices)
    return anchors.tolist(), positive, negative
