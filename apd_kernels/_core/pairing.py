"""Which rows of y are positives and which are negatives of an anchor, as every mining and pair loss understands it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_floating, check_integers, check_tensor

DOMAIN_RULES = ("all", "within", "across")


class Pairing(NamedTuple):
    """Positives have the anchor's identity, negatives another one; then some of both are left out."""

    labels: Tensor  # (N,), integers
    y_labels: Tensor | None = None  # (M,), integers; None: y is x, and no anchor is paired with itself
    own: Tensor | None = None  # (N,), integers: the row of y that is the anchor itself; -1 for none
    domains: Tensor | None = None  # (N,), integers: the domain of each anchor
    y_domains: Tensor | None = None  # (M,), integers; None with y_labels None
    y_valid: Tensor | None = None  # (M,), bool: rows that may be chosen, of x without y
    positives: str = "all"  # "within": only of the anchor's domain; "across": only of other domains
    negatives: str = "all"

    def of_labels_only(self) -> bool:
        """Whether labels decide alone (and, without y, the place on the diagonal)."""
        return self.own is None and self.domains is None and self.y_valid is None


def checked_pairing(
    x: Tensor,
    labels: Tensor,
    y: Any,
    y_labels: Tensor | None,
    own: Tensor | None,
    domains: Tensor | None,
    y_domains: Tensor | None,
    y_valid: Tensor | None,
    positives: str,
    negatives: str,
) -> Pairing:
    """The pairing of anchors x (N, D) or (S, N, D) with rows y (M, D) or (S, M, D); every argument checked.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice, or one without its counterpart.
    """
    n = x.shape[-2]
    check_integers("labels", labels, n, x.device)
    for name, value in (("y_labels", y_labels), ("own", own), ("y_domains", y_domains)):
        if y is None and value is not None:
            raise ValueError(f"y: expected with {name}, got None")
    if y is not None:
        if y_labels is None:
            raise ValueError("y_labels: expected with y, got None")
        check_integers("y_labels", y_labels, y.shape[-2], x.device)
        if own is not None:
            check_integers("own", own, n, x.device)
    if y_valid is not None:
        m = n if y is None else y.shape[-2]
        check_tensor("y_valid", y_valid)
        if y_valid.dtype != torch.bool:
            raise TypeError(f"y_valid: expected torch.bool, got {y_valid.dtype}")
        if y_valid.shape != (m,):
            raise ValueError(f"y_valid: expected shape ({m},), got {tuple(y_valid.shape)}")
        if y_valid.device != x.device:
            raise ValueError(f"y_valid: expected device {x.device}, got {y_valid.device}")
    check_choice("positives", positives, DOMAIN_RULES)
    check_choice("negatives", negatives, DOMAIN_RULES)
    if domains is None:
        if y_domains is not None:
            raise ValueError("domains: expected with y_domains, got None")
        for name, rule in (("positives", positives), ("negatives", negatives)):
            if rule != "all":
                raise ValueError(f"domains: expected with {name}={rule!r}, got None")
    else:
        check_integers("domains", domains, n, x.device)
        if y is not None:
            if y_domains is None:
                raise ValueError("y_domains: expected with domains and y, got None")
            check_integers("y_domains", y_domains, y.shape[-2], x.device)
        if positives == negatives == "all":  # nothing to leave out: the shorter path
            domains = y_domains = None
    return Pairing(labels, y_labels, own, domains, y_domains, y_valid, positives, negatives)


def checked_matrix_pairing(distances: Tensor, pairing: Pairing) -> Pairing:
    """The pairing of the rows of a distance matrix (N, M) with its columns; both checked.

    Raises:
        TypeError, ValueError: as `checked_pairing`; a pairing without `y_labels` of a matrix that is not square.
    """
    check_floating("distances", distances)
    if distances.dim() != 2:
        raise ValueError(f"distances: expected shape (N, M), got {tuple(distances.shape)}")
    if not isinstance(pairing, Pairing):
        raise TypeError(f"pairing: expected a Pairing, got {type(pairing).__name__}")
    rows, columns = distances.shape
    if pairing.y_labels is None and rows != columns:
        raise ValueError(f"pairing: expected y_labels with distances of shape {(rows, columns)}, got None")
    others = None if pairing.y_labels is None else distances.mT  # as many as columns
    labels, y_labels, own, domains, y_domains, y_valid, positives, negatives = pairing
    return checked_pairing(distances, labels, others, y_labels, own, domains, y_domains, y_valid, positives, negatives)
