"""Retrieval metrics by counting: no Q×G matrix, no sort of the gallery.

CMC, AP and INP of a query depend only on the ranks of its positives, and the i-th nearest positive has rank i plus the
number of negatives that are not farther than it. So first the similarities of the positive pairs are taken and sorted,
query by query: the thresholds. Then all other pairs are compared with them, tile by tile.

For a fixed query the similarity s(x, y) = x·y ("dot", and "cosine" of unit rows) or x·y − ½‖y‖² (Euclidean) falls as
the distance grows. Both phases take it with the same tile arithmetic, so that equal gallery rows tie exactly.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from apd_kernels._core.backend import implementation, resolve_backend
from apd_kernels._core.checks import check_choice, check_features, check_integers, check_same_kind
from apd_kernels._core.compiler import outside_of_graphs
from apd_kernels._core.operators import implementation_context, internal_dtype
from apd_kernels._core.precision import resolve_precision
from apd_kernels._core.rows import unit_rows
from apd_kernels.prepared import METRICS

AVERAGE_PRECISIONS = ("rectangular", "trapezoidal")
JUNK = -1  # the identity of gallery images that count neither for nor against


class RankMetrics(NamedTuple):
    """What `rank_metrics` measured; means are over the valid queries."""

    cmc: Tensor  # (max_rank,) float64: share of queries with a positive among the first k = 1, 2, …
    mAP: float
    mINP: float
    ap: Tensor  # (Q,) float64: average precision of each query, NaN where it is not counted
    valid: Tensor  # (Q,) bool: the query has a positive and is counted


@outside_of_graphs("rank_metrics reads its data: call it outside the compiled part")
@torch.no_grad()
def rank_metrics(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    metric: str = "cosine",
    ap: str = "rectangular",
    max_rank: int = 50,
    precision: str | None = None,
) -> RankMetrics:
    """CMC, mAP and mINP of a retrieval run, exactly, from features (Zheng et al., 2015; mINP: Ye et al., 2021).

    Gallery images of the query's identity *and* camera are removed, images of identity −1 (junk) are ignored. A query
    without a positive in the rest, or of identity −1, is not counted. Ties are pessimistic: at the same distance a
    negative comes before a positive, so features that are all equal do not score. Bit-identical gallery rows tie (on
    the CPU with MKL, which PyTorch's x86 wheels use; not every BLAS library multiplies equal columns equally).

    An evaluation operation: it waits for the GPU several times, raises on what it finds in the data, and is neither
    compiled by `torch.compile` nor captured in a CUDA graph. Memory: a copy of the features, a few numbers per positive
    pair, and 64 MB.

    Args:
        query: features, shape (Q, D); float16, bfloat16, float32 or float64.
        gallery: features, shape (G, D), dtype and device as `query`.
        query_ids: identity of each query, shape (Q,), any integer dtype.
        gallery_ids: identity of each gallery image, shape (G,).
        query_cams: camera of each query, shape (Q,); None (then also `gallery_cams`) to keep every gallery image.
        gallery_cams: camera of each gallery image, shape (G,).
        metric: ``"euclidean"``, ``"sqeuclidean"`` (the same ranking), ``"cosine"`` or ``"dot"``, as in
            `pairwise_distance`.
        ap: ``"rectangular"``: AP is the mean of the precision at each positive; ``"trapezoidal"``: of the mean of the
            precision before and at it, as in the first Market-1501 code.
        max_rank: length of the CMC; where fewer gallery images are left, it stays at its last value.
        precision: of float32 products on tensor cores, as in `pairwise_distance`.

    Returns:
        `RankMetrics` ``(cmc, mAP, mINP, ap, valid)``, tensors on the device of the features.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; features that are not finite; no
            query to count.
        RuntimeError: called while a CUDA graph is captured.

    >>> import torch
    >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> result = rank_metrics(gallery[:1], gallery, torch.tensor([7]), torch.tensor([8, 7, 7]), max_rank=3)
    >>> result.cmc, round(result.mAP, 4), round(result.mINP, 4)
    (tensor([0., 1., 1.], dtype=torch.float64), 0.5833, 0.6667)
    """
    _check(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    check_choice("metric", metric, METRICS)
    check_choice("ap", ap, AVERAGE_PRECISIONS)
    if isinstance(max_rank, bool) or not isinstance(max_rank, int):
        raise TypeError(f"max_rank: expected an int, got {type(max_rank).__name__}")
    if max_rank < 1:
        raise ValueError(f"max_rank: expected at least 1, got {max_rank}")
    precision = resolve_precision(precision)
    backend = resolve_backend(query)
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("rank_metrics: expected a call outside CUDA graph capture; its steps depend on the data")
    ranking = implementation(backend, "ranking")
    pairs = _matched(query_ids, gallery_ids, query_cams, gallery_cams)
    operands = _prepared(query, gallery, pairs, metric, backend)
    with implementation_context(query, backend):
        thresholds, starts = _thresholds(ranking, operands, pairs, precision)
        negatives = ranking.count_negatives(*operands, pairs.first, pairs.last, thresholds, starts, precision)
    return _summary(negatives, starts, pairs.query_rows, query.shape[0], ap, max_rank)


def _check(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None,
    gallery_cams: Tensor | None,
) -> None:
    check_features("query", query, sets=False)
    check_features("gallery", gallery, sets=False)
    check_same_kind("gallery", gallery, "query", query)
    if gallery.shape[1] != query.shape[1]:
        raise ValueError(f"gallery: expected shape (G, {query.shape[1]}), got {tuple(gallery.shape)}")
    check_integers("query_ids", query_ids, query.shape[0], query.device)
    check_integers("gallery_ids", gallery_ids, gallery.shape[0], query.device)
    if (query_cams is None) != (gallery_cams is None):
        given, missing = ("query_cams", "gallery_cams") if gallery_cams is None else ("gallery_cams", "query_cams")
        raise ValueError(f"{missing}: expected with {given}, got None")
    if query_cams is not None and gallery_cams is not None:
        check_integers("query_cams", query_cams, query.shape[0], query.device)
        check_integers("gallery_cams", gallery_cams, gallery.shape[0], query.device)


class _Matched(NamedTuple):
    """The queries to count and the gallery without junk, both sorted by identity, as rows of what was given.

    Then the gallery images of a query's identity are the contiguous range first … last of `gallery_rows`, and as the
    gallery is also sorted by camera, those to remove are the range removed_first … removed_last inside it.
    """

    query_rows: Tensor
    gallery_rows: Tensor
    first: Tensor
    last: Tensor
    removed_first: Tensor
    removed_last: Tensor


def _matched(
    query_ids: Tensor, gallery_ids: Tensor, query_cams: Tensor | None, gallery_cams: Tensor | None
) -> _Matched:
    query_ids, gallery_ids = query_ids.long(), gallery_ids.long()
    identity = torch.unique(torch.cat([query_ids, gallery_ids]), return_inverse=True)[1]
    cameras = 1
    code = identity  # one number for identity and camera, sorted by identity first
    if query_cams is not None and gallery_cams is not None:
        names, camera = torch.unique(torch.cat([query_cams.long(), gallery_cams.long()]), return_inverse=True)
        cameras = max(1, names.numel())
        code = identity * cameras + camera
    queries = query_ids.numel()
    gallery_rows = (gallery_ids != JUNK).nonzero()[:, 0]
    gallery_rows = gallery_rows[code[queries:][gallery_rows].argsort(stable=True)]
    code_of_gallery, code_of_query = code[queries:][gallery_rows], code[:queries]
    first_code = identity[:queries] * cameras
    first = torch.searchsorted(code_of_gallery, first_code)
    last = torch.searchsorted(code_of_gallery, first_code + cameras)
    removed_first, removed_last = last, last
    if query_cams is not None:
        removed_first = torch.searchsorted(code_of_gallery, code_of_query)
        removed_last = torch.searchsorted(code_of_gallery, code_of_query, right=True)
    positives = (last - first) - (removed_last - removed_first)
    query_rows = positives.nonzero()[:, 0]
    if query_rows.numel() == 0:
        where = "" if query_cams is None else " from another camera"
        raise ValueError(
            f"query_ids: expected at least one query with a gallery image of the same identity{where}, got none among "
            f"{queries} queries and {gallery_ids.numel()} gallery images"
        )
    query_rows = query_rows[first_code[query_rows].argsort(stable=True)]
    return _Matched(
        query_rows,
        gallery_rows,
        *(rows[query_rows].contiguous() for rows in (first, last, removed_first, removed_last)),
    )


class _Operands(NamedTuple):
    """Rows ready for the products, in the order of `_Matched`; half_squares only for Euclidean metrics."""

    query: Tensor
    gallery: Tensor
    half_squares: Tensor | None


def _prepared(query: Tensor, gallery: Tensor, pairs: _Matched, metric: str, backend: str) -> _Operands:
    """Sorted copies of the rows: of unit length for "cosine", otherwise scaled by powers of two, which is exact and
    changes no ranking, so that no product leaves the range of float32."""
    query_largest, gallery_largest = _largest("query", query), _largest("gallery", gallery)
    dtype = internal_dtype(query)
    queries, images = pairs.query_rows.numel(), pairs.gallery_rows.numel()
    if metric == "cosine":
        x = _sorted_rows(query, pairs.query_rows, dtype, unit=True)
        y = _sorted_rows(gallery, pairs.gallery_rows, dtype, unit=True)
        return _Operands(x[:queries], y[:images], None)
    if backend == "triton":
        dtype = query.dtype  # products of half inputs are exact in float32
    if metric == "dot":
        x = _sorted_rows(query, pairs.query_rows, dtype, _scale(query_largest, dtype))
        y = _sorted_rows(gallery, pairs.gallery_rows, dtype, _scale(gallery_largest.amax(), dtype))
        return _Operands(x[:queries], y[:images], None)
    scale = _scale(torch.maximum(query_largest.amax(), gallery_largest.amax()), dtype)
    x = _sorted_rows(query, pairs.query_rows, dtype, scale)
    centre = None
    if dtype == internal_dtype(query):
        # Distances do not change with a common shift, and centred rows lose fewer digits in x·y − ½‖y‖². A centre on a
        # coarse grid (values lie within ±1) leaves integer features exact.
        centre = (x[:queries].mean(0) * 64).round() / 64
        x -= centre
    y = _sorted_rows(gallery, pairs.gallery_rows, dtype, scale, centre)
    return _Operands(x[:queries], y[:images], _half_squares(y)[:images])


def _padded(dimension: int) -> int:
    return -(-dimension // 16) * 16


def _block_rows(x: Tensor) -> int:
    """Rows of a block in the passes over the features; on the CPU its temporaries stay in the cache (1 MB)."""
    return max(1, (1 << 24 if x.is_cuda else 1 << 18) // _padded(x.shape[1]))


def _largest(name: str, x: Tensor) -> Tensor:
    """max |x| of each row; raises where a row is not finite."""
    largest = torch.cat([block.abs().amax(-1) for block in x.split(_block_rows(x))]).to(internal_dtype(x))
    broken = (~largest.isfinite()).nonzero()[:, 0]
    if broken.numel():
        shown = ", ".join(map(str, broken[:5].tolist())) + (", …" if broken.numel() > 5 else "")
        raise ValueError(f"{name}: expected finite features, got NaN or infinity in {broken.numel()} rows: {shown}")
    return largest


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that brings `largest` to about 1; 1 for float16, whose squares fit float32 as they are."""
    if dtype == torch.float16:
        return torch.ones_like(largest)
    limit = 1000 if dtype == torch.float64 else 100  # far enough, and the power itself stays in range
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-limit, limit))


