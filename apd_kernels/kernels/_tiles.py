"""Device functions that several kernels share."""

import triton
import triton.language as tl


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
    """acc[i, j] = x_rows[i] · y_columns[j] in float32, and with SQUARES also ‖y_columns[j]‖² (else zeros).

    Tensor cores truncate while they accumulate: a bias that grows with D. So every BK-chunk is added into a separate
    float32 accumulator; `one` = 1.0 comes at run time, or the compiler folds the chunk back into the dot.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    y_rows = y + columns.to(tl.int64)[:, None] * y_stride
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        in_row = (k < D)[None, :]
        a = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & in_row, other=0.0)
        b = tl.load(y_rows + k[None, :], mask=column_mask[:, None] & in_row, other=0.0)
        if SQUARES:
            b32 = b.to(tl.float32)
            squares += tl.sum(b32 * b32, 1)
        if PRECISION == "bf16":
            acc += tl.dot(a.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16))) * one
        else:
            acc += tl.dot(a, tl.trans(b), input_precision=PRECISION) * one
    return acc, squares


@triton.jit
def nan_as(x, value):
    """x with NaN replaced: Triton's max and min skip NaN."""
    return tl.where(x != x, value, x)
