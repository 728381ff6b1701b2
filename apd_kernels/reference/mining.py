"""Hard pairs from blocks of a product, their distances from row differences, their sparse gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.rows import row_blocks
from apd_kernels.reference.pairing import pair_masks
from apd_kernels.reference.prepared import column_keys, operands

# Keys looked at in one go: 2 MB of float32 stay in the cache between the product and the passes over it.
# 256×8192×512 on 2 cores, product alone, ms by rows × columns: 256×2048 12.0, 64×8192 18.4, 256×8192 14.5.
BLOCK_KEYS = 1 << 19
BLOCK_ROWS = 256
# A maximum with its place takes 10 times as long as a maximum: first the best group, then the best column in it.
GROUP = 64


def batch_hard(
    x: Tensor, y: Tensor | None, prepared: Operands, pairing: Pairing, metric: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances and indices of each anchor's farthest positive and nearest negative."""
    winners = mine(x, y, prepared, pairing, metric)
    return *pair_distances(x, y, *winners, metric), *winners


def mine(x: Tensor, y: Tensor | None, prepared: Operands, pairing: Pairing, metric: str) -> tuple[Tensor, Tensor]:
    """Winners by a key that orders as the distance of a fixed anchor: ½‖y‖² − x·y (Euclidean), −x·y (cosine, dot)."""
    a, b, half = operands(x, y, prepared, metric in ("euclidean", "sqeuclidean"))
    rows, columns, sets = a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())
    height = max(1, min(rows, BLOCK_ROWS, BLOCK_KEYS // (GROUP * sets)))
    width = max(GROUP, BLOCK_KEYS // (height * sets) // GROUP * GROUP)
    whole = columns // GROUP * GROUP  # the columns beyond make a block of their own
    parts = [slice(first, min(first + width, whole)) for first in range(0, whole, width)]
    if whole < columns:
        parts.append(slice(whole, columns))
    blocks = []
    for start in range(0, rows, height):
        block = slice(start, min(start + height, rows))
        anchors = a[..., block, :]
        farthest = nearest = None
        for part in parts:
            keys = column_keys(anchors, b[..., part, :], None if half is None else half[..., part])
            # ∓inf stands for a missing pair; a key out of range is not missing. NaN wins on either side.
            limit = torch.finfo(keys.dtype).max
            keys.clamp_(-limit, limit)
            positive, negative = pair_masks(pairing, block, part)
            farthest = _better(farthest, _extreme(torch.where(positive, keys, -torch.inf), True), part.start, True)
            nearest = _better(nearest, _extreme(torch.where(negative, keys, torch.inf), False), part.start, False)
        if farthest is not None and nearest is not None:
            missing = (farthest[0] == -torch.inf, nearest[0] == torch.inf)
            blocks.append((farthest[1].masked_fill_(missing[0], -1), nearest[1].masked_fill_(missing[1], -1)))
    if not blocks:
        nothing = x.new_full(x.shape[:-1], -1, dtype=torch.int64)
        return nothing, nothing.clone()
    found = blocks[0] if len(blocks) == 1 else tuple(torch.cat(parts, -1) for parts in zip(*blocks, strict=True))
    if x.device.type == "cpu" and columns > 1:
        _take_first_of_equal_rows(b, pairing, found)
    return found[0], found[1]


def _take_first_of_equal_rows(rows: Tensor, pairing: Pairing, winners: tuple[Tensor, ...]) -> None:
    """Replace each winner by the first of the equal rows, (…, M, D), that its anchor may choose. −0 equals 0.

    On a CPU the product does not decide between equal rows: a BLAS library may add the terms of a column in an order
    that depends on its place. MKL does with AVX2 (equal rows, 100 × 1000: another than the first wins for half of the
    anchors), and in float64 also with AVX-512.
    """
    found = marks_of_equal_rows(rows)
    if found is None:
        return
    marks, repeated = found
    for side, index in enumerate(winners):
        for number, chosen in enumerate(index.view(-1, index.shape[-1])):
            every, mark = (rows, marks) if rows.dim() == 2 else (rows[number], marks[number])
            doubtful = (chosen >= 0) & torch.isin(mark[chosen.clamp(min=0)], repeated)
            size = max(1, BLOCK_KEYS // len(mark))
            for start in range(0, len(chosen), size):
                part = slice(start, min(start + size, len(chosen)))
                anchors = doubtful[part].nonzero()[:, 0]
                if len(anchors):
                    allowed = pair_masks(pairing, part, slice(0, len(mark)))[side][anchors]
                    chosen[part.start + anchors] = _first(every, mark, allowed, chosen[part.start + anchors])


def marks_of_equal_rows(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """A number for each row, (…, M), equal where rows are, and those numbers that several rows have; None without such.

    Of 16 elements a row first. Only the rows that those do not tell apart are read whole: sparse features have many.
    """
    step = max(1, rows.shape[-1] // 16)
    marks = _marks(rows[..., ::step][..., :16])
    alike = torch.isin(marks, _repeated(marks))
    if not bool(alike.any()):
        return None
    if rows.shape[-1] > 16:
        # A number of its own for every other row. One may meet a mark, as a row of zeros has 0: `_first` compares rows.
        marks = torch.where(alike, marks, torch.arange(marks.numel(), device=rows.device).view(marks.shape))
        places = alike.flatten().nonzero()[:, 0]
        whole = rows.reshape(-1, rows.shape[-1])
        for block in row_blocks(len(places), rows.shape[-1], 4):
            marks.view(-1)[places[block]] = _marks(whole[places[block]])
        if not len(_repeated(marks)):
            return None
    return marks, _repeated(marks)


def _repeated(marks: Tensor) -> Tensor:
    """Those that occur several times in a set."""
    ordered = marks.sort(-1).values
    return ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]


def _marks(rows: Tensor) -> Tensor:
    rows = rows + 0.0  # −0 is 0
    bits = rows.view(torch.int64 if rows.element_size() == 8 else torch.int32).to(torch.int64)
    factors = torch.arange(1, 2 * bits.shape[-1], 2, device=rows.device) * 0x9E3779B97F4A7C1
    return (bits * factors).sum(-1)  # of integers: exact in any order


def _first(rows: Tensor, marks: Tensor, allowed: Tensor, chosen: Tensor) -> Tensor:
    """The first allowed row, (n, M), of the bits of each chosen one, (n,), which is allowed itself."""
    candidates = (marks == marks[chosen, None]) & allowed
    found = chosen.clone()
    left = torch.arange(len(chosen), device=chosen.device)
    while len(left):
        first = candidates[left].to(torch.uint8).argmax(1)
        equal = _same_bits(rows[first], rows[chosen[left]])
        found[left[equal]] = first[equal]
        candidates[left[~equal], first[~equal]] = False
        left = left[~equal]
    return found


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    bits = torch.int64 if a.element_size() == 8 else torch.int32
    return ((a + 0.0).view(bits) == (b + 0.0).view(bits)).all(-1)


def _better(
    best: tuple[Tensor, Tensor] | None, candidate: tuple[Tensor, Tensor], first: int, largest: bool
) -> tuple[Tensor, Tensor]:
    """The better of two (value, index); the candidate's place counts from `first`."""
    value, index = candidate
    if best is None:
        return value, index
    index.add_(first)
    # Strictly: among equals the lowest index stays. The first NaN stays, too.
    better = (value > best[0]) if largest else (value < best[0])
    better |= value.isnan() & ~best[0].isnan()
    return torch.where(better, value, best[0]), torch.where(better, index, best[1])


def _extreme(values: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The largest or smallest value of each row and its lowest place."""
    width = values.shape[-1]
    if width % GROUP or width == GROUP:
        return values.max(-1) if largest else values.min(-1)
    groups = values.unflatten(-1, (-1, GROUP))
    value, group = groups.amax(-1).max(-1) if largest else groups.amin(-1).min(-1)
    inside = groups.gather(-2, group[..., None, None].expand(*group.shape, 1, GROUP)).squeeze(-2)
    place = inside.argmax(-1) if largest else inside.argmin(-1)
    return value, place.add_(group, alpha=GROUP)


def take_rows(y: Tensor, index: Tensor) -> Tensor:
    """y[index] for (M, D), y[s, index[…, s, i]] for (S, M, D) and (…, S, N). -1 takes row 0."""
    if 0 in y.shape[:-1]:
        return y.new_zeros((*index.shape, y.shape[-1]))
    if y.dim() == 3:
        return torch.stack([take_rows(rows, index[..., s, :]) for s, rows in enumerate(y)], -3)
    # Not gather(), which copies elements where this copies rows.
    return y.index_select(0, index.clamp(min=0).flatten()).view(*index.shape, y.shape[-1])


def pair_distances(
    x: Tensor, y: Tensor | None, positive_index: Tensor, negative_index: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """d(x_i, y_index[i]) from the differences of the rows; 0 where the index is -1."""
    distances = stacked_distances(x, y, torch.stack([positive_index, negative_index]), metric)
    return distances[0].clone(), distances[1].clone()  # an operator's results do not share memory


def stacked_distances(x: Tensor, y: Tensor | None, indices: Tensor, metric: str) -> Tensor:
    """(2, …, N), of the positives and of the negatives."""
    dtype = internal_dtype(x)
    a, b = x.to(dtype), (x if y is None else y).to(dtype)
    distances = [
        row_distance(a[..., block, :], take_rows(b, indices[..., block]), metric)
        for block in row_blocks(x.shape[-2], x.shape[-1], 2 * max(1, x.shape[:-2].numel()))
    ]
    if not distances:
        return a.new_zeros(indices.shape)
    return (distances[0] if len(distances) == 1 else torch.cat(distances, -1)).masked_fill_(indices < 0, 0)


def row_distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Distances row by row from the difference of the rows, (…, N)."""
    if metric == "dot":
        return -torch.linalg.vecdot(a, b)
    if metric == "euclidean":
        return torch.linalg.vector_norm(a - b, dim=-1)
    squared = (a - b).square().sum(-1)
    if metric == "sqeuclidean":
        return squared
    # 1 − a·b = ½‖a − b‖² for unit rows; a zero row adds the ½ that its length lacks
    zero_rows = (a == 0).all(-1).to(a.dtype) + (b == 0).all(-1).to(a.dtype)
    return 0.5 * (squared + zero_rows)


def pair_gradient(
    x: Tensor,
    y: Tensor | None,
    positive_weights: Tensor,
    negative_weights: Tensor,
    positive_index: Tensor,
    negative_index: Tensor,
    scale: Tensor | None,
    metric: str,
    for_x: bool,
    for_y: bool,
) -> tuple[Tensor, Tensor]:
    """∂x_i = Σ w (x_i − y_w) over anchor i's two winners; ∂y_j = Σ w (y_j − x_i) over the anchors i that chose j.

    Without y both sums go to x. For "dot" the difference is −(the other row). `scale` multiplies a set's weights.
    """
    dtype = internal_dtype(x)
    a = x.to(dtype)
    b = a if y is None else y.to(dtype)
    rows, dimension = b.shape[-2:]
    indices = torch.stack([positive_index, negative_index])
    weights = torch.stack([positive_weights, negative_weights])
    if scale is not None:
        weights *= scale[..., None]
    weights = weights.masked_fill_(indices < 0, 0)[..., None]
    dropped = weights == 0  # a weight of 0 drops its pair even when a row is not finite
    any_dropped = weights.device.type != "cpu" or bool(dropped.any())
    for_chosen = for_x if y is None else for_y
    blocks = list(row_blocks(x.shape[-2], dimension, 2 * max(1, x.shape[:-2].numel())))
    # Without y both sums go to one tensor: it starts with the anchors', or from 0 where they come in several blocks.
    both = for_x and y is None and len(blocks) > 1
    new = torch.zeros_like if both else torch.empty_like
    own = new(a, memory_format=torch.contiguous_format) if for_x else x.new_empty(0)
    if y is None:
        chosen = own
    else:
        chosen = torch.zeros_like(b, memory_format=torch.contiguous_format) if for_y else x.new_empty(0)
    targets = indices.clamp(min=0)
    if x.dim() == 3:  # rows of all sets, one after the other
        targets += rows * torch.arange(len(x), device=x.device)[:, None]
    for block in blocks:
        weight, anchors = weights[..., block, :], a[..., block, :]
        if for_x or metric != "dot":
            to_anchor = take_rows(b, indices[..., block])
            to_anchor = to_anchor.neg_() if metric == "dot" else torch.sub(anchors, to_anchor, out=to_anchor)
            to_anchor.mul_(weight)
            if any_dropped:
                to_anchor.masked_fill_(dropped[..., block, :], 0)
            if both:
                own[..., block, :].add_(to_anchor[0]).add_(to_anchor[1])
            elif for_x:
                torch.add(to_anchor[0], to_anchor[1], out=own[..., block, :])
        if for_chosen and rows:
            to_winner = (anchors * weight).masked_fill_(dropped[..., block, :], 0) if metric == "dot" else to_anchor
            # In anchor order on the CPU, so the sum is the same in every run.
            target, change = targets[..., block].flatten(), to_winner.flatten(0, -2)
            chosen.view(-1, dimension).index_add_(0, target, change, alpha=-1)
    return own.to(x.dtype), chosen.to(y.dtype) if y is not None and for_y else x.new_empty(0)
