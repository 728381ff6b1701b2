"""A ring buffer by indices, and a momentum update in rounds: each takes the next sample of every identity."""

from __future__ import annotations

import torch
from torch import Tensor


def enqueue(features: Tensor, labels: Tensor, enqueued: Tensor, x: Tensor, x_labels: Tensor, skipped: int) -> None:
    """Row j into slot (enqueued + skipped + j) mod capacity; into an empty ring also row 0 into every other slot."""
    x, x_labels = x.to(features.dtype), x_labels.to(labels.dtype)
    if features.device.type != "cpu":  # nobody waits for a GPU, so all slots are written
        features.copy_(torch.where(enqueued == 0, x[:1], features))
        labels.copy_(torch.where(enqueued == 0, x_labels[:1], labels))
    elif enqueued == 0:
        features.copy_(x[:1].expand_as(features))
        labels.copy_(x_labels[:1].expand_as(labels))
    slot = (enqueued + skipped + torch.arange(len(x), device=x.device)) % len(features)
    features.index_copy_(0, slot, x)
    labels.index_copy_(0, slot, x_labels)


def momentum_update(centroids: Tensor, valid: Tensor, x: Tensor, labels: Tensor, momentum: float) -> None:
    """c ← (m·c + (1 − m)·x) / ‖m·c + (1 − m)·x‖ for one sample after the other, c ← x / ‖x‖ for an identity's first."""
    labels = labels.to(torch.int64)
    counts = (labels >= 0) & (labels < len(centroids))
    target = labels.clamp(0, len(centroids) - 1)
    for samples in _rounds(target):
        at = target[samples]
        old, seen, new = centroids[at], valid[at], x[samples].to(centroids.dtype)
        moved = torch.where(seen[:, None], momentum * old + (1 - momentum) * new, new)
        norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        moves = (norm != 0) & counts[samples, None]
        centroids.index_copy_(0, at, torch.where(moves, moved / norm, old))
        valid.index_copy_(0, at, seen | moves[:, 0])


def _rounds(target: Tensor) -> tuple[Tensor, ...]:
    """The samples in groups that hold no target twice: first everybody's first sample, then everybody's second, …"""
    place = torch.arange(len(target), device=target.device)
    if target.device.type != "cpu":  # how many samples a target has is not known without waiting for the GPU
        return place.split(1)
    order = target.argsort(stable=True)
    ordered = target[order]
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    occurrence = place - torch.where(first, place, 0).cummax(0).values
    return order[occurrence.argsort(stable=True)].split(occurrence.bincount().tolist())
