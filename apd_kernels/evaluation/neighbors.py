"""The k nearest gallery rows of every query, exactly, without a Q×G matrix.

For a fixed query the similarity s(x, y) = x·y ("dot", and "cosine" of unit rows) or x·y − ½‖y‖² (Euclidean) falls as
the distance grows. The k largest similarities are selected from blocks of products, equal ones by the lowest index;
equal gallery rows have equal bits. Then the distance of each winner is taken from its two rows, which loses no digits
to cancellation, and the winners are ordered by it.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.backend import implementation, resolve_backend
from apd_kernels._core.checks import (
    check_choice,
    check_features,
    check_gallery,
    check_integers,
    check_length,
    check_number,
    check_tensor,
)
from apd_kernels._core.compiler import outside_of_graphs
from apd_kernels._core.operands import METRICS, GalleryRows, PreparedRows, check_prepared
from apd_kernels._core.operators import implementation_context, internal_dtype
from apd_kernels._core.precision import resolve_precision
from apd_kernels.evaluation.retrieval_metrics import Unlabelled, checked_unlabelled
from apd_kernels.evaluation.rows import centred_products, check_places, half_squares, largest_of, scale_of, sorted_rows

_SAME = ("query_ids", "gallery_ids", "query_cams", "gallery_cams")


class Neighbors(NamedTuple):
    """What `knn` found, nearest first; both of shape (Q, k)."""

    distances: Tensor  # float32 (float64 for float64); inf where there is no further row
    indices: Tensor  # int64, rows of the gallery; -1 where there is none


@outside_of_graphs("knn reads its data: call it outside the compiled part")
@torch.no_grad()
def knn(
    query: Tensor,
    gallery: Tensor | PreparedRows,
    k: int,
    *,
    metric: str = "cosine",
    exclude_same: tuple[Tensor, ...] | None = None,
    exclude_self: bool | Tensor = False,
    mask: Tensor | None = None,
    max_distance: float | None = None,
    precision: str | None = None,
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> Neighbors:
    """The k nearest gallery rows of every query, exactly; equal distances are ordered by index.

    Neighbors are selected from products and their distances then taken from the two rows. So the rounding of the
    products decides only which of several rows at the same distance, up to that rounding, come in at place k. Equal
    gallery rows always tie (on the CPU with MKL, as for `rank_metrics`).

    An evaluation operation: it waits for the GPU several times, raises on what it finds in the data, and is neither
    compiled by `torch.compile` nor captured in a CUDA graph. Memory: a copy of the features, the result, and some
    100 MB (more only where k exceeds a hundred thousand).

    Args:
        query: features, shape (Q, D); float16, bfloat16, float32 or float64.
        gallery: features, shape (G, D), dtype and device as `query`; or such rows after `prepare_rows`: the first
            search makes its copy of them, later ones take it. The result has the same bits, for "cosine" up to the
            rounding of unit rows.
        k: number of neighbors of each query, at most G or 65,536; where fewer rows are left, the rest is filled with
            "none".
        metric: ``"cosine"``, ``"euclidean"``, ``"sqeuclidean"`` or ``"dot"``, as in `pairwise_distance`.
        exclude_same: ``(query_ids, gallery_ids, query_cams, gallery_cams)``, integers of shape (Q,) or (G,), in the
            order of `rank_metrics`: gallery rows of the query's identity *and* camera are left out.
            ``(ids, cams)`` where the queries are the gallery: the same tensor, or with ``exclude_self=True``.
        exclude_self: True where query i is gallery row i, which is then left out; or the gallery row of each query,
            integers of shape (Q,), −1 for none.
        mask: True for gallery rows that may be found, bool of shape (G,), or (Q, G) with a choice for each query.
        max_distance: farther rows are not found (open-set search); a row at exactly this distance is.
        precision: of float32 products on tensor cores, as in `pairwise_distance`.
        junk, unknown_camera: the identity and the camera in `exclude_same` that equal nothing, as in `rank_metrics`.

    Returns:
        `Neighbors` ``(distances, indices)``, on the device of the features. Where there is no further row: inf, −1.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; features that are not finite.
        RuntimeError: called while a CUDA graph is captured.

    >>> import torch
    >>> gallery = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [3.0, 4.0]])
    >>> knn(gallery[:1], gallery, 3, metric="euclidean")
    Neighbors(distances=tensor([[0., 5., 5.]]), indices=tensor([[0, 1, 3]]))
    >>> knn(gallery[:1], gallery, 3, metric="euclidean", max_distance=4.0, mask=torch.tensor([True, True, True, False]))
    Neighbors(distances=tensor([[0., inf, inf]]), indices=tensor([[ 0, -1, -1]]))
    """
    check_choice("metric", metric, METRICS)
    precision = _checked_features(query, gallery, metric, precision)
    same = _checked_exclusion(exclude_same, query, gallery, exclude_self)
    _check(query, gallery, k, exclude_self, mask)
    if max_distance is not None:
        check_number("max_distance", max_distance, minimum=-float("inf") if metric == "dot" else 0.0)
    backend = resolve_backend(query)
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("knn: expected a call outside CUDA graph capture; its steps depend on the data")
    if not isinstance(exclude_self, bool):
        check_places("exclude_self", exclude_self.long(), gallery.shape[0])
    largest = largest_of("query", query)
    searched = _searched(query, gallery.shape[0], same, exclude_self, mask, checked_unlabelled(junk, unknown_camera))
    rows = _gallery_rows(gallery, searched.rows, metric, backend)
    queries, images = query.shape[0], searched.rows.numel()
    distances = torch.full((queries, k), torch.inf, dtype=internal_dtype(query), device=query.device)
    indices = torch.full((queries, k), -1, dtype=torch.int64, device=query.device)
    if queries == 0 or images == 0:
        return Neighbors(distances, indices)
    search = implementation(backend, "neighbors")
    operands = _operands(query, rows, largest, metric)
    with implementation_context(query, backend):
        found = search.nearest(*operands, *searched[1:], min(k, images), precision)
        of_found = _distances(search, query, operands, rows, searched.rows, largest, found, metric)
    of_found = torch.where(found == images, torch.inf, of_found)
    of_found, order = of_found.sort(dim=1, stable=True)  # `found` ascends: equal distances stay ordered by index
    found = found.gather(1, order)
    missing = found == images
    if max_distance is not None:
        missing |= of_found > max_distance
    distances[:, : found.shape[1]] = of_found.masked_fill(missing, torch.inf)
    indices[:, : found.shape[1]] = searched.rows[found.clamp(max=images - 1)].masked_fill(missing, -1)
    return Neighbors(distances, indices)


def _checked_features(query: Tensor, gallery: Tensor | PreparedRows, metric: str, precision: str | None) -> str:
    """The precision of products, which prepared rows bring."""
    check_features("query", query, sets=False)
    if isinstance(gallery, PreparedRows):
        check_prepared("gallery", gallery, "query", query, metric, precision)
        return gallery.precision
    check_gallery(gallery, query)
    return resolve_precision(precision)


def _checked_exclusion(
    exclude_same: tuple[Tensor, ...] | None,
    query: Tensor,
    gallery: Tensor | PreparedRows,
    exclude_self: bool | Tensor,
) -> tuple[Tensor, ...] | None:
    """`exclude_same` as (query_ids, gallery_ids, query_cams, gallery_cams)."""
    if exclude_same is None:
        return None
    among_themselves = exclude_self is True or gallery is query
    if among_themselves and isinstance(exclude_same, tuple) and len(exclude_same) == 2:
        ids, cams = exclude_same
        exclude_same = ids, ids, cams, cams
    if not isinstance(exclude_same, tuple) or len(exclude_same) != len(_SAME):
        got = f"{len(exclude_same)} values" if isinstance(exclude_same, tuple) else type(exclude_same).__name__
        raise TypeError(
            f"exclude_same: expected a tuple ({', '.join(_SAME)}), or (ids, cams) where query and gallery are one "
            f"tensor or exclude_self is True, got {got}"
        )
    counts = (query.shape[0], gallery.shape[0]) * 2
    for name, values, count in zip(_SAME, exclude_same, counts, strict=True):
        check_integers(f"exclude_same: {name}", values, count, query.device)
    return exclude_same


def _check(
    query: Tensor, gallery: Tensor | PreparedRows, k: int, exclude_self: bool | Tensor, mask: Tensor | None
) -> None:
    queries, images, device = query.shape[0], gallery.shape[0], query.device
    check_length("k", k, images)
    if isinstance(exclude_self, bool):
        if exclude_self and queries != images:
            raise ValueError(
                f"exclude_self: expected as many queries as gallery rows with True, got {queries} and {images}"
            )
    else:
        check_integers("exclude_self", exclude_self, queries, device)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        if mask.shape not in ((images,), (queries, images)):
            raise ValueError(f"mask: expected shape ({images},) or ({queries}, {images}), got {tuple(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"mask: expected device {device}, got {mask.device}")


class _Searched(NamedTuple):
    """The gallery rows that are searched at all, and which of them a query leaves out, counted among these rows."""

    rows: Tensor  # (images,) int64, ascending
    query_codes: Tensor | None  # (Q,): a query leaves out the rows of its code
    gallery_codes: Tensor | None  # (images,)
    own: Tensor | None  # (Q,): the row that a query leaves out; -1 for none
    mask: Tensor | None  # (Q, images) bool: the rows that it may find


def _searched(
    query: Tensor,
    images: int,
    exclude_same: tuple[Tensor, ...] | None,
    exclude_self: bool | Tensor,
    mask: Tensor | None,
    unlabelled: Unlabelled,
) -> _Searched:
    queries, device = query.shape[0], query.device
    rows = torch.arange(images, device=device)
    own = None
    if not isinstance(exclude_self, bool):
        own = exclude_self.long()
    elif exclude_self:
        own = rows
    if mask is not None and mask.dim() == 1:
        rows = mask.nonzero()[:, 0]
        if own is not None:
            kept = torch.where(mask, mask.cumsum(0) - 1, -1)
            own = torch.where(own >= 0, kept[own.clamp(min=0)], -1) if images else own
        mask = None
    query_codes = gallery_codes = None
    if exclude_same is not None:
        query_ids, gallery_ids, query_cams, gallery_cams = (values.long() for values in exclude_same)
        identity = torch.unique(torch.cat([query_ids, gallery_ids]), return_inverse=True)[1]
        names, camera = torch.unique(torch.cat([query_cams, gallery_cams]), return_inverse=True)
        code = identity * max(1, names.numel()) + camera
        query_codes = torch.where(unlabelled.removes_nothing(query_ids, query_cams), -1, code[:queries])
        gallery_codes = code[queries:][rows]
    return _Searched(rows, query_codes, gallery_codes, own, mask)


def _gallery_rows(gallery: Tensor | PreparedRows, rows: Tensor, metric: str, backend: str) -> GalleryRows:
    if not isinstance(gallery, PreparedRows):
        return _made_gallery_rows(gallery, rows, metric, backend)
    if gallery.searched is None:
        every = torch.arange(gallery.shape[0], device=gallery.device)
        gallery.searched = _made_gallery_rows(gallery.rows, every, metric, backend)
    kept = gallery.searched
    return kept if rows.numel() == gallery.shape[0] else kept.only(rows)


def _made_gallery_rows(gallery: Tensor, rows: Tensor, metric: str, backend: str) -> GalleryRows:
    """Copies of the rows: of unit length for "cosine", otherwise scaled by a power of two, which is exact and changes
    no order, and centred for Euclidean metrics. Scale and centre are those of the whole gallery."""
    largest, images, dtype = largest_of("gallery", gallery), rows.numel(), internal_dtype(gallery)
    if metric == "cosine":
        products = sorted_rows(gallery, rows, dtype, unit=True)[:images]
        return GalleryRows(gallery, largest, torch.ones_like(_largest(largest)), products)
    if backend == "triton":
        dtype = gallery.dtype  # products of half inputs are exact in float32
    scale = scale_of(_largest(largest), dtype)
    if metric == "dot":
        return GalleryRows(gallery, largest, scale, sorted_rows(gallery, rows, dtype, scale)[:images])
    dtype, centre = centred_products(gallery, scale, backend)
    copy = sorted_rows(gallery, rows, dtype, scale, centre)
    return GalleryRows(gallery, largest, scale, copy[:images], half_squares(copy)[:images], centre)


class _Operands(NamedTuple):
    """Rows ready for the products; half_squares only for Euclidean metrics."""

    query: Tensor
    gallery: Tensor
    half_squares: Tensor | None


def _operands(query: Tensor, rows: GalleryRows, largest: Tensor, metric: str) -> _Operands:
    """The queries as the gallery, whose half squares follow where long queries need another scale."""
    queries, dtype = query.shape[0], rows.products.dtype
    every = torch.arange(queries, device=query.device)
    if metric == "cosine":
        return _Operands(sorted_rows(query, every, dtype, unit=True)[:queries], rows.products, None)
    scale = _query_scale(largest, rows.scale, metric, dtype)
    centre, half = rows.centre, rows.half_squares
    if half is not None:
        shorter = scale / rows.scale  # 1, or a smaller power of two that is in every similarity of all queries
        half = half * shorter
        centre = None if centre is None else centre * shorter
    return _Operands(sorted_rows(query, every, dtype, scale, centre)[:queries], rows.products, half)


def _query_scale(largest: Tensor, of_gallery: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """Powers of two: of each query, or of all where the metric needs a common one, not above the gallery's."""
    if metric == "dot":
        return scale_of(largest, dtype)
    return torch.minimum(scale_of(_largest(largest), dtype), of_gallery)


