"""Rows for products in float32 or float64: centred where that keeps digits, with the halves of their squared norms."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels.prepared import Operands

# Rows that the mean is estimated from. Any common vector may be subtracted; a good one is near the mean.
SAMPLED_ROWS = 256
# Centring copies all rows. Without it squares are rounded at ‖mean‖² + variance instead of at the variance: worth a
# copy where that is more than 4 times as much. (After a ReLU it is 2.7 times.)
WORTH_CENTRING = 3.0


def prepare_rows(y: Tensor, euclidean: bool, precision: str) -> Operands:
    """Rows in the internal dtype; for Euclidean distances also ½‖row‖², both less a centre where one pays."""
    rows = y.to(internal_dtype(y))
    if not euclidean:
        return Operands(rows)
    centre = common_offset(rows)
    if centre is not None:
        rows = rows - centre
    return Operands(rows, half_squares(rows), centre)


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


def common_offset(rows: Tensor) -> Tensor | None:
    """About the mean row of each set, (…, 1, D), where it is large against the spread around it."""
    count = rows.shape[-2]
    if count == 0:
        return None
    sample = rows[..., :: max(1, count // SAMPLED_ROWS), :]
    centre = sample.mean(-2, keepdim=True).nan_to_num(0, 0, 0)
    # A copy of few rows costs less than the question; and looking at values would wait for a GPU.
    if count <= SAMPLED_ROWS or rows.device.type != "cpu":
        return centre
    of_centre = torch.linalg.vecdot(centre, centre)
    spread = torch.linalg.vecdot(sample, sample) - of_centre
    return centre if bool((of_centre > WORTH_CENTRING * spread.nanmean(-1, keepdim=True)).any()) else None


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
