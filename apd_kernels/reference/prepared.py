"""Rows for products in float32 or float64: centred where that keeps digits, with the halves of their squared norms."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import SHORTEST_CENTRED, WORTH_CENTRING

# Rows that the mean is estimated from. Any common vector may be subtracted; a good one is near the mean.
SAMPLED_ROWS = 256


def prepare_rows(y: Tensor, euclidean: bool, precision: str) -> Operands:
    """Rows in the internal dtype; for Euclidean distances also ½‖row‖², both less a centre where one pays."""
    rows = y.to(internal_dtype(y))
    if not euclidean:
        return Operands(rows)
    half = half_squares(rows)
    centre = common_offset(rows, half)
    if centre is not None:
        rows = rows - centre
        half = half_squares(rows)
    return Operands(rows, half, centre)


def operands(x: Tensor, y: Tensor | None, prepared: Operands, euclidean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of x and of y (without y those of x) in the internal dtype, and ½‖y‖² for Euclidean distances.

    Both are less one common vector, which changes no difference and no Euclidean distance.
    """
    if prepared.parts is None:
        prepared = prepare_rows(x if y is None else y, euclidean, "")
    b, centre = prepared.parts, prepared.centre
    assert b is not None
    a = b if y is None else x.to(b.dtype)
    if y is not None and centre is not None:
        a = a - centre
    return a, b, prepared.half


def common_offset(rows: Tensor, half: Tensor) -> Tensor | None:
    """About the mean row of each set, (…, 1, D), where subtracting it keeps digits; else 0, or None for all sets."""
    count = rows.shape[-2]
    if count == 0:
        return None
    centre = rows[..., :: max(1, count // SAMPLED_ROWS), :].mean(-2)
    square = torch.linalg.vecdot(centre, centre)
    # The answer for most batches on a CPU, where the whole question takes as long as a small batch. NaN asks it.
    if rows.dim() == 2 and rows.device.type == "cpu" and float(square) < 2 * WORTH_CENTRING * float(half.median()):
        return None
    centre, square = centre.nan_to_num(0, 0, 0), square.nan_to_num(0, 0, 0)
    squares = (2 * half).nan_to_num(float("inf"), float("inf"))
    ordered = squares.sort(-1).values  # not median(), which PyTorch's deterministic mode refuses on CUDA
    shortest, median = ordered[..., 0], ordered[..., (count - 1) // 2]
    pays = (square >= WORTH_CENTRING * median) & (SHORTEST_CENTRED**2 * square <= shortest)
    if rows.device.type == "cpu" and not bool(pays.any()):  # asking would wait for a GPU
        return None
    return torch.where(pays[..., None], centre, 0)[..., None, :]


def half_squares(rows: Tensor) -> Tensor:
    """½‖row‖², (…, M)."""
    # Not vecdot(), which takes memory for all products, and 3 times as long on a CPU.
    return torch.linalg.vector_norm(rows, dim=-1).square_().mul_(0.5)


def column_keys(a: Tensor, b: Tensor, half: Tensor | None, scale: int = 1) -> Tensor:
    """scale · (½‖b‖² − a·b), ordering like the distance from a fixed row of a; −a·b without ½‖b‖²."""
    if half is None:
        return (a @ b.mT).neg_()
    if a.dim() == 2:
        return torch.addmm(scale * half, a, b.mT, alpha=-scale)
    return torch.baddbmm(scale * half[:, None], a, b.mT, alpha=-scale)
