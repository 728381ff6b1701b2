"""All steps of the L2 triplet ascent on N×N matrices, for batches that are small against D.

Every point is Z = X + C X, where the rows of C sum to 0. For such coefficient rows u, v: (uX)·(vX) = u B vᵀ with
B = −½ D∘D, D the distances of X. With A = I + C, R = C B and P = A B = B + R:

    d²(i, j)  = (A_i − A_j)·(P_i − P_j)                   winners: from the difference of the rows
    G_A, G_P  = the Laplacian of the weights on A, on P    g = G_A X,  ‖g_i‖² = G_A,i·G_P,i
    C, R     += α/‖g‖ · (G_A, G_P),   ‖δ_i‖² = C_i·R_i,   rows scaled back to ‖δ_i‖ ≤ ε
    Q         = B + R + Rᵀ + R Cᵀ,   d²_ij = Q_ii + Q_jj − 2 Q_ij   to mine the next winners

Three launches whatever the number of steps: `_squared_distances`, `_solve` (one program a set), `_apply`. The matrices
are float64: at this size it costs little, and near-duplicates keep their digits. Rows that one program's threads hand
to each other go through memory, with a barrier before and after.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import dot_precision, launch
from apd_kernels.kernels._tiles import nan_as
from apd_kernels.kernels.losses import per_difference, sigmoid

# One program walks 16 rows of at most 64 float64 at a time: 4 elements a thread. Larger batches take direct steps.
SOLVER_ROWS = 64


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
        difference = a.to(tl.float32)[:, None, :] - b.to(tl.float32)[None, :, :]
        acc += tl.sum(difference * difference, 2).to(tl.float64)
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
    k = tl.arange(0, NP)
    other = tl.load(labels + k, mask=k < N, other=0)
    largest = 0.0
    for r0 in range(0, NP, RB):
        i = r0 + tl.arange(0, RB)
        tl.store(c + i[:, None] * NP + k[None, :], tl.zeros((RB, NP), tl.float64))
        tl.store(r + i[:, None] * NP + k[None, :], tl.zeros((RB, NP), tl.float64))
        tl.store(diagonal + i, tl.zeros((RB,), tl.float64))
        d2 = tl.load(squared + i[:, None] * N + k[None, :], mask=(i < N)[:, None] & (k < N)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.max(d2, 1), 0).to(tl.float32))
    # A quadratic form below the rounding of its largest terms is 0, as between equal rows; its edge is dropped.
    nothing = 32 * 2.220446049250313e-16 * largest.to(tl.float64)
    tl.debug_barrier()

    for t in range(0, steps):
        old_c, old_r = c + (t % 2) * NP * NP, r + (t % 2) * NP * NP
        new_c, new_r = c + (1 - t % 2) * NP * NP, r + (1 - t % 2) * NP * NP
        for r0 in range(0, NP, RB):
            i = r0 + tl.arange(0, RB)
            at = i[:, None] * NP + k[None, :]
            transposed = k[None, :] * NP + i[:, None]
            inside = (i < N)[:, None] & (k < N)[None, :]
            product = tl.zeros((RB, NP), tl.float32)
            for m0 in range(0, NP, 16):
                m = m0 + tl.arange(0, 16)
                left = tl.load(old_r + i[:, None] * NP + m[None, :]).to(tl.float32)
                right = tl.load(old_c + k[None, :] * NP + m[:, None]).to(tl.float32)
                product = tl.dot(left, right, product, input_precision=PRECISION)
            q = product.to(tl.float64) + _products(old_r, squared, i, k, N, NP) + tl.load(old_r + transposed)
            d2 = tl.load(diagonal + i)[:, None] + tl.load(diagonal + k)[None, :] - 2 * q
            own = tl.load(labels + i, mask=i < N, other=0)
            same = (own[:, None] == other[None, :]) & inside
            positive = same & (i[:, None] != k[None, :])
            negative = (same == 0) & inside
            valid = (tl.max(positive.to(tl.int32), 1) > 0) & (tl.max(negative.to(tl.int32), 1) > 0)
            high = tl.where(positive, nan_as(d2, float("inf")), float("-inf"))
            low = tl.where(negative, nan_as(d2, float("-inf")), float("inf"))
            _, p = tl.max(high, 1, return_indices=True)
            _, n = tl.min(low, 1, return_indices=True)
            v_a, v_b = _pair(old_c, old_r, squared, i, p, k, N, NP)
            square = tl.sum(v_a * v_b, 1)
            d_p = tl.sqrt(tl.where(square <= nothing, 0.0, square))
            v_a, v_b = _pair(old_c, old_r, squared, i, n, k, N, NP)
            square = tl.sum(v_a * v_b, 1)
            d_n = tl.sqrt(tl.where(square <= nothing, 0.0, square))
            slope = tl.where(valid, sigmoid(d_p - d_n), 0.0)
            tl.store(winners + i, p)
            tl.store(winners + NP + i, n)
            tl.store(weights + i, per_difference(slope, d_p, 0))
            tl.store(weights + NP + i, per_difference(-slope, d_n, 0))
        tl.debug_barrier()

        for r0 in range(0, NP, RB):
            i = r0 + tl.arange(0, RB)
            at = i[:, None] * NP + k[None, :]
            w_j = tl.load(weights + i)
            v_a, v_b = _pair(old_c, old_r, squared, i, tl.load(winners + i), k, N, NP)
            g_a, g_b = w_j[:, None] * v_a, w_j[:, None] * v_b
            w_j = tl.load(weights + NP + i)
            v_a, v_b = _pair(old_c, old_r, squared, i, tl.load(winners + NP + i), k, N, NP)
            g_a += w_j[:, None] * v_a
            g_b += w_j[:, None] * v_b
            # The anchors that chose a row: the first of each row, then the second, …, as many as the busiest row has.
            w = tl.where(tl.load(winners + k)[None, :] == i[:, None], tl.load(weights + k)[None, :], 0.0)
            w += tl.where(tl.load(winners + NP + k)[None, :] == i[:, None], tl.load(weights + NP + k)[None, :], 0.0)
            last = tl.zeros((RB,), tl.int32) - 1
            for _ in range(0, tl.max(tl.sum((w != 0).to(tl.int32), 1), 0)):
                last = tl.min(tl.where((w != 0) & (k[None, :] > last[:, None]), k[None, :], NP), 1)
                w_j = tl.sum(tl.where(k[None, :] == last[:, None], w, 0.0), 1)
                v_a, v_b = _pair(old_c, old_r, squared, i, tl.minimum(last, NP - 1), k, N, NP)
                g_a += w_j[:, None] * v_a
                g_b += w_j[:, None] * v_b

            scale = tl.zeros((RB,), tl.float64) + 1.0
            if size is not None:
                scale = tl.load(size + s * N + i, mask=i < N, other=0.0).to(tl.float64)
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
        tl.debug_barrier()


@triton.jit(do_not_specialize=["N"])
def _apply(x, c, out, N, D, set_stride, NP: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """X + C (X − mean): the rows of C sum to 0, so the mean only takes away digits that cancel."""
    s = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, NP)
    j = tl.arange(0, NP)
    k = tl.program_id(0) * BD + tl.arange(0, BD)
    mask = (i < N)[:, None] & (k < D)[None, :]
    at = s * N * D + i[:, None] * D + k[None, :]
    rows = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, rows - (tl.sum(rows, 0) / N)[None, :], 0.0)
    coefficients = tl.load(c + s * set_stride + i[:, None] * NP + j[None, :]).to(tl.float32)
    moved = rows + tl.dot(coefficients, centred, input_precision=PRECISION)
    tl.store(out + at, moved.to(out.dtype.element_ty), mask=mask)


def solve(x: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int, relative: bool) -> Tensor:
    """x: (N, D) or (S, N, D), contiguous, N ≤ SOLVER_ROWS."""
    n, dimension = x.shape[-2:]
    sets = x.shape[:-2].numel()
    NP = max(16, triton.next_power_of_2(n))

    def scratch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(sets, *shape, dtype=dtype, device=x.device)

    squared, c, r = scratch(n, n), scratch(2, NP, NP), scratch(2, NP, NP)
    diagonal, winners, weights = scratch(NP), scratch(2, NP, dtype=torch.int32), scratch(2, NP)
    size = torch.linalg.vector_norm(x.float(), dim=-1) if relative else None
    out = torch.empty_like(x)
    precision = dot_precision(squared, "fp32")
    tiles = triton.cdiv(n, 16)
    launch(_squared_distances, (tiles, tiles, sets), x, squared, n, dimension, BM=16, BK=32, num_warps=4)
    launch(
        _solve, (sets,),
        squared, labels.contiguous(), size, c, r, diagonal, winners, weights, n, steps, epsilon, step_size,
        NP=NP, RB=16, PRECISION=precision, num_warps=8, num_stages=2,
    )  # fmt: skip
    launch(
        _apply, (triton.cdiv(dimension, 32), sets), x, c[:, steps % 2], out, n, dimension, 2 * NP * NP,
        NP=NP, BD=32, PRECISION=precision, num_warps=8,
    )  # fmt: skip
    return out
