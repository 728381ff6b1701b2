"""Rows made ready for distances once: a memory bank or a gallery that many batches are compared with."""

from __future__ import annotations

from torch import Tensor

from apd_kernels._core.backend import implementation, resolve_backend
from apd_kernels._core.checks import check_choice, check_features
from apd_kernels._core.operands import METRICS, PreparedRows, kind_of
from apd_kernels._core.operators import implementation_context
from apd_kernels._core.precision import resolve_precision
from apd_kernels._core.rows import unit_rows


def prepare_rows(y: Tensor, *, metric: str = "euclidean", precision: str | None = None) -> PreparedRows:
    """Norms, centred copies and precision splits of rows, to be kept and given as `y` in place of the rows.

    `pairwise_distance`, `batch_hard`, `triplet_loss` and `knn` otherwise make them anew in each call. The copies take
    as much memory as the rows in float32 (half of it for ``"bf16"``; nothing but norms for half-precision rows on a
    GPU); a first `knn` adds a copy of its own.
    They are constants: no gradient reaches `y`. The rows themselves are not copied (but for ``"cosine"``), and using
    them after an in-place change is an error. Call it outside of functions that `torch.compile` compiles.

    Args:
        y: rows, shape (M, D) or (S, M, D); float16, bfloat16, float32 or float64.
        metric: ``"euclidean"`` (also serves ``"sqeuclidean"``), ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.
        precision: of products on tensor cores, as in `pairwise_distance`; those of every later call.

    Returns:
        `PreparedRows`, which serves calls with the same kind of metric, dtype, device and backend.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.

    >>> import torch
    >>> from apd_kernels import batch_hard, prepare_rows
    >>> bank, identities = torch.tensor([[0.0, 1.0], [4.0, 0.0], [9.0, 0.0]]), torch.tensor([7, 8, 7])
    >>> kept = prepare_rows(bank)
    >>> batch_hard(torch.tensor([[0.0, 0.0]]), torch.tensor([7]), kept, identities).distances
    Pair(positive=tensor([9.]), negative=tensor([4.]))
    """
    check_features("y", y)
    check_choice("metric", metric, METRICS)
    precision = resolve_precision(precision)
    backend = resolve_backend(y)
    dtype = y.dtype
    rows = unit_rows(y.detach()) if metric == "cosine" else y.detach()
    kind = kind_of(metric)
    with implementation_context(rows, backend):
        operands = implementation(backend, "prepared").prepare_rows(rows, kind == "euclidean", precision)
    return PreparedRows(rows, operands, dtype, kind, precision, backend)
