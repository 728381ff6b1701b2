"""The skeleton of what reduces pairs: a tile of products → keys and masks → a small state of each row → combined.

Four walks over the tiles of x × y. `reduce_rows`: one program for a row tile and a share of the column tiles, and
`merge_splits` for the shares. `reduce_triangle`: x against itself, a tile on or above the diagonal serves its rows and
its columns. `weigh_tiles`: the derivative by each pair. `visit_tiles`: one program a tile, wherever it is placed. They
multiply, form keys and masks; what is done with a tile are the device functions of a `Reduction`, which they are
compiled with. Of losses, whose keys are distances:

    start                                            the state of rows that have met nobody, as numbers
    tile(d, positive, negative, values)              the state of a tile; `values` of its rows, (BM, 1), and parameters
    combine(state, later)                            of two shares, the second of higher columns
    finish(state, values)                            the results
    weights(d, positive, negative, values, results, gradients)   ∂L/∂d, from the results and ∂L/∂results

Of mining, whose keys only order the columns of a row, and which remembers places:

    init(BM), combine(state, later)
    tile(key, positive, negative, first, AXIS)       the state of a tile along AXIS; `first`: its first other row
    store(state, out, s, sets, rows, row_mask, N, split, splits)

Of what keeps no state, with similarities as keys:

    place(given, N, M, number, BM, BN)               the first row and column of a program's tile, and the columns' step
    visit(key, row, column, rows, columns, given, out, N, M, number, BM, BN)

Arguments are bundled: a launch takes time for each of them, and Triton 3.6 to 3.8 compile the members of a tuple to
what they are one by one.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import launch, row_stride
from apd_kernels.kernels._pairing import anchor_values, pair_masks, pairing_arguments
from apd_kernels.kernels._split import column_key, in_units_of, split_product, unscaled
from apd_kernels.kernels._tiles import MAX_SPLITS, nan_as, per_difference, product
from apd_kernels.kernels._weighted_rows import add_weighted_rows, weight_blocks
from apd_kernels.kernels.prepared import tiles_of

GROUP = tl.constexpr(8)  # row tiles that walk the columns together, so that both are read from the L2 cache


class Reduction:
    """Device functions that a walk is compiled with. Hashed by identity: a launch looks up one object, not six."""

    def __init__(self, name: str, *, start: tuple[float, ...] | None = None, **functions: Any):
        self.name = name  # of the compiled kernel, as profilers show it
        self.start = start
        self.of_loss = start is not None
        self._functions = functions
        self.__dict__.update(functions)

    @functools.cached_property
    def cache_key(self) -> str:
        """What Triton's caches know it by: the sources of all functions and of what they call."""
        sources = (f"{name} {getattr(function, 'cache_key', '')}" for name, function in self._functions.items())
        return hashlib.sha256(" ".join((self.name, str(self.of_loss), *sources)).encode()).hexdigest()

    def name_of(self, walk: str) -> str:
        return self.name + {"merge_splits": "_merge", "weigh_tiles": "_weights"}.get(walk, "")

    def __repr__(self) -> str:
        return f"Reduction({self.name} {self.cache_key})"


def _name(walk: str, specialization: Any) -> str:
    return str(specialization.constants["REDUCTION"].name_of(walk))


@triton.jit
def grouped_tile(t, height, width, GROUP: tl.constexpr):
    """Row and column of the t-th of height × width tiles, in bands of GROUP rows, column by column."""
    band = t // (GROUP * width)
    rows = tl.minimum(height - band * GROUP, GROUP)
    within = t % (GROUP * width)
    return band * GROUP + within % rows, within // rows


@triton.jit
def grouped_place(given, N, M, number, BM: tl.constexpr, BN: tl.constexpr):
    """All tiles, one a program."""
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(M, BN), GROUP)
    return row * BM, column * BN, 1