def _largest(of_rows: Tensor) -> Tensor:
    return of_rows.amax() if of_rows.numel() else of_rows.new_zeros(())


def _distances(
    search: ModuleType,
    query: Tensor,
    operands: _Operands,
    gallery: GalleryRows,
    rows: Tensor,
    largest: Tensor,
    found: Tensor,
    metric: str,
) -> Tensor:
    """d(query i, searched row found[i, j]); any number where `found` is past the last row."""
    at = found.clamp(max=rows.numel() - 1)
    if metric == "dot":
        scale = _query_scale(largest, gallery.scale, metric, operands.query.dtype)
        products = search.pair_sums(operands.query, operands.gallery, None, at, True)
        return 0 - products / scale[:, None] / gallery.scale
    if metric == "cosine":  # of unit rows: ½‖x − y‖², which keeps the digits of small distances
        halves = 0.5 * search.pair_sums(operands.query, operands.gallery, None, at, False)
        return torch.where((largest == 0)[:, None] | (gallery.largest == 0)[rows[at]], 1, halves)
    dtype = internal_dtype(query)
    scale = _query_scale(largest, scale_of(_largest(gallery.largest), dtype), metric, dtype)
    squares = search.pair_sums(query, gallery.source, scale, rows[at], False)
    return squares.sqrt() / scale if metric == "euclidean" else squares / scale / scale
