"""k-reciprocal encoding on sparse rows, from neighbour lists of one blocked pass over all distances.

N items have squared distances s_ij. R(i, k) are the items j among the k nearest of i that have i among their k nearest.
R*(i) adds R(j, k/2 + 1) for every j in R(i) that shares more than two thirds of it with R(i). Row i of V holds weights
on R*(i) that sum to 1, then the mean of the rows of the k2 nearest of i. With t_ij = Σ_c min(V_ic, V_jc) the Jaccard
distance is 1 − t/(v_i + v_j − t), where v_i is the sum of row i: 1 up to rounding. V has some hundred entries a row;
nothing of size N×N exists at once.

Every sum is taken in one order (neighbours by rank, columns ascending), on every device. So t_ij is at most v_i and v_j
to the last bit: no distance is below 0, and equal rows of V are at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apd_kernels._core.operators import internal_dtype
from apd_kernels._core.rows import BLOCK_ELEMENTS
from apd_kernels._core.threads import Result, each_block

# On the CPU products are taken in tiles of one shape, so that equal columns give equal bits: see reference/ranking.py.
TILE_ROWS, TILE_COLUMNS = 256, 384
# Elements of the blocks of all threads: with their temporaries about 1 GB of float32.
IN_FLIGHT = 1 << 27
# Of float32: |s − the exact one| ≤ PRODUCT_ERROR · (‖x_i‖ + ‖x_j‖)², as measured for products in docs/numerics.md.
PRODUCT_ERROR = 4 * 2.0**-24
SHARE = 3, 2  # a set is added to R(i) when 3 · overlap > 2 · its size


def rows_at_once(columns: int) -> int:
    """Whole tiles of rows within BLOCK_ELEMENTS, where `columns` leave room for one."""
    return max(TILE_ROWS, BLOCK_ELEMENTS // max(1, columns) // TILE_ROWS * TILE_ROWS)


def blocks(count: int, columns: int) -> Iterator[slice]:
    """Slices of `rows_at_once` over `count` rows."""
    size = rows_at_once(columns)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def each_rows(x: Tensor, work: Callable[[slice], Result], count: int, columns: int) -> list[Result]:
    """`work` of every one of the `blocks`, of which threads on the CPU have IN_FLIGHT elements at once."""
    at_once = max(1, IN_FLIGHT // (rows_at_once(columns) * max(1, columns)))
    return each_block(x, work, blocks(count, columns), at_once)


class Distances(Protocol):
    """Squared distances s_ij among N items."""

    count: int
    like: Tensor  # of their dtype and device

    def block(self, rows: Tensor) -> Tensor:
        """s of the items `rows` to all items, (R, N)."""

    def pairs(self, rows: Tensor, place: Tensor, columns: Tensor) -> Tensor:
        """s of rows[place[p]] to columns[p] for every p."""

    def in_order(self, items: Tensor, block: Tensor, values: Tensor, found: Tensor, borders: tuple[int, ...]) -> None:
        """Correct the lists of `nearest` where rounding decided who is in the first so many."""


class RowDistances:
    """‖x_i − x_j‖²: from products in blocks, by difference for single pairs."""

    def __init__(self, rows: Tensor, count: int, sources: tuple[Tensor, ...] = (), unit: bool = False) -> None:
        """`rows` are filled up with zero rows to whole tiles in both directions. They were made from `sources`, which
        `in_order` reads again: scaled and centred, or brought to unit length."""
        self.count, self.like, self._rows = count, rows, rows
        self._sources, self._unit = sources, unit
        if (rows[:count] == rows[:1]).all():
            rows.zero_()  # identical rows are at distance 0, whatever products of them round to
        # ‖x‖² from the same tiles as x·y: then ‖x‖² + ‖y‖² − 2x·y of equal rows is exactly 0.
        self._squares = torch.cat([(tile @ tile.T).diagonal() for tile in rows.split(TILE_COLUMNS)])

    def block(self, rows: Tensor) -> Tensor:
        x = self._rows.new_zeros(-(-len(rows) // TILE_ROWS) * TILE_ROWS, self._rows.shape[1])
        x[: len(rows)] = self._rows[rows]
        product = torch.empty(len(x), len(self._rows), dtype=x.dtype, device=x.device)
        tile_rows, tile_columns = (TILE_ROWS, TILE_COLUMNS) if x.device.type == "cpu" else product.shape
        for part, of_part in zip(x.split(tile_rows), product.split(tile_rows), strict=True):
            tiles = zip(self._rows.split(tile_columns), of_part.split(tile_columns, 1), strict=True)
            for y, tile in tiles:
                torch.mm(part, y.T, out=tile)
        squared = product[: len(rows), : self.count]
        return squared.mul_(-2).add_(self._squares[rows, None]).add_(self._squares[: self.count]).clamp_(min=0)

    def pairs(self, rows: Tensor, place: Tensor, columns: Tensor) -> Tensor:
        # On the CPU the temporaries stay in the cache (1 MB each).
        size = max(1, (BLOCK_ELEMENTS if self._rows.is_cuda else 1 << 18) // self._rows.shape[1])
        found = [
            (self._rows[first] - self._rows[second]).square_().sum(-1)
            for first, second in zip(rows[place].split(size), columns.split(size), strict=True)
        ]
        return torch.cat(found)

    def in_order(self, items: Tensor, block: Tensor, values: Tensor, found: Tensor, borders: tuple[int, ...]) -> None:
        """Write the lists `found` anew where the rounding of the products may have decided who is in them: where two
        neighbours at one of the `borders` of a list, with their `values`, are not apart by more than the error. Those
        that may belong there are compared by the differences of their rows in float64, in which gaps of 1e-8 show."""
        if not self._sources or values.dtype == torch.float64:
            return
        norms = self._squares[: self.count].sqrt()
        doubtful = torch.zeros(len(items), dtype=torch.bool, device=items.device)
        for border in (border for border in borders if border < values.shape[1]):
            pair = found[:, border - 1 : border + 1]
            error = PRODUCT_ERROR * (norms[items, None] + norms[pair]).square().sum(1)
            doubtful |= values[:, border] - values[:, border - 1] <= error
        k = max((border for border in borders if border <= values.shape[1]), default=0)
        for row in doubtful.nonzero()[:, 0].tolist():
            item = int(items[row])
            error = PRODUCT_ERROR * (norms[item] + norms).square()
            near = (block[row] - error <= values[row, k - 1] + error[found[row, k - 1]]).nonzero()[:, 0]
            exact = torch.cat([self._exact(item, part) for part in near.split(BLOCK_ELEMENTS // 2 // norms.shape[0])])
            found[row, :k] = near[exact.argsort(stable=True)[:k]]

    def _exact(self, item: int, columns: Tensor) -> Tensor:
        """‖x_item − x_j‖² in float64, up to a common factor, from the features as they were given."""
        one, others = self._source(columns.new_tensor([item])), self._source(columns)
        if not self._unit:
            return (others - one).square_().sum(1)
        lengths = one.norm(dim=1, keepdim=True), others.norm(dim=1, keepdim=True)
        one, others = (rows / torch.where(n > 0, n, 1) for rows, n in zip((one, others), lengths, strict=True))
        # A zero row is at right angles to all others, as if it were of unit length in a dimension of its own.
        apart = ((lengths[0] == 0) != (lengths[1] == 0))[:, 0]
        return (others - one).square_().sum(1) + apart

    def _source(self, items: Tensor) -> Tensor:
        result = self.like.new_empty(len(items), self._sources[0].shape[1], dtype=torch.float64)
        start = 0
        for rows in self._sources:
            inside = (items >= start) & (items < start + len(rows))
            result[inside] = rows[items[inside] - start].double()
            start += len(rows)
        return result


class MatrixDistances:
    """The columns of [[q_q, q_g], [q_gᵀ, g_g]], or their squares."""

    def __init__(self, query_gallery: Tensor, query_query: Tensor, gallery_gallery: Tensor, squares: bool) -> None:
        self.count = len(query_query) + len(gallery_gallery)
        self.like = query_gallery.new_empty(0, dtype=internal_dtype(query_gallery))
        self._parts, self._squares = (query_gallery, query_query, gallery_gallery), squares

    def block(self, rows: Tensor) -> Tensor:
        query_gallery, query_query, gallery_gallery = self._parts
        queries = len(query_query)
        of_query = rows < queries
        query, image = rows[of_query], rows[~of_query] - queries
        block = self.like.new_empty(len(rows), self.count)
        block[of_query] = torch.cat([query_query[:, query].T, query_gallery[query]], 1).to(block.dtype)
        block[~of_query] = torch.cat([query_gallery[:, image].T, gallery_gallery[:, image].T], 1).to(block.dtype)
        return block.square_() if self._squares else block

    def pairs(self, rows: Tensor, place: Tensor, columns: Tensor) -> Tensor:
        return self.block(rows)[place, columns]

    def in_order(self, items: Tensor, block: Tensor, values: Tensor, found: Tensor, borders: tuple[int, ...]) -> None:
        """The distances are what they are."""


def nearest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of every row, ascending, and where they are; equal ones by lowest index. k ≤ columns."""
    count = distances.shape[1]
    values, indices = distances.topk(min(k + 1, count), largest=False)
    if k < count:
        # Which of several values at the end of the list topk takes is not defined: rows where it had a choice again.
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        values, indices = values[:, :k], indices[:, :k]
        if tied.numel():
            row, last = distances[tied], values[tied, k - 1 :]
            nearer, equal = row < last, row == last
            chosen = nearer | (equal & (equal.cumsum(1) <= k - nearer.sum(1, keepdim=True)))
            indices[tied] = chosen.nonzero()[:, 1].view(-1, k)
            values[tied] = row[chosen].view(-1, k)
    indices, order = indices.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, stable=True)
    return values, indices.gather(1, order)


