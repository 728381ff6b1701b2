"""Retrieval metrics of feature files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apd.errors import InputError
from apd.features import FeatureSet, check_same_dim
from apd_kernels import rank_metrics

RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Evaluation:
    """The figures of one retrieval run."""

    cmc: dict[int, float]  # rank-k for the k of RANKS
    mAP: float
    mINP: float
    num_queries: int
    num_valid_queries: int
    metric: str
    ap: str

    def as_json(self) -> dict[str, Any]:
        return {
            "cmc": {str(k): value for k, value in self.cmc.items()},
            "mAP": self.mAP,
            "mINP": self.mINP,
            "num_queries": self.num_queries,
            "num_valid_queries": self.num_valid_queries,
            "metric": self.metric,
            "ap": self.ap,
        }


def evaluate(
    query: FeatureSet, gallery: FeatureSet, *, metric: str = "cosine", ap: str = "rectangular", device: str = "cpu"
) -> Evaluation:
    """Search every query in the gallery, leaving out images of its identity in its own camera.

    Args:
        query, gallery: rows with identities and cameras.
        metric, ap: as in `apd_kernels.rank_metrics`.
        device: where to compute.

    Raises:
        InputError: the two do not fit together, or no query has an image of its identity in another camera.
    """
    check_same_dim(query, gallery)
    try:
        result = rank_metrics(
            *(features_tensor(rows, device) for rows in (query, gallery)),
            *(torch.from_numpy(rows.identities().astype(np.int64)).to(device) for rows in (query, gallery)),
            *(torch.from_numpy(rows.cameras().astype(np.int64)).to(device) for rows in (query, gallery)),
            metric=metric,
            ap=ap,
            max_rank=max(RANKS),
        )
    except InputError:
        raise
    except ValueError as error:
        files = dict.fromkeys(str(rows.path) for rows in (query, gallery))
        raise InputError(f"{' and '.join(files)}: {error}") from error
    return Evaluation(
        cmc={k: float(result.cmc[k - 1]) for k in RANKS},
        mAP=result.mAP,
        mINP=result.mINP,
        num_queries=len(query),
        num_valid_queries=int(result.valid.sum()),
        metric=metric,
        ap=ap,
    )


def features_tensor(rows: FeatureSet, device: str = "cpu") -> torch.Tensor:
    """The features in float32, or in float64 where the file has it."""
    dtype = np.float64 if rows.features.dtype.itemsize >= 8 else np.float32
    return torch.from_numpy(rows.features.astype(dtype)).to(device)
