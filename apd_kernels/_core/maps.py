"""Feature maps, (B, C, H, W) or (B, L, C), as operations on them see them: channels at positions."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_axis(x: Tensor) -> int:
    """Of the channels: 1 for (B, C, H, W), 2 for (B, L, C)."""
    return 1 if x.dim() == 4 else 2


def memory_format(x: Tensor) -> torch.memory_format:
    """How results like `x` are laid out: channels_last where a (B, C, H, W) map steps least from channel to channel."""
    if x.dim() == 4 and not x.is_contiguous() and x.stride(1) < min(x.stride(2), x.stride(3)):
        return torch.channels_last
    return torch.contiguous_format


def stacked_like(x: Tensor, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for `count` results like `x` one after the other, as one batch."""
    shape = (count * x.shape[0], *x.shape[1:])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))
