"""Re-ranking written out with dense matrices and Python sets in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def squared(x: Tensor, metric: str = "euclidean") -> np.ndarray:
    """‖x_i − x_j‖² in float64; of unit rows for "cosine", where a zero row has a direction of its own."""
    x = x.double()
    if metric == "cosine":
        norm = x.norm(dim=1, keepdim=True)
        x = torch.cat([torch.where(norm > 0, x / norm, 0), (norm == 0).double()], 1)
    return (x[:, None] - x[None]).square().sum(-1).numpy()


def encoded(s: np.ndarray, exponent: np.ndarray, k: int, half: int, k2: int) -> np.ndarray:
    """V, from the squared distances, what is in the exponent, and the lengths of the lists."""
    count = len(s)
    order = s.argsort(1, kind="stable")
    rank = order.argsort(1)

    def mutual(i: int, length: int) -> set[int]:
        return {j for j in order[i, :length].tolist() if rank[j, i] < length}

    half_sets = [mutual(j, half) for j in range(count)]
    v = np.zeros((count, count))
    for i in range(count):
        own = mutual(i, k)
        expanded = set(own)
        for j in own:
            if 3 * len(half_sets[j] & own) > 2 * len(half_sets[j]):
                expanded |= half_sets[j]
        columns = sorted(expanded)
        weight = np.exp(exponent[i].min() - exponent[i, columns])
        v[i, columns] = weight / weight.sum()
    return v if k2 == 1 else np.stack([v[row[:k2]].mean(0) for row in order])


def jaccard(v: np.ndarray) -> np.ndarray:
    shared = np.stack([np.minimum(row, v).sum(1) for row in v])
    return 1 - shared / (2 - shared)


def reranked(s: np.ndarray, queries: int, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """From the squared distances of all images among each other."""
    count = len(s)
    if s.max(initial=0) == 0:
        return np.zeros((queries, count - queries))
    own = s / s.max(1, keepdims=True)
    v = encoded(s, own, min(k1, count) + 1, round(min(k1, count) / 2) + 1, k2)
    final = lambda_value * own + (1 - lambda_value) * jaccard(v)
    return final[:queries, queries:]


def clustered(s: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """Jaccard distances as clustering takes them."""
    k = min(k1, len(s))
    v = encoded(s, s, k, min(round(k / 2) + 1, k), 1)
    # With k = 1 and k2 > 1 the mean is the row of the nearest, which is another item where a row comes several times.
    return jaccard(v if k2 == 1 else np.stack([v[row[: min(k2, k)]].mean(0) for row in s.argsort(1, kind="stable")]))


def rounded(s: np.ndarray, queries: int, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """As `reranked`, with V and the sums over it in float16, column by column: the variant "transreid"."""
    count = len(s)
    if s.max(initial=0) == 0:
        return np.zeros((queries, count - queries))
    own = s / s.max(1, keepdims=True)
    k, half = min(k1, count) + 1, round(min(k1, count) / 2) + 1
    v = encoded(s, own, k, half, 1).astype(np.float16)
    if k2 > 1:
        order = s.argsort(1, kind="stable")[:, :k2]
        v = np.stack([(v[row].astype(np.float32).sum(0) / np.float32(len(row))) for row in order]).astype(np.float16)
    shared = np.zeros((count, count), np.float16)
    for column in range(count):
        shared += np.minimum(v[:, None, column], v[None, :, column])
    jaccard_part = np.float16(1) - shared / (np.float16(2) - shared)
    final = lambda_value * own + (np.float16(1 - lambda_value) * jaccard_part).astype(np.float64)
    return final[:queries, queries:]
