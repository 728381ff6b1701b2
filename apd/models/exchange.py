"""Self-perturbation over the images of all processes (APD, section SP-Net, SPS)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from apd_kernels import gather_features, identity_derangement, ssd_mask


def exchanged_maps(features: Tensor, attention: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """K, NK and K*, whose NK are exchanged over the images of all processes, as one process with all images would.

    Args:
        features: F, (B, C, H, W), of this process's images.
        attention: logits of the attention maps, each (B, C, H, W).
        labels: identity of each image, int64 (B,).

    Returns:
        the maps, stacked (3 B, C, H, W), and bool (B,): which images received the NK of another identity.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        permutation, exchanged = identity_derangement(labels, return_valid=True)
        return ssd_mask(features, attention, permutation, stacked=True), exchanged
    relevant, irrelevant, _ = ssd_mask(features, attention, None)
    partners, exchanged = _partners(irrelevant, labels)
    return torch.cat([relevant, irrelevant, relevant + partners]), exchanged


@torch.compiler.disable
def _partners(irrelevant: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The NK that each image receives; the first process draws them for all."""
    everybody = gather_features(irrelevant.flatten(1), labels)
    permutation = identity_derangement(everybody.labels)
    dist.broadcast(permutation, 0)
    own = slice(everybody.start, everybody.start + len(labels))
    partners = permutation[own]
    return everybody.features[partners].view_as(irrelevant), everybody.labels[partners] != labels
