"""Pairwise distances, and their gradient from the distances themselves.

    d²_ij = ‖x_i‖² + ‖y_j‖² − 2 x_i·y_j
    ∂x_i  = Σ_j w_ij (x_i − y_j),   w = g/d (euclidean), 2g (sqeuclidean)
    ∂x_i  = −Σ_j g_ij y_j           (dot, and cosine of unit rows)

The weights are formed tile by tile; nothing of size N×M is written besides the distances.

Two routes. Small problems multiply the rows as they come. Large float32 ones at float32 grade, and those against rows
that are kept prepared, multiply prepared rows: centred, and as float16 parts (see prepared.py and _split.py). There
the weights are split as well, in registers, a row's BK weights at a time with a scale s of their own:

    Σ_j w_ij y_j  ≈  largest² Σ_chunks s⁻¹ (hi·hi' + 2⁻¹¹ (hi·lo' + lo·hi')),     s w_ij f_j = hi + 2⁻¹¹ lo
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._pairs import grouped_tile
from apd_kernels.kernels._split import (
    half_squared_distance,
    high_and_low,
    in_units_of,
    power_of_four,
    split_product,
    unscaled,
)
from apd_kernels.kernels._tiles import high_and_rest, product, sum_apart
from apd_kernels.kernels._tuning import separate_accumulators, tile
from apd_kernels.kernels.prepared import (
    has_tma,
    operands,
    pays_to_split,
    prepare_rows,
    product_options,
    programs,
    rows_kernel,
    tiles_of,
)

METRIC_NUMBER = {"euclidean": 0, "sqeuclidean": 1, "cosine": 2, "dot": 3}

GROUP = 8  # row tiles that walk the columns together, so that both operands are read from the L2 cache


@triton.jit(do_not_specialize=["N", "M"])
def _distance(
    x, y, out, N, M, D, x_stride, y_stride, one,
    METRIC: tl.constexpr, SELF: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(N, BM)  # all tiles on the first axis: the others end at 65,535
    rows = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    columns = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
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


@triton.jit
def triangle_tile(t, side, GROUP: tl.constexpr):
    """Row i and column j ≥ i of the t-th of side (side + 1) / 2 tiles. Rows i and side − i (even: side − 1 − i) of the
    triangle are one row of a rectangle."""
    i, c = grouped_tile(t, (side + 1) // 2, side + 1 - side % 2, GROUP)
    first = c < side - i  # the rest of the rectangle's row is the second row
    second = side - 1 - i + side % 2
    return tl.where(first, i, second), tl.where(first, i + c, c - (side - i) + second)


@triton.jit
def _store_distances(
    acc, row, column, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s, N, M,
    METRIC: tl.constexpr, SELF: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    row_mask, column_mask = rows < N, columns < M
    x_at, y_at = s.to(tl.int64) * N + rows, s.to(tl.int64) * M + columns
    if METRIC < 2:
        a_half = tl.load(x_half + x_at, mask=row_mask, other=0.0)
        b_half = tl.load(y_half + y_at, mask=column_mask, other=0.0)
        a_factor, b_factor = tl.full((BM,), 1.0, tl.float32), tl.full((BN,), 1.0, tl.float32)
        unit = 1.0
        if FORM == "split":
            largest = tl.maximum(tl.load(x_largest + s), tl.load(y_largest + s))
            unit = largest * largest
            a_root = tl.load(x_root + x_at, mask=row_mask, other=1.0)
            b_root = tl.load(y_root + y_at, mask=column_mask, other=1.0)
            a_factor, a_half = in_units_of(largest, a_root, a_half)
            b_factor, b_half = in_units_of(largest, b_root, b_half)
        d = 2 * half_squared_distance(acc, a_factor, b_factor, a_half, b_half)
        if METRIC == 0:
            d = tl.sqrt(d) * unit  # to 1 ulp; correct rounding takes registers that the product needs
        else:
            d = d * unit * unit
        if SELF:
            d = tl.where((rows[:, None] == columns[None, :]) & (d == d), 0.0, d)
    else:
        if FORM == "split":
            a_root = tl.load(x_root + x_at, mask=row_mask, other=1.0)
            b_root = tl.load(y_root + y_at, mask=column_mask, other=1.0)
            acc = unscaled(acc, a_root, b_root)
        if METRIC == 2:
            d = 1 - acc
            d = tl.where(d < 0, 0.0, d)
        else:
            d = -acc
    # SELF: below the diagonal sums have another order, so both sides take the value from above it.
    mask = row_mask[:, None] & column_mask[None, :]
    if SELF:
        mask = mask & (rows[:, None] <= columns[None, :])
    tl.store(out + x_at[:, None] * M + columns[None, :], d, mask=mask)
    if SELF:
        mask = (rows[None, :] < columns[:, None]) & column_mask[:, None] & row_mask[None, :]
        place = out + (s.to(tl.int64) * N + column) * M + row
        tl.store(place + tl.arange(0, BN).to(tl.int64)[:, None] * M + tl.arange(0, BM)[None, :], d.T, mask=mask)


@triton.jit
def _store_in_parts(
    acc, row, column, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s, N, M,
    METRIC: tl.constexpr, SELF: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """`_store_distances` of PART columns at a time: on sm_90 a whole tile's addresses and mirror image would spill."""
    if BN > PART:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        _store_in_parts(left, row, column, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s, N, M,
                        METRIC, SELF, FORM, BM, BN // 2, PART)  # fmt: skip
        _store_in_parts(right, row, column + BN // 2, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s,
                        N, M, METRIC, SELF, FORM, BM, BN // 2, PART)  # fmt: skip
    else:
        _store_distances(acc, row, column, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s, N, M,
                         METRIC, SELF, FORM, BM, BN)  # fmt: skip


@triton.jit
def _distance_tile(
    x, y, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s, i, j, S, N, M, D, one,
    METRIC: tl.constexpr, SELF: tl.constexpr, FORM: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    acc = split_product(x, y, s * N + i * BM, s * M + j * BN, S * N - 1, S * M - 1, D, one,
                        FORM, TMA, SEPARATE, BM, BN, BK)  # fmt: skip
    _store_in_parts(acc, i * BM, j * BN, x_half, y_half, x_root, y_root, x_largest, y_largest, out, s, N, M,
                    METRIC, SELF, FORM, BM, BN, PART)  # fmt: skip


@triton.jit(do_not_specialize=["S", "N", "M"])
def _prepared_distance(
    x, y, x_half, y_half, x_root, y_root, x_largest, y_largest, out, S, N, M, D, one,
    METRIC: tl.constexpr, SELF: tl.constexpr, FORM: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Distances of prepared rows, by a grid that stays and takes tile after tile. SELF: one program a tile on or above
    the diagonal, which also writes its mirror image; in a loop its addresses would take registers from the product."""
    row_tiles, column_tiles = tl.cdiv(N, BM), tl.cdiv(M, BN)
    if SELF:
        tiles = row_tiles * (row_tiles + 1) // 2
        t = tl.program_id(0)
        i, j = triangle_tile(t % tiles, row_tiles, GROUP)
        _distance_tile(x, y, x_half, y_half, x_root, y_root, x_largest, y_largest, out, t // tiles, i, j, S, N, M, D,
                       one, METRIC, SELF, FORM, TMA, SEPARATE, BM, BN, BK, PART)  # fmt: skip
    else:
        tiles = row_tiles * column_tiles
        for t in tl.range(tl.program_id(0), S * tiles, tl.num_programs(0), flatten=True):
            i, j = grouped_tile(t % tiles, row_tiles, column_tiles, GROUP)
            _distance_tile(x, y, x_half, y_half, x_root, y_root, x_largest, y_largest, out, t // tiles, i, j, S, N, M,
                           D, one, METRIC, SELF, FORM, TMA, SEPARATE, BM, BN, BK, PART)  # fmt: skip


@triton.jit
def pair_weights(
    gradient, distance, rows, columns, mask, N, M,
    METRIC: tl.constexpr, SELF: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Weights of the differences of rows and columns, which lie row by row of N×M or, TRANSPOSED, of M×N."""
    if TRANSPOSED:
        at = columns.to(tl.int64)[None, :] * N + rows[:, None]
    else:
        at = rows.to(tl.int64)[:, None] * M + columns[None, :]
    w = tl.load(gradient + at, mask=mask, other=0.0)
    if SELF:
        w += tl.load(gradient + rows[:, None] + columns.to(tl.int64)[None, :] * M, mask=mask, other=0.0)
    if METRIC == 0:
        d = tl.load(distance + at, mask=mask, other=0.0)
        w = tl.where(d == 0, 0.0, w / tl.where(d == 0, 1.0, d))
    elif METRIC == 1:
        w = 2 * w
    return w


@triton.jit(do_not_specialize=["N", "M"])
def _gradient(
    gradient, distance, x, y, out, N, M, D, x_stride, y_stride,
    METRIC: tl.constexpr, SELF: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows of ∂x. SELF adds the transposed weights: x stands on both sides of the distance. TRANSPOSED: of ∂y, whose
    weights are those of the M×N pairs with the sides exchanged."""
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
    if PRECISION == "tf32x3 apart":
        cross = tl.zeros((BM, BD), tl.float32)
        rest = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for j0 in range(0, M, BN):
        columns = j0 + tl.arange(0, BN)
        column_mask = columns < M
        mask = row_mask[:, None] & column_mask[None, :]
        w = pair_weights(gradient, distance, rows, columns, mask, N, M, METRIC, SELF, TRANSPOSED)
        b = tl.load(
            y + columns.to(tl.int64)[:, None] * y_stride + k[None, :],
            mask=column_mask[:, None] & (k < D)[None, :],
            other=0.0,
        )
        total += tl.sum(w, 1)
        if PRECISION == "bf16":
            acc += tl.dot(w.to(tl.bfloat16), b.to(tl.bfloat16))
        elif PRECISION == "tf32x3 apart":  # as in `product`
            w, w_rest = high_and_rest(w)
            b, b_rest = high_and_rest(b)
            acc = tl.dot(w, b, acc, input_precision="tf32")
            cross = tl.dot(w, b_rest, cross, input_precision="tf32")
            rest = tl.dot(w_rest, b, rest, input_precision="tf32")
        else:
            acc += tl.dot(w, b.to(tl.float32), input_precision=PRECISION)
    if PRECISION == "tf32x3 apart":
        acc = sum_apart(acc, cross, rest)
    if METRIC < 2:
        a = tl.load(x_tile, mask=element_mask, other=0.0).to(tl.float32)
        result = total[:, None] * a - acc
    else:
        result = -acc
    out += (s * N + rows.to(tl.int64))[:, None] * D + k[None, :]
    tl.store(out, result.to(out.dtype.element_ty), mask=element_mask)


@triton.jit(do_not_specialize=["N", "M"])
def _prepared_gradient(
    gradient, distance, own, centre, other, other_root, other_largest, out, N, M, D, padded, own_stride,
    METRIC: tl.constexpr, SELF: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, SEPARATE: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`_gradient` at float32 grade: own rows as they are, the other ones split."""
    s = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(D, BD)
    rows = tl.program_id(0) // parts * BM + tl.arange(0, BM)
    k0 = tl.program_id(0) % parts * BD  # programs that read the same weights run together
    k = k0 + tl.arange(0, BD)
    row_mask = rows < N
    gradient += s * N * M
    distance += s * N * M
    largest = tl.load(other_largest + s)
    acc = tl.zeros((BM, BD), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for j0 in range(0, M, BK):
        columns = j0 + tl.arange(0, BK)
        column_mask = columns < M
        mask = row_mask[:, None] & column_mask[None, :]
        w = pair_weights(gradient, distance, rows, columns, mask, N, M, METRIC, SELF, TRANSPOSED)
        total += tl.sum(w, 1)
        root = tl.load(other_root + s * M + columns, mask=column_mask, other=1.0)
        factor, _ = in_units_of(largest, root, 0.0)
        w *= tl.where(column_mask, factor, 0.0)[None, :]
        magnitude = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        r, scale = power_of_four(magnitude)
        scale = tl.where(magnitude < 0x7F800000, scale, float("nan"))
        high, low = high_and_low(w * scale[:, None])
        if TMA:  # rows beyond the last are zeros
            b = other.load([j0, k0])
            b_low = other.load([j0, padded + k0])
        else:
            y_rows = other + (s * M + columns)[:, None] * 2 * padded + k[None, :]
            y_mask = column_mask[:, None] & (k < padded)[None, :]
            b = tl.load(y_rows, mask=y_mask, other=0.0)
            b_low = tl.load(y_rows + padded, mask=y_mask, other=0.0)
        unscale = (r * r)[:, None]
        if SEPARATE:  # as in `split_product`; a sum of dots would become one accumulator
            acc += tl.dot(high, b) * unscale
            acc += tl.dot(high, b_low) * (unscale * (1.0 / 2048))
            acc += tl.dot(low, b) * (unscale * (1.0 / 2048))
        else:
            cross = tl.dot(low, b, tl.dot(high, b_low))
            acc += (tl.dot(high, b) + cross * (1.0 / 2048)) * unscale
    acc *= largest * largest
    mask = row_mask[:, None] & (k < D)[None, :]
    if METRIC < 2:
        a = tl.load(own + (s * N + rows)[:, None] * own_stride + k[None, :], mask=mask, other=0.0)
        a -= tl.load(centre + s * D + k, mask=k < D, other=0.0)[None, :]
        acc = total[:, None] * a - acc
    else:
        acc = -acc
    tl.store(out + (s * N + rows)[:, None] * D + k[None, :], acc, mask=mask)


def pairwise_distance(x: Tensor, y: Tensor | None, prepared: Operands, metric: str, precision: str) -> Tensor:
    """Launch `_distance`, one program a tile, or `_prepared_distance`."""
    if prepared.parts is not None or pays_to_split(x, y, precision):
        return _of_prepared(x, y, prepared, metric, precision)
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    out = torch.empty(*x.shape[:-1], m, dtype=torch.float32, device=x.device)
    dots = dot_precision(x, precision)
    options = tile(rows_kernel("distance", x, y, dots), x)
    launch(
        _distance, (triton.cdiv(n, options["BM"]) * triton.cdiv(m, options["BN"]), sets),
        a, b, out, n, m, dimension, row_stride(a), row_stride(b), 1.0,
        METRIC=METRIC_NUMBER[metric], SELF=y is None, PRECISION=dots, **options,
    )  # fmt: skip
    return out


def _of_prepared(x: Tensor, y: Tensor | None, prepared: Operands, metric: str, precision: str) -> Tensor:
    n, m = x.shape[-2], x.shape[-2] if y is None else y.shape[-2]
    out = torch.empty(*x.shape[:-1], m, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    a, b = operands(x, y, prepared, metric in ("euclidean", "sqeuclidean"), precision)
    options = product_options("distance", x, precision)
    sets = a.parts.shape[0]
    row_tiles, column_tiles = triton.cdiv(n, options["BM"]), triton.cdiv(m, options["BN"])
    tiles = sets * (row_tiles * (row_tiles + 1) // 2 if y is None else row_tiles * column_tiles)
    BK, BN = options["BK"], options["BN"]
    launch(
        _prepared_distance, (tiles if y is None else min(tiles, programs(x)),),
        tiles_of(a.parts, options["BM"], BK, options), tiles_of(b.parts, BN, BK, options),
        a.half, b.half, a.root, b.root, a.largest, b.largest, out, sets, n, m,
        a.parts.shape[-1] // (2 if a.root is not None else 1), 1.0,
        METRIC=METRIC_NUMBER[metric], SELF=y is None, GROUP=GROUP, PART=BN if BN <= 64 else 32, **options,
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
    if pays_to_split(x, y, precision):
        _split_backward(gradient, distance, a, b, for_x, for_y, metric, y is None)
        return for_x, for_y
    # The weights are float32 whatever the rows are.
    dots = dot_precision(gradient, "fp32" if x.dtype in (torch.float16, torch.bfloat16) else precision)
    options = tile("gradient.rows", x)
    sides = [(a, b, for_x, False)] if needs_x else []
    if y is not None and needs_y:
        sides.append((b, a, for_y, True))
    for own, other, out, transposed in sides:
        sets, n, dimension = own.shape
        launch(
            _gradient, (triton.cdiv(n, options["BM"]), triton.cdiv(dimension, options["BD"]), sets),
            gradient, distance, own, other, out, n, other.shape[1], dimension,
            row_stride(own), row_stride(other),
            METRIC=METRIC_NUMBER[metric], SELF=y is None, TRANSPOSED=transposed, PRECISION=dots, **options,
        )  # fmt: skip
    return for_x, for_y


def _split_backward(
    gradient: Tensor, distance: Tensor, a: Tensor, b: Tensor, for_x: Tensor, for_y: Tensor, metric: str, self: bool
) -> None:
    """Launch `_prepared_gradient` for each side whose gradient has elements."""
    euclidean = metric in ("euclidean", "sqeuclidean")
    # A descriptor would read the next set's rows as the last ones of this.
    options = {"TMA": has_tma(a) and a.shape[0] == 1, "SEPARATE": separate_accumulators(a), **tile("gradient.split", a)}
    centre = None
    for own, other, out, transposed in ((a, b, for_x, False), (b, a, for_y, True)):
        if out.numel() == 0:
            continue
        parts, _, centre, root, largest = prepare_rows(other, euclidean, "fp32", centre)
        sets, n, dimension = own.shape
        launch(
            _prepared_gradient, (triton.cdiv(dimension, options["BD"]) * triton.cdiv(n, options["BM"]), sets),
            gradient, distance, own, centre, tiles_of(parts, options["BK"], options["BD"], options), root, largest, out,
            n, other.shape[1], dimension, parts.shape[-1] // 2, row_stride(own),
            METRIC=METRIC_NUMBER[metric], SELF=self, TRANSPOSED=transposed, **options,
        )  # fmt: skip