@triton.jit
def row_terms(half, root, largest, first, rows, mask, EUCLIDEAN: tl.constexpr, FORM: tl.constexpr):
    """Factor and half square of prepared rows of one set, whose first is the `first` of all."""
    terms = tl.where(mask, 0.0, 0.0)
    factor = terms + 1.0
    if EUCLIDEAN:
        terms = tl.load(half + first + rows, mask=mask, other=0.0)
    if FORM == "split":
        factor, terms = in_units_of(largest, tl.load(root + first + rows, mask=mask, other=largest), terms)
    return factor, terms


@triton.jit
def distance_tile(acc, xx, yy, METRIC: tl.constexpr):
    """Distances from products and squares; NaN stays NaN."""
    if METRIC < 2:
        d = xx[:, None] + yy[None, :] - 2 * acc
        d = tl.where(d < 0, 0.0, d)
        if METRIC == 0:
            d = tl.sqrt_rn(d)
    elif METRIC == 2:
        d = 1 - acc
        d = tl.where(d < 0, 0.0, d)
    else:
        d = -acc
    return d


@triton.jit
def exponentials(logits, mask):
    """Of each row under the mask: the largest logit, −inf for none; exponentials less it; their total."""
    infinity: tl.constexpr = float("inf")
    largest = tl.max(tl.where(mask, nan_as(logits, -infinity), -infinity), 1)
    shift = tl.where(largest == -infinity, 0.0, largest)
    e = tl.exp(tl.where(mask, logits - shift[:, None], -infinity))
    return largest, e, tl.sum(e, 1)


@triton.jit
def shared_scale(largest, other):
    """The larger one, and the factors that bring totals of exponentials less either to it."""
    larger = tl.maximum(largest, other)
    shift = tl.where(larger == -float("inf"), 0.0, larger)  # as long as there is nothing
    return larger, tl.exp(largest - shift), tl.exp(other - shift)


