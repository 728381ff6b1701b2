"""Rank by counting: similarities of positive pairs, then the negatives that reach them.

    s_ij = q_i · g_j − ½‖g_j‖²   (without half squares: q_i · g_j)
    n_ip = #{ j of another identity : s_ij ≥ t_ip }

Queries and gallery are sorted by identity, so the gallery rows of query i's identity are the range
first_i … last_i: they lie in a band of tiles, the only ones that the first kernel multiplies. The second takes all
tiles; of a row's ascending thresholds it walks only those that the tile's best negative reaches. Both get s from the
same function with the same tile, so a pair has the same bits in both, and equal gallery rows tie exactly. The counts
are added with integer atomics, whose order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels.kernels._launch import dot_precision, launch
from apd_kernels.kernels._tiles import product

# Both kernels: other sizes in one of them would take the same pair another way.
TILE = {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
GROUP = 8  # row blocks that walk the gallery together, so that a gallery tile is read from L2


@triton.jit
def _similarity(
    q, g, half_squares, rows, columns, Q, G, D, one,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    s, _, _ = product(q, g, rows, columns, rows < Q, columns < G, D, D, D, one,
                      BM, BN, BK, PRECISION, False)  # fmt: skip
    if half_squares is not None:
        s -= tl.load(half_squares + columns, mask=columns < G, other=0.0)[None, :]
    return tl.maximum(s, -3.4028234663852886e38)  # infinitely far, but there


@triton.jit(do_not_specialize=["Q", "G"])
def _same_identity(
    q, g, half_squares, first, last, starts, out, Q, G, D, one,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN
    columns = column + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask = rows < Q
    begin = tl.load(first + rows, mask=row_mask, other=G)
    end = tl.load(last + rows, mask=row_mask, other=0)
    if (tl.min(begin, 0) < column + BN) & (tl.max(end, 0) > column):
        s = _similarity(q, g, half_squares, rows, columns, Q, G, D, one,
                        PRECISION, BM, BN, BK)  # fmt: skip
        # Column by column: a tile of scattered addresses does not fit the registers.
        place = tl.load(starts + rows, mask=row_mask, other=0) - begin
        own = tl.maximum(begin, column)
        end = tl.minimum(end, column + BN)
        for _ in range(0, tl.max(end - own, 0)):
            value = tl.max(tl.where(columns[None, :] == own[:, None], s, float("-inf")), 1)
            tl.store(out + place + own, value, mask=own < end)
            own += 1


@triton.jit(do_not_specialize=["Q", "G"])
def _count_negatives(
    q, g, half_squares, first, last, thresholds, starts, count, Q, G, D, one,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BM)
    group = tl.program_id(0) // (GROUP * tl.cdiv(G, BN))
    within = tl.program_id(0) % (GROUP * tl.cdiv(G, BN))
    height = min(blocks - group * GROUP, GROUP)
    rows = (group * GROUP + within % height) * BM + tl.arange(0, BM)
    columns = within // height * BN + tl.arange(0, BN)
    row_mask = rows < Q
    s = _similarity(q, g, half_squares, rows, columns, Q, G, D, one,
                    PRECISION, BM, BN, BK)  # fmt: skip
    begin = tl.load(first + rows, mask=row_mask, other=0)
    end = tl.load(last + rows, mask=row_mask, other=0)
    same = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
    s = tl.where(same | (columns >= G)[None, :], float("-inf"), s)

    # How many thresholds the best negative reaches, by binary search: all below `low`, none from `high` on.
    best = tl.max(s, 1)
    start = tl.load(starts + rows, mask=row_mask, other=0)
    low = tl.zeros((BM,), tl.int64)
    high = tl.load(starts + rows + 1, mask=row_mask, other=0) - start
    left = tl.max(high, 0)
    while left > 0:
        middle = (low + high) // 2
        open = low < high
        reached = open & (tl.load(thresholds + start + middle, mask=open, other=float("inf")) <= best)
        low = tl.where(reached, middle + 1, low)
        high = tl.where(open & (reached == 0), middle, high)
        left = left // 2
    for p in range(0, tl.max(low, 0)):
        walked = p < low
        t = tl.load(thresholds + start + p, mask=walked, other=float("inf"))
        n = tl.sum((s >= t[:, None]).to(tl.int32), 1)
        tl.atomic_add(count + start + p, n, mask=walked, sem="relaxed")


def same_identity_similarities(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    first: Tensor,
    last: Tensor,
    starts: Tensor,
    pairs: int,
    precision: str,
) -> Tensor:
    """Launch `_same_identity` on all tiles; those beside the band of positive pairs return at once."""
    similarity = torch.empty(pairs, dtype=torch.float32, device=query.device)
    (q, d), g = query.shape, gallery.shape[0]
    launch(
        _same_identity, (triton.cdiv(g, TILE["BN"]), triton.cdiv(q, TILE["BM"])),
        query, gallery, half_squares, first, last, starts, similarity, q, g, d, 1.0,
        PRECISION=dot_precision(query, precision), **TILE,
    )  # fmt: skip
    return similarity


def count_negatives(
    query: Tensor,
    gallery: Tensor,
    half_squares: Tensor | None,
    first: Tensor,
    last: Tensor,
    thresholds: Tensor,
    starts: Tensor,
    precision: str,
) -> Tensor:
    """Launch `_count_negatives`: one program a tile."""
    count = torch.zeros(thresholds.shape, dtype=torch.int32, device=query.device)
    (q, d), g = query.shape, gallery.shape[0]
    launch(
        _count_negatives, (triton.cdiv(q, TILE["BM"]) * triton.cdiv(g, TILE["BN"]),),
        query, gallery, half_squares, first, last, thresholds, starts, count, q, g, d, 1.0,
        PRECISION=dot_precision(query, precision), GROUP=GROUP, **TILE,
    )  # fmt: skip
    return count
