"""Circle loss and supervised contrastive loss, from the similarities s_ij = x_i·y_j of tiles.

    circle:       u = 1 − s_p or s_n,   l = γ (u + m)₊ (u − m),   term = softplus(LSE_p(l) + LSE_n(l))
                  w_ij = ∂term/∂s_ij = ∓ σ(LSE_p + LSE_n) exp(l_ij − LSE) γ (u + m)₊       (− for positives)
    contrastive:  l = s/τ,   term = LSE(l) − mean_p l_ip
                  w_ij = (exp(l_ij − LSE) − [j is a positive] / number of positives) / τ
    ∂x_i = Σ_j w_ij y_j,   ∂y_j = Σ_i w_ij x_i

Both losses are the mean of the terms, summed by one program per set in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.kernels._launch import dot_precision, launch, row_stride, sets_of_rows
from apd_kernels.kernels._logsumexp import (
    MAX_SPLITS,
    add_logits,
    add_weighted_rows,
    column_splits,
    merged,
    split_values,
    weight_blocks,
)
from apd_kernels.kernels._pairing import anchor_values, pair_masks, pairing_arguments
from apd_kernels.kernels._tiles import product
from apd_kernels.kernels.losses import sigmoid, softplus


@triton.jit
def circle_logits(s, positive, gamma, margin):
    """Logits, and their derivative by u where the weight (u + m)₊ is a constant."""
    u = tl.where(positive, 1 - s, s)
    by_u = gamma * tl.where(u + margin < 0, 0.0, u + margin)
    return by_u * (u - margin), by_u


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split", "splits", "scale", "margin"])
def _contrast(
    x, y, labels, y_labels, own, domains, y_domains, y_valid, sums, N, M, D, x_stride, y_stride,
    tiles_per_split, splits, scale, margin, one,
    CIRCLE: tl.constexpr, SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums over one split's columns, written to [which, set, split, row]: largest and total of the positives and of the
    negatives for CIRCLE, else largest and total of both, the positives' logits and their number."""
    split = tl.program_id(1)
    s = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < N
    x += s * N * x_stride
    y += s * M * y_stride
    label, own_row, domain = anchor_values(labels, own, domains, rows, row_mask)
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    third = tl.full((BM,), -float("inf") if CIRCLE else 0.0, tl.float32)
    fourth = tl.zeros((BM,), tl.float32)
    first = split * tiles_per_split * BN
    for n0 in range(first, tl.minimum(first + tiles_per_split * BN, M), BN):
        columns = n0 + tl.arange(0, BN)
        column_mask = columns < M
        acc, _, _ = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                            BM, BN, BK, PRECISION, False)  # fmt: skip
        positive, negative = pair_masks(label, own_row, domain, y_labels, own, y_domains, y_valid, rows, columns,
                                        row_mask, column_mask, SELF, POSITIVES, NEGATIVES)  # fmt: skip
        if CIRCLE:
            logits, _ = circle_logits(acc, positive, scale, margin)
            largest, total, _, _ = add_logits(largest, total, logits, positive)
            third, fourth, _, _ = add_logits(third, fourth, logits, negative)
        else:
            logits = acc * scale
            largest, total, _, _ = add_logits(largest, total, logits, positive | negative)
            third += tl.sum(tl.where(positive, logits, 0.0), 1)
            fourth += tl.sum(positive.to(tl.float32), 1)
    at = (s * splits + split) * N + rows
    step = tl.num_programs(2).to(tl.int64) * splits * N
    tl.store(sums + at, largest, mask=row_mask)
    tl.store(sums + step + at, total, mask=row_mask)
    tl.store(sums + 2 * step + at, third, mask=row_mask)
    tl.store(sums + 3 * step + at, fourth, mask=row_mask)


