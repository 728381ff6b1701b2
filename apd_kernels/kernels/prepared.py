"""Rows made ready for products on tensor cores: centred, split or converted, with their half squares.

float32 grade from float16 (`_split.split_product`): each row is scaled by a power of 4 to a largest magnitude of
2¹² … 2¹⁴ and kept as hi = fp16(x s) and lo = fp16((x s − hi) 2¹¹). x·y from hi·hi', hi·lo' and lo·hi' is off by
at most 2⁻²¹ ‖x‖‖y‖ (each lo is rounded to 2⁻²³, lo·lo' ≤ 2⁻²² is left out) and in random data by 2⁻²⁶.

Rows for Euclidean distances are less a common vector: no difference of rows changes, and squares of smaller rows keep
more digits of it. A row that is not finite becomes NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from apd_kernels._core.operands import Operands
from apd_kernels._core.rows import SHORTEST_CENTRED, WORTH_CENTRING
from apd_kernels.kernels._launch import launch, row_stride, sets_of_rows
from apd_kernels.kernels._split import high_and_low, power_of_four
from apd_kernels.kernels._tiles import rounded_to_tf32
from apd_kernels.kernels._tuning import has_descriptors, separate_accumulators, tile

# Rows that the mean is estimated from. Any common vector may be subtracted; a good one is near the mean.
SAMPLED_ROWS = 1024
# The mean is subtracted where its square times this is more than the mean square. After a ReLU it is a third, and
# centring took a decade off the error on an H100.
# Stateless calls split float32 rows from this many multiply-adds on, which take 0.1 ms on an H100: below, the nine
# launches cost more than the product. Estimates: no GPU has run them.
LARGE_PRODUCTS = 1 << 33
# … and up to this many elements of x and y: their parts take as much memory again, 2 GB.
SPLIT_ELEMENTS = 1 << 29
# Prepared rows are padded with zeros to a multiple: whole chunks of every tile, and rows that TMA can address.
PADDED = 64


@triton.jit(do_not_specialize=["M"])
def _split_rows(rows, centre, parts, root, half, M, D, padded, stride, BD: tl.constexpr):
    """One program a row: its largest magnitude, then, from cache, its parts."""
    s = tl.program_id(1).to(tl.int64)
    at = s * M + tl.program_id(0)
    magnitude = tl.zeros((BD,), tl.int32)
    for k0 in range(0, D, BD):
        v = _centred(rows + at * stride, centre, s, k0 + tl.arange(0, BD), D)
        # As integers magnitudes have the same order, and what is not finite comes last.
        magnitude = tl.maximum(magnitude, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(magnitude, 0)
    r, scale = power_of_four(largest)
    finite = largest < 0x7F800000
    scale = tl.where(finite, scale, 1.0)
    squares = tl.zeros((BD,), tl.float32)
    for k0 in range(0, padded, BD):
        k = k0 + tl.arange(0, BD)
        v = _centred(rows + at * stride, centre, s, k, D) * scale
        v = tl.where(finite, v, float("nan"))
        squares += v * v
        high, low = high_and_low(v)
        out = parts + at * 2 * padded + k
        tl.store(out, high, mask=k < padded)
        tl.store(out + padded, low, mask=k < padded)
    tl.store(root + at, r)
    if half is not None:
        tl.store(half + at, 0.5 * tl.sum(squares, 0))


@triton.jit(do_not_specialize=["M"])
def _convert_rows(rows, centre, parts, half, M, D, padded, stride, TF32: tl.constexpr, BD: tl.constexpr):
    """One program a row: the row in the dtype of `parts`, and half its square after rounding; either may be None."""
    s = tl.program_id(1).to(tl.int64)
    at = s * M + tl.program_id(0)
    squares = tl.zeros((BD,), tl.float32)
    for k0 in range(0, padded, BD):
        k = k0 + tl.arange(0, BD)
        v = _centred(rows + at * stride, centre, s, k, D)
        if TF32:  # rounded here: a tensor core would truncate, and the square would be that of another row
            v = rounded_to_tf32(v)
        if parts is not None:
            v = v.to(parts.dtype.element_ty)
            tl.store(parts + at * padded + k, v, mask=k < padded)
        v = v.to(tl.float32)
        squares += v * v
    if half is not None:
        tl.store(half + at, 0.5 * tl.sum(squares, 0))


@triton.jit
def _centred(row, centre, s, k, D):
    v = tl.load(row + k, mask=k < D, other=0.0).to(tl.float32)
    if centre is not None:
        v -= tl.load(centre + s * D + k, mask=k < D, other=0.0)
    return v


def is_split(x: Tensor, precision: str) -> bool:
    """Whether rows like `x` are prepared as hi and lo parts."""
    return x.dtype == torch.float32 and precision == "fp32"


def prepare_rows(rows: Tensor, euclidean: bool, precision: str, centre: Tensor | None = None) -> Operands:
    """Launch `_split_rows` or `_convert_rows`: S sets of M rows ready for products, D' elements after padding.

    parts: (S, M, 2 D') float16, hi of a row and then its lo, of float32 rows for "fp32"; else (S, M, D'), the rows
    converted (half-precision rows themselves if their layout allows). half: (S, M), of split rows in units of their
    scale, and centre: (S, D), for Euclidean distances. root: (S, M) powers of two, and largest: (S,), of split rows.
    `centre` is subtracted instead of the rows' own: that of the rows that they will be compared with.
    """
    a = sets_of_rows(rows)
    sets, m, dimension = a.shape
    padded = triton.cdiv(dimension, PADDED) * PADDED
    half = torch.empty(sets, m, dtype=torch.float32, device=a.device) if euclidean else None
    if not euclidean or a.dtype != torch.float32:
        centre = None
    elif centre is None:
        centre = _mean_row(a) if m else a.new_zeros(sets, dimension)
    BD = min(1024, triton.next_power_of_2(padded))
    if is_split(a, precision):
        parts = torch.empty(sets, m, 2 * padded, dtype=torch.float16, device=a.device)
        root = torch.empty(sets, m, dtype=torch.float32, device=a.device)
        launch(
            _split_rows, (m, sets),
            a, centre, parts, root, half, m, dimension, padded, row_stride(a), BD=BD, num_warps=4,
        )  # fmt: skip
        largest = root.amax(1) if m else root.new_ones(sets)
        return Operands(parts, half, centre, root, largest)
    dtype = torch.bfloat16 if a.dtype == torch.float32 and precision == "bf16" else a.dtype
    as_is = (
        dtype == a.dtype != torch.float32  # float32 is rounded to TF32 here: a tensor core would truncate
        and padded == dimension == row_stride(a)
        and a.data_ptr() % 16 == 0
    )
    converted = None if as_is else torch.empty(sets, m, padded, dtype=dtype, device=a.device)
    if converted is not None or half is not None:
        launch(
            _convert_rows, (m, sets),
            a, centre, converted, half, m, dimension, padded, row_stride(a),
            TF32=dtype == torch.float32, BD=BD, num_warps=4,
        )  # fmt: skip
    return Operands(a if converted is None else converted, half, centre)


def operands(
    x: Tensor, y: Tensor | None, prepared: Operands, euclidean: bool, precision: str
) -> tuple[Operands, Operands]:
    """Both sides of a product, less the same centre; y's from `prepared` if there is, without y x's twice."""
    b = prepare_rows(x if y is None else y, euclidean, precision) if prepared.parts is None else prepared
    return (b if y is None else prepare_rows(x, euclidean, precision, b.centre)), b


def _mean_row(rows: Tensor) -> Tensor:
    """About the mean of each set, (S, D), where subtracting it keeps digits, as a sample of the rows says; else 0."""
    sample = rows[:, :: max(1, triton.cdiv(rows.shape[1], SAMPLED_ROWS))].float()
    squares = torch.linalg.vecdot(sample, sample).nan_to_num(float("inf"), float("inf"))
    mean = sample.mean(1).nan_to_num(0, 0, 0)
    square = torch.linalg.vecdot(mean, mean)
    ordered = squares.sort(1).values  # not median(), which PyTorch's deterministic mode refuses on CUDA
    median = ordered[:, (ordered.shape[1] - 1) // 2]
    pays = (square >= WORTH_CENTRING * median) & (SHORTEST_CENTRED**2 * square <= ordered[:, 0])
    return torch.where(pays[:, None], mean, 0)


def pays_to_split(x: Tensor, y: Tensor | None, precision: str) -> bool:
    """Whether a stateless call is worth splitting its rows."""
    if not is_split(x, precision):
        return False
    n, m = x.shape[-2], (x if y is None else y).shape[-2]
    elements = max(1, x.shape[:-2].numel()) * (n if y is None else n + m) * x.shape[-1]
    return is_large(x, y) and elements <= SPLIT_ELEMENTS


def is_large(x: Tensor, y: Tensor | None) -> bool:
    """Whether products of all rows take longer than a few launches."""
    columns = (x if y is None else y).shape[-2]
    return max(1, x.shape[:-2].numel()) * x.shape[-2] * columns * x.shape[-1] >= LARGE_PRODUCTS


def rows_kernel(kernel: str, x: Tensor, y: Tensor | None, dots: str) -> str:
    """The table's row for rows as they come: large problems want wide tiles, for which three products have no room."""
    return f"{kernel}.wide" if is_large(x, y) and not dots.startswith("tf32x3") else f"{kernel}.rows"


