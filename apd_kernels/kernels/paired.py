"""Distances row by row: one program a row, which is read once from memory (again from the cache for "cosine").

∂x = w (x − y) = −∂y (w = g/d or 2g);   dot: ∂x = −g y;   cosine: ∂x = g ((x̂ − ŷ) − d x̂) / ‖x‖
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import launch, row_stride, sets_of_rows
from apd_kernels.kernels._tiles import row_distance
from apd_kernels.kernels.distance import METRIC_NUMBER


@triton.jit
def _length(row, D, BD: tl.constexpr):
    """The largest magnitude of a row and the norm of the row divided by it: both in range for any finite row."""
    largest = tl.zeros((BD,), tl.float32)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        largest = tl.maximum(largest, tl.abs(tl.load(row + k, mask=k < D, other=0.0).to(tl.float32)))
    scale = tl.max(largest, 0)
    divisor = tl.where(scale > 0, scale, 1.0)
    squares = tl.zeros((BD,), tl.float32)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        value = tl.load(row + k, mask=k < D, other=0.0).to(tl.float32) / divisor
        squares += value * value
    return scale, tl.sqrt_rn(tl.sum(squares, 0))


@triton.jit
def _unit(values, scale, norm):
    """values / (scale · norm), whose divisor need not be in range; a zero row stays zero."""
    return values / tl.where(scale > 0, scale, 1.0) / tl.where(norm == 0, 1.0, norm)


@triton.jit(do_not_specialize=["N"])
def _paired(x, y, out, N, D, x_stride, y_stride, METRIC: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * N + tl.program_id(0)
    x += row * x_stride
    y += row * y_stride
    if METRIC == 2:
        x_scale, x_norm = _length(x, D, BD)
        y_scale, y_norm = _length(y, D, BD)
        total = tl.zeros((BD,), tl.float32)
        for k0 in range(0, D, BD):
            k = k0 + tl.arange(0, BD)
            a = _unit(tl.load(x + k, mask=k < D, other=0.0).to(tl.float32), x_scale, x_norm)
            b = _unit(tl.load(y + k, mask=k < D, other=0.0).to(tl.float32), y_scale, y_norm)
            total += (a - b) * (a - b)
        # ½‖x̂ − ŷ‖² = 1 − cos keeps the digits of small angles; a zero row adds the ½ that its length lacks.
        zero_rows = (x_norm == 0).to(tl.float32) + (y_norm == 0).to(tl.float32)
        d = 0.5 * (tl.sum(total, 0) + zero_rows)
    else:
        d = row_distance(x, y, D, METRIC, BD)
    tl.store(out + row, d)


@triton.jit(do_not_specialize=["N"])
def _paired_gradient(
    gradient, distance, x, y, x_gradient, y_gradient, N, D, x_stride, y_stride,
    METRIC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * N + tl.program_id(0)
    g, d = tl.load(gradient + row), tl.load(distance + row)
    x += row * x_stride
    y += row * y_stride
    w = g
    if METRIC == 0:
        w = tl.where((d == 0) | (g == 0), 0.0, g / tl.where(d == 0, 1.0, d))
    if METRIC == 1:
        w = 2 * g
    if METRIC == 2:
        x_scale, x_norm = _length(x, D, BD)
        y_scale, y_norm = _length(y, D, BD)
        w = tl.where((x_norm == 0) | (y_norm == 0), 0.0, g)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        mask = k < D
        a = tl.load(x + k, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(y + k, mask=mask, other=0.0).to(tl.float32)
        if METRIC == 3:
            to_x, to_y = -w * b, -w * a
        elif METRIC == 2:
            u, v = _unit(a, x_scale, x_norm), _unit(b, y_scale, y_norm)
            to_x = tl.where(w == 0, 0.0, _unit(w * (u - v - d * u), x_scale, x_norm))
            to_y = tl.where(w == 0, 0.0, _unit(w * (v - u - d * v), y_scale, y_norm))
        else:
            to_x = tl.where(w == 0, 0.0, w * (a - b))
            to_y = -to_x
        if x_gradient is not None:
            tl.store(x_gradient + row * D + k, to_x.to(x_gradient.dtype.element_ty), mask=mask)
        if y_gradient is not None:
            tl.store(y_gradient + row * D + k, to_y.to(y_gradient.dtype.element_ty), mask=mask)


def paired_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """One launch."""
    a, b = sets_of_rows(x), sets_of_rows(y)
    sets, n, dimension = a.shape
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    launch(
        _paired, (n, sets), a, b, out, n, dimension, row_stride(a), row_stride(b),
        METRIC=METRIC_NUMBER[metric], BD=1024, num_warps=4,
    )  # fmt: skip
    return out


def paired_distance_backward(
    gradient: Tensor, distance: Tensor, x: Tensor, y: Tensor, metric: str, for_x: bool, for_y: bool
) -> tuple[Tensor, Tensor]:
    """One launch for both gradients."""
    a, b = sets_of_rows(x), sets_of_rows(y)
    sets, n, dimension = a.shape
    x_gradient, y_gradient = (
        torch.empty(x.shape if wanted else 0, dtype=x.dtype, device=x.device) for wanted in (for_x, for_y)
    )
    launch(
        _paired_gradient, (n, sets),
        gradient.contiguous(), distance.contiguous(), a, b,
        x_gradient if for_x else None, y_gradient if for_y else None,
        n, dimension, row_stride(a), row_stride(b),
        METRIC=METRIC_NUMBER[metric], BD=1024, num_warps=4,
    )  # fmt: skip
    return x_gradient, y_gradient
