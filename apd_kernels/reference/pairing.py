"""Positives and negatives as masks over blocks of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.pairing import Pairing

EVERY = slice(None)


def pair_masks(pairing: Pairing, rows: slice, columns: slice = EVERY) -> tuple[Tensor, Tensor]:
    """Positives and negatives of some anchors among some rows of y, two bool tensors (rows, columns)."""
    labels, y_labels, own, domains, y_domains, y_valid, positives, negatives = pairing
    others = labels if y_labels is None else y_labels
    start, stop, _ = columns.indices(len(others))
    positive = labels[rows, None] == others[None, columns]
    negative = ~positive
    if y_labels is None:
        positive.diagonal(rows.start - start).fill_(False)  # empty where the blocks do not meet
    if own is not None:
        other = own[rows, None] != torch.arange(start, stop, device=labels.device)
        positive &= other
        negative &= other
    if y_valid is not None:
        positive &= y_valid[columns]
        negative &= y_valid[columns]
    if domains is not None:
        within = domains[rows, None] == (domains if y_domains is None else y_domains)[None, columns]
        for mask, rule in ((positive, positives), (negative, negatives)):
            if rule != "all":
                mask &= within if rule == "within" else ~within
    return positive, negative
