"""Row arithmetic shared by operations that normalise features, and the bound on temporaries of the PyTorch path."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype

# Elements of one temporary of the PyTorch path: 16 M float32 = 64 MB. Larger blocks are no faster on 2 cores.
BLOCK_ELEMENTS = 1 << 24
# Euclidean rows are less a common vector, about their mean, where its square is this share of theirs or more: squares
# are rounded at the spread then, and not at mean² + spread. (After a ReLU the share is 0.64, of centred rows 0.)
WORTH_CENTRING = 0.75
# … and where no row is shorter than a half of it: subtracting a long vector costs a short row its digits.
SHORTEST_CENTRED = 0.5


def unit_rows(x: Tensor) -> Tensor:
    """x / ‖x‖ per row in float32 (float64 for float64), for any finite row; a zero row stays zero, with gradient zero.

    Dividing by the largest magnitude first keeps the squares in range. That scale is a constant to autograd, exactly:
    the result does not depend on it.
    """
    scaled, _, norm = scaled_rows(x.to(internal_dtype(x)))
    length = torch.where(norm == 0, float("inf"), norm)
    return scaled / length if scaled.requires_grad else scaled.div_(length)


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| of each row; NaN where there is one."""
    # The ∞-norm is one pass and one launch, but on a CPU one number at a time: 4.7 ms for 3288 × 512, this 0.3.
    return x.abs().amax(-1) if x.device.type == "cpu" else torch.linalg.vector_norm(x, ord=float("inf"), dim=-1)


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x divided by the largest magnitude of each row, that magnitude (1 for a zero row), and the norm of the quotient:
    at least 1, except for a zero row. Their product is the row's norm, whose square need not be in range."""
    largest = largest_magnitude(x.detach())[..., None]
    largest = torch.where(largest > 0, largest, 1)
    scaled = x / largest
    return scaled, largest, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def per_difference(slope: Tensor, distance: Tensor, metric: str = "euclidean") -> Tensor:
    """The weight of a row difference x − y in a gradient, from the slope by the distance: slope/d, 2·slope or slope.

    0 for a Euclidean distance of 0, and for a slope of 0 whatever the distance: a NaN that was masked out stays out.
    """
    if metric == "euclidean":
        return (slope / distance).masked_fill_((distance == 0) | (slope == 0), 0)
    return 2 * slope if metric == "sqeuclidean" else slope


def row_blocks(rows: int, columns: int, sets: int = 1) -> Iterator[slice]:
    """Slices over `rows` such that a block of `sets` × rows × `columns` elements stays within BLOCK_ELEMENTS."""
    size = max(1, BLOCK_ELEMENTS // max(1, columns * sets))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
