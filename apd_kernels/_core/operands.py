"""What products are taken of: rows as they are or prepared, and the checks of both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.backend import resolve_backend
from apd_kernels._core.checks import check_choice, check_comparable, check_features
from apd_kernels._core.precision import resolve_precision
from apd_kernels._core.rows import unit_rows

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")


class Operands(NamedTuple):
    """Rows made ready for products; what is there, and in which form, is the backend's choice."""

    parts: Tensor | None = None  # the rows, centred, converted, split, padded; None: nothing is prepared
    half: Tensor | None = None  # ½‖row‖² of each row, for Euclidean distances
    centre: Tensor | None = None  # what was subtracted from the rows
    root: Tensor | None = None  # scale^−½ of each row
    largest: Tensor | None = None  # max root

    def of_rows(self, rows: Tensor) -> Operands:
        """Those of chosen rows of one set, whose parts are (M, …)."""
        parts, half, root = (None if x is None else x[rows] for x in (self.parts, self.half, self.root))
        return Operands(parts, half, self.centre, root, self.largest)


class GalleryRows(NamedTuple):
    """Rows made ready for the products of `knn` with any queries, or only those rows that are searched."""

    source: Tensor  # as given (of unit length in prepared rows for "cosine"): Euclidean distances are taken from it
    largest: Tensor  # (G,): max |x| of each row
    scale: Tensor  # the power of two that is in `products`
    products: Tensor  # scaled and centred as in `rank_metrics`, of unit length for "cosine"
    half_squares: Tensor | None = None  # only for Euclidean metrics, as is the centre
    centre: Tensor | None = None

    def only(self, rows: Tensor) -> GalleryRows:
        """With the products of these rows."""
        half = None if self.half_squares is None else self.half_squares[rows]
        return self._replace(products=self.products[rows], half_squares=half)


class PreparedRows:
    """Rows as products with them are taken: see `prepare_rows`.

    >>> import torch
    >>> from apd_kernels import prepare_rows
    >>> kept = prepare_rows(torch.ones(5, 2), metric="dot", precision="fp32")
    >>> kept
    PreparedRows(shape=(5, 2), metric='dot', precision='fp32', backend='torch', device=cpu)
    >>> kept.nbytes()
    0
    """

    def __init__(self, rows: Tensor, operands: Operands, dtype: torch.dtype, metric: str, precision: str, backend: str):
        self.rows = rows  # (M, D) or (S, M, D): what distances of chosen rows are taken from; unit rows for "cosine"
        self.operands = operands  # of the backend: see `prepare_rows` in its prepared.py
        self.dtype = dtype  # of the rows that were given
        self.metric = metric  # "euclidean" (also for squares), "cosine" or "dot"
        self.precision = precision
        self.backend = backend
        self.searched: GalleryRows | None = None  # which the first `knn` makes
        self._version = None if rows.is_inference() else rows._version

    @property
    def shape(self) -> torch.Size:
        """(M, D) or (S, M, D)."""
        return self.rows.shape

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def nbytes(self) -> int:
        """Memory that is held beside the rows themselves."""
        kept = [tensor for tensor in (*self.operands, *(self.searched or ())) if tensor is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        storages.pop(self.rows.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    def check_unchanged(self, name: str) -> None:
        """The rows may be the caller's memory: what was made of them would not be theirs any more."""
        if self._version is not None and not torch.compiler.is_compiling() and self.rows._version != self._version:
            raise RuntimeError(f"{name}: its rows were changed in place after prepare_rows; prepare them again")

    def __repr__(self) -> str:
        return (
            f"PreparedRows(shape={tuple(self.shape)}, metric={self.metric!r}, precision={self.precision!r}, "
            f"backend={self.backend!r}, device={self.device})"
        )


def checked_operands(
    x: Tensor, y: Tensor | PreparedRows | None, metric: str, precision: str | None
) -> tuple[Tensor, Tensor | None, Operands, str, str]:
    """Check what distances are taken of: x, y, the prepared operands of y, precision and backend for an operator.

    Rows are of unit length for "cosine"; there are no operands where y is not prepared.
    """
    check_features("x", x)
    check_choice("metric", metric, METRICS)
    if not isinstance(y, PreparedRows):
        if y is not None:
            check_comparable("y", y, "x", x)
        backend = resolve_backend(x)
        if metric == "cosine":
            x, y = unit_rows(x), None if y is None else unit_rows(y)
        return x, y, Operands(), resolve_precision(precision), backend
    check_prepared("y", y, "x", x, metric, precision)
    return unit_rows(x) if metric == "cosine" else x, y.rows, y.operands, y.precision, y.backend


def check_prepared(name: str, y: PreparedRows, other_name: str, x: Tensor, metric: str, precision: str | None) -> None:
    """`y` are unchanged rows to compare with those of `x`, prepared for this metric, precision and backend."""
    y.check_unchanged(name)
    if y.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} as {other_name}, got {y.dtype} that were prepared")
    if y.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as {other_name}, got {y.device}")
    if len(y.shape) != x.dim() or y.shape[-1] != x.shape[-1] or y.shape[:-2] != x.shape[:-2]:
        expected = (*x.shape[:-2], "M", x.shape[-1])
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, expected))}), got {tuple(y.shape)}")
    for what, wanted, found in (
        ("metric", kind_of(metric), y.metric),
        ("precision", y.precision if precision is None else resolve_precision(precision), y.precision),
        ("backend", resolve_backend(x), y.backend),
    ):
        if wanted != found:
            raise ValueError(f"{name}: expected rows prepared for {what} {wanted!r}, got {found!r}")


def kind_of(metric: str) -> str:
    return "euclidean" if metric == "sqeuclidean" else metric