@triton.jit(do_not_specialize=["N", "splits"])
def _contrast_terms(
    sums, terms, first, second, N, splits, CIRCLE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Terms of a block of anchors, 0 for one without its pairs. For CIRCLE `first` and `second` are LSE_p and LSE_n,
    else LSE and the number of positives; `first` is −inf for an anchor without a term."""
    infinity: tl.constexpr = float("inf")
    s = tl.program_id(1).to(tl.int64)
    sets = tl.num_programs(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, log_sum, _ = merged(sums, 0, s, sets, rows, N, splits, SPLITS)
    if CIRCLE:
        other, result, _ = merged(sums, 2, s, sets, rows, N, splits, SPLITS)
        valid = (total != 0) & (other != 0)
        term = softplus(tl.where(valid, log_sum + result, 0.0))
    else:
        of_positives = tl.sum(split_values(sums, 2, s, sets, rows, N, splits, 0.0, SPLITS), 1)
        result = tl.sum(split_values(sums, 3, s, sets, rows, N, splits, 0.0, SPLITS), 1)
        valid = result > 0
        term = log_sum - of_positives / tl.where(valid, result, 1.0)
    at, mask = s * N + rows, rows < N
    tl.store(terms + at, tl.where(valid, term, 0.0), mask=mask)
    tl.store(first + at, tl.where(valid, log_sum, -infinity), mask=mask)
    tl.store(second + at, tl.where(valid, result, 1.0), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _contrast_mean(terms, first, loss, share, N, BLOCK: tl.constexpr):
    """One program a set: the mean of its terms, and 1 / their number."""
    s = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(terms + s * N + i, mask=i < N, other=0.0)
        count += (tl.load(first + s * N + i, mask=i < N, other=-float("inf")) != -float("inf")).to(tl.int32)
    scale = 1.0 / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(loss + s, tl.sum(total, 0) * scale)
    tl.store(share + s, scale)


@triton.jit(do_not_specialize=["start", "stop", "N", "M", "height", "scale", "margin"])
def _contrast_weights(
    x, y, labels, y_labels, own, domains, y_domains, y_valid, first, second, weights,
    start, stop, N, M, D, width, height, x_stride, y_stride, scale, margin, one,
    CIRCLE: tl.constexpr, SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w_ij of the anchors from `start` to `stop`; 0 in the padding."""
    s = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = start + place
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < stop, columns < M
    x += s * N * x_stride
    y += s * M * y_stride
    acc, _, _ = product(x, y, rows, columns, row_mask, column_mask, D, x_stride, y_stride, one,
                        BM, BN, BK, PRECISION, False)  # fmt: skip
    label, own_row, domain = anchor_values(labels, own, domains, rows, row_mask)
    positive, negative = pair_masks(label, own_row, domain, y_labels, own, y_domains, y_valid, rows, columns,
                                    row_mask, column_mask, SELF, POSITIVES, NEGATIVES)  # fmt: skip
    log_sum = tl.load(first + s * N + rows, mask=row_mask, other=-float("inf"))
    result = tl.load(second + s * N + rows, mask=row_mask, other=1.0)
    paired = (positive | negative) & (log_sum != -float("inf"))[:, None]
    if CIRCLE:
        logits, by_u = circle_logits(acc, positive, scale, margin)
        outer = sigmoid(tl.where(log_sum == -float("inf"), 0.0, log_sum + result))[:, None]
        of_side = tl.where(positive, log_sum[:, None], result[:, None])
        w = outer * by_u * tl.exp(tl.where(paired, logits - of_side, 0.0))
        w = tl.where(positive, -w, w)
    else:
        softmax = tl.exp(tl.where(paired, acc * scale - log_sum[:, None], 0.0))
        w = scale * (softmax - tl.where(positive, 1.0 / result[:, None], 0.0))
    weights += (s * height + place)[:, None] * width + columns[None, :]
    tl.store(weights, tl.where(paired, w, 0.0), mask=row_mask[:, None] & (columns < width)[None, :])


@triton.jit(do_not_specialize=["size"])
def _contrast_scaled(gradient, share, total, out, size, BLOCK: tl.constexpr):
    """g · share · total of one set."""
    s = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(gradient + s) * tl.load(share + s)
    tl.store(out + s * size + i, tl.load(total + s * size + i, mask=i < size) * factor, mask=i < size)


def contrastive_loss(
    x: Tensor,
    y: Tensor | None,
    prepared: Operands,
    pairing: Pairing,
    form: str,
    scale: float,
    margin: float,
    precision: str,
    needs_x: bool,
    needs_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_contrast`, `_contrast_terms`, `_contrast_mean`; for gradients, `_contrast_weights` and sums by block."""
    a = sets_of_rows(x)
    b = a if y is None else sets_of_rows(y)
    sets, n, dimension = a.shape
    m = b.shape[1]
    for_x = torch.zeros(x.shape if needs_x else 0, dtype=torch.float32, device=x.device)
    for_y = torch.zeros(0 if y is None or not needs_y else y.shape, dtype=torch.float32, device=x.device)
    if m == 0:
        loss = torch.zeros(x.shape[:-2], dtype=torch.float32, device=x.device)
        return loss, torch.ones_like(loss), for_x, for_y
    loss, share = (torch.empty(x.shape[:-2], dtype=torch.float32, device=x.device) for _ in range(2))
    tensors, rules = pairing_arguments(pairing)
    constants: dict[str, Any] = dict(zip(("SELF", "POSITIVES", "NEGATIVES"), rules, strict=True))
    constants.update(CIRCLE=form == "circle", PRECISION=dot_precision(a, precision))
    BM, BN, BK = 64, 32, 32
    row_tiles = triton.cdiv(n, BM)
    splits, tiles_per_split = column_splits(row_tiles, triton.cdiv(m, BN), sets)
    sums = torch.empty(4, sets, splits, n, dtype=torch.float32, device=x.device)
    terms, first, second = (torch.empty(sets, n, dtype=torch.float32, device=x.device) for _ in range(3))
    launch(
        _contrast, (row_tiles, splits, sets),
        a, b, *tensors, sums, n, m, dimension, row_stride(a), row_stride(b),
        tiles_per_split, splits, scale, margin, 1.0,
        **constants, BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3,
    )  # fmt: skip
    BLOCK = 16
    launch(
        _contrast_terms, (triton.cdiv(n, BLOCK), sets), sums, terms, first, second, n, splits,
        CIRCLE=form == "circle", SPLITS=MAX_SPLITS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    launch(_contrast_mean, (sets,), terms, first, loss, share, n, BLOCK=1024, num_warps=4)
    if needs_x or needs_y:
        for block, weights in weight_blocks(n, m, sets, x.device):
            _, height, width = weights.shape
            BM, BN, BK = 64, 64, 32
            launch(
                _contrast_weights, (triton.cdiv(width, BN), triton.cdiv(block.stop - block.start, BM), sets),
                a, b, *tensors, first, second, weights, block.start, block.stop, n, m, dimension, width, height,
                row_stride(a), row_stride(b), scale, margin, 1.0,
                **constants, BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3,
            )  # fmt: skip
            add_weighted_rows(for_x, for_x if y is None else for_y, weights, a, b, block, precision, less_own=False)
    return loss, share, for_x, for_y


def contrastive_loss_scaled(gradient: Tensor, share: Tensor, for_x: Tensor, for_y: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `_contrast_scaled` for x and for y."""
    sets = share.numel()
    scaled = []
    for total in (for_x, for_y):
        out = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        size = total.numel() // max(1, sets)
        launch(
            _contrast_scaled, (triton.cdiv(size, 1024), sets),
            gradient.contiguous(), share, total.contiguous(), out, size, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        scaled.append(out)
    return scaled[0], scaled[1]
