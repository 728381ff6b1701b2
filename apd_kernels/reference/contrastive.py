"""Circle and supervised contrastive loss in blocks of rows; the gradient comes from the block in hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.rows import row_blocks
from apd_kernels.reference.logsumexp import add_weighted_rows, chunks, exponentials, products
from apd_kernels.reference.pairing import pair_masks
from apd_kernels.reference.prepared import operands


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
    """Mean of the terms, 1 / number of terms, and ∂sum/∂x_i = Σ_j w_ij y_j, ∂sum/∂y_j = Σ_i w_ij x_i."""
    a, b, _ = operands(x, y, prepared, False)
    rows, columns, sets = a.shape[-2], b.shape[-2], max(1, x.shape[:-2].numel())
    for_x = a.new_zeros(a.shape if needs_x else 0)
    for_y = for_x if y is None else a.new_zeros(b.shape if needs_y else 0)
    everything = y is not None and pairing.of_labels_only()  # every row of y is paired with every anchor
    terms, valid = a.new_zeros(a.shape[:-1]), torch.zeros(a.shape[:-1], dtype=torch.bool, device=a.device)
    for block in row_blocks(rows, columns, sets) if columns else ():
        similarities = products(a[..., block, :], b)
        for chunk in chunks(block, columns, sets):
            s = similarities[..., chunk.start - block.start : chunk.stop - block.start, :]
            masks = pair_masks(pairing, chunk)
            slopes = s if needs_x or needs_y else None
            if form == "circle":
                terms[..., chunk], valid[..., chunk] = _circle(s, *masks, scale, margin, slopes)
            else:
                paired = None if everything else masks[0] | masks[1]
                terms[..., chunk], valid[..., chunk] = _contrastive(s, masks[0], paired, scale, slopes)
        if needs_x or needs_y:
            # A term of an anchor that is paired with every row is finite only if every row is.
            finite = everything and a.device.type == "cpu" and bool(terms[..., block].isfinite().all())
            add_weighted_rows(for_x, for_y, similarities, a, b, block, y is None, finite=finite)
    share = valid.sum(-1).clamp_(min=1).to(a.dtype).reciprocal_()
    return torch.where(valid, terms, 0).sum(-1) * share, share, for_x, for_y if y is not None else a.new_empty(0)


def contrastive_loss_scaled(gradient: Tensor, share: Tensor, for_x: Tensor, for_y: Tensor) -> tuple[Tensor, Tensor]:
    """g · share · ∂sum, per set."""
    factor = (gradient * share)[..., None, None]
    scaled = [(side * factor).contiguous() if side.dim() > 1 else side.new_empty(0) for side in (for_x, for_y)]
    return scaled[0], scaled[1]


def _circle(
    s: Tensor, positive: Tensor, negative: Tensor, gamma: float, margin: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Terms and which count; ∂term/∂s into `slopes`. With u = 1 − s_p or s_n, both logits are γ (u + m)₊ (u − m)."""
    u = torch.where(positive, 1 - s, s)
    by_u = (u + margin).clamp_(min=0).mul_(gamma)
    logits = u.sub_(margin).mul_(by_u)
    e_p, sum_p, of_positives = exponentials(logits, positive)
    e_n, sum_n, of_negatives = exponentials(logits, negative)
    valid = (sum_p != 0) & (sum_n != 0)
    both = of_positives + of_negatives
    if slopes is not None:
        outer = torch.sigmoid(both)
        e_p.mul_(torch.where(valid, outer / sum_p, 0)[..., None])
        e_n.mul_(torch.where(valid, outer / sum_n, 0)[..., None]).sub_(e_p)
        torch.mul(e_n, by_u, out=slopes)
        _leave_out(slopes, positive | negative, valid, sum_p + sum_n)
    return F.softplus(both, threshold=40), valid


def _contrastive(
    s: Tensor, positive: Tensor, paired: Tensor | None, scale: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Terms and which count; ∂term/∂s into `slopes`. `paired` None: all are, and a NaN of any makes a term NaN."""
    logits = s * scale
    weights = positive.to(s.dtype)
    of_positives = (logits * weights if paired is None else torch.where(positive, logits, 0)).sum(-1)
    e, total, of_all = exponentials(logits, paired)
    count = weights.sum(-1)
    valid = (count > 0).expand(total.shape)
    count.clamp_(min=1)
    if slopes is not None:
        torch.mul(e, torch.where(valid, scale / total, 0)[..., None], out=slopes)
        slopes.addcmul_(weights, (scale / count)[..., None], value=-1)
        _leave_out(slopes, paired, valid, total)
    return of_all - of_positives / count, valid


def _leave_out(slopes: Tensor, paired: Tensor | None, valid: Tensor, sums: Tensor) -> None:
    """0 for pairs of no weight. They have it without this, but where a NaN makes a NaN of 0."""
    if slopes.device.type == "cpu" and bool(sums.isfinite().all()):  # elsewhere looking would wait for the device
        return
    kept = valid[..., None] if paired is None else paired & valid[..., None]
    slopes.masked_fill_(~kept, 0)
