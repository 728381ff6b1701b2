"""All steps of the L2 triplet ascent on N×N matrices, for batches that are small against D, on the CPU.

Every point is Z = X + C X, where the rows of C sum to 0: steps add multiples of differences of rows. For such
coefficient rows u, v the product (uX)·(vX) is u B vᵀ with B = −½ D∘D, D the distances of X. With A = I + C, P = A B and
L the Laplacian of the weights between anchors and their winners:

    Q          = P Aᵀ             d²_ij = Q_ii + Q_jj − 2 Q_ij
    [G | H]    = L [A | P]        ‖gradient of row i‖² = G_i·H_i
    [C | R]   += γ [G | H]        ‖displacement of row i‖² = C_i·R_i,  P = B + R

Two products with X, and steps whose cost does not depend on D. In float64: that costs little at this size, and the
differences between near-duplicates keep their digits.

Between the products stand some thirty operations a step on a few thousand numbers, where NumPy spends 1 µs a call and
PyTorch 3: 10 steps of 64×2048 take 1.9 ms on 2 cores, with PyTorch alone 3.7.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from apd_kernels.reference.mining import marks_of_equal_rows

_FAR = 8.0  # times the mean of the squares about the mean; of N rows a single far one has up to N times


class _Kept(threading.local):
    """Two float64 arrays of a thread that outlive its calls: the pages of new ones cost as much as the products."""

    most = 1 << 21  # elements, 16 MB; larger ones are new each time

    def __init__(self) -> None:
        self.memory = np.empty(0)

    def pair(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        size = shape.numel()
        memory = self.memory if self.memory.size >= 2 * size else np.empty(2 * size)
        if size <= self.most:
            self.memory = memory
        rows, products = torch.from_numpy(memory[: 2 * size]).view(2, *shape)
        return rows, products


_kept = _Kept()


def solve(x: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int, relative: bool) -> Tensor | None:
    """x after all steps, contiguous; x: (N, D) on the CPU, float32 or half. None for rows that take
    the direct form: not finite, or one of them far from all others."""
    n = len(x)
    rows, moved = _kept.pair(x.shape)
    rows.copy_(x)
    rows -= rows.mean(0)
    b = (rows @ rows.T).numpy()
    squares = b.diagonal().copy()
    most = squares.max()
    # One row far from all others would leave the digits of these to rounding.
    if not most <= _FAR * squares.mean():
        return None
    # A quadratic form below the rounding of its largest terms is 0, as between bit-identical rows; its edge is dropped.
    nothing = 32 * np.finfo(np.float64).eps * most
    b -= 0.5 * squares
    b -= 0.5 * squares[:, None]
    np.fill_diagonal(b, 0)
    size = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).numpy() if relative else np.ones(n)
    radius, step = epsilon * size, step_size * size
    # A BLAS library may round the columns of equal rows differently: of those that rounding tells apart the first wins.
    copies = marks_of_equal_rows(rows) is not None

    identity = labels.numpy()
    same = identity[:, None] == identity
    images = same.sum(1)
    valid = np.tile((images > 1) & (images < n), 2)
    excluded = np.zeros((2, n, n))  # added to the keys of the positives, and of the negatives
    excluded[0][~same] = -np.inf
    np.fill_diagonal(excluded[0], -np.inf)
    excluded[1][same] = -np.inf

    begin = np.concatenate([np.eye(n), b], 1)
    displaced = np.zeros_like(begin)  # [C | R]
    points, gradient = begin.copy(), np.empty_like(begin)  # [A | P], [G | H]
    q, edges, products = b.copy(), np.empty((n, n)), np.empty((n, n))
    keys = np.empty((2, n, n))
    every, ones = np.arange(n), np.ones(n)
    first = np.arange(2 * n) * n  # of a row of keys, positives' and negatives'
    side = np.repeat([1.0, -1.0], n)
    for taken in range(steps):
        if taken:
            np.matmul(points[:, n:], points[:, :n].T, out=q)
        half = 0.5 * q.diagonal()
        np.subtract(half, q, out=keys[1])  # of row i as ½ d²_ij: the term that its whole row shares is left out
        np.add(excluded[0], keys[1], out=keys[0])
        np.subtract(excluded[1], keys[1], out=keys[1])
        both = keys.reshape(2 * n, n)
        winner = (both >= both.max(1, keepdims=True) - nothing).argmax(1) if copies else both.argmax(1)
        square = 2 * (side * keys.reshape(-1)[winner + first] + np.tile(half, 2))
        near = ~((square > nothing) & valid)
        distance = np.sqrt(np.where(near, 1, square))
        gap = np.where(near, 0, distance)
        slope = np.exp(-np.logaddexp(0, gap[n:] - gap[:n]))  # σ, without overflow
        weight = np.where(near, 0, side * np.tile(slope, 2) / distance)
        flat = edges.reshape(-1)
        flat.fill(0)
        flat[winner + first % (n * n)] = -weight  # never the same place
        flat[winner * n + np.tile(every, 2)] -= weight
        flat[:: n + 1] = -(edges @ ones)
        if slope.min() < 1e-140:  # of a saturated loss: as they are, their squares would leave the range
            largest = np.abs(edges).max(1, keepdims=True)
            edges /= np.where(largest == 0, 1, largest)

        np.matmul(edges, points, out=gradient)
        length = np.multiply(gradient[:, :n], gradient[:, n:], out=products) @ ones
        moving = length > 0
        gradient *= np.where(moving, step / np.sqrt(np.where(moving, length, 1)), 0)[:, None]
        displaced += gradient
        square = np.multiply(displaced[:, :n], displaced[:, n:], out=products) @ ones
        outside = square > radius * radius
        if outside.any():
            displaced *= np.where(outside, radius / np.sqrt(np.where(outside, square, 1)), 1)[:, None]
        np.add(begin, displaced, out=points)
    torch.mm(torch.from_numpy(displaced[:, :n]), rows, out=moved)
    return moved.to(torch.float32).add_(x).to(x.dtype)
