"""Retrieval metrics by counting: no Q×G matrix, no sort of the gallery.

CMC, AP and INP of a query depend only on the ranks of its positives, and the i-th nearest positive has rank i plus the
number of negatives that are not farther than it. So first the similarities of the positive pairs are taken and sorted,
query by query: the thresholds. Then all other pairs are compared with them, tile by tile.

For a fixed query the similarity s(x, y) = x·y ("dot", and "cosine" of unit rows) or x·y − ½‖y‖² (Euclidean) falls as
the distance grows. Both phases take it with the same tile arithmetic, so that equal gallery rows tie exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_floating, check_integers, check_number
from apd_kernels._core.compiler import outside_of_graphs
from apd_kernels._core.operators import internal_dtype
from apd_kernels.evaluation.accumulator import RankAccumulator, Shard
from apd_kernels.evaluation.block_counts import BlockCounts, counts_of_blocks
from apd_kernels.evaluation.retrieval_metrics import (
    TIES_OF_DISTANCES,
    PositiveRanks,
    RankMetrics,
    Unlabelled,
    check_labels,
    check_options,
    check_own,
    checked_unlabelled,
)
from apd_kernels.evaluation.rows import padded

__all__ = [
    "PositiveRanks",
    "RankAccumulator",
    "RankMetrics",
    "positive_ranks",
    "positive_ranks_from_distances",
    "rank_metrics",
    "rank_metrics_from_distances",
    "tpr_at_fpr_from_distances",
]

_BLOCK_ELEMENTS = 1 << 24  # of a distance matrix that are worked on at once, by all threads together
# Of the copy that is made of a gallery; a larger one is worked on in pieces, which are copied once in each pass.
_PIECE_BYTES = 1 << 29


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
    ties: str = "pessimistic",
    max_rank: int = 50,
    precision: str | None = None,
    exclude: Tensor | None = None,
    single_shot: int | None = None,
    seed: int = 0,
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> RankMetrics:
    """CMC, mAP and mINP of a retrieval run, exactly, from features (Zheng et al., 2015; mINP: Ye et al., 2021).

    Gallery images of the query's identity *and* camera are removed, images of identity `junk` are ignored. A query
    without a positive in the rest, or of identity `junk`, is not counted. Ties are pessimistic: at the same distance a
    negative comes before a positive, so features that are all equal do not score. Bit-identical gallery rows tie (on
    the CPU with MKL, which PyTorch's x86 wheels use; not every BLAS library multiplies equal columns equally).

    An evaluation operation: it waits for the GPU several times, raises on what it finds in the data, and is neither
    compiled by `torch.compile` nor captured in a CUDA graph. Memory: a copy of the queries and of at most 512 MB of the
    gallery (on a GPU twice that), a few numbers per positive pair, and 64 MB. A gallery that comes in pieces:
    `RankAccumulator`.

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
        ties: ``"pessimistic"``; ``"optimistic"``: a positive comes first; ``"expected"``: the expectation over all
            orders of the images at one distance, for twice the counting; ``"grouped"``: images at one distance all have
            the last of their places, as in scikit-learn's average precision.
        max_rank: length of the CMC; where fewer gallery images are left, it stays at its last value.
        precision: of float32 products on tensor cores, as in `pairwise_distance`.
        exclude: (Q,) int64, each query's own place in the gallery, or −1: a data set of one camera, searched in
            itself. The image there is of the query's identity.
        single_shot: the CMC of CUHK03's first protocol, as torchreid and fast-reid take it: the mean over so many
            draws (they: 10) of one gallery image of each identity, of the query's own among those that are not
            removed. AP and INP are of all images. None: the CMC too.
        seed: of those draws.
        junk: the number that is no identity: such images count neither for nor against. None: every number is one, as
            in torchreid and fast-reid.
        unknown_camera: the number that says "camera not known": it equals no camera, so nothing is removed for it.
            None: every number is a camera.

    Returns:
        `RankMetrics` ``(cmc, mAP, mINP, ap, valid, inp, first_rank)``, tensors on the device of the features.

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
    ranks = RankAccumulator(
        query,
        query_ids,
        query_cams,
        metric=metric,
        ap=ap,
        ties=ties,
        max_rank=max_rank,
        precision=precision,
        exclude=exclude,
        junk=junk,
        unknown_camera=unknown_camera,
    )
    draws = _checked_draws(single_shot, seed)
    unlabelled = checked_unlabelled(junk, unknown_camera)
    curves = _counted(ranks, gallery, query_ids, gallery_ids, gallery_cams, exclude, unlabelled, draws, seed)
    result = ranks.compute()
    return result._replace(cmc=torch.stack(curves).mean(0)) if curves else result


@outside_of_graphs("positive_ranks reads its data: call it outside the compiled part")
@torch.no_grad()
def positive_ranks(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    metric: str = "cosine",
    ties: str = "pessimistic",
    precision: str | None = None,
    exclude: Tensor | None = None,
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> PositiveRanks:
    """The rank of every positive of every query, exactly, from features, for figures that `RankMetrics` lacks.

    The result has R-precision, MAP@R and MRR@k; other figures of ranked lists are a line over its ranks.

    Args:
        query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, metric, precision, exclude, junk,
        unknown_camera: as in `rank_metrics`.
        ties: as in `rank_metrics`, but for ``"expected"``.

    Returns:
        `PositiveRanks` ``(query, rank, hit, positives)``.

    Raises:
        TypeError, ValueError, RuntimeError: as `rank_metrics`.

    >>> import torch
    >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> positive_ranks(gallery[:1], gallery, torch.tensor([7]), torch.tensor([8, 7, 7])).rank
    tensor([2, 3])
    """
    ranks = RankAccumulator(
        query,
        query_ids,
        query_cams,
        metric=metric,
        ties=ties,
        precision=precision,
        exclude=exclude,
        junk=junk,
        unknown_camera=unknown_camera,
    )
    _counted(ranks, gallery, query_ids, gallery_ids, gallery_cams, exclude, checked_unlabelled(junk, unknown_camera))
    return ranks.positive_ranks()


def _counted(
    ranks: RankAccumulator,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    gallery_cams: Tensor | None,
    exclude: Tensor | None,
    unlabelled: Unlabelled,
    draws: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """Both passes over the gallery, in pieces where it is large, and the CMC of each draw of single images."""
    ranks.check(gallery, gallery_ids, gallery_cams)
    if exclude is not None:
        check_own(exclude, query_ids, gallery_ids, unlabelled)

    def shard(ranks: RankAccumulator, images: slice | Tensor) -> Shard:
        cams = None if gallery_cams is None else gallery_cams[images]
        return ranks.shard_of(gallery[images], gallery_ids[images], cams)

    size = _piece_rows(gallery)
    pieces = [slice(at, at + size) for at in range(0, max(1, gallery.shape[0]), size)]
    whole = shard(ranks, pieces[0]) if len(pieces) == 1 else None
    for piece in pieces:
        ranks.add(whole or shard(ranks, piece))
    generator = torch.Generator("cpu").manual_seed(seed)
    curves = []
    for _ in range(draws):
        draw, images = ranks.draw(gallery_ids, gallery_cams, generator)
        for drawn in images.split(max(1, size // 2)):  # half: they are gathered before they are copied
            draw.count_shard(shard(draw, drawn))
        curves.append(draw.compute().cmc)
    for piece in pieces:
        ranks.count_shard(whole or shard(ranks, piece))
    return curves


def _checked_draws(single_shot: int | None, seed: int) -> int:
    _check_seed(seed)
    if single_shot is None:
        return 0
    if isinstance(single_shot, bool) or not isinstance(single_shot, int):
        raise TypeError(f"single_shot: expected an int, got {type(single_shot).__name__}")
    if single_shot < 1:
        raise ValueError(f"single_shot: expected at least 1, got {single_shot}")
    return single_shot


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")


def _piece_rows(gallery: Tensor) -> int:
    """Gallery images at a time: all of them, or equal pieces whose copies keep within _PIECE_BYTES."""
    images, row_bytes = gallery.shape[0], padded(gallery.shape[1]) * internal_dtype(gallery).itemsize
    pieces = max(1, -(-images * row_bytes // _PIECE_BYTES))
    return max(1, -(-images // pieces))


@outside_of_graphs("rank_metrics_from_distances reads its data: call it outside the compiled part")
@torch.no_grad()
def rank_metrics_from_distances(
    distances: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    ap: str = "rectangular",
    ties: str = "pessimistic",
    max_rank: int = 50,
    exclude: Tensor | None = None,
    single_shot: int | None = None,
    seed: int = 0,
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> RankMetrics:
    """CMC, mAP and mINP, exactly, of distances that somebody else has computed.

    Args:
        distances: shape (Q, G), smaller is nearer; float16, bfloat16, float32 or float64, any strides. It is read in
            blocks of rows, 64 MB at a time.
        query_ids, gallery_ids, query_cams, gallery_cams, ap, max_rank, exclude, single_shot, seed, junk,
        unknown_camera: as in `rank_metrics`; the same draws.
        ties: as in `rank_metrics`, or ``"stable"``: images at one distance are in the order of the gallery.

    Returns:
        `RankMetrics`, tensors on the device of the distances.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; a distance that is NaN; no query
            to count.
        RuntimeError: called while a CUDA graph is captured.

    >>> import torch
    >>> distances = torch.tensor([[0.3, 0.1, 0.5]])
    >>> result = rank_metrics_from_distances(distances, torch.tensor([7]), torch.tensor([7, 8, 7]), max_rank=3)
    >>> result.cmc, round(result.mAP, 4)
    (tensor([0., 1., 1.], dtype=torch.float64), 0.5833)
    """
    check_options(ap, ties, max_rank, TIES_OF_DISTANCES)
    labels = query_ids, gallery_ids, query_cams, gallery_cams
    draws = _checked_draws(single_shot, seed)
    counted = _counted_in(distances, labels, ties, exclude, checked_unlabelled(junk, unknown_camera), draws, seed)
    return counted.metrics(distances.shape[0], ap, ties, max_rank)


@outside_of_graphs("positive_ranks_from_distances reads its data: call it outside the compiled part")
@torch.no_grad()
def positive_ranks_from_distances(
    distances: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    ties: str = "pessimistic",
    exclude: Tensor | None = None,
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> PositiveRanks:
    """`positive_ranks` of distances that somebody else has computed.

    Args:
        distances, query_ids, gallery_ids, query_cams, gallery_cams, exclude, junk, unknown_camera: as in
            `rank_metrics_from_distances`.
        ties: as there, but for ``"expected"``.

    Returns:
        `PositiveRanks` ``(query, rank, hit, positives)``.

    Raises:
        TypeError, ValueError, RuntimeError: as `rank_metrics_from_distances`.

    >>> import torch
    >>> distances = torch.tensor([[0.3, 0.3, 0.5]])
    >>> positive_ranks_from_distances(distances, torch.tensor([7]), torch.tensor([7, 8, 7]), ties="stable").rank
    tensor([1, 3])
    """
    check_choice("ties", ties, tuple(choice for choice in TIES_OF_DISTANCES if choice != "expected"))
    labels = query_ids, gallery_ids, query_cams, gallery_cams
    counted = _counted_in(distances, labels, ties, exclude, checked_unlabelled(junk, unknown_camera))
    return counted.ranks(distances.shape[0], ties)


def _counted_in(
    distances: Tensor,
    labels: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ties: str,
    exclude: Tensor | None,
    unlabelled: Unlabelled,
    draws: int = 0,
    seed: int = 0,
) -> BlockCounts:
    _check_matrix(distances, labels)
    if exclude is not None:
        check_integers("exclude", exclude, distances.shape[0], distances.device)
    if distances.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("rank_metrics: expected a call outside CUDA graph capture; its steps depend on the data")
    if exclude is not None:
        check_own(exclude, labels[0], labels[1], unlabelled)
    dtype = internal_dtype(distances)
    return counts_of_blocks(
        lambda rows: distances[rows].to(dtype),
        _rows_at_once(distances),
        *labels,
        ties=ties,
        unlabelled=unlabelled,
        exclude=exclude,
        draws=draws,
        seed=seed,
    )


def _check_matrix(distances: Tensor, labels: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> None:
    check_floating("distances", distances)
    if distances.dim() != 2:
        raise ValueError(f"distances: expected shape (Q, G), got {tuple(distances.shape)}")
    queries, images = distances.shape
    check_labels(*labels, (queries, images), distances.device)


def _rows_at_once(distances: Tensor) -> int:
    at_once = 1 if distances.is_cuda else torch.get_num_threads()  # blocks
    return max(1, _BLOCK_ELEMENTS // at_once // max(1, distances.shape[1]))


@outside_of_graphs("tpr_at_fpr_from_distances reads its data: call it outside the compiled part")
@torch.no_grad()
def tpr_at_fpr_from_distances(
    distances: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None = None,
    gallery_cams: Tensor | None = None,
    *,
    fpr: Sequence[float] = (1e-4, 1e-3, 1e-2),
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> Tensor:
    """The share of the pairs of one person that a threshold on the distance accepts, where it accepts at most so large
    a share of the pairs of two: the ROC of verification at some places, exactly.

    Pairs are all of a query and a gallery image but those that `rank_metrics` removes or ignores.

    Args:
        distances, query_ids, gallery_ids, query_cams, gallery_cams, junk, unknown_camera: as in
            `rank_metrics_from_distances`. Beside blocks of 64 MB max(fpr) · Q · G distances are kept.
        fpr: false positive rates, each from 0 to below 1.

    Returns:
        True positive rates, (len(fpr),) float64.

    Raises:
        TypeError, ValueError: as `rank_metrics_from_distances`; no pair of one person, or none of two.

    >>> import torch
    >>> distances = torch.tensor([[0.3, 0.25, 0.5], [0.6, 0.2, 0.4]])
    >>> ids = torch.tensor([7, 8]), torch.tensor([7, 8, 7])
    >>> tpr_at_fpr_from_distances(distances, *ids, fpr=(0.0, 0.4))
    tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    _check_matrix(distances, (query_ids, gallery_ids, query_cams, gallery_cams))
    unlabelled = checked_unlabelled(junk, unknown_camera)
    if not isinstance(fpr, Sequence):
        raise TypeError(f"fpr: expected a sequence of rates, got {type(fpr).__name__}")
    for rate in fpr:
        check_number("fpr", rate)
        if rate >= 1:
            raise ValueError(f"fpr: expected rates below 1, got {rate}")
    query_ids, gallery_ids = query_ids.long(), gallery_ids.long()
    queries = (~unlabelled.is_junk(query_ids)).nonzero()[:, 0]
    images = ~unlabelled.is_junk(gallery_ids)
    most = 1 + int(max(fpr, default=0) * queries.numel() * int(images.sum())) + 1
    positives, nearest, impostors = [], distances.new_empty(0), 0
    for rows in queries.split(_rows_at_once(distances)):
        block = distances[rows]
        if block.isnan().any():
            raise ValueError("distances: expected no NaN, got one")
        same = query_ids[rows, None] == gallery_ids
        genuine = same & images
        if query_cams is not None and gallery_cams is not None:
            genuine &= ~unlabelled.removed(query_ids[rows, None], query_cams[rows, None], gallery_ids, gallery_cams)
        negative = ~same & images
        positives.append(block[genuine])
        impostors += int(negative.sum())
        nearest = torch.cat([nearest, block[negative]])
        if nearest.numel() > most:
            nearest = nearest.topk(most, largest=False, sorted=False).values
    found = torch.cat(positives) if positives else nearest.new_empty(0)
    if not found.numel() or not impostors:
        raise ValueError(
            f"query_ids: expected pairs of one person and pairs of two, got {found.numel()} and {impostors}"
        )
    nearest = nearest.sort().values
    rates = []
    for rate in fpr:
        accepted = int(rate * impostors)
        # 0.29 · 100 is below 29; as far as the product is rounded up, back.
        accepted += ((accepted + 1) / impostors <= rate) - (accepted / impostors > rate)
        # The next one is refused, and what is as far as it.
        below = found < nearest[accepted] if accepted < impostors else torch.ones_like(found, dtype=torch.bool)
        rates.append(below.double().mean())
    return torch.stack(rates) if rates else found.new_empty(0, dtype=torch.float64)
