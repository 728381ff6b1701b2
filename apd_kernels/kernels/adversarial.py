"""Projected gradient steps on features.

    triplet    s_a = σ(d_p − d_n) for anchor a,   w_p = s/d_p,   w_n = −s/d_n
               g_i = Σ w (z_i − z_winner) over i's winners + Σ w_a (z_i − z_a) over the anchors a that chose i
    negative   s_j = σ(d(z, n_j) − d(z, x)),   g = Σ_j s_j (z − x)/d(z, x) − Σ_j s_j (z − n_j)/d(z, n_j)
    step       z_i ← x_i + project(z_i + α g_i/‖g_i‖ − x_i)          (l∞: sign(g_i), clamp)

Two launches a step for "triplet" (`_mine`, `_step`: an anchor that chose a row is looked at again by the row's program,
which costs three rows and saves a launch), one for all steps of "negative". For batches that are small against D
`adversarial_solver.py` takes the steps of "triplet" on N×N matrices. In large ones a row cannot look through all:
they are mined and differentiated as `batch_hard` does it, with split products and sorted winners, about ten launches
that the products outlast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import launch, row_stride, sets_of_rows
from apd_kernels.kernels.adversarial_solver import SOLVER_ROWS, SOLVER_SHARE, solve
from apd_kernels.kernels.losses import per_difference, sigmoid
from apd_kernels.kernels.mining import SCANNED_ANCHORS, batch_hard, best_of_splits, mine, pair_gradient

# Every row's program reads the splits of all anchors, so they are few.
_SPLITS = 16


@triton.jit
def _moved(start, z, g, epsilon, step_size, LINF: tl.constexpr, RELATIVE: tl.constexpr):
    """The row after a step along g, back in its ball."""
    radius, step = epsilon, step_size
    # Squares are taken of rows divided by their largest entry: a saturated loss has gradients of 1e-30 and less.
    if RELATIVE:
        largest = tl.max(tl.abs(start), 0)
        if LINF:
            size = largest
        else:
            scaled = start / tl.where(largest > 0, largest, 1.0)
            size = tl.sqrt_rn(tl.sum(scaled * scaled, 0)) * largest
        radius *= size
        step *= size
    if LINF:
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
        offset = z + step * sign - start
        offset = tl.where(offset > radius, radius, tl.where(offset < -radius, -radius, offset))
    else:
        largest = tl.max(tl.abs(g), 0)
        g = g / tl.where(largest > 0, largest, 1.0)
        square = tl.sum(g * g, 0)  # at least 1, except for a zero row; NaN for a row with a NaN
        offset = z + step * (g / tl.where(square == 0, 1.0, tl.sqrt_rn(square))) - start
        length = tl.sqrt_rn(tl.sum(offset * offset, 0))
        offset *= tl.where(length > radius, radius / tl.where(length > radius, length, 1.0), 1.0)
    return start + offset


@triton.jit
def _winners(key, index, at, mask, splits, FARTHEST: tl.constexpr, SPLITS: tl.constexpr):
    """`best_of_splits` for a vector of anchors; -1 outside the mask."""
    t = tl.arange(0, SPLITS)
    here = mask[:, None] & (t < splits)[None, :]
    if FARTHEST:
        _, best = tl.max(
            tl.load(key + at[:, None] * splits + t[None, :], mask=here, other=float("-inf")), 1, return_indices=True
        )
    else:
        _, best = tl.min(
            tl.load(key + at[:, None] * splits + t[None, :], mask=here, other=float("inf")), 1, return_indices=True
        )
    return tl.load(index + at * splits + best, mask=mask, other=-1)


@triton.jit(do_not_specialize=["N", "M", "splits"])
def _step(
    x, z, y, key, index, out, N, M, D, y_stride, splits, epsilon, step_size,
    SELF: tl.constexpr, LINF: tl.constexpr, RELATIVE: tl.constexpr,
    SPLITS: tl.constexpr, SCAN: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a row. x: originals, z: current points (float32), y: rows to choose from (z itself with SELF)."""
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    negatives = tl.num_programs(1) * N  # from an anchor's positive winner to its negative one
    at = s * N + i
    k = tl.arange(0, BD)
    mask = k < D
    z += s * N * D
    y += s * M * y_stride
    row = tl.load(z + i * D + k, mask=mask, other=0.0)
    start = tl.load(x + at * D + k, mask=mask, other=0.0).to(tl.float32)

    p = best_of_splits(key + at * splits, index + at * splits, splits, True, SPLITS)
    n = best_of_splits(key + (negatives + at) * splits, index + (negatives + at) * splits, splits, False, SPLITS)
    to_p = row - tl.load(y + tl.maximum(p, 0) * y_stride + k, mask=mask, other=0.0).to(tl.float32)
    to_n = row - tl.load(y + tl.maximum(n, 0) * y_stride + k, mask=mask, other=0.0).to(tl.float32)
    d_p, d_n = tl.sqrt_rn(tl.sum(to_p * to_p, 0)), tl.sqrt_rn(tl.sum(to_n * to_n, 0))
    slope = tl.where((p < 0) | (n < 0), 0.0, sigmoid(d_p - d_n))
    w_p, w_n = per_difference(slope, d_p, 0), per_difference(-slope, d_n, 0)
    # A weight of 0 drops its pair even when the row is not finite.
    g = tl.where(w_p == 0, 0.0, w_p * to_p) + tl.where(w_n == 0, 0.0, w_n * to_n)

    if SELF:
        for j0 in range(0, N, SCAN):
            j = j0 + tl.arange(0, SCAN)
            j_at = s * N + j
            chose = (_winners(key, index, j_at, j < N, splits, True, SPLITS) == i) | (
                _winners(key, index, negatives + j_at, j < N, splits, False, SPLITS) == i
            )
            if tl.max(chose.to(tl.int32), 0) > 0:
                for j1 in range(j0, j0 + SCAN, BJ):
                    a = j1 + tl.arange(0, BJ)
                    a_at = s * N + a
                    a_p = _winners(key, index, a_at, a < N, splits, True, SPLITS)
                    a_n = _winners(key, index, negatives + a_at, a < N, splits, False, SPLITS)
                    mine = ((a_p == i) | (a_n == i)) & (a_p >= 0) & (a_n >= 0)
                    if tl.max(mine.to(tl.int32), 0) > 0:
                        here = mine[:, None] & mask[None, :]
                        anchor = tl.load(z + a.to(tl.int64)[:, None] * D + k[None, :], mask=here, other=0.0)
                        far = tl.load(z + a_p.to(tl.int64)[:, None] * D + k[None, :], mask=here, other=0.0)
                        near = tl.load(z + a_n.to(tl.int64)[:, None] * D + k[None, :], mask=here, other=0.0)
                        a_d_p = tl.sqrt_rn(tl.sum((anchor - far) * (anchor - far), 1))
                        a_d_n = tl.sqrt_rn(tl.sum((anchor - near) * (anchor - near), 1))
                        a_slope = sigmoid(a_d_p - a_d_n)
                        w = tl.where(a_p == i, per_difference(a_slope, a_d_p, 0), per_difference(-a_slope, a_d_n, 0))
                        used = mine & (w != 0)
                        g += tl.sum(tl.where(used[:, None], w[:, None] * (row[None, :] - anchor), 0.0), 0)

    moved = _moved(start, row, g, epsilon, step_size, LINF, RELATIVE)
    tl.store(out + at * D + k, moved.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def _ascent_weights(positive, negative, positive_index, negative_index, w_p, w_n, size, BLOCK: tl.constexpr):
    """w_p, w_n of each anchor from its distances; 0 without a pair."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    d_p, d_n = tl.load(positive + at, mask=mask, other=0.0), tl.load(negative + at, mask=mask, other=0.0)
    paired = (tl.load(positive_index + at, mask=mask, other=-1) >= 0) & (
        tl.load(negative_index + at, mask=mask, other=-1) >= 0
    )
    slope = tl.where(paired, sigmoid(d_p - d_n), 0.0)
    tl.store(w_p + at, per_difference(slope, d_p, 0), mask=mask)
    tl.store(w_n + at, per_difference(-slope, d_n, 0), mask=mask)


@triton.jit
def _project(
    x, z, gradient, out, D, epsilon, step_size, LINF: tl.constexpr, RELATIVE: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """One program a row takes its step along a gradient that is there."""
    at = tl.program_id(0).to(tl.int64) * D
    k = tl.arange(0, BD)
    mask = k < D
    start = tl.load(x + at + k, mask=mask, other=0.0).to(tl.float32)
    row = tl.load(z + at + k, mask=mask, other=0.0)
    g = tl.load(gradient + at + k, mask=mask, other=0.0)
    moved = _moved(start, row, g, epsilon, step_size, LINF, RELATIVE)
    tl.store(out + at + k, moved.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "steps"])
def _negative(
    x, negatives, valid, begin, out, M, D, steps, sample_stride, negative_stride, epsilon, step_size,
    LINF: tl.constexpr, RELATIVE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a row, all its steps: rows do not meet."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    mask = k < D
    start = tl.load(x + i * D + k, mask=mask, other=0.0).to(tl.float32)
    z = start
    if begin is not None:
        z = tl.load(begin + i * D + k, mask=mask, other=0.0).to(tl.float32)
    if tl.load(valid + i):
        for _ in range(0, steps):
            away = z - start
            d_x = tl.sqrt_rn(tl.sum(away * away, 0))
            g = tl.zeros((BD,), tl.float32)
            slopes = 0.0
            for j in range(0, M):
                n = tl.load(
                    negatives + i * sample_stride + tl.cast(j, tl.int64) * negative_stride + k, mask=mask, other=0.0
                )
                toward = z - n.to(tl.float32)
                d = tl.sqrt_rn(tl.sum(toward * toward, 0))
                slope = sigmoid(d - d_x)
                slopes += slope
                g -= per_difference(slope, d, 0) * toward
            g += per_difference(slopes, d_x, 0) * away
            z = _moved(start, z, g, epsilon, step_size, LINF, RELATIVE)
    tl.store(out + i * D + k, z.to(out.dtype.element_ty), mask=mask)


def metric_perturb(
    x: Tensor,
    labels: Tensor,
    begin: Tensor | None,
    memory: Tensor | None,
    memory_labels: Tensor | None,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
    precision: str,
) -> Tensor:
    """The solver; or `steps` times `_mine` and `_step`, in large batches `_gradient` and `_project`, the points in
    float32 between them."""
    start = x.contiguous()
    n, dimension = start.shape[-2:]
    sets = start.shape[:-2].numel()
    plain = norm == "l2" and begin is None and memory is None
    if plain and n <= min(SOLVER_ROWS, SOLVER_SHARE * dimension):
        return solve(start, labels, epsilon, step_size, steps, relative)
    if memory is not None and memory.shape[-2] == 0:  # nothing to choose, and no row to read
        return (start if begin is None else begin).to(x.dtype, copy=True).view(x.shape)
    points = (start if begin is None else begin.contiguous()).float()
    bank = None if memory is None else sets_of_rows(memory)
    pairing = Pairing(labels, memory_labels)
    out = torch.empty(start.shape, dtype=x.dtype, device=x.device)
    spare = [torch.empty(start.shape, dtype=torch.float32, device=x.device) for _ in range(min(2, steps - 1))]
    BD = max(16, triton.next_power_of_2(dimension))
    ball = {"LINF": norm == "linf", "RELATIVE": relative}
    for step in range(steps):
        target = out if step == steps - 1 else spare[step % 2]
        if bank is None and n > SCANNED_ANCHORS:
            gradient = _gradient(points, pairing, precision)
            launch(
                _project, (sets * n,), start, points, gradient, target, dimension, epsilon, step_size,
                **ball, BD=BD, num_warps=_warps(BD),
            )  # fmt: skip
        else:
            key, index, splits = mine(points, bank, pairing, "euclidean", precision, most_splits=_SPLITS)
            rows = sets_of_rows(points) if bank is None else bank
            launch(
                _step, (n, sets),
                start, points, rows, key, index, target, n, rows.shape[1], dimension, row_stride(rows), splits,
                epsilon, step_size, SELF=memory is None, **ball,
                SPLITS=_SPLITS, SCAN=32, BJ=1 if BD > 2048 else 2, BD=BD, num_warps=_warps(BD),
            )  # fmt: skip
        points = target
    return out


def _gradient(points: Tensor, pairing: Pairing, precision: str) -> Tensor:
    """Of the sum over the anchors, in the steps of `batch_hard` and its backward pass."""
    *distances, positive, negative = batch_hard(points, None, Operands(), pairing, "euclidean", precision)
    weights = [torch.empty_like(distance) for distance in distances]
    size = points.shape[:-1].numel()
    launch(
        _ascent_weights, (triton.cdiv(size, 256),), *distances, positive, negative, *weights, size,
        BLOCK=256, num_warps=4,
    )  # fmt: skip
    return pair_gradient(points, None, weights[0], weights[1], positive, negative, None, "euclidean", True, False)[0]


def negative_perturb(
    x: Tensor,
    negatives: Tensor,
    valid: Tensor,
    begin: Tensor | None,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
) -> Tensor:
    """One launch."""
    start = x.contiguous()
    dimension = start.shape[-1]
    others = negatives if negatives.dim() == 3 else negatives.flatten(0, -3)
    if others.stride(-1) != 1 and others.shape[-1] > 1:
        others = others.contiguous()
    out = torch.empty(start.shape, dtype=x.dtype, device=x.device)
    BD = max(16, triton.next_power_of_2(dimension))
    launch(
        _negative, (start.shape[:-1].numel(),),
        start, others, valid.contiguous(), None if begin is None else begin.contiguous(), out,
        others.shape[1], dimension, steps, others.stride(0), others.stride(1), epsilon, step_size,
        LINF=norm == "linf", RELATIVE=relative, BD=BD, num_warps=_warps(BD),
    )  # fmt: skip
    return out


def _warps(BD: int) -> int:
    """8 elements a thread at most: a row, its original, a gradient and a partner stay in registers."""
    return min(16, max(4, BD // 256))
