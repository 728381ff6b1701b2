"""Pairwise distances, and their gradient from the distances themselves.

    d²_ij = ‖x_i‖² + ‖y_j‖² − 2 x_i·y_j
    ∂x_i  = Σ_j w_ij (x_i − y_j),   w = g/d (euclidean), 2g (sqeuclidean)
    ∂x_i  = −Σ_j g_ij y_j           (dot, and cosine of unit rows)

The weights are formed tile by tile; nothing of size N×M is written besides the distances.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._tiles import product

METRIC_NUMBER = {"euclidean": 0, "sqeuclidean": 1, "cosine": 2, "dot": 3}


@triton.jit(do_not_specialize=["N", "M"])
def _distance(
    x, y, out, N, M, D, x_stride, y_stride, one,
    METRIC: tl.constexpr, SELF: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < N, columns < M
    x += s * N * x_stride
    y += s * M * y_stride
    acc, xx, yy = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                          BM, BN, BK, PRECISION, METRIC < 2)  # fmt: skip
    if METRIC < 2:
        d = xx[:, None] + yy[None, :] - 2 * acc
        d = tl.where(d < 0, 0.0, d)  # not maximum(): that would turn NaN into 0
        if SELF:
            d = tl.where((rows[:, None] == columns[None, :]) & (d == d), 0.0, d)
        if METRIC == 0:
            d = tl.sqrt_rn(d)
    elif METRIC == 2:
        d = 1 - acc
        d = tl.where(d < 0, 0.0, d)
    else:
        d = -acc
    out += s * N * M + rows.to(tl.int64)[:, None] * M + columns[None, :]
    tl.store(out, d, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["N", "M", "row_step", "column_step"])
def _gradient(
    gradient, distance, x, y, out, N, M, D, row_step, column_step, x_stride, y_stride,
    METRIC: tl.constexpr, SELF: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows of ∂x; element (i, j) of the N×M weights lies at i·row_step + j·column_step, so ∂y is the same with the
    steps exchanged. SELF adds the transposed weights: x stands on both sides of the distance."""
    s = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    row_mask = rows < N
    element_mask = row_mask[:, None] & (k < D)[None, :]
    gradient += s * N * M
    distance += s * N * M
    x_tile = x + (s * N + rows.to(tl.int64))[:, None] * x_stride + k[None, :]
    y += s * M * y_stride
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for j0 in range(0, M, BN):
        columns = j0 + tl.arange(0, BN)
        column_mask = columns < M
        mask = row_mask[:, None] & column_mask[None, :]
        at = rows.to(tl.int64)[:, None] * row_step + columns.to(tl.int64)[None, :] * column_step
        w = tl.load(gradient + at, mask=mask, other=0.0)
        if SELF:
            w += tl.load(gradient + rows[:, None] + columns.to(tl.int64)[None, :] * M, mask=mask, other=0.0)
        if METRIC == 0:
            d = tl.load(distance + at, mask=mask, other=0.0)
            w = tl.where(d == 0, 0.0, w / tl.where(d == 0, 1.0, d))
        elif METRIC == 1:
            w = 2 * w
        b = tl.load(
            y + columns.to(tl.int64)[:, None] * y_stride + k[None, :],
            mask=column_mask[:, None] & (k < D)[None, :],
            other=0.0,
        )
        total += tl.sum(w, 1)
        if PRECISION == "bf16":
            acc += tl.dot(w.to(tl.bfloat16), b.to(tl.bfloat16))
        else:
            acc += tl.dot(w, b.to(tl.float32), input_precision=PRECISION)
    if METRIC < 2:
        a = tl.load(x_tile, mask=element_mask, other=0.0).to(tl.float32)
        result = total[:, None] * a - acc
    else:
        result = -acc
    out += (s * N + rows.to(tl.int64))[:, None] * D + k[None, :]
    tl.store(out, result.to(out.dtype.element_ty), mask=element_mask)


def pairwise_distance(x: Tensor, y: Tensor | None, metric: str, precision: str) -> Tensor:
    """Launch `_distance`: one program a 64×64 tile."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    out = torch.empty(*x.shape[:-1], m, dtype=torch.float32, device=x.device)
    BM, BN, BK = 64, 64, 32
    launch(
        _distance, (triton.cdiv(n, BM), triton.cdiv(m, BN), sets),
        a, b, out, n, m, dimension, row_stride(a), row_stride(b), 1.0,
        METRIC=METRIC_NUMBER[metric], SELF=y is None, PRECISION=dot_precision(x, precision),
        BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def pairwise_distance_backward(
    gradient: Tensor,
    distance: Tensor,
    x: Tensor,
    y: Tensor | None,
    metric: str,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `_gradient` for x, and with the sides exchanged for y: each only where it is needed."""
    gradient = gradient.contiguous()
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    for_x = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    for_y = torch.empty(0 if y is None or not needs_y else y.shape, dtype=x.dtype, device=x.device)
    # The weights are float32 whatever the rows are.
    dots = dot_precision(gradient, "fp32" if x.dtype in (torch.float16, torch.bfloat16) else precision)
    BM, BN, BD = 64, 32, 32
    sides = [(a, b, for_x, b.shape[1], 1)] if needs_x else []
    if y is not None and needs_y:
        sides.append((b, a, for_y, 1, b.shape[1]))
    for own, other, out, row_step, column_step in sides:
        sets, n, dimension = own.shape
        launch(
            _gradient, (triton.cdiv(n, BM), triton.cdiv(dimension, BD), sets),
            gradient, distance, own, other, out, n, other.shape[1], dimension, row_step, column_step,
            row_stride(own), row_stride(other),
            METRIC=METRIC_NUMBER[metric], SELF=y is None, PRECISION=dots,
            BM=BM, BN=BN, BD=BD, num_warps=8, num_stages=3,
        )  # fmt: skip
    return for_x, for_y
