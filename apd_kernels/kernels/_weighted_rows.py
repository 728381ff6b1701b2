"""Sums of rows weighted by pairs.

Weights of pairs are written in blocks of rows, of at most 64 MB, and used up before the next block: no
float atomics, the same sums in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.rows import row_blocks
from apd_kernels.kernels._launch import dot_precision, launch, row_stride
from apd_kernels.kernels._tiles import high_and_rest, sum_apart

# Rows of a block of weights are padded with zeros to a multiple of this, so that they are read in vectors.
PADDING = 32


@triton.jit
def finite(values):
    """0 in place of NaN and infinities: what a pair with such a row weighs says it already."""
    values = values.to(tl.float32)
    return tl.where(values - values == 0, values, 0.0)


@triton.jit
def _add_rows(
    weights, own, other, out, rows, columns, first_row, first_column, own_rows, other_rows, D, width, height,
    own_stride, other_stride, one,
    TRANSPOSED: tl.constexpr, LESS_OWN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BD + tl.arange(0, BD)
    in_row = (k < D)[None, :]
    weights += s * height * width
    acc = tl.zeros((BM, BD), tl.float32)
    if PRECISION == "tf32x3 apart":
        cross = tl.zeros((BM, BD), tl.float32)
        rest = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for j0 in range(0, columns, BN):
        j = j0 + tl.arange(0, BN)
        if TRANSPOSED:  # the padding is part of the mask: its limit is what the compiler knows to be a multiple of 16
            at = j.to(tl.int64)[None, :] * width + i[:, None]
            w = tl.load(weights + at, mask=(i < width)[:, None] & (j < columns)[None, :], other=0.0)
        else:
            at = i.to(tl.int64)[:, None] * width + j[None, :]
            w = tl.load(weights + at, mask=(i < rows)[:, None] & (j < width)[None, :], other=0.0)
        b = other + (s * other_rows + first_column + j)[:, None] * other_stride + k[None, :]
        b = finite(tl.load(b, mask=(j < columns)[:, None] & in_row, other=0.0))
        if LESS_OWN:
            total += tl.sum(w, 1)
        if PRECISION == "bf16":
            acc += tl.dot(w.to(tl.bfloat16), b.to(tl.bfloat16)) * one
        elif PRECISION == "tf32x3 apart":  # as in `product`
            w, w_rest = high_and_rest(w)
            b, b_rest = high_and_rest(b)
            acc += tl.dot(w, b, input_precision="tf32") * one
            cross = tl.dot(w, b_rest, cross, input_precision="tf32")
            rest = tl.dot(w_rest, b, rest, input_precision="tf32")
        else:
            acc += tl.dot(w, b, input_precision=PRECISION) * one
    if PRECISION == "tf32x3 apart":
        acc = sum_apart(acc, cross, rest)
    mask = (i < rows)[:, None] & in_row
    row = s * own_rows + first_row + i
    if LESS_OWN:
        a = tl.load(own + row[:, None] * own_stride + k[None, :], mask=mask, other=0.0)
        acc -= total[:, None] * finite(a)
    out += row[:, None] * D + k[None, :]
    tl.store(out, tl.load(out, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit(do_not_specialize=["n", "m", "start", "N", "M", "height"])
def _add_to_anchors(
    weights, x, y, out, n, m, start, N, M, D, width, height, x_stride, y_stride, one,
    LESS_OWN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_i += Σ_j w_ij y_j (LESS_OWN: y_j − x_i) for the n anchors from `start` on."""
    _add_rows(weights, x, y, out, n, m, start, 0, N, M, D, width, height, x_stride, y_stride, one,
              False, LESS_OWN, PRECISION, BM, BN, BD)  # fmt: skip


@triton.jit(do_not_specialize=["n", "m", "start", "N", "M", "height"])
def _add_to_others(
    weights, x, y, out, n, m, start, N, M, D, width, height, x_stride, y_stride, one,
    LESS_OWN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_j += Σ_i w_ij x_i (LESS_OWN: x_i − y_j) over the n anchors from `start` on."""
    _add_rows(weights, y, x, out, m, n, 0, start, M, N, D, width, height, y_stride, x_stride, one,
              True, LESS_OWN, PRECISION, BM, BN, BD)  # fmt: skip


def weight_blocks(n: int, m: int, sets: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of anchors and, for each, (sets, anchors, m + padding) elements to write their weights to."""
    width = triton.cdiv(m, PADDING) * PADDING
    blocks = list(row_blocks(n, width, sets))
    if blocks:
        weights = torch.empty(sets, blocks[0].stop, width, dtype=torch.float32, device=device)
        yield from ((block, weights) for block in blocks)


def add_weighted_rows(
    for_x: Tensor, for_y: Tensor, weights: Tensor, a: Tensor, b: Tensor, block: slice, precision: str, less_own: bool
) -> None:
    """Launch `_add_to_anchors` and `_add_to_others`, each unless its result is empty; for_y is for_x where b is a."""
    sets, n, dimension = a.shape
    m = b.shape[1]
    _, height, width = weights.shape
    anchors = block.stop - block.start
    # The weights are float32 whatever the rows are.
    dots = dot_precision(weights, "fp32" if a.dtype in (torch.float16, torch.bfloat16) else precision)
    BM, BN, BD = 64, 32, 64
    for kernel, out, rows in ((_add_to_anchors, for_x, anchors), (_add_to_others, for_y, m)):
        if out.dim() > 1:
            launch(
                kernel, (triton.cdiv(rows, BM), triton.cdiv(dimension, BD), sets),
                weights, a, b, out, anchors, m, block.start, n, m, dimension, width, height,
                row_stride(a), row_stride(b), 1.0,
                LESS_OWN=less_own, PRECISION=dots, BM=BM, BN=BN, BD=BD, num_warps=8, num_stages=3,
            )  # fmt: skip
