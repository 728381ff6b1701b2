"""Re-ranking by k-reciprocal neighbours, Jaccard distances and query expansion, without an N×N matrix.

What is kept of N images is a list of neighbours and one sparse row each. Distances to all images are taken in blocks,
once for the lists and, for the queries, once more for the result. See reference/rerank.py for the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.backend import named_backend
from apd_kernels._core.checks import (
    check_choice,
    check_features,
    check_floating,
    check_gallery,
    check_length,
    check_number,
    check_same_kind,
)
from apd_kernels._core.compiler import outside_of_graphs
from apd_kernels._core.operators import implementation_context, internal_dtype
from apd_kernels._core.rows import unit_rows
from apd_kernels.evaluation.block_counts import counts_of_blocks
from apd_kernels.evaluation.neighbors import Neighbors
from apd_kernels.evaluation.retrieval_metrics import (
    TIES_OF_DISTANCES,
    RankMetrics,
    check_labels,
    check_options,
    checked_unlabelled,
)
from apd_kernels.evaluation.rows import centred_products, largest_of, scale_of
from apd_kernels.reference import rerank as reference

VARIANTS = ("torchreid", "transreid", "fastreid")
RERANK_METRICS = ("euclidean", "sqeuclidean", "cosine")
JACCARD_METRICS = ("euclidean", "cosine")

_BETWEEN_STEPS = "re-ranking reads its data: call it outside the compiled part"


class ExpandedFeatures(NamedTuple):
    """What `query_expansion` made of the features; not normalized."""

    query: Tensor  # (Q, D)
    gallery: Tensor  # (G, D)


class RerankedDistances:
    """Re-ranked distances of queries to gallery images, computed in blocks of queries when they are asked for.

    `k_reciprocal_rerank` and `k_reciprocal_rerank_from_distances` make it. It holds the features (or the matrices) and
    the sparse rows of all images; every method computes the blocks again.

    >>> import torch
    >>> gallery = torch.tensor([[0.0], [1.1], [3.0], [3.2]])
    >>> reranked = k_reciprocal_rerank(torch.tensor([[0.9]]), gallery, k1=2, k2=1)
    >>> reranked.shape
    (1, 4)
    >>> for rows, distances in reranked.blocks():
    ...     print(rows, distances.shape)
    slice(0, 1, None) torch.Size([1, 4])
    """

    def __init__(
        self,
        queries: int,
        encoding: reference.Encoding,
        lambda_value: float,
        share: Callable[[Tensor], Tensor],
        like: Tensor,
    ) -> None:
        """`share` gives what λ stands before: of some queries to all images, anew each time."""
        self.shape = (queries, len(encoding.sums) - queries)
        self._encoding, self._lambda, self._share, self._like = encoding, lambda_value, share, like

    def __repr__(self) -> str:
        return f"RerankedDistances(shape={self.shape}, lambda_value={self._lambda:g})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """`dense` as NumPy's matrix, for functions that want one."""
        if copy is False:
            raise ValueError("copy: expected None or True, as the distances are computed when they are asked for")
        return np.asarray(self.dense().cpu().numpy(), dtype=dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All distances, query block by query block.

        Yields:
            ``(rows, distances)``: a slice of the queries and their distances to the whole gallery, shape
            (rows.stop − rows.start, G), float32 (float64 for float64 inputs), about 64 MB.
        """
        for rows in reference.blocks(self.shape[0], len(self._encoding.sums)):
            yield rows, self._block(self._queries(rows))

    @torch.no_grad()
    def dense(self) -> Tensor:
        """All distances as one (Q, G) matrix."""
        result = self._like.new_empty(self.shape)

        def work(rows: slice) -> None:
            result[rows] = self._block(self._queries(rows))

        self._each(work)
        return result

    @torch.no_grad()
    def topk(self, k: int) -> Neighbors:
        """The k nearest gallery images of each query.

        Args:
            k: length of the lists; places beyond the gallery are filled with inf and −1.

        Returns:
            `Neighbors` ``(distances, indices)``, equal distances by lowest index.
        """
        queries, images = self.shape
        check_length("k", k, images)
        distances = self._like.new_full((queries, k), float("inf"))
        indices = torch.full((queries, k), -1, device=distances.device)
        kept = min(k, images)
        if kept:

            def work(rows: slice) -> None:
                found = reference.nearest(self._block(self._queries(rows)), kept)
                distances[rows, :kept], indices[rows, :kept] = found

            self._each(work)
        return Neighbors(distances, indices)

    @torch.no_grad()
    def rank_metrics(
        self,
        query_ids: Tensor,
        gallery_ids: Tensor,
        query_cams: Tensor | None = None,
        gallery_cams: Tensor | None = None,
        *,
        ap: str = "rectangular",
        ties: str = "pessimistic",
        max_rank: int = 50,
        junk: int | None = -1,
        unknown_camera: int | None = -1,
    ) -> RankMetrics:
        """CMC, mAP and mINP of the re-ranked distances, block by block; see the function `rank_metrics`.

        Args:
            query_ids: identity of each query, shape (Q,), any integer dtype.
            gallery_ids: identity of each gallery image, shape (G,).
            query_cams: camera of each query, shape (Q,); None (then also `gallery_cams`) keeps every gallery image.
            gallery_cams: camera of each gallery image, shape (G,).
            ap, ties, junk, unknown_camera: as in `rank_metrics_from_distances`.
            max_rank: length of the CMC.

        Returns:
            `RankMetrics` ``(cmc, mAP, mINP, ap, valid, inp, first_rank)``.

        Raises:
            TypeError, ValueError: as `rank_metrics`.
        """
        check_labels(query_ids, gallery_ids, query_cams, gallery_cams, self.shape, self._like.device)
        check_options(ap, ties, max_rank, TIES_OF_DISTANCES)
        counted = counts_of_blocks(
            self._block,
            reference.rows_at_once(len(self._encoding.sums)),
            query_ids,
            gallery_ids,
            query_cams,
            gallery_cams,
            ties=ties,
            unlabelled=checked_unlabelled(junk, unknown_camera),
        )
        return counted.metrics(self.shape[0], ap, ties, max_rank)

    def _queries(self, rows: slice) -> Tensor:
        return torch.arange(rows.start, rows.stop, device=self._like.device)

    def _each(self, work: Callable[[slice], None]) -> None:
        """Of every block of queries, in threads on the CPU."""
        reference.each_rows(self._like, work, self.shape[0], len(self._encoding.sums))

    @torch.no_grad()
    def _block(self, queries: Tensor) -> Tensor:
        """λ · share + (1 − λ) Jaccard of some queries and the gallery."""
        first = self.shape[0]
        with implementation_context(self._like, "torch"):
            result = reference.jaccard(self._encoding, queries)[:, first:]
            weight = torch.tensor(1 - self._lambda, dtype=result.dtype, device="cpu")  # float16 rounds it too
            result = result.mul_(weight).to(self._like.dtype)
            if self._lambda:
                result += self._share(queries)[:, first:].mul_(self._lambda)
        return result


@outside_of_graphs(_BETWEEN_STEPS)
@torch.no_grad()
def k_reciprocal_rerank(
    query: Tensor,
    gallery: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    variant: str = "torchreid",
    metric: str = "euclidean",
) -> RerankedDistances:
    """Re-rank galleries by the neighbours that images share (Zhong et al., CVPR 2017, 1701.08398), from features.

    The result is λ d²/max d² + (1 − λ) Jaccard, over queries and gallery as one set (variant "fastreid": λ d). No N×N
    matrix is made: memory is a copy of the features, some hundred numbers an image and a few blocks of 64 MB (more
    beyond 65,536 images: 256 rows). Equal distances are ordered by the image's place, queries first, then the gallery;
    features that are all equal give 0. Which images are in a list, rounding does not decide: where products of float32
    leave it open, the differences of the rows are taken in float64.

    An evaluation operation in PyTorch for every device: it waits for the GPU, raises on what it finds in the data, and
    is neither compiled by `torch.compile` nor captured in a CUDA graph. Its products follow PyTorch's matmul precision
    switch.

    Args:
        query: features, shape (Q, D); float16, bfloat16, float32 or float64.
        gallery: features, shape (G, D), dtype and device as `query`.
        k1: neighbours that must be mutual; at most Q + G count.
        k2: neighbours over which encodings are averaged; 1 for none.
        lambda_value: λ, the share of the distance itself, 0 to 1.
        variant: ``"torchreid"``: the square of `metric` over its maximum, as in torchreid, fast-reid, BAU and
            cluster-contrast. ``"transreid"``: the same of Euclidean distances with encodings in float16, as in
            TransReID, CLIP-ReID and strong-baseline; some 4e-3 off exact arithmetic, and as far below 0 as there.
            ``"fastreid"``: the distance `metric` itself, from products as in `pairwise_distance`, and the Jaccard
            distance of `jaccard_distance`, which is what fast-reid's evaluator calls re-ranking.
        metric: ``"euclidean"``; ``"sqeuclidean"``, whose square torchreid's and fast-reid's own evaluation takes; or
            ``"cosine"``, 1 − cos, where a zero row is at distance 1 from all others.

    Returns:
        `RerankedDistances`, which gives ``topk(k)``, ``blocks()``, ``dense()`` and ``rank_metrics(…)``.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, range or choice; features that are not
            finite.
        RuntimeError: called while a CUDA graph is captured, or on a named backend "triton", which has no kernel for it.

    >>> import torch
    >>> gallery = torch.tensor([[0.0], [1.1], [3.0], [3.2]])
    >>> reranked = k_reciprocal_rerank(torch.tensor([[0.9]]), gallery, k1=2, k2=1)
    >>> reranked.topk(2).indices
    tensor([[1, 0]])
    """
    _check_evaluation("k_reciprocal_rerank", query)
    check_features("query", query, sets=False)
    check_gallery(gallery, query)
    _check_parameters(k1, k2, lambda_value, variant)
    check_choice("metric", metric, RERANK_METRICS)
    if variant == "transreid" and metric != "euclidean":
        raise ValueError(f"metric: expected 'euclidean' for variant 'transreid', got {metric!r}")
    rows, count, scale = _prepared({"query": query, "gallery": gallery}, metric)
    with implementation_context(rows, "torch"):
        distances = reference.RowDistances(rows, count, (query, gallery), metric == "cosine")
    if variant == "fastreid":
        encoding = _jaccard_encoding(distances, k1, k2, scale, rows.dtype)

        def distance(queries: Tensor) -> Tensor:
            squared = distances.block(queries)
            if metric == "cosine":
                return squared.div_(2)
            return squared.sqrt_().div_(scale) if metric == "euclidean" else squared.div_(scale).div_(scale)

        return RerankedDistances(len(query), encoding, lambda_value, distance, rows[:0])
    # 1 − cos is half the squared distance of unit rows; factors vanish in the division by the maximum.
    return _reranked(distances, len(query), k1, k2, lambda_value, variant, 1 if metric == "euclidean" else 2)


@outside_of_graphs(_BETWEEN_STEPS)
@torch.no_grad()
def k_reciprocal_rerank_from_distances(
    query_gallery: Tensor,
    query_query: Tensor,
    gallery_gallery: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    variant: str = "torchreid",
) -> RerankedDistances:
    """`k_reciprocal_rerank` for distances that are already there; nothing of their size is added.

    Args:
        query_gallery: distances, shape (Q, G); float16, bfloat16, float32 or float64.
        query_query: distances, shape (Q, Q), dtype and device as `query_gallery`.
        gallery_gallery: distances, shape (G, G), dtype and device as `query_gallery`.
        k1: neighbours that must be mutual; at most Q + G count.
        k2: neighbours over which encodings are averaged; 1 for none.
        lambda_value: λ, the share of the distance itself, 0 to 1.
        variant: ``"torchreid"``: the distances are squared here; ``"transreid"``: they are squares, taken as they are,
            and encodings are in float16.

    Returns:
        `RerankedDistances`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device, range or choice; distances that are not
            finite.
        RuntimeError: as `k_reciprocal_rerank`.

    >>> import torch
    >>> from apd_kernels import pairwise_distance
    >>> query, gallery = torch.tensor([[0.9]]), torch.tensor([[0.0], [1.1], [3.0], [3.2]])
    >>> distances = pairwise_distance(query, gallery), pairwise_distance(query), pairwise_distance(gallery)
    >>> k_reciprocal_rerank_from_distances(*distances, k1=2, k2=1).topk(2).indices
    tensor([[1, 0]])
    """
    _check_evaluation("k_reciprocal_rerank_from_distances", query_gallery)
    check_floating("query_gallery", query_gallery)
    if query_gallery.dim() != 2:
        raise ValueError(f"query_gallery: expected shape (Q, G), got {tuple(query_gallery.shape)}")
    given = {"query_gallery": query_gallery, "query_query": query_query, "gallery_gallery": gallery_gallery}
    for (name, matrix), size in zip(list(given.items())[1:], query_gallery.shape, strict=True):
        check_floating(name, matrix)
        check_same_kind(name, matrix, "query_gallery", query_gallery)
        if matrix.shape != (size, size):
            raise ValueError(f"{name}: expected shape ({size}, {size}), got {tuple(matrix.shape)}")
    _check_parameters(k1, k2, lambda_value, variant, VARIANTS[:2])
    for name, matrix in given.items():
        if not all(block.isfinite().all() for block in matrix.split(reference.TILE_ROWS)):
            raise ValueError(f"{name}: expected finite distances, got NaN or infinity")
    squares = variant == "torchreid"  # the others are squares already
    distances = reference.MatrixDistances(query_gallery, query_query, gallery_gallery, squares=squares)
    return _reranked(distances, len(query_gallery), k1, k2, lambda_value, variant, 1)


@outside_of_graphs(_BETWEEN_STEPS)
@torch.no_grad()
def jaccard_distance(
    features: Tensor,
    gallery: Tensor | None = None,
    *,
    k1: int = 20,
    k2: int = 6,
    metric: str = "euclidean",
    sparse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Jaccard distances of k-reciprocal encodings among all rows of a set, as clustering of pseudo-labels takes them.

    As in cluster-contrast, SpCL, BAU and fast-reid: lists of k1 neighbours that include the row itself, weights by a
    softmax of −‖x − y‖². Equal distances are ordered by lowest index; features that are all equal give 0.

    An evaluation operation in PyTorch for every device, as `k_reciprocal_rerank`.

    Args:
        features: shape (N, D); float16, bfloat16, float32 or float64.
        gallery: shape (G, D), dtype and device as `features`. Then the set is both, and the distances are those of
            features to gallery, (N, G); with `sparse`, too.
        k1: length of the neighbour lists; at most as many as the set has count.
        k2: neighbours over which encodings are averaged, at most `k1`; 1 for none.
        metric: ``"euclidean"``, or ``"cosine"``: of the rows at unit length, where a zero row is at distance 1.
        sparse: return only the pairs that share a neighbour, in CSR layout, and make no N×N matrix. The pairs left
            out are at distance 1; explicit zeros are distances.
        dtype: of the encodings and the result; ``torch.float16`` halves the matrix and rounds as cluster-contrast's
            ``use_float16``, some 4e-3 off. None: float32 (float64 for float64 inputs).

    Returns:
        (N, N), symmetric, between 0 and 1, zeros on the diagonal; or (N, G).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, range or choice; features that are not finite.
        RuntimeError: as `k_reciprocal_rerank`.

    >>> import torch
    >>> features = torch.tensor([[0.0], [0.5], [4.0], [4.5]])
    >>> jaccard_distance(features, k1=2, k2=1) < 1
    tensor([[ True,  True, False, False],
            [ True,  True, False, False],
            [False, False,  True,  True],
            [False, False,  True,  True]])
    >>> jaccard_distance(features, k1=2, k2=1, sparse=True).values().numel()
    8
    """
    _check_evaluation("jaccard_distance", features)
    check_features("features", features, sets=False)
    if gallery is not None:
        check_gallery(gallery, features)
    _check_count("k1", k1)
    _check_count("k2", k2)
    check_choice("metric", metric, JACCARD_METRICS)
    if dtype not in (None, torch.float16, internal_dtype(features)):
        raise TypeError(f"dtype: expected torch.float16, {internal_dtype(features)} or None, got {dtype}")
    sets = {"features": features} if gallery is None else {"features": features, "gallery": gallery}
    rows, count, scale = _prepared(sets, metric)
    with implementation_context(rows, "torch"):
        distances = reference.RowDistances(rows, count, tuple(sets.values()), metric == "cosine")
        encoding = _jaccard_encoding(distances, k1, k2, scale, dtype or rows.dtype)
        del distances, rows
        items = torch.arange(len(features), device=features.device)
        first = 0 if gallery is None else len(features)

        def block(rows: slice) -> Tensor:
            distances = reference.jaccard(encoding, items[rows])
            if dtype == torch.float16:
                distances.clamp_(min=0)  # its sums may exceed 1
            distances.diagonal(rows.start).zero_()  # also of a row in no list of its own, beside too many equal ones
            return distances[:, first:]

        gathered = _gathered_sparse if sparse else _gathered
        return gathered(block, encoding.sums, (len(items), count - first))


def _jaccard_encoding(
    distances: reference.RowDistances, k1: int, k2: int, scale: Tensor, dtype: torch.dtype
) -> reference.Encoding:
    """Lists of k1 that hold the item itself, and weights of its squared distances."""
    k = min(k1, distances.count)
    half = min(round(k / 2) + 1, k)
    indices, largest = reference.neighbours(distances, k, (k, half, min(k2, k)))
    divisor = torch.where(largest > 0, scale.double().square(), 0)
    return reference.searchable(reference.encoded(distances, indices, divisor, k=k, half=half, k2=k2, dtype=dtype))


def _gathered(block_of: Callable[[slice], Tensor], like: Tensor, shape: tuple[int, int]) -> Tensor:
    result = like.new_empty(shape)

    def work(rows: slice) -> None:
        result[rows] = block_of(rows)

    reference.each_rows(like, work, shape[0], len(like))
    return result


def _gathered_sparse(block_of: Callable[[slice], Tensor], like: Tensor, shape: tuple[int, int]) -> Tensor:
    def work(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        block = block_of(rows)
        stored = block < 1
        return stored.sum(1), stored.nonzero()[:, 1], block[stored]

    empty = like.new_empty(0)
    parts = [(empty.new_zeros(1).long(), empty.long(), empty)]
    parts += reference.each_rows(like, work, shape[0], len(like))
    lengths, columns, values = map(torch.cat, zip(*parts, strict=True))
    return torch.sparse_csr_tensor(
        lengths.cumsum(0),
        columns,
        values,
        shape,
        check_invariants=False,  # they hold by construction; the check reads everything again
    )


@outside_of_graphs(_BETWEEN_STEPS)
@torch.no_grad()
def query_expansion(
    query: Tensor, gallery: Tensor, *, k: int = 10, alpha: float = 3.0, times: int = 1
) -> ExpandedFeatures:
    """Replace every row by the mean of its k nearest, weighted by cos^α: AQE (α = 0) and αQE (Radenović et al., 2018).

    Neighbours are taken by cosine among queries and gallery together, the row itself included, as in fast-reid. A
    negative cosine counts as 0. Equal similarities are ordered by lowest index, queries first.

    An evaluation operation in PyTorch for every device, as `k_reciprocal_rerank`.

    Args:
        query: features, shape (Q, D); float16, bfloat16, float32 or float64.
        gallery: features, shape (G, D), dtype and device as `query`.
        k: neighbours in a mean; at most Q + G count.
        alpha: α ≥ 0.
        times: how often the expansion is repeated on its own result.

    Returns:
        `ExpandedFeatures` ``(query, gallery)``, float32 (float64 for float64 inputs), not normalized.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; features that are not finite.
        RuntimeError: as `k_reciprocal_rerank`.

    >>> import torch
    >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.6, 0.8]])
    >>> query_expansion(query, gallery, k=2, alpha=1.0).query
    tensor([[0.6800, 0.2400]])
    """
    _check_evaluation("query_expansion", query)
    check_features("query", query, sets=False)
    check_gallery(gallery, query)
    _check_count("k", k)
    _check_count("times", times)
    check_number("alpha", alpha)
    queries = len(query)
    features = torch.cat([query, gallery]).to(internal_dtype(query))
    for _ in range(times):
        rows, count, _ = _prepared({"query": features[:queries], "gallery": features[queries:]}, "cosine")
        with implementation_context(rows, "torch"):
            distances = reference.RowDistances(rows, count)
            indices, _ = reference.neighbours(distances, min(k, count))
            features = reference.expanded_rows(features, indices, distances, alpha)
    return ExpandedFeatures(features[:queries], features[queries:])


def _reranked(
    distances: reference.Distances, queries: int, k1: int, k2: int, lambda_value: float, variant: str, power: int
) -> RerankedDistances:
    count = distances.count
    k1 = min(k1, count)
    k = min(k1 + 1, count)
    half = min(round(k1 / 2) + 1, k)
    dtype = torch.float16 if variant == "transreid" else distances.like.dtype
    with implementation_context(distances.like, "torch"):
        indices, largest = reference.neighbours(distances, max(k, min(k2, count)), (k, half, min(k2, count)))
        encoding = reference.encoded(distances, indices, largest, k=k, half=half, k2=k2, power=power, dtype=dtype)

        def share(queries: Tensor) -> Tensor:
            return reference.divided(distances.block(queries), largest[queries, None]).pow_(power)

        return RerankedDistances(queries, reference.searchable(encoding), lambda_value, share, largest[:0])


def _prepared(features: dict[str, Tensor], metric: str) -> tuple[Tensor, int, Tensor]:
    """The rows of all features one after the other, ready for `RowDistances`, their number, and their scale.

    For "cosine" they have unit length, a zero row in a dimension of its own. Otherwise they are scaled by a power of
    two and centred. All blocks have one shape and all rows one alignment, so that equal rows stay equal.
    """
    first = next(iter(features.values()))
    dtype, dimension, count = internal_dtype(first), first.shape[1], sum(map(len, features.values()))
    tile = 3 * reference.TILE_ROWS  # whole tiles of rows and of columns
    rows = torch.zeros(-(-count // tile) * tile, (dimension // 16 + 1) * 16, dtype=dtype, device=first.device)
    start, dimensions = 0, rows[:, :dimension]
    largest = torch.zeros(1, dtype=dtype, device=first.device)
    for name, x in features.items():
        if len(x):
            largest = torch.maximum(largest, largest_of(name, x).amax())
        dimensions[start : start + len(x)] = x
        start += len(x)
    scale = torch.ones_like(largest)
    if metric == "cosine":
        for block in rows.split(tile):
            block.copy_(unit_rows(block))
        zero = (rows[:count] == 0).all(1)
        rows[:count, dimension][zero] = 1
    elif count:
        scale = scale_of(largest, dtype)
        _, centre = centred_products(dimensions[:count], scale, "torch")
        assert centre is not None
        rows *= scale
        dimensions[:count] -= centre
    return rows, count, scale


def _check_evaluation(name: str, x: object) -> None:
    if named_backend() == "triton":
        raise RuntimeError(f"backend 'triton': {name} runs in PyTorch on every device; use the 'torch' backend")
    if isinstance(x, Tensor) and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name}: expected a call outside CUDA graph capture; its steps depend on the data")


def _check_parameters(
    k1: int, k2: int, lambda_value: float, variant: str, variants: tuple[str, ...] = VARIANTS
) -> None:
    _check_count("k1", k1)
    _check_count("k2", k2)
    check_number("lambda_value", lambda_value)
    if lambda_value > 1:
        raise ValueError(f"lambda_value: expected at most 1, got {lambda_value}")
    check_choice("variant", variant, variants)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
