"""What every suite runs on: the device, the candidates, features with identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
CANDIDATES = ("ours", "eager", "compile")


def identities(count: int, each: int, dimension: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """`each` rows around each of `count` random centres, and their labels."""
    labels = torch.arange(count, device=DEVICE).repeat_interleave(each)
    centres = torch.randn(count, dimension, device=DEVICE)
    return centres[labels] + spread * torch.randn(count * each, dimension, device=DEVICE), labels


def ranking_features(
    queries: int, gallery: int, dimension: int, people: int, *, spread: float, distractors: int = 0
) -> tuple[Tensor, ...]:
    """Rows, identities and cameras of queries and gallery, as `rank_metrics` takes them.

    Identity structure in 64 dimensions, as real features have it; distractors are spread as the centres are.
    """
    low, ids = identities(people, -(-(queries + gallery) // people), 64, spread)
    order = torch.randperm(len(ids), device=DEVICE)[: queries + gallery]
    low, ids = low[order], ids[order]
    if distractors:
        others = torch.randn(distractors, 64, device=DEVICE) * (1 + spread**2) ** 0.5
        low, ids = torch.cat([low, others]), torch.cat([ids, ids.new_full((len(others),), people)])
    rows = low @ torch.randn(64, dimension, device=DEVICE)
    cams = torch.randint(0, 6, (len(ids),), device=DEVICE)
    return rows[:queries], rows[queries:], ids[:queries], ids[queries:], cams[:queries], cams[queries:]


def compiled(candidate: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function) if candidate == "compile" else function
