"""What stage 1 is watched by: does G move images to another identity, and does it leave their content?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from apd.data.augmentation import as_floats
from apd.data.images import ImageStore
from apd.data.market import UNKNOWN
from apd.models.trunk import Trunk

REFERENCE_PAIRS = 256  # images of one person from two cameras: the mean of L_C over them is known to a few percent
_SAMPLES = 8  # images in a picture
_STREAM = 3  # the pairs' own random numbers


@torch.no_grad()
def flipped_share(made: Tensor, batch: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Of the originals whose nearest other image has their identity, the share whose G(x) is nearest to another one.

    Args:
        made: ψ(G(x)), (B, D).
        batch: rows of the originals in the bank, int64 (B,).
        bank: ψ of all images, (N, D).
        labels: their identities, int64 (N,).
    """

    def right(x: Tensor) -> Tensor:
        distances = torch.cdist(x, bank)
        distances.scatter_(1, batch[:, None], torch.inf)  # the original itself
        return labels[distances.argmin(1)] == labels[batch]

    before, after = right(bank[batch]), right(made)
    return (before & ~after).sum() / before.sum().clamp(min=1)


def camera_pairs(identities: np.ndarray, cameras: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """Random images, each with one of the same person from another camera: int64 (P, 2), P at most `most`."""
    random = np.random.default_rng((_STREAM, seed))
    _, person, images = np.unique(identities, return_inverse=True, return_counts=True)
    people = np.split(np.argsort(person, kind="stable"), np.cumsum(images)[:-1])
    found: list[tuple[int, int]] = []
    for i in random.permutation(len(identities)):
        if len(found) == most:
            break
        others = people[person[i]]
        others = others[(cameras[others] != cameras[i]) & (cameras[others] != UNKNOWN)]
        if len(others) and cameras[i] != UNKNOWN:
            found.append((int(i), int(random.choice(others))))
    return np.array(found, np.int64).reshape(-1, 2)


@torch.no_grad()
def camera_distance(
    trunk: Trunk,
    store: ImageStore,
    identities: np.ndarray,
    cameras: np.ndarray,
    *,
    most: int | None = None,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> float | None:
    """How far φ of one person in two cameras is apart, eq. 4's mean over pairs: the measure of L_C.

    Args:
        trunk: with φ, on the device.
        store: N images.
        identities, cameras: of each, int64 (N,).
        most: pairs that are looked at; None: one of every image that has a partner.
        batch_size: images that the trunk gets at once; no more φ than theirs are in memory.
        seed: of the choice of pairs.
        device: where the trunk is.

    Returns:
        the mean; None where no person was seen by two cameras.
    """
    pairs = camera_pairs(identities, cameras, most, seed)
    total = 0.0
    for start in range(0, len(pairs), max(1, batch_size // 2)):
        part = pairs[start : start + max(1, batch_size // 2)]
        images = as_floats(torch.stack([store[i] for i in part.T.ravel()])).to(device)
        one, other = trunk(images).shallow.float().chunk(2)
        total += float(l1_loss(one, other)) * len(part)
    return total / len(pairs) if len(pairs) else None


def sample_images(store: ImageStore) -> Tensor:
    """Up to eight images from all over the store, always the same: (n, 3, H, W) in [0, 1]."""
    chosen = np.unique(np.linspace(0, len(store) - 1, _SAMPLES).round().astype(int))
    return as_floats(torch.stack([store[i] for i in chosen]))


@torch.no_grad()
def sample_grid(generator: nn.Module, originals: Tensor) -> Tensor:
    """A picture (3, 2 H, n W) in [0, 1]: originals x (n, 3, H, W) side by side, and below each its G(x)."""
    rows = (originals, generator(originals).float())
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
