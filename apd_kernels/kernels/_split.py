"""Products of prepared rows (see prepared.py) on the device, and what they mean.

    x·y ≈ (hi·hi' + 2⁻¹¹ (hi·lo' + lo·hi')) / (s s')      three float16 products, float32 grade

Rows of x and y carry their scales s = root⁻², powers of 4. Euclidean distances need one unit for all rows: that of
the largest row, `largest` = max root. In it a row's factor is f = (root / largest)² ≤ 1, exactly, and

    ½ (d / largest²)² = h_i + h_j − f_i f_j acc_ij,     h = f² · ½‖x s‖²
"""

import triton
import triton.language as tl


@triton.jit
def power_of_four(magnitude):
    """root = 2⁻ᵏ and s = 4ᵏ, which brings the float with these bits to 2¹² … 2¹⁴, or below where s would overflow.

    Both and 1/s are normal floats. Zero and what is not finite get the least root: they never are the largest row.
    """
    exponent = magnitude >> 23  # 127 for 1.0; 255: not finite
    k = tl.where(exponent == 255, 63, tl.minimum((140 - exponent) >> 1, 63))
    return ((127 - k) << 23).to(tl.float32, bitcast=True), ((127 + 2 * k) << 23).to(tl.float32, bitcast=True)


@triton.jit
def high_and_low(v):
    """float16 hi and lo with v ≈ hi + 2⁻¹¹ lo to 2⁻²³, for |v| < 2¹⁴."""
    high = v.to(tl.float16)
    return high, ((v - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def operand_tile(operand, row, last, k, stride, ROWS: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """operand[row : row + ROWS, k : k + BK]. Rows beyond their set hold anything: whoever asks leaves them out."""
    if TMA:
        tile = operand.load([row, k])
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), last).to(tl.int64)
        tile = tl.load(operand + rows[:, None] * stride + (k + tl.arange(0, BK))[None, :])
    return tile


@triton.jit
def split_product(
    x,
    y,
    row,
    column,
    x_last,
    y_last,
    D,
    one,
    FORM: tl.constexpr,
    TMA: tl.constexpr,
    SEPARATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc[i, j] = x[row + i] · y[column + j] in float32, in the units of the operands' scales.

    x, y: descriptors (TMA) or pointers of prepared rows, D padded elements each: for FORM "split" hi and, D further,
    lo; else the rows themselves, FORM being their `input_precision`. Row, column and the last rows count over all sets.

    Tensor cores truncate while they accumulate: a bias that grows with D. So every BK-chunk of the large product is
    added into a separate float32 accumulator; `one` = 1.0 comes at run time, or the compiler folds the chunk back into
    the dot. The small ones are 2⁻¹¹ of it and their bias with them. SEPARATE: each dot has an accumulator of its own,
    because on tcgen05 (sm_100) two dots of one iteration into the same one are wrong (triton#10821).
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if FORM == "split":
        cross = tl.zeros((BM, BN), tl.float32)
        if SEPARATE:
            other = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            a = operand_tile(x, row, x_last, k, 2 * D, BM, BK, TMA)
            b = operand_tile(y, column, y_last, k, 2 * D, BN, BK, TMA)
            a_low = operand_tile(x, row, x_last, D + k, 2 * D, BM, BK, TMA)
            b_low = operand_tile(y, column, y_last, D + k, 2 * D, BN, BK, TMA)
            acc += tl.dot(a, b.T) * one
            cross = tl.dot(a, b_low.T, cross)
            if SEPARATE:
                other = tl.dot(a_low, b.T, other)
            else:
                cross = tl.dot(a_low, b.T, cross)
        if SEPARATE:
            cross += other
        acc += cross * (1.0 / 2048)
    else:
        for k in range(0, D, BK):
            a = operand_tile(x, row, x_last, k, D, BM, BK, TMA)
            b = operand_tile(y, column, y_last, k, D, BN, BK, TMA)
            acc += tl.dot(a, b.T, input_precision=FORM) * one
    return acc


@triton.jit
def in_units_of(largest, root, half):
    """f and h of rows: their factor and ½‖row‖² in the unit of the largest row. Far smaller rows count as 0."""
    # Division of powers of two, 2⁻¹²⁰ … 1, by their exponents: an exact one costs the registers of a whole tile.
    ratio = root.to(tl.int32, bitcast=True) - largest.to(tl.int32, bitcast=True) + (127 << 23)
    factor = ratio.to(tl.float32, bitcast=True)
    factor *= factor
    return factor, half * factor * factor


@triton.jit
def column_key(acc, x_factor, y_factor, y_half):
    """½‖y‖² − x·y, which orders the columns of a row like their Euclidean distances.

    For "dot" and "cosine": with x_factor 1 and y_half 0 it orders them like −x·y.
    """
    return y_half[None, :] - x_factor[:, None] * (y_factor[None, :] * acc)


@triton.jit
def half_squared_distance(acc, x_factor, y_factor, x_half, y_half):
    """½d² in the unit of the largest row, at least 0; NaN stays NaN."""
    e = x_half[:, None] + (y_half[None, :] - x_factor[:, None] * (y_factor[None, :] * acc))
    return tl.where(e < 0, 0.0, e)


@triton.jit
def unscaled(acc, x_root, y_root):
    """x·y itself: over- and underflows only where the product does."""
    root = x_root[:, None] * y_root[None, :]  # 2⁻¹²⁶ … 2¹¹⁴
    return acc * root * root