def neighbours(distances: Distances, k: int, borders: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """The k nearest items of every item, (N, k), ties by lowest index, and its largest squared distance, (N,). Who is
    among the first so many, for each of the borders, no rounding decides."""
    count = distances.count
    like = distances.like
    indices = torch.empty(count, k, dtype=torch.int64, device=like.device)
    largest = torch.empty(count, dtype=like.dtype, device=like.device)
    items = torch.arange(count, device=like.device)

    def work(rows: slice) -> None:
        block = distances.block(items[rows])
        values, found = nearest(block, min(k + 1, count))
        distances.in_order(items[rows], block, values, found, borders)
        indices[rows] = found[:, :k]
        largest[rows] = block.amax(1)

    each_rows(like, work, count, count)
    return indices, largest


class Sparse(NamedTuple):
    """The rows of a matrix: row i holds `values` at `columns`, ascending, at starts[i] … starts[i + 1]."""

    starts: Tensor
    columns: Tensor
    values: Tensor


def encoded(
    distances: Distances,
    indices: Tensor,
    divisor: Tensor,
    *,
    k: int,
    half: int,
    k2: int,
    power: int = 1,
    dtype: torch.dtype,
) -> Sparse:
    """V, from lists of k and of half, with weights exp(−(s/divisor)^power).

    Where no divisor is above 0, all items are the same.
    """
    if not divisor.any():
        # Then the lists are no more than the tie rule: one entry that all share.
        items = torch.arange(distances.count + 1, device=indices.device)
        return Sparse(items, torch.zeros_like(items[1:]), torch.ones_like(items[1:], dtype=dtype))
    weights = _weights(distances, _expanded(indices[:, :k], indices[:, :half]), divisor, power, dtype)
    return weights if k2 == 1 else _averaged(weights, indices[:, :k2])


def _mutual(lists: Tensor) -> Tensor:
    """For every list entry, whether that item's own list holds the item of the row."""
    items = torch.arange(len(lists), device=lists.device)

    def work(rows: slice) -> Tensor:
        return (lists[lists[rows]] == items[rows, None, None]).any(-1)

    return torch.cat(each_block(lists, work, _slices(lists, len(lists), lists.shape[1] ** 2)))


def _slices(x: Tensor, count: int, columns: int) -> Iterator[slice]:
    """Slices of `count` rows whose temporaries of int64 are 32 MB; 2 MB on the CPU, for each thread."""
    size = max(1, (BLOCK_ELEMENTS // 4 if x.is_cuda else BLOCK_ELEMENTS // 64) // columns)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _expanded(lists: Tensor, half_lists: Tensor) -> tuple[Tensor, Tensor]:
    """R* of every item: ``(starts, columns)`` as in `Sparse`."""
    count = len(lists)
    nothing = count  # stands for an entry that is in no set
    mutual, half_mutual = _mutual(lists), _mutual(half_lists)
    sets, half_sets = torch.where(mutual, lists, nothing), torch.where(half_mutual, half_lists, nothing)
    sizes = half_mutual.sum(1)

    def work(rows: slice) -> tuple[Tensor, Tensor]:
        own, neighbour = sets[rows], lists[rows]
        member = torch.zeros(len(own), count + 1, dtype=torch.bool, device=lists.device)
        member.scatter_(1, own, True)
        member[:, nothing] = False
        of_neighbour = half_sets[neighbour]  # (rows, k, half)
        overlap = member.gather(1, of_neighbour.flatten(1)).view(of_neighbour.shape).sum(-1)
        accepted = mutual[rows] & (SHARE[0] * overlap > SHARE[1] * sizes[neighbour])
        added = torch.where(accepted[..., None], of_neighbour, nothing)
        union = torch.cat([own, added.flatten(1)], 1)
        place = torch.arange(len(own), device=lists.device)[:, None]
        keys = (place * count + union)[union != nothing].unique()
        return torch.bincount(keys // count, minlength=len(own)), keys % count

    parts = each_rows(lists, work, count, max(count, lists.shape[1] * half_lists.shape[1]))
    lengths, columns = map(torch.cat, zip(*parts, strict=True))
    return _starts(lengths), columns


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _entries(starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of several rows one after the other: for each, which of `rows` it belongs to, and where it is."""
    first = starts[rows]
    lengths = starts[rows + 1] - first
    place = torch.repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    return place, (first - ends + lengths).index_select(0, place).add_(torch.arange(len(place), device=rows.device))


def _weights(
    distances: Distances, sets: tuple[Tensor, Tensor], divisor: Tensor, power: int, dtype: torch.dtype
) -> Sparse:
    starts, columns = sets
    items = torch.arange(distances.count, device=columns.device)
    values = torch.empty(len(columns), dtype=dtype, device=columns.device)

    def work(rows: slice) -> None:
        place, entry = _entries(starts, items[rows])
        lengths = starts[1:][rows] - starts[:-1][rows]
        squared = distances.pairs(items[rows], place, columns[entry]).double()
        distance = divided(squared, divisor[rows].double()[place]).pow(power)
        # The smallest is taken off, so that no row underflows.
        weight = (torch.segment_reduce(distance, "min", lengths=lengths)[place] - distance).exp()
        total = torch.segment_reduce(weight, "sum", lengths=lengths)
        values[entry] = (weight / total[place]).to(dtype)

    each_rows(columns, work, distances.count, distances.count)
    return Sparse(starts, columns, values)


def divided(squared: Tensor, divisor: Tensor) -> Tensor:
    """s / divisor, written into s; 0 where the divisor is."""
    return squared.div_(torch.where(divisor > 0, divisor, torch.inf))


def _averaged(weights: Sparse, lists: Tensor) -> Sparse:
    """The mean of the rows of each item's list."""
    count, k = lists.shape
    dtype = weights.values.dtype
    exact = torch.float32 if dtype == torch.float16 else dtype

    def work(rows: slice) -> Sparse:
        parts = [_entries(weights.starts, chosen) for chosen in lists[rows].unbind(1)]
        keys = torch.cat([place * count + weights.columns[entry] for place, entry in parts])
        keys, target = keys.unique(return_inverse=True)
        total = torch.zeros(len(keys), dtype=exact, device=lists.device)
        for (_, entry), of_rank in zip(parts, target.split([len(entry) for _, entry in parts]), strict=True):
            total.index_add_(0, of_rank, weights.values[entry].to(exact))  # each target once: one order, any device
        lengths = torch.bincount(keys // count, minlength=rows.stop - rows.start)
        return Sparse(lengths, keys % count, (total / k).to(dtype))

    entries = -(-len(weights.values) // count)  # of a row, about
    lengths, columns, values = map(
        torch.cat, zip(*each_block(lists, work, _slices(lists, count, k * entries)), strict=True)
    )
    return Sparse(_starts(lengths), columns, values)


class Encoding(NamedTuple):
    """V ready for `jaccard`."""

    matrix: Sparse
    by_column: Sparse  # its columns as rows
    sums: Tensor  # (N,): v


def searchable(matrix: Sparse) -> Encoding:
    lengths = matrix.starts.diff()
    order = matrix.columns.argsort(stable=True)
    starts = _starts(torch.bincount(matrix.columns, minlength=len(lengths)))
    by_column = Sparse(starts, torch.repeat_interleave(lengths)[order], matrix.values[order])
    sums = matrix.values.new_zeros(len(lengths))
    for number in range(int(lengths.max()) if len(lengths) else 0):  # in the order of `jaccard`
        present = (lengths > number).nonzero()[:, 0]
        sums[present] += matrix.values[matrix.starts[present] + number]
    # The sum is taken as 1 where it is not: of rows that are in no list of their own, beside too many equal ones; and
    # in float16, as TransReID does.
    rounding = 0 if sums.dtype == torch.float16 else 1024 * torch.finfo(sums.dtype).eps
    return Encoding(matrix, by_column, torch.where((sums - 1).abs() <= rounding, sums, 1))


def jaccard(encoding: Encoding, rows: Tensor) -> Tensor:
    """1 − t/(v_i + v_j − t) of the items `rows` to all items, (R, N)."""
    matrix, by_column, sums = encoding
    count = len(matrix.starts) - 1
    shared = torch.zeros(len(rows) * count, dtype=matrix.values.dtype, device=rows.device)
    first = matrix.starts[rows]
    lengths = matrix.starts[rows + 1] - first
    # One entry of every row at a time: then no target comes twice, and every sum is in the order of the columns.
    # index_select takes half the time of an index in brackets.
    for number in range(int(lengths.max()) if len(rows) else 0):
        present = (lengths > number).nonzero()[:, 0]
        entry = first[present] + number
        place, other = _entries(by_column.starts, matrix.columns[entry])
        target = (present * count).index_select(0, place).add_(by_column.columns.index_select(0, other))
        own = matrix.values[entry].index_select(0, place)
        shared.index_add_(0, target, torch.minimum(own, by_column.values.index_select(0, other)))
    shared = shared.view(len(rows), count)
    union = (sums[rows, None] + sums).sub_(shared)
    return shared.div_(union).neg_().add_(1)


def expanded_rows(rows: Tensor, indices: Tensor, squared: Distances, alpha: float) -> Tensor:
    """Σ_j cos(x_i, x_j)^α x_j / k over the k nearest of every row, in the order of their ranks."""
    count, k = indices.shape
    result = torch.zeros_like(rows)
    items = torch.arange(count, device=rows.device)

    def work(part: slice) -> None:
        place = torch.arange(part.stop - part.start, device=rows.device)
        for rank in range(k):
            chosen = indices[part, rank]
            cosine = (1 - squared.pairs(items[part], place, chosen) / 2).clamp_(min=0)
            result[part] += cosine.pow(alpha)[:, None] * rows[chosen]

    each_block(rows, work, _slices(rows, count, rows.shape[1]))
    return result / k
