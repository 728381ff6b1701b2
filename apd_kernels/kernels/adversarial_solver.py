"""All steps of the L2 triplet ascent on N×N matrices, for batches that are small against D.

Every point is Z = X + C X, where the rows of C sum to 0. For such coefficient rows u, v: (uX)·(vX) = u B vᵀ with
B = −½ D∘D, D the distances of X. With A = I + C, R = C B and P = A B = B + R:

    d²(i, j)  = (A_i − A_j)·(P_i − P_j)                   winners: from the difference of the rows
    G_A, G_P  = the Laplacian of the weights on A, on P    g = G_A X,  ‖g_i‖² = G_A,i·G_P,i
    C, R     += α/‖g‖ · (G_A, G_P),   ‖δ_i‖² = C_i·R_i,   rows scaled back to ‖δ_i‖ ≤ ε
    Q         = B + R + Rᵀ + R Cᵀ,   d²_ij = Q_ii + Q_jj − 2 Q_ij   to mine the next winners

Up to 64 rows three launches whatever the number of steps: `_squared_distances`, `_solve` (one program a set), `_apply`.
Up to 512 several programs a set, and with them two launches a step, `_choose` and `_move`. The matrices are float64: at
this size it costs little, and near-duplicates keep their digits. Rows that one program's threads hand to each other go
through memory, with a barrier before and after.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import dot_precision, launch
from apd_kernels.kernels._tiles import high_and_rest, nan_as, sum_apart
from apd_kernels.kernels.losses import per_difference, sigmoid
from apd_kernels.kernels.mining import best_of_splits

# One program walks 16 rows of at most 64 float64 at a time: 4 elements a thread.
ONE_PROGRAM_ROWS = 64
COLUMNS = 64  # that one program of `_choose` mines in
# Beyond, a direct step works on 4·D bytes a row and N²D products, a step here on 16·N bytes and N³. Where 4·N ≤ D that
# is less in both, up to the 512 rows that D ≤ 4096 and the registers of `_move` allow. Counted: no GPU has run it.
SOLVER_ROWS = 512
SOLVER_SHARE = 0.25
ROUNDING = tl.constexpr(32 * 2.220446049250313e-16)  # of the terms of a square: less is taken for 0


@triton.jit(do_not_specialize=["N"])
def _squared_distances(x, out, N, D, BM: tl.constexpr, BK: tl.constexpr):
    """d²(x_i, x_j) by differences, a BM×BM tile a program."""
    s = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    x += s * N * D
    acc = tl.zeros((BM, BM), tl.float64)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x + i[:, None] * D + k[None, :], mask=(i < N)[:, None] & (k < D)[None, :], other=0.0)
        b = tl.load(x + j[:, None] * D + k[None, :], mask=(j < N)[:, None] & (k < D)[None, :], other=0.0)
        difference = a.to(tl.float64)[:, None, :] - b.to(tl.float64)[None, :, :]
        acc += tl.sum(difference * difference, 2)
    tl.store(out + s * N * N + i[:, None] * N + j[None, :], acc, mask=(i < N)[:, None] & (j < N)[None, :])


@triton.jit
def _coefficients(c, i, k, NP: tl.constexpr):
    """Rows i of A = I + C."""
    return tl.load(c + i[:, None] * NP + k[None, :]) + (i[:, None] == k[None, :]).to(tl.float64)


@triton.jit
def _products(r, squared, i, k, N, NP: tl.constexpr):
    """Rows i of P = B + R."""
    mask = (i < N)[:, None] & (k < N)[None, :]
    return tl.load(r + i[:, None] * NP + k[None, :]) - 0.5 * tl.load(
        squared + i[:, None] * N + k[None, :], mask=mask, other=0.0
    )


@triton.jit
def _pair(c, r, squared, i, j, k, N, NP: tl.constexpr):
    """A_i − A_j and P_i − P_j for vectors of rows i and j."""
    return (
        _coefficients(c, i, k, NP) - _coefficients(c, j, k, NP),
        _products(r, squared, i, k, N, NP) - _products(r, squared, j, k, N, NP),
    )


@triton.jit
def _pair_distance(c, r, squared, i, j, k, N, NP: tl.constexpr):
    """Distances of rows i from rows j. A square below the rounding of its terms is 0, as between equal rows."""
    v_a, v_b = _pair(c, r, squared, i, j, k, N, NP)
    terms = v_a * v_b
    square = tl.sum(terms, 1)
    return tl.sqrt(tl.where(square <= tl.sum(tl.abs(terms), 1) * ROUNDING, 0.0, square))


@triton.jit
def _add_edge(g_a, g_b, heaviest, w, c, r, squared, i, j, k, N, NP: tl.constexpr):
    """g + w (row i − row j), and the heaviest |w| so far; a weight of 0 drops its edge."""
    v_a, v_b = _pair(c, r, squared, i, j, k, N, NP)
    used = (w != 0)[:, None]
    g_a += tl.where(used, w[:, None] * v_a, 0.0)
    g_b += tl.where(used, w[:, None] * v_b, 0.0)
    return g_a, g_b, tl.maximum(heaviest, tl.abs(w))


@triton.jit
def _keys(squared, labels, c, r, diagonal, i, j, N, NP: tl.constexpr, PRECISION: tl.constexpr):
    """d² of rows i and j where their identities are equal, where they differ, and ∓infinity elsewhere. NaN wins."""
    product = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    if PRECISION == "tf32x3 apart":
        cross = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
        rest = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for m0 in range(0, NP, 16):
        m = m0 + tl.arange(0, 16)
        left = tl.load(r + i[:, None] * NP + m[None, :]).to(tl.float32)
        right = tl.load(c + j[None, :] * NP + m[:, None]).to(tl.float32)
        if PRECISION == "tf32x3 apart":  # as in `_tiles.product`
            left, left_rest = high_and_rest(left)
            right, right_rest = high_and_rest(right)
            product = tl.dot(left, right, product, input_precision="tf32")
            cross = tl.dot(left, right_rest, cross, input_precision="tf32")
            rest = tl.dot(left_rest, right, rest, input_precision="tf32")
        else:
            product = tl.dot(left, right, product, input_precision=PRECISION)
    if PRECISION == "tf32x3 apart":
        product = sum_apart(product, cross, rest)
    q = product.to(tl.float64) + _products(r, squared, i, j, N, NP) + tl.load(r + j[None, :] * NP + i[:, None])
    d2 = tl.load(diagonal + i)[:, None] + tl.load(diagonal + j)[None, :] - 2 * q
    own = tl.load(labels + i, mask=i < N, other=0)
    other = tl.load(labels + j, mask=j < N, other=0)
    inside = (i < N)[:, None] & (j < N)[None, :]
    same = (own[:, None] == other[None, :]) & inside
    positive = same & (i[:, None] != j[None, :])
    negative = (same == 0) & inside
    high = tl.where(positive, nan_as(d2, float("inf")), float("-inf"))
    low = tl.where(negative, nan_as(d2, float("-inf")), float("inf"))
    return high, low


@triton.jit
def _take_step(
    g_a, g_b, heaviest, old_c, old_r, new_c, new_r, diagonal, size, i, k, N, epsilon, step_size, NP: tl.constexpr
):  # fmt: skip
    """Rows i after a step along g, back in their balls, and their Q_ii."""
    at = i[:, None] * NP + k[None, :]
    scale = tl.zeros_like(heaviest) + 1.0
    if size is not None:
        scale = tl.load(size + i, mask=i < N, other=0.0).to(tl.float64)
    # Squares are taken of rows divided by their heaviest weight: a saturated loss has slopes of 1e-200.
    unit = tl.where(heaviest == 0, 1.0, heaviest)[:, None]
    g_a, g_b = g_a / unit, g_b / unit
    square = tl.sum(g_a * g_b, 1)
    still = square <= 0  # NaN is not: it shows
    factor = tl.where(still, 0.0, step_size * scale / tl.sqrt(tl.where(still, 1.0, square)))
    moved_a = tl.load(old_c + at) + factor[:, None] * g_a
    moved_b = tl.load(old_r + at) + factor[:, None] * g_b
    square = tl.sum(moved_a * moved_b, 1)
    length = tl.sqrt(tl.where(square < 0, 0.0, square))
    radius = epsilon * scale
    back = tl.where(length > radius, radius / tl.where(length > radius, length, 1.0), 1.0)
    moved_a *= back[:, None]
    moved_b *= back[:, None]
    tl.store(new_c + at, moved_a)
    tl.store(new_r + at, moved_b)
    # Q_ii = 2 R_ii + R_i·C_i
    own = tl.sum(tl.where(i[:, None] == k[None, :], moved_b, 0.0), 1)
    tl.store(diagonal + i, 2 * own + tl.sum(moved_a * moved_b, 1))


@triton.jit(do_not_specialize=["N", "steps"])
def _solve(
    squared, labels, size, c, r, diagonal, winners, weights, N, steps, epsilon, step_size,
    NP: tl.constexpr, RB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """RB rows at a time: first the winners and weights of all rows, then, when all threads have those, the new rows.
    C and R have two places each, old and new; the last step leaves the result in place steps % 2."""
    s = tl.program_id(0).to(tl.int64)
    squared += s * N * N
    c += s * 2 * NP * NP
    r += s * 2 * NP * NP
    diagonal += s * NP
    winners += s * 2 * NP
    weights += s * 2 * NP
    if size is not None:
        size += s * N
    k = tl.arange(0, NP)
    for r0 in range(0, NP, RB):
        i = r0 + tl.arange(0, RB)
        tl.store(c + i[:, None] * NP + k[None, :], tl.zeros((RB, NP), tl.float64))
        tl.store(r + i[:, None] * NP + k[None, :], tl.zeros((RB, NP), tl.float64))
        tl.store(diagonal + i, tl.zeros((RB,), tl.float64))
    tl.debug_barrier()

    for t in range(0, steps):
        old_c, old_r = c + (t % 2) * NP * NP, r + (t % 2) * NP * NP
        new_c, new_r = c + (1 - t % 2) * NP * NP, r + (1 - t % 2) * NP * NP
        for r0 in range(0, NP, RB):
            i = r0 + tl.arange(0, RB)
            high, low = _keys(squared, labels, old_c, old_r, diagonal, i, k, N, NP, PRECISION)
            farthest, p = tl.max(high, 1, return_indices=True)
            nearest, n = tl.min(low, 1, return_indices=True)
            d_p = _pair_distance(old_c, old_r, squared, i, p, k, N, NP)
            d_n = _pair_distance(old_c, old_r, squared, i, n, k, N, NP)
            valid = (farthest != float("-inf")) & (nearest != float("inf"))
            slope = tl.where(valid, sigmoid(d_p - d_n), 0.0)
            tl.store(winners + i, p)
            tl.store(winners + NP + i, n)
            tl.store(weights + i, per_difference(slope, d_p, 0))
            tl.store(weights + NP + i, per_difference(-slope, d_n, 0))
        tl.debug_barrier()

        for r0 in range(0, NP, RB):
            i = r0 + tl.arange(0, RB)
            g_a, g_b = tl.zeros((RB, NP), tl.float64), tl.zeros((RB, NP), tl.float64)
            heaviest = tl.zeros((RB,), tl.float64)
            for side in tl.static_range(2):
                w_j, j = tl.load(weights + side * NP + i), tl.load(winners + side * NP + i)
                g_a, g_b, heaviest = _add_edge(g_a, g_b, heaviest, w_j, old_c, old_r, squared, i, j, k, N, NP)
            # The anchors that chose a row: the first of each row, then the second, …, as many as the busiest row has.
            w = tl.where(tl.load(winners + k)[None, :] == i[:, None], tl.load(weights + k)[None, :], 0.0)
            w += tl.where(tl.load(winners + NP + k)[None, :] == i[:, None], tl.load(weights + NP + k)[None, :], 0.0)
            last = tl.zeros((RB,), tl.int32) - 1
            for _ in range(0, tl.max(tl.sum((w != 0).to(tl.int32), 1), 0)):
                last = tl.min(tl.where((w != 0) & (k[None, :] > last[:, None]), k[None, :], NP), 1)
                w_j = tl.sum(tl.where(k[None, :] == last[:, None], w, 0.0), 1)
                j = tl.minimum(last, NP - 1)
                g_a, g_b, heaviest = _add_edge(g_a, g_b, heaviest, w_j, old_c, old_r, squared, i, j, k, N, NP)
            _take_step(g_a, g_b, heaviest, old_c, old_r, new_c, new_r, diagonal, size, i, k, N, epsilon, step_size,
                       NP)  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "splits"])
def _choose(
    squared, labels, c, r, diagonal, key, index, N, splits, set_stride,
    NP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best positive and negative of BM rows among BN: to [side, set, row, split]."""
    split = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = split * BN + tl.arange(0, BN)
    high, low = _keys(squared + s * N * N, labels, c + s * set_stride, r + s * set_stride, diagonal + s * set_stride,
                      i, j, N, NP, PRECISION)  # fmt: skip
    farthest, p = tl.max(high, 1, return_indices=True)
    nearest, n = tl.min(low, 1, return_indices=True)
    at = (s * N + i) * splits + split
    other_side = tl.num_programs(2) * N * splits
    tl.store(key + at, farthest, mask=i < N)
    tl.store(key + other_side + at, nearest, mask=i < N)
    tl.store(index + at, tl.where(farthest == float("-inf"), -1, split * BN + p), mask=i < N)
    tl.store(index + other_side + at, tl.where(nearest == float("inf"), -1, split * BN + n), mask=i < N)