def _sorted_rows(
    x: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    centre: Tensor | None = None,
    *,
    unit: bool = False,
) -> Tensor:
    """x[rows] · scale − centre, or x[rows] at unit length, with zeros appended to a multiple of 16 dimensions.

    A reduction over a row may take another order in a block of another shape, or for a row of another alignment, and
    equal rows must stay equal: so all rows are aligned, and all blocks have one shape; unused rows follow the last.
    """
    dimension = x.shape[1]
    size = _block_rows(x)
    copy = torch.empty(-(-rows.numel() // size) * size, _padded(dimension), dtype=dtype, device=x.device)
    copy[:, dimension:] = 0
    copy[rows.numel() :] = 0
    for chosen, block in zip(rows.split(size), copy.split(size), strict=True):
        target = block[: chosen.numel(), :dimension]
        target.copy_(x[chosen])
        if scale is not None:
            target *= (scale[chosen, None] if scale.dim() else scale).to(dtype)
        if centre is not None:
            target -= centre[:dimension]
        if unit:
            block.copy_(unit_rows(block))
    return copy


def _half_squares(rows: Tensor) -> Tensor:
    """½‖y‖² of each row of a `_sorted_rows` copy, in float32 (float64), from blocks of one shape again."""
    blocks = rows.split(_block_rows(rows))
    return 0.5 * torch.cat([block.to(internal_dtype(rows)).square().sum(-1) for block in blocks])


def _thresholds(ranking: ModuleType, operands: _Operands, pairs: _Matched, precision: str) -> tuple[Tensor, Tensor]:
    """Similarities of the positive pairs, ascending for each query; those of query i are starts[i] … starts[i + 1]."""
    lengths = pairs.last - pairs.first
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row = torch.repeat_interleave(lengths)
    similarity = ranking.same_identity_similarities(*operands, pairs.first, pairs.last, starts, row.numel(), precision)
    column = torch.arange(row.numel(), device=row.device) + (pairs.first - starts[:-1])[row]
    positive = (column < pairs.removed_first[row]) | (column >= pairs.removed_last[row])
    similarity, row = similarity[positive], row[positive]
    order = similarity.argsort()
    order = order[row[order].argsort(stable=True)]
    removed = pairs.removed_last - pairs.removed_first
    starts[1:] -= removed.cumsum(0)
    return similarity[order], starts


def _summary(
    negatives: Tensor, starts: Tensor, query_rows: Tensor, queries: int, ap: str, max_rank: int
) -> RankMetrics:
    """The metrics, from the number of negatives that come before each positive; farthest positive first."""
    device = negatives.device
    negatives, starts, query_rows = negatives.cpu().long(), starts.cpu(), query_rows.cpu()
    positives = starts.diff()
    row = torch.repeat_interleave(positives)
    hit = starts[1:][row] - torch.arange(row.numel())  # 1 for the nearest positive, P for the farthest
    rank = hit + negatives
    precision = hit / rank.double()
    if ap == "trapezoidal":
        before = torch.where(rank > 1, (hit - 1) / (rank - 1).clamp(min=1).double(), 1.0)
        precision = (precision + before) / 2
    each = torch.bincount(row, weights=precision, minlength=positives.numel()) / positives
    worst, best = rank[starts[:-1]], rank[starts[1:] - 1]
    found = torch.bincount(best[best <= max_rank] - 1, minlength=max_rank)
    average = torch.full((queries,), float("nan"), dtype=torch.float64)
    average[query_rows] = each
    valid = ~average.isnan()
    return RankMetrics(
        cmc=(found.cumsum(0).double() / positives.numel()).to(device),
        mAP=float(average[valid].mean()),
        mINP=float((positives / worst.double()).mean()),
        ap=average.to(device),
        valid=valid.to(device),
    )
