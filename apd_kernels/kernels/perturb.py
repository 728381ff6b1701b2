"""Projected gradient ascent of the soft-margin batch-hard loss on the features themselves.

    s_a = σ(d_p − d_n) for anchor a,   w_p = s/d_p,   w_n = −s/d_n
    g_i = Σ w (z_i − z_winner) over i's winners + Σ w_a (z_i − z_a) over the anchors a that chose i
    z_i ← x_i + project(z_i + α g_i/‖g_i‖ − x_i)          (l∞: sign(g_i), clamp)

Four launches a step and no autograd graph: mine, weights, gradient, move.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import launch
from apd_kernels.kernels._tiles import row_distance
from apd_kernels.kernels.losses import per_difference, sigmoid
from apd_kernels.kernels.mining import MAX_SPLITS, best_of_splits, mine, pair_gradient


@triton.jit(do_not_specialize=["N", "splits"])
def _weights(
    z, key, index, positive_index, negative_index, positive_weights, negative_weights, N, D, splits,
    SPLITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program an anchor: its winners and the weights of the two row differences in the gradient."""
    s = tl.program_id(1).to(tl.int64)
    at = s * N + tl.program_id(0).to(tl.int64)
    negative_at = tl.num_programs(1) * N + at
    p = best_of_splits(key + at * splits, index + at * splits, splits, True, SPLITS)
    n = best_of_splits(key + negative_at * splits, index + negative_at * splits, splits, False, SPLITS)
    row = z + at * D
    d_p = row_distance(row, z + (s * N + tl.maximum(p, 0)) * D, D, 0, BD)
    d_n = row_distance(row, z + (s * N + tl.maximum(n, 0)) * D, D, 0, BD)
    slope = tl.where((p < 0) | (n < 0), 0.0, sigmoid(d_p - d_n))
    tl.store(positive_index + at, p)
    tl.store(negative_index + at, n)
    tl.store(positive_weights + at, per_difference(slope, d_p, 0))
    tl.store(negative_weights + at, per_difference(-slope, d_n, 0))


@triton.jit
def _move(
    x, z, gradient, out, D, epsilon, step_size,
    LINF: tl.constexpr, RELATIVE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program a row: the step, and the way back into the ball. z and out may be the same."""
    at = tl.program_id(0).to(tl.int64) * D
    x_size = tl.zeros((BD,), tl.float32)
    g_size = tl.zeros((BD,), tl.float32)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        x_size = tl.maximum(x_size, tl.abs(tl.load(x + at + k, mask=k < D, other=0.0).to(tl.float32)))
        g_size = tl.maximum(g_size, tl.abs(tl.load(gradient + at + k, mask=k < D, other=0.0)))
    x_largest, g_largest = tl.max(x_size, 0), tl.max(g_size, 0)
    radius, step = epsilon, step_size
    # Squares are taken of rows divided by their largest entry: a saturated loss has gradients of 1e-30 and less.
    x_unit = tl.where(x_largest > 0, x_largest, 1.0)
    g_unit = tl.where(g_largest > 0, g_largest, 1.0)
    x_square = tl.zeros((BD,), tl.float32)
    g_square = tl.zeros((BD,), tl.float32)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        a = tl.load(x + at + k, mask=k < D, other=0.0).to(tl.float32) / x_unit
        g = tl.load(gradient + at + k, mask=k < D, other=0.0) / g_unit
        x_square += a * a
        g_square += g * g
    if RELATIVE:
        if LINF:
            size = x_largest
        else:
            size = tl.sqrt_rn(tl.sum(x_square, 0)) * x_unit
        radius *= size
        step *= size
    g_total = tl.sum(g_square, 0)  # at least 1, except for a zero row; NaN for a row with a NaN
    g_norm = tl.where(g_total == 0, 1.0, tl.sqrt_rn(g_total))
    factor = 1.0
    if not LINF:
        square = tl.zeros((BD,), tl.float32)
        for k0 in range(0, D, BD):
            k = k0 + tl.arange(0, BD)
            a = tl.load(x + at + k, mask=k < D, other=0.0).to(tl.float32)
            g = tl.load(gradient + at + k, mask=k < D, other=0.0) / g_unit
            moved = tl.load(z + at + k, mask=k < D, other=0.0) + step * (g / g_norm)
            square += (moved - a) * (moved - a)
        length = tl.sqrt_rn(tl.sum(square, 0))
        factor = tl.where(length > radius, radius / tl.where(length > radius, length, 1.0), 1.0)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        a = tl.load(x + at + k, mask=k < D, other=0.0).to(tl.float32)
        g = tl.load(gradient + at + k, mask=k < D, other=0.0)
        moved = tl.load(z + at + k, mask=k < D, other=0.0)
        if LINF:
            sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
            offset = moved + step * sign - a
            offset = tl.where(offset > radius, radius, tl.where(offset < -radius, -radius, offset))
        else:
            offset = (moved + step * (g / g_unit / g_norm) - a) * factor
        tl.store(out + at + k, (a + offset).to(out.dtype.element_ty), mask=k < D)


def metric_perturb(
    x: Tensor,
    labels: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    relative: bool,
    norm: str,
    precision: str,
) -> Tensor:
    """`steps` times `_mine`, `_weights`, `_pair_gradient` and `_move`; the state stays float32 between steps."""
    start = x.contiguous()
    sets, (n, dimension) = start.shape[:-2].numel(), start.shape[-2:]
    out = torch.empty(start.shape, dtype=x.dtype, device=x.device)
    state = start if x.dtype == torch.float32 else start.float()
    winners = tuple(torch.empty(start.shape[:-1], dtype=torch.int64, device=x.device) for _ in range(2))
    weights = tuple(torch.empty(start.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    for step in range(steps):
        key, index, splits = mine(state, labels, None, None, "euclidean", precision)
        launch(
            _weights, (n, sets), state, key, index, *winners, *weights, n, dimension, splits,
            SPLITS=MAX_SPLITS, BD=1024, num_warps=4,
        )  # fmt: skip
        gradient, _ = pair_gradient(state, None, *weights, *winners, "euclidean", True, False)
        last = step == steps - 1
        target = out if last else (torch.empty_like(gradient) if state is start else state)
        launch(
            _move, (sets * n,), start, state, gradient, target, dimension, epsilon, step_size,
            LINF=norm == "linf", RELATIVE=relative, BD=1024, num_warps=4,
        )  # fmt: skip
        state = target
    return out