@triton.jit
def log_sum_exp(largest, total):
    """−inf for a total of 0."""
    return tl.where(total == 0, -float("inf"), largest + tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def _values(pointers, s, rows, row_mask, N):
    """What lies at (set, row) behind each pointer, (BM, 1)."""
    values = ()
    for k in tl.static_range(len(pointers)):
        values = values + (tl.load(pointers[k] + s * N + rows, mask=row_mask, other=0.0)[:, None],)  # noqa: RUF005
    return values


@triton.jit
def _started(start, BM: tl.constexpr):
    state = ()
    for k in tl.static_range(len(start)):
        state = state + (tl.full((BM,), 1.0, tl.float32) * start[k],)  # noqa: RUF005
    return state


@triton.jit
def _neighbours(state, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Even and odd columns of (BLOCK, 2 WIDTH)."""
    even, odd = (), ()
    for k in tl.static_range(len(state)):
        left, right = state[k].reshape(BLOCK, WIDTH, 2).split()
        even, odd = even + (left,), odd + (right,)  # noqa: RUF005
    return even, odd


@triton.jit
def _masks(anchor, pairing, rows, columns, row_mask, column_mask, RULES: tl.constexpr):
    label, own_row, domain = anchor
    return pair_masks(label, own_row, domain, pairing[1], pairing[2], pairing[4], pairing[5], rows, columns,
                      row_mask, column_mask, RULES[0], RULES[1], RULES[2])  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split"], repr=functools.partial(_name, "reduce_rows"))
def reduce_rows(
    x, y, sides, pairing, given, out, N, M, D, tiles_per_split, one,
    REDUCTION: tl.constexpr, METRIC: tl.constexpr, RULES: tl.constexpr, PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each row's state over one split's columns, of a loss to [which, set, split, row]."""
    x_half, y_half, x_root, y_root, largest, x_stride, y_stride = sides
    FORM: tl.constexpr = PRODUCT[0]
    EUCLIDEAN: tl.constexpr = METRIC < 2
    split = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    row_mask = rows < N
    anchor = anchor_values(pairing[0], pairing[2], pairing[3], rows, row_mask)
    if REDUCTION.of_loss:
        values = _values(given[0], s, rows, row_mask, N) + given[1]
        state = _started(given[2], BM)
    else:
        state = REDUCTION.init(BM)
    first = split * tiles_per_split * BN
    last = tl.minimum(first + tiles_per_split * BN, M)
    if PRODUCT[1]:  # prepared
        unit = tl.load(largest + s) if FORM == "split" else 1.0
        # A factor of the anchor changes no order, and might underflow: only half squares have to be in its unit.
        x_factor, _ = row_terms(x_half, x_root, unit, s * N, rows, row_mask, EUCLIDEAN, FORM if EUCLIDEAN else "")
        first_row, first_column = (s * N).to(tl.int32), (s * M).to(tl.int32)
        for n0 in range(first, last, BN):
            acc = split_product(x, y, first_row + row, first_column + n0, first_row + N - 1, first_column + M - 1, D,
                                one, FORM, PRODUCT[2], PRODUCT[3], BM, BN, BK)  # fmt: skip
            # In halves: the masks and keys of a whole tile leave the registers on sm_90.
            left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            for side in tl.static_range(2):
                column = n0 + side * (BN // 2)
                columns = column + tl.arange(0, BN // 2)
                y_factor, terms = row_terms(y_half, y_root, unit, s * M, columns, columns < M, EUCLIDEAN, FORM)
                key = column_key(left if side == 0 else right, x_factor, y_factor, terms)
                positive, negative = _masks(anchor, pairing, rows, columns, row_mask, columns < M, RULES)
                state = REDUCTION.combine(state, REDUCTION.tile(key, positive, negative, column, 1))
    else:
        x += s * N * x_stride
        y += s * M * y_stride
        for n0 in range(first, last, BN):
            columns = n0 + tl.arange(0, BN)
            acc, xx, yy = product(x, y, rows, columns, row_mask, columns < M, D, x_stride, y_stride, one,
                                  BM, BN, BK, FORM, EUCLIDEAN)  # fmt: skip
            # Before the masks: after them sm_90 takes up to 10% more instructions a tile.
            if REDUCTION.of_loss:
                key = distance_tile(acc, xx, yy, METRIC)
            else:
                key = 0.5 * yy[None, :] - acc if EUCLIDEAN else -acc
            positive, negative = _masks(anchor, pairing, rows, columns, row_mask, columns < M, RULES)
            if REDUCTION.of_loss:
                state = REDUCTION.combine(state, REDUCTION.tile(key, positive, negative, values))
            else:
                state = REDUCTION.combine(state, REDUCTION.tile(key, positive, negative, n0, 1))
    sets, splits = tl.num_programs(2), tl.num_programs(1)
    if REDUCTION.of_loss:
        at = (s * splits + split) * N + rows
        for k in tl.static_range(len(state)):
            tl.store(out + at, state[k], mask=row_mask)
            at += sets.to(tl.int64) * splits * N
    else:
        REDUCTION.store(state, out, s, sets, rows, row_mask, N, split, splits)


@triton.jit(do_not_specialize=["N", "splits"], repr=functools.partial(_name, "merge_splits"))
def merge_splits(states, given, out, N, splits, REDUCTION: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """The results of a block of rows, each to [set, row], from the states [which, set, split, row]: neighbours are
    combined, the earlier first, until one is left."""
    s = tl.program_id(1).to(tl.int64)
    sets = tl.num_programs(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_mask = rows < N
    SPLITS: tl.constexpr = 1 << LEVELS
    t = tl.arange(0, SPLITS)
    at = (s * splits + t[None, :]) * N + rows[:, None]
    mask = row_mask[:, None] & (t < splits)[None, :]
    state = ()
    for k in tl.static_range(len(given[2])):
        state = state + (tl.load(states + at, mask=mask, other=given[2][k]),)  # noqa: RUF005
        at += sets * splits * N
    for level in tl.static_range(LEVELS):
        state, later = _neighbours(state, BLOCK, SPLITS >> (level + 1))
        state = REDUCTION.combine(state, later)
    values = _values(given[0], s, rows, row_mask, N) + given[1]
    results = REDUCTION.finish(state, values)
    for k in tl.static_range(len(results)):
        tl.store(out[k] + s * N + rows[:, None], results[k], mask=row_mask[:, None])


@triton.jit(do_not_specialize=["N"], repr=functools.partial(_name, "reduce_triangle"))
def reduce_triangle(
    x, y, sides, pairing, out, N, D, one,
    REDUCTION: tl.constexpr, METRIC: tl.constexpr, RULES: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile on or above the diagonal: its rows' state is their split of its column tile, its columns' of its row tile.
    Keys order the columns of a row."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    if column_tile < row_tile:
        return
    half, _, root, _, largest, stride, _ = sides
    FORM: tl.constexpr = PRODUCT[0]
    EUCLIDEAN: tl.constexpr = METRIC < 2
    s = tl.program_id(2).to(tl.int64)
    sets, splits = tl.num_programs(2), tl.num_programs(1)
    row, column = row_tile * BLOCK, column_tile * BLOCK
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    row_mask, column_mask = rows < N, columns < N
    anchor = anchor_values(pairing[0], None, pairing[3], rows, row_mask)
    if PRODUCT[1]:  # prepared
        first = (s * N).to(tl.int32)
        acc = split_product(x, y, first + row, first + column, first + N - 1, first + N - 1, D, one,
                            FORM, PRODUCT[2], PRODUCT[3], BLOCK, BLOCK, BK)  # fmt: skip
        unit = tl.load(largest + s) if FORM == "split" else 1.0
        x_factor, xx = row_terms(half, root, unit, s * N, rows, row_mask, EUCLIDEAN, FORM)
        y_factor, yy = row_terms(half, root, unit, s * N, columns, column_mask, EUCLIDEAN, FORM)
    else:
        x_factor, y_factor = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 1.0, tl.float32)
        acc, xx, yy = product(x + s * N * stride, y + s * N * stride, rows, columns, row_mask, column_mask, D,
                              stride, stride, one, BLOCK, BLOCK, BK, FORM, EUCLIDEAN)  # fmt: skip
        xx, yy = 0.5 * xx, 0.5 * yy
    positive, negative = _masks(anchor, pairing, rows, columns, row_mask, column_mask, RULES)
    # Only half squares have to be in the anchor's unit: its factor changes no order, and might underflow.
    key = column_key(acc, x_factor if EUCLIDEAN else 0 * x_factor + 1, y_factor, yy)
    state = REDUCTION.tile(key, positive, negative, column, 1)
    REDUCTION.store(state, out, s, sets, rows, row_mask, N, column_tile, splits)
    if row_tile < column_tile:
        y_factor = y_factor if EUCLIDEAN else 0 * y_factor + 1
        key = xx[:, None] - y_factor[None, :] * (x_factor[:, None] * acc)
        state = REDUCTION.tile(key, positive, negative, row, 0)
        REDUCTION.store(state, out, s, sets, columns, column_mask, N, row_tile, splits)


@triton.jit(do_not_specialize=["start", "stop", "N", "M", "height"], repr=functools.partial(_name, "weigh_tiles"))
def weigh_tiles(
    x, y, sides, pairing, given, out, start, stop, N, M, D, height, one,
    REDUCTION: tl.constexpr, METRIC: tl.constexpr, RULES: tl.constexpr, PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Less the weights of the differences of the anchors from `start` to `stop`, 0 in the padding, to `out`: (sets,
    height, width) and width. Of rows as they are."""
    weights, width = out
    x_stride, y_stride = sides[5], sides[6]
    FORM: tl.constexpr = PRODUCT[0]  # as an argument Triton 3.6 takes no string out of a tuple
    s = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = start + place
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < stop, columns < M
    x += s * N * x_stride
    y += s * M * y_stride
    acc, xx, yy = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                          BM, BN, BK, FORM, METRIC < 2)  # fmt: skip
    d = distance_tile(acc, xx, yy, METRIC)
    anchor = anchor_values(pairing[0], pairing[2], pairing[3], rows, row_mask)
    positive, negative = _masks(anchor, pairing, rows, columns, row_mask, column_mask, RULES)
    values = _values(given[0], s, rows, row_mask, N) + given[1]
    results, gradients = _values(given[2], s, rows, row_mask, N), _values(given[3], s, rows, row_mask, N)
    slope = REDUCTION.weights(d, positive, negative, values, results, gradients)
    w = -per_difference(tl.where(positive | negative, slope, 0.0), d, METRIC)
    weights += (s * height + place)[:, None] * width + columns[None, :]
    tl.store(weights, w, mask=row_mask[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["N", "M", "number"], repr=functools.partial(_name, "visit_tiles"))
def visit_tiles(
    x, y, sides, given, out, N, M, D, number, one,
    REDUCTION: tl.constexpr, PRODUCT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program a tile of one set of rows, with the similarities x·y − ½‖y‖² as keys (x·y without half squares)."""
    _, y_half, x_root, y_root, _, x_stride, y_stride = sides
    FORM: tl.constexpr = PRODUCT[0]
    row, column, step = REDUCTION.place(given, N, M, number, BM, BN)
    rows, columns = row + tl.arange(0, BM), column + step * tl.arange(0, BN)
    if PRODUCT[1]:  # prepared
        s = split_product(x, y, row, column, N - 1, M - 1, D, one, FORM, PRODUCT[2], PRODUCT[3], BM, BN, BK)
        if FORM == "split":
            s = unscaled(s, tl.load(x_root + rows, mask=rows < N, other=0.0),
                         tl.load(y_root + columns, mask=columns < M, other=0.0))  # fmt: skip
    else:
        s, _, _ = product(x, y, rows, columns, rows < N, columns < M, D, x_stride, y_stride, one,
                          BM, BN, BK, FORM, False)  # fmt: skip
    if y_half is not None:
        s -= tl.load(y_half + columns, mask=columns < M, other=0.0)[None, :]
    # Anew: those from before the product would cost two instructions an element of the tile on sm_90.
    rows, columns = row + tl.arange(0, BM), column + step * tl.arange(0, BN)
    REDUCTION.visit(s, row, column, rows, columns, given, out, N, M, number, BM, BN)


class Sides(NamedTuple):
    """Both sides of a product as a kernel reads them, its constants, and the numbers of rows and elements."""

    x: Any  # (rows of all sets, D), pointers or a descriptor
    y: Any
    terms: tuple[Any, ...]  # x_half, y_half, x_root, y_root, largest, x_stride, y_stride
    product: tuple[str, bool, bool, bool]  # FORM, whether rows are prepared, TMA, SEPARATE
    options: dict[str, Any]  # the tile
    dimension: int


def sides_of_rows(a: Tensor, b: Tensor, dots: str, options: dict[str, Any], half: Tensor | None = None) -> Sides:
    """Rows as they are, (S, N, D) and (S, M, D); `dots` as in `dot_precision`."""
    product = (dots, False, False, False)
    return Sides(a, b, (None, half, None, None, None, row_stride(a), row_stride(b)), product, options, a.shape[-1])


def sides_of_parts(own: Operands, others: Operands, options: dict[str, Any], largest: Tensor | None = None) -> Sides:
    """Prepared rows; `options` with those of `product_options`. A tile without BN is square."""
    assert own.parts is not None
    assert others.parts is not None
    x = tiles_of(own.parts, options["BM"], options["BK"], options)
    y = tiles_of(others.parts, options.get("BN", options["BM"]), options["BK"], options)
    options = dict(options)
    product = (options.pop("FORM"), True, options.pop("TMA"), options.pop("SEPARATE"))
    dimension = own.parts.shape[-1] // (1 if own.root is None else 2)
    return Sides(x, y, (own.half, others.half, own.root, others.root, largest, 0, 0), product, options, dimension)


def column_splits(row_tiles: int, column_tiles: int, sets: int, most: int = MAX_SPLITS) -> tuple[int, int]:
    """Into how many parts the columns are divided to fill the device, and the column tiles of each."""
    splits = max(1, min(column_tiles, most, MAX_SPLITS // max(1, row_tiles * sets)))
    tiles_per_split = max(1, triton.cdiv(column_tiles, splits))
    return triton.cdiv(column_tiles, tiles_per_split), tiles_per_split


# Of losses. Narrow in the first pass, to fill the GPU. Estimates: no GPU has run them.
_STATES = {"BM": 64, "BN": 32, "BK": 32, "num_warps": 8, "num_stages": 3}
_WEIGHTS = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}


def reduced(
    reduction: Reduction, a: Tensor, b: Tensor, pairing: Pairing, metric: int, dots: str, results: int,
    values: tuple[Tensor, ...] = (), parameters: tuple[float, ...] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch `reduce_rows` and `merge_splits`: the results, (S, N) each, of a loss's reduction of (S, N, D), (S, M, D).

    values: (S, N) float32 each, contiguous. parameters: the numbers that follow them.
    """
    sets, n, _ = a.shape
    sides = sides_of_rows(a, b, dots, _STATES)
    row_tiles = triton.cdiv(n, _STATES["BM"])
    splits, tiles_per_split = column_splits(row_tiles, triton.cdiv(b.shape[1], _STATES["BN"]), sets)
    assert reduction.start is not None
    states = torch.empty(len(reduction.start), sets, splits, n, dtype=torch.float32, device=a.device)
    out = tuple(torch.empty(sets, n, dtype=torch.float32, device=a.device) for _ in range(results))
    tensors, rules = pairing_arguments(pairing)
    given = (values, parameters, reduction.start)
    launch(
        reduce_rows, (row_tiles, splits, sets),
        sides.x, sides.y, sides.terms, tensors, given, states, n, b.shape[1], sides.dimension, tiles_per_split, 1.0,
        REDUCTION=reduction, METRIC=metric, RULES=rules, PRODUCT=sides.product, **sides.options,
    )  # fmt: skip
    BLOCK = 8
    launch(
        merge_splits, (triton.cdiv(n, BLOCK), sets), states, given, out, n, splits,
        REDUCTION=reduction, LEVELS=(MAX_SPLITS - 1).bit_length(), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def add_weighted_pairs(
    for_x: Tensor, for_y: Tensor, reduction: Reduction, a: Tensor, b: Tensor, pairing: Pairing, metric: int, dots: str,
    precision: str, given: tuple[tuple[Any, ...], ...],
) -> None:  # fmt: skip
    """Launch `weigh_tiles` and add the sums of rows, block by block: for_x −= Σ_j w_ij (x_i − y_j), of y the same (of
    "cosine" and "dot" += Σ_j w_ij y_j), w the weight of a difference. `given`: values, parameters, results, gradients;
    for_y is for_x where b is a; an empty one is not wanted."""
    sets, n, _ = a.shape
    m = b.shape[1]
    sides = sides_of_rows(a, b, dots, _WEIGHTS)
    tensors, rules = pairing_arguments(pairing)
    for block, weights in weight_blocks(n, m, sets, a.device) if m else ():
        _, height, width = weights.shape
        grid = (triton.cdiv(width, _WEIGHTS["BN"]), triton.cdiv(block.stop - block.start, _WEIGHTS["BM"]), sets)
        launch(
            weigh_tiles, grid,
            sides.x, sides.y, sides.terms, tensors, given, (weights, width), block.start, block.stop, n, m,
            sides.dimension, height, 1.0,
            REDUCTION=reduction, METRIC=metric, RULES=rules, PRODUCT=sides.product, **sides.options,
        )  # fmt: skip
        add_weighted_rows(for_x, for_y, weights, a, b, block, precision, less_own=metric < 2)
