"""Hard pairs from blocks of a product, their distances from row differences, their sparse gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import row_blocks


def batch_hard(
    x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances and indices of each anchor's farthest positive and nearest negative."""
    positive_index, negative_index = mine(x, labels, y, y_labels, metric)
    other = x if y is None else y
    return (
        pair_distance(x, other, positive_index, metric),
        pair_distance(x, other, negative_index, metric),
        positive_index,
        negative_index,
    )


def mine(x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    """Winners by a key that orders as the distance of a fixed anchor: ½‖y‖² − x·y (Euclidean), −x·y (cosine, dot)."""
    dtype = internal_dtype(x)
    a = x.to(dtype)
    b = a if y is None else y.to(dtype)
    b_labels = labels if y_labels is None else y_labels
    rows, columns = a.shape[-2], b.shape[-2]
    positive_index = x.new_full(x.shape[:-1], -1, dtype=torch.int64)
    negative_index = positive_index.clone()
    if rows == 0 or columns == 0:
        return positive_index, negative_index
    euclidean = metric in ("euclidean", "sqeuclidean")
    if euclidean:  # a common offset of all rows would cost the digits that tell them apart
        centre = b.mean(-2, keepdim=True).nan_to_num(0, 0, 0)
        a, b = a - centre, b - centre
    half_square = 0.5 * (b * b).sum(-1)[..., None, :] if euclidean else b.new_zeros(())
    infinity, smallest = float("inf"), torch.finfo(dtype).min
    for block in row_blocks(rows, columns, max(1, x.shape[:-2].numel())):
        # Missing: −inf for the maximum, +inf for the minimum. NaN (and a key out of range) wins on either side.
        key = half_square - a[..., block, :] @ b.mT
        same = labels[block, None] == b_labels[None, :]
        other = ~same
        if y is None:
            anchors = torch.arange(block.start, block.stop, device=x.device)
            same[anchors - block.start, anchors] = False
        farthest = key.nan_to_num(infinity, infinity, smallest).masked_fill_(~same, -infinity).argmax(-1)
        nearest = key.nan_to_num(-infinity, -smallest, -infinity).masked_fill_(~other, infinity).argmin(-1)
        positive_index[..., block] = torch.where(same.any(-1), farthest, -1)
        negative_index[..., block] = torch.where(other.any(-1), nearest, -1)
    return positive_index, negative_index


def take_rows(y: Tensor, index: Tensor) -> Tensor:
    """y[s, index[s, i]] for (S, M, D) and (S, N); y[index[i]] for (M, D) and (N,). -1 takes row 0."""
    if y.shape[-2] == 0:
        return y.new_zeros((*index.shape, y.shape[-1]))
    return y.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, y.shape[-1]))


def pair_distance(x: Tensor, y: Tensor, index: Tensor, metric: str) -> Tensor:
    """d(x_i, y_index[i]) from the difference of the rows; 0 where the index is -1."""
    dtype = internal_dtype(x)
    a, b = x.to(dtype), take_rows(y, index).to(dtype)
    if metric == "dot":
        distance = -(a * b).sum(-1)
    elif metric == "cosine":  # 1 − a·b = ½‖a − b‖² for unit rows; a zero row adds the ½ that its length lacks
        zero_rows = (a == 0).all(-1).to(dtype) + (b == 0).all(-1).to(dtype)
        distance = 0.5 * ((a - b).square().sum(-1) + zero_rows)
    elif metric == "sqeuclidean":
        distance = (a - b).square().sum(-1)
    else:
        distance = torch.linalg.vector_norm(a - b, dim=-1)
    return torch.where(index >= 0, distance, 0)


def pair_gradient(
    x: Tensor,
    y: Tensor | None,
    positive_weights: Tensor,
    negative_weights: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    metric: str,
    for_x: bool,
    for_y: bool,
) -> tuple[Tensor, Tensor]:
    """∂x_i = Σ w (x_i − y_w) over anchor i's two winners; ∂y_j = Σ w (y_j − x_i) over the anchors i that chose j.

    Without y both sums go to x. For "dot" the difference is −(the other row).
    """
    dtype = internal_dtype(x)
    a = x.to(dtype)
    b = a if y is None else y.to(dtype)
    own = torch.zeros_like(a, memory_format=torch.contiguous_format)
    chosen = own if y is None else torch.zeros_like(b, memory_format=torch.contiguous_format)
    rows, dimension = b.shape[-2:]
    first = rows * torch.arange(x.shape[:-2].numel(), device=x.device).view(*x.shape[:-2], 1)  # row of each set
    for weights, index in ((positive_weights, positive_index), (negative_weights, negative_index)):
        if rows == 0:
            break
        weight = torch.where(index >= 0, weights, 0)[..., None]
        target = (index.clamp(min=0) + first).flatten()
        # A weight of 0 must drop its pair even when a row is not finite.
        to_anchor = take_rows(b, index)
        to_anchor = to_anchor.neg_() if metric == "dot" else torch.sub(a, to_anchor, out=to_anchor)
        to_anchor.mul_(weight).masked_fill_(weight == 0, 0)
        if for_x:
            own.add_(to_anchor)
        if for_x if y is None else for_y:
            to_winner = (a * weight).masked_fill_(weight == 0, 0) if metric == "dot" else to_anchor
            # In anchor order on the CPU, so the sum is the same in every run.
            chosen.view(-1, dimension).index_add_(0, target, to_winner.reshape(-1, dimension), alpha=-1)
    return (
        own.to(x.dtype) if for_x else x.new_empty(0),
        chosen.to(y.dtype) if y is not None and for_y else x.new_empty(0),
    )
