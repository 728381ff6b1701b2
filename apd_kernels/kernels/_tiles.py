"""Device functions that several kernels share."""

import triton
import triton.language as tl

# Programs in flight that fill the largest GPUs twice (132 multiprocessors on an H100); also the most splits of one row.
MAX_SPLITS = 256


@triton.jit
def rounded_to_tf32(v):
    """v with 11 bits of its 24, to nearest. A NaN stays one."""
    rounded = ((v.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(v == v, rounded, v)


@triton.jit
def high_and_rest(v):
    """float32 as the sum of two that TF32 holds: all of v but 2⁻²²."""
    high = rounded_to_tf32(v.to(tl.float32))
    return high, v - high


@triton.jit
def sum_apart(acc, cross, other):
    """Three sums of products (high·high, high·rest, rest·high) as one. Next to an infinity the small ones are NaN."""
    cross += other
    return acc + tl.where(cross == cross, cross, 0.0)


@triton.jit
def product(
    x,
    y,
    rows,
    columns,
    row_mask,
    column_mask,
    D,
    x_stride,
    y_stride,
    one,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """acc[i, j] = x_rows[i] · y_columns[j] in float32, and with SQUARES also ‖x_rows[i]‖² and ‖y_columns[j]‖² (else 0).

    y is taken in x's dtype: a half-precision memory may meet float32 points.

    Tensor cores truncate while they accumulate: a bias that grows with D. So every BK-chunk is added into a separate
    float32 accumulator; `one` = 1.0 comes at run time, or the compiler folds the chunk back into the dot.

    PRECISION "tf32x3 apart": three TF32 products of `high_and_rest`, each with an accumulator of its own, for tcgen05,
    where two dots of one iteration into the same one are wrong (triton#10821).
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if PRECISION == "tf32x3 apart":
        cross = tl.zeros((BM, BN), tl.float32)
        other = tl.zeros((BM, BN), tl.float32)
    xx = tl.zeros((BM,), tl.float32)
    yy = tl.zeros((BN,), tl.float32)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    y_rows = y + columns.to(tl.int64)[:, None] * y_stride
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        in_row = (k < D)[None, :]
        a = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & in_row, other=0.0)
        b = tl.load(y_rows + k[None, :], mask=column_mask[:, None] & in_row, other=0.0).to(a.dtype)
        if SQUARES:
            a32, b32 = a.to(tl.float32), b.to(tl.float32)
            xx += tl.sum(a32 * a32, 1)
            yy += tl.sum(b32 * b32, 1)
        if PRECISION == "bf16":
            acc += tl.dot(a.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16))) * one
        elif PRECISION == "tf32x3 apart":
            a, a_rest = high_and_rest(a)
            b, b_rest = high_and_rest(b)
            acc += tl.dot(a, tl.trans(b), input_precision="tf32") * one
            cross = tl.dot(a, tl.trans(b_rest), cross, input_precision="tf32")
            other = tl.dot(a_rest, tl.trans(b), other, input_precision="tf32")
        else:
            acc += tl.dot(a, tl.trans(b), input_precision=PRECISION) * one
    if PRECISION == "tf32x3 apart":
        acc = sum_apart(acc, cross, other)
    return acc, xx, yy


@triton.jit
def nan_as(x, value):
    """x with NaN replaced: Triton's max and min skip NaN."""
    return tl.where(x != x, value, x)


@triton.jit
def row_distance(x_row, y_row, D, METRIC: tl.constexpr, BD: tl.constexpr):
    """d(x_row, y_row) in float32 from the difference of the rows; METRIC as in `METRICS`."""
    total = tl.zeros((BD,), tl.float32)
    xx = tl.zeros((BD,), tl.float32)
    yy = tl.zeros((BD,), tl.float32)
    for k0 in range(0, D, BD):
        k = k0 + tl.arange(0, BD)
        a = tl.load(x_row + k, mask=k < D, other=0.0).to(tl.float32)
        b = tl.load(y_row + k, mask=k < D, other=0.0).to(tl.float32)
        if METRIC == 3:
            total -= a * b
        else:
            total += (a - b) * (a - b)
        if METRIC == 2:
            xx += a * a
            yy += b * b
    d = tl.sum(total, 0)
    if METRIC == 0:
        d = tl.sqrt_rn(d)
    elif METRIC == 2:  # 1 − a·b = ½‖a − b‖² for unit rows; a zero row adds the ½ that its length lacks
        zero_rows = (tl.sum(xx, 0) == 0).to(tl.float32) + (tl.sum(yy, 0) == 0).to(tl.float32)
        d = 0.5 * (d + zero_rows)
    return d


@triton.jit
def per_difference(slope, d, METRIC: tl.constexpr):
    """Weight of a row difference: slope/d (euclidean, 0 at d = 0), 2·slope (sqeuclidean), slope."""
    if METRIC == 0:
        weight = tl.where((d == 0) | (slope == 0), 0.0, slope / tl.where(d == 0, 1.0, d))
    elif METRIC == 1:
        weight = 2 * slope
    else:
        weight = slope
    return weight


@triton.jit
def add_chosen(
    acc,
    row_values,
    row,
    positive_index,
    negative_index,
    positive_weights,
    negative_weights,
    anchors,
    anchor_stride,
    N,
    D,
    k,
    DOT: tl.constexpr,
    SCAN: tl.constexpr,
    BJ: tl.constexpr,
):
    """acc + Σ_j w_j (row_values − anchor_j) over the anchors j that chose `row`, in index order; for DOT −w_j anchor_j.

    A scan instead of a scatter: no atomics, the same sum in every run. Most chunks of SCAN anchors hold nobody who
    chose this row and cost one load; the others are looked at BJ anchors at a time.
    """
    for j0 in range(0, N, SCAN):
        j = j0 + tl.arange(0, SCAN)
        chose = (tl.load(positive_index + j, mask=j < N, other=-1) == row) | (
            tl.load(negative_index + j, mask=j < N, other=-1) == row
        )
        if tl.max(chose.to(tl.int32), 0) > 0:
            for j1 in range(j0, j0 + SCAN, BJ):
                i = j1 + tl.arange(0, BJ)
                as_positive = tl.load(positive_index + i, mask=i < N, other=-1) == row
                as_negative = tl.load(negative_index + i, mask=i < N, other=-1) == row
                w = tl.load(positive_weights + i, mask=as_positive, other=0.0)
                w += tl.load(negative_weights + i, mask=as_negative, other=0.0)
                mine = w != 0
                if tl.max(mine.to(tl.int32), 0) > 0:
                    b = tl.load(
                        anchors + i.to(tl.int64)[:, None] * anchor_stride + k[None, :],
                        mask=mine[:, None] & (k < D)[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    if DOT:
                        change = -w[:, None] * b
                    else:
                        change = w[:, None] * (row_values[None, :] - b)
                    acc += tl.sum(tl.where(mine[:, None], change, 0.0), 0)
    return acc
