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


def compiled(candidate: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function) if candidate == "compile" else function
