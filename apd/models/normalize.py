"""Every network gets images in [0, 1] and normalizes them itself: a wrong mean or deviation costs accuracy silently."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(images − mean) / std by channel.

    Args:
        mean, std: of the images that the network was, or is to be, trained on, in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images of the shape of `images`, (B, 3, H, W) in [0, 1]."""
        return (images - self.mean) / self.std