def product_options(kernel: str, x: Tensor, precision: str) -> dict[str, Any]:
    """Constants and options of a kernel that calls `split_product` for rows like `x`."""
    form = "split" if is_split(x, precision) else "tf32" if x.dtype == torch.float32 and precision == "tf32" else "ieee"
    return _options(kernel, x, form)


def options_of_parts(kernel: str, parts: Tensor, split: bool) -> dict[str, Any]:
    """The same from what the rows have become: float32 that is not split is rounded to TF32."""
    return _options(kernel, parts, "split" if split else "tf32" if parts.dtype == torch.float32 else "ieee")


def _options(kernel: str, x: Tensor, form: str) -> dict[str, Any]:
    options = tile(f"{kernel}.split" if form == "split" else f"{kernel}.plain", x)
    return {"FORM": form, "TMA": has_tma(x), "SEPARATE": separate_accumulators(x), **options}


def has_tma(x: Tensor) -> bool:
    """Whether tiles are loaded by descriptors."""
    return has_descriptors(x)


def tiles_of(parts: Tensor, rows: int, columns: int, options: dict[str, Any]) -> Tensor | TensorDescriptor:
    """What a kernel reads tiles of `parts` from: with TMA a descriptor of rows × columns."""
    flat = parts.view(-1, parts.shape[-1])
    return TensorDescriptor.from_tensor(flat, [rows, columns]) if options["TMA"] else flat


def programs(x: Tensor) -> int:
    """Of a persistent grid: one a multiprocessor."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 132


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