@triton.jit
def _anchor(
    key, index, a, other_side, squared, c, r, k, N, splits, NP: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Winners of one anchor, row 0 for none, and the weights of its edges to them."""
    at = a * splits
    p = best_of_splits(key + at, index + at, splits, True, SPLITS)
    n = best_of_splits(key + other_side + at, index + other_side + at, splits, False, SPLITS)
    one = tl.arange(0, 1)
    i, far, near = a + one, tl.maximum(p, 0) + one, tl.maximum(n, 0) + one
    d_p = _pair_distance(c, r, squared, i, far, k, N, NP)
    d_n = _pair_distance(c, r, squared, i, near, k, N, NP)
    slope = tl.where((p >= 0) & (n >= 0), sigmoid(d_p - d_n), 0.0)
    return far, near, per_difference(slope, d_p, 0), per_difference(-slope, d_n, 0)


@triton.jit(do_not_specialize=["N", "splits"])
def _move(
    squared, size, key, index, old_c, old_r, new_c, new_r, diagonal, N, splits, set_stride, epsilon, step_size,
    NP: tl.constexpr, SPLITS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One program a row: an anchor that chose it is looked at again, which spares a launch between the two."""
    i = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    other_side = tl.num_programs(1) * N * splits
    key += s * N * splits
    index += s * N * splits
    squared += s * N * N
    old_c += s * set_stride
    old_r += s * set_stride
    if size is not None:
        size += s * N
    k = tl.arange(0, NP)
    row = i + tl.arange(0, 1)
    g_a, g_b = tl.zeros((1, NP), tl.float64), tl.zeros((1, NP), tl.float64)
    heaviest = tl.zeros((1,), tl.float64)
    far, near, w_p, w_n = _anchor(key, index, i, other_side, squared, old_c, old_r, k, N, splits, NP, SPLITS)
    g_a, g_b, heaviest = _add_edge(g_a, g_b, heaviest, w_p, old_c, old_r, squared, row, far, k, N, NP)
    g_a, g_b, heaviest = _add_edge(g_a, g_b, heaviest, w_n, old_c, old_r, squared, row, near, k, N, NP)
    t = tl.arange(0, SPLITS)
    for j0 in range(0, N, SCAN):
        j = j0 + tl.arange(0, SCAN)
        at = j[:, None] * splits + t[None, :]
        here = (j < N)[:, None] & (t < splits)[None, :]
        # Among the winners of any split: few anchors are looked at in vain.
        chose = tl.load(index + at, mask=here, other=-1) == i
        chose |= tl.load(index + other_side + at, mask=here, other=-1) == i
        if tl.max(tl.max(chose.to(tl.int32), 1), 0) > 0:
            for a in range(j0, tl.minimum(j0 + SCAN, N)):
                own = a * splits + t
                named = (tl.load(index + own, mask=t < splits, other=-1) == i) | (
                    tl.load(index + other_side + own, mask=t < splits, other=-1) == i
                )
                if tl.max(named.to(tl.int32), 0) > 0:
                    p, n, to_p, to_n = _anchor(key, index, a, other_side, squared, old_c, old_r, k, N, splits, NP,
                                               SPLITS)  # fmt: skip
                    w = tl.where(p == i, to_p, tl.where(n == i, to_n, 0.0))  # 0 where it has no pair
                    g_a, g_b, heaviest = _add_edge(g_a, g_b, heaviest, w, old_c, old_r, squared, row,
                                                   a + tl.arange(0, 1), k, N, NP)  # fmt: skip
    _take_step(g_a, g_b, heaviest, old_c, old_r, new_c + s * set_stride, new_r + s * set_stride,
               diagonal + s * set_stride, size, row, k, N, epsilon, step_size, NP)  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _apply(x, c, out, N, D, set_stride, NP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """X_i + Σ_j C_ij (X_j − X_i), as the rows of C sum to 0: between close rows no digits cancel, and a far row that
    moved nobody, or one that is not finite, has no part in the others."""
    s = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.program_id(0) * BD + tl.arange(0, BD)
    x += s * N * D
    mask = (i < N)[:, None] & (k < D)[None, :]
    rows = tl.load(x + i[:, None] * D + k[None, :], mask=mask, other=0.0).to(tl.float32)
    moved = tl.zeros((BM, BD), tl.float32)
    for j in range(0, N):
        w = tl.load(c + s * set_stride + i * NP + j).to(tl.float32)[:, None]
        other = tl.load(x + j * D + k, mask=k < D, other=0.0).to(tl.float32)
        moved += tl.where(w == 0, 0.0, w * (other[None, :] - rows))
    tl.store(out + (s * N + i[:, None]) * D + k[None, :], (rows + moved).to(out.dtype.element_ty), mask=mask)


def solve(x: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int, relative: bool) -> Tensor:
    """x: (N, D) or (S, N, D), contiguous, N ≤ SOLVER_ROWS."""
    n, dimension = x.shape[-2:]
    sets = x.shape[:-2].numel()
    NP = max(16, triton.next_power_of_2(n))
    squared = torch.empty(sets, n, n, dtype=torch.float64, device=x.device)
    precision = dot_precision(squared, "fp32")
    tiles = triton.cdiv(n, 16)
    launch(_squared_distances, (tiles, tiles, sets), x, squared, n, dimension, BM=16, BK=32, num_warps=4)
    size = torch.linalg.vector_norm(x.float(), dim=-1) if relative else None
    take = _in_one_program if n <= ONE_PROGRAM_ROWS else _in_several
    c = take(squared, labels.contiguous(), size, epsilon, step_size, steps, NP, precision)
    out = torch.empty_like(x)
    launch(
        _apply, (triton.cdiv(dimension, 128), triton.cdiv(n, 16), sets), x, c, out, n, dimension, c.stride(0),
        NP=NP, BM=16, BD=128, num_warps=4,
    )  # fmt: skip
    return out


def _in_one_program(
    squared: Tensor,
    labels: Tensor,
    size: Tensor | None,
    epsilon: float,
    step_size: float,
    steps: int,
    NP: int,
    precision: str,
) -> Tensor:
    """C of each set, (S, NP, NP) in a larger tensor."""
    sets, n, _ = squared.shape

    def scratch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(sets, *shape, dtype=dtype, device=squared.device)

    c, r = scratch(2, NP, NP), scratch(2, NP, NP)
    launch(
        _solve, (sets,),
        squared, labels, size, c, r, scratch(NP), scratch(2, NP, dtype=torch.int32), scratch(2, NP),
        n, steps, epsilon, step_size, NP=NP, RB=16, PRECISION=precision, num_warps=8, num_stages=2,
    )  # fmt: skip
    return c[:, steps % 2]


def _in_several(
    squared: Tensor,
    labels: Tensor,
    size: Tensor | None,
    epsilon: float,
    step_size: float,
    steps: int,
    NP: int,
    precision: str,
) -> Tensor:
    """The same, and besides two launches a step one that zeroes C, R and Q_ii."""
    sets, n, _ = squared.shape
    state = torch.zeros(sets, 4 * NP * NP + NP, dtype=torch.float64, device=squared.device)
    c, r = state[:, : 2 * NP * NP].view(sets, 2, NP, NP), state[:, 2 * NP * NP : -NP].view(sets, 2, NP, NP)
    diagonal, stride = state[:, -NP:], state.shape[1]
    splits = triton.cdiv(n, COLUMNS)
    key = torch.empty(2, sets, n, splits, dtype=torch.float64, device=squared.device)
    index = torch.empty(2, sets, n, splits, dtype=torch.int32, device=squared.device)
    for step in range(steps):
        old, new = step % 2, 1 - step % 2
        launch(
            _choose, (triton.cdiv(n, 16), splits, sets),
            squared, labels, c[:, old], r[:, old], diagonal, key, index, n, splits, stride,
            NP=NP, BM=16, BN=COLUMNS, PRECISION=precision, num_warps=4, num_stages=2,
        )  # fmt: skip
        launch(
            _move, (n, sets),
            squared, size, key, index, c[:, old], r[:, old], c[:, new], r[:, new], diagonal,
            n, splits, stride, epsilon, step_size, NP=NP, SPLITS=NP // COLUMNS, SCAN=32, num_warps=max(1, NP // 64),
        )  # fmt: skip
    return c[:, steps % 2]
