"""Positives and negatives of a tile of pairs, on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from apd_kernels._core.pairing import DOMAIN_RULES, Pairing

RULE_NUMBER = {rule: number for number, rule in enumerate(DOMAIN_RULES)}


@triton.jit
def anchor_values(labels, own, domains, rows, row_mask):
    """What a tile's rows bring to `pair_masks`: identity, own row of y and domain of each anchor.

    Labels are int64 in registers, so that int8 −1 is not uint8 255. Without `own` or `domains` the label stands in.
    """
    label = tl.load(labels + rows, mask=row_mask, other=0).to(tl.int64)
    own_row = label
    domain = label
    if own is not None:
        own_row = tl.load(own + rows, mask=row_mask, other=-1).to(tl.int64)
    if domains is not None:
        domain = tl.load(domains + rows, mask=row_mask, other=0).to(tl.int64)
    return label, own_row, domain


@triton.jit
def pair_masks(
    label, own_row, domain, y_labels, own, y_domains, y_valid, rows, columns, row_mask, column_mask,
    SELF: tl.constexpr, POSITIVES: tl.constexpr, NEGATIVES: tl.constexpr,
):  # fmt: skip
    """Positives and negatives, two bool tiles (rows, columns). `own`, `y_domains`, `y_valid` may be None."""
    if y_valid is not None:
        column_mask = column_mask & (tl.load(y_valid + columns, mask=column_mask, other=0) != 0)
    allowed = row_mask[:, None] & column_mask[None, :]
    if own is not None:
        allowed = allowed & (own_row[:, None] != columns[None, :])
    same = label[:, None] == tl.load(y_labels + columns, mask=column_mask, other=0).to(tl.int64)[None, :]
    positive = same & allowed
    negative = (same == 0) & allowed
    if SELF:
        positive = positive & (rows[:, None] != columns[None, :])
    if y_domains is not None:
        within = domain[:, None] == tl.load(y_domains + columns, mask=column_mask, other=0).to(tl.int64)[None, :]
        if POSITIVES == 1:
            positive = positive & within
        if POSITIVES == 2:
            positive = positive & (within == 0)
        if NEGATIVES == 1:
            negative = negative & within
        if NEGATIVES == 2:
            negative = negative & (within == 0)
    return positive, negative


def pairing_arguments(pairing: Pairing) -> tuple[tuple[Tensor | None, ...], tuple[bool, int, int]]:
    """(labels, y_labels, own, domains, y_domains, y_valid) contiguous, without y those of x; and the rules: whether
    anchors are rows of y in their places, and the numbers of the domain rules."""
    labels, y_labels, own, domains, y_domains, y_valid, positives, negatives = pairing
    labels = labels.contiguous()
    domains = None if domains is None else domains.contiguous()
    tensors = (
        labels,
        labels if y_labels is None else y_labels.contiguous(),
        None if own is None else own.contiguous(),
        domains,
        domains if y_domains is None else y_domains.contiguous(),
        None if y_valid is None else y_valid.contiguous(),
    )
    return tensors, (y_labels is None, RULE_NUMBER[positives], RULE_NUMBER[negatives])
