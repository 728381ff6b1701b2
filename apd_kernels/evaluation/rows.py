"""Copies of feature rows for evaluation: sorted, scaled or of unit length, and the same bits for equal rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import WORTH_CENTRING, largest_magnitude, unit_rows
from apd_kernels._core.threads import each_block

_SAMPLED = 64  # rows that a centre is estimated from


def padded(dimension: int) -> int:
    return -(-dimension // 16) * 16


def block_rows(x: Tensor) -> int:
    """Rows of a block in the passes over the features; on the CPU its temporaries stay in the cache (1 MB)."""
    return max(1, (1 << 24 if x.is_cuda else 1 << 18) // padded(x.shape[1]))


def largest_of(name: str, x: Tensor) -> Tensor:
    """max |x| of each row; raises where a row is not finite."""
    largest = torch.cat(each_block(x, largest_magnitude, x.split(block_rows(x)))).to(internal_dtype(x))
    broken = (~largest.isfinite()).nonzero()[:, 0]
    if broken.numel():
        shown = ", ".join(map(str, broken[:5].tolist())) + (", …" if broken.numel() > 5 else "")
        raise ValueError(f"{name}: expected finite features, got NaN or infinity in {broken.numel()} rows: {shown}")
    return largest


def check_places(name: str, places: Tensor, images: int) -> None:
    """Rows of the gallery, one for each query, or −1."""
    outside = ((places < -1) | (places >= images)).nonzero()[:, 0]
    if outside.numel():
        raise ValueError(
            f"{name}: expected rows of the gallery, 0 to {images - 1}, or -1, got {int(places[outside[0]])} for query "
            f"{int(outside[0])}"
        )


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that brings `largest` to about 1; 1 for float16, whose squares fit float32 as they are."""
    if dtype == torch.float16:
        return torch.ones_like(largest)
    limit = 1022 if dtype == torch.float64 else 126  # as far as the power is a normal number
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-limit, limit))


def sorted_rows(
    x: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    centre: Tensor | None = None,
    *,
    unit: bool = False,
) -> Tensor:
    """x[rows] · scale − centre, or x[rows] at unit length, with zeros appended to a multiple of 16 dimensions.

    A reduction over a row may take another order in a block of another shape, or for a row of another alignment, and
    equal rows must stay equal: so all rows are aligned, and all blocks have one shape; unused rows follow the last.
    """
    dimension = x.shape[1]
    size = block_rows(x)
    copy = torch.empty(-(-rows.numel() // size) * size, padded(dimension), dtype=dtype, device=x.device)
    copy[:, dimension:] = 0
    copy[rows.numel() :] = 0

    def work(part: tuple[Tensor, Tensor]) -> None:
        chosen, block = part
        target = block[: chosen.numel(), :dimension]
        target.copy_(x[chosen])
        if scale is not None:
            target *= (scale[chosen, None] if scale.dim() else scale).to(dtype)
        if centre is not None:
            target -= centre[:dimension]
        if unit:
            block.copy_(unit_rows(block))

    each_block(x, work, zip(rows.split(size), copy.split(size), strict=True))
    return copy


def centred_products(rows: Tensor, scale: Tensor, backend: str) -> tuple[torch.dtype, Tensor | None]:
    """The dtype of the products of rows · scale for Euclidean distances, and what is subtracted from the rows, (D,).

    Distances do not change with a common shift, and rows about 0 lose fewer digits in x·y − ½‖y‖². The centre has the
    median of some rows in each dimension. That is a value of a row: integers stay integers. And a few rows that lie
    elsewhere, as zeros for images that could not be read, do not move it. Kernels multiply half-precision rows as they
    are, but for those far from the origin.
    """
    dtype, count = internal_dtype(rows), rows.shape[0]
    sampled = min(count, _SAMPLED)
    if not sampled:
        return dtype, None
    chosen = torch.arange(sampled, device=rows.device) * count // sampled
    some = (rows[chosen].to(dtype) * scale).cpu().numpy()
    centre = np.sort(np.ascontiguousarray(some.T), 1)[:, (sampled - 1) // 2]  # 5 times as fast as PyTorch's median
    if backend == "triton" and rows.dtype != dtype:
        squares = np.sort(np.square(some, dtype=np.float64).sum(1))
        if np.square(centre, dtype=np.float64).sum() < WORTH_CENTRING * squares[(sampled - 1) // 2]:
            return rows.dtype, None
    return dtype, torch.from_numpy(centre.copy()).to(rows.device)


def half_squares(rows: Tensor) -> Tensor:
    """½‖y‖² of each row of a `sorted_rows` copy, in float32 (float64), from blocks of one shape again."""
    blocks = rows.split(block_rows(rows))
    return 0.5 * torch.cat([block.to(internal_dtype(rows)).square().sum(-1) for block in blocks])
