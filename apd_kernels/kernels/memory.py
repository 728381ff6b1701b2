"""Writing into a ring buffer, and the momentum update of centroids, both in place.

    slot_j = (enqueued + skipped + j) mod capacity,  features[slot_j] = x_j
    c ← v / ‖v‖ with v = m·c + (1 − m)·x, for the samples x of an identity in the order of the batch

Normalizing makes the update nonlinear in c, so the samples of an identity cannot be folded into one weighted sum, nor
into an associative scan of fixed size. But an identity's row fits into the registers of one program, which walks
through its samples; the identities are independent of each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import launch, row_stride, sets_of_rows

# Programs that share the slots of a large ring when it is written for the first time, and leave at once later.
FILLING_PROGRAMS = 1024


@triton.jit(do_not_specialize=["N", "M", "skipped"])
def _enqueue(features, labels, enqueued, x, x_labels, N, M, D, x_stride, skipped, BD: tl.constexpr):
    """Each program takes some of the N rows; of an empty ring, of all M slots, those from N on as copies of row 0."""
    before = tl.load(enqueued)
    for j in range(tl.program_id(0), tl.where(before == 0, M, N), tl.num_programs(0)):
        row = tl.where(j < N, j, 0).to(tl.int64)
        slot = (before + skipped + j) % M
        tl.store(labels + slot, tl.load(x_labels + row).to(tl.int64))
        for k0 in range(0, D, BD):
            k = k0 + tl.arange(0, BD)
            values = tl.load(x + row * x_stride + k, mask=k < D)
            tl.store(features + slot * D + k, values.to(features.dtype.element_ty), mask=k < D)


@triton.jit(do_not_specialize=["N", "C"])
def _momentum_update(
    centroids, valid, x, labels, N, C, D, x_stride, momentum, rest, BJ: tl.constexpr, BD: tl.constexpr
):
    """One program a sample; the one of an identity's first sample takes all of them, the others leave."""
    i = tl.program_id(0)
    label = tl.load(labels + i).to(tl.int64)  # so that int8 −1 is not uint8 255
    earlier = tl.where((label >= 0) & (label < C), 0, 1)
    for j0 in range(0, i, BJ):
        j = j0 + tl.arange(0, BJ)
        same = tl.load(labels + j, mask=j < i, other=0).to(tl.int64) == label
        earlier += tl.sum((same & (j < i)).to(tl.int32), 0)
    if earlier == 0:
        k = tl.arange(0, BD)
        c = tl.load(centroids + label * D + k, mask=k < D, other=0.0)
        seen = tl.load(valid + label).to(tl.int32)
        for j0 in range(i, N, BJ):
            j = j0 + tl.arange(0, BJ)
            waiting = (tl.load(labels + j, mask=j < N, other=0).to(tl.int64) == label) & (j < N)
            for _ in range(0, tl.sum(waiting.to(tl.int32), 0)):
                sample = tl.min(tl.where(waiting, j, N), 0)
                waiting = waiting & (j != sample)
                new = tl.load(x + sample.to(tl.int64) * x_stride + k, mask=k < D, other=0.0).to(tl.float32)
                moved = tl.where(seen != 0, momentum * c + rest * new, new)
                norm = tl.sqrt_rn(tl.sum(moved * moved, 0))
                c = tl.where(norm != 0, moved / tl.where(norm != 0, norm, 1.0), c)
                seen = tl.where(norm != 0, 1, seen)
        tl.store(centroids + label * D + k, c, mask=k < D)
        tl.store(valid + label, seen != 0)


def enqueue(features: Tensor, labels: Tensor, enqueued: Tensor, x: Tensor, x_labels: Tensor, skipped: int) -> None:
    """Launch `_enqueue`."""
    rows = sets_of_rows(x)
    (capacity, dimension), n = features.shape, len(x)
    launch(
        _enqueue, (max(n, min(capacity, FILLING_PROGRAMS)),),
        features, labels, enqueued, rows, x_labels.contiguous(), n, capacity, dimension, row_stride(rows), skipped,
        BD=1024, num_warps=4,
    )  # fmt: skip
    for written in (features, labels):  # one by one: PyTorch 2.4 takes no tuple
        torch.autograd.graph.increment_version(written)


def momentum_update(centroids: Tensor, valid: Tensor, x: Tensor, labels: Tensor, momentum: float) -> None:
    """Launch `_momentum_update`."""
    rows = sets_of_rows(x)
    (identities, dimension), n = centroids.shape, len(x)
    BD = triton.next_power_of_2(dimension)
    launch(
        _momentum_update, (n,),
        centroids, valid, rows, labels.contiguous(), n, identities, dimension, row_stride(rows),
        momentum, 1 - momentum, BJ=128, BD=BD, num_warps=max(1, min(16, BD // 512)),
    )  # fmt: skip
    for written in (centroids, valid):
        torch.autograd.graph.increment_version(written)
