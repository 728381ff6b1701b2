"""Retrieval metrics by counting: no Q×G matrix, no sort of the gallery.

CMC, AP and INP of a query depend only on the ranks of its positives, and the i-th nearest positive has rank i plus the
number of negatives that are not farther than it. So first the similarities of the positive pairs are taken and sorted,
query by query: the thresholds. Then all other pairs are compared with them, tile by tile.

For a fixed query the similarity s(x, y) = x·y ("dot", and "cosine" of unit rows) or x·y − ½‖y‖² (Euclidean) falls as
the distance grows. Both phases take it with the same tile arithmetic, so that equal gallery rows tie exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apd_kernels._core.checks import check_floating, check_integers
from apd_kernels._core.compiler import outside_of_graphs
from apd_kernels._core.operators import internal_dtype
from apd_kernels.evaluation.accumulator import RankAccumulator, Shard
from apd_kernels.evaluation.retrieval_metrics import (
    RankMetrics,
    check_labels,
    check_options,
    check_own,
    checked_unlabelled,
    metrics_of_blocks,
)
from apd_kernels.evaluation.rows import padded

__all__ = ["RankAccumulator", "RankMetrics", "rank_metrics", "rank_metrics_from_distances"]

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
            orders of the images at one distance, for twice the counting.
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
    if single_shot is not None:
        if isinstance(single_shot, bool) or not isinstance(single_shot, int):
            raise TypeError(f"single_shot: expected an int, got {type(single_shot).__name__}")
        if single_shot < 1:
            raise ValueError(f"single_shot: expected at least 1, got {single_shot}")
    _check_seed(seed)
    ranks.check(gallery, gallery_ids, gallery_cams)
    if exclude is not None:
        check_own(exclude, query_ids, gallery_ids, checked_unlabelled(junk, unknown_camera))

    def shard(ranks: RankAccumulator, images: slice | Tensor) -> Shard:
        cams = None if gallery_cams is None else gallery_cams[images]
        return ranks.shard_of(gallery[images], gallery_ids[images], cams)

    size = _piece_rows(gallery)
    pieces = [slice(at, at + size) for at in range(0, max(1, gallery.shape[0]), size)]
    whole = shard(ranks, pieces[0]) if len(pieces) == 1 else None
    for piece in pieces:
        ranks.add(whole or shard(ranks, piece))
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = []
    for _ in range(single_shot or 0):
        draw, images = ranks.draw(gallery_ids, gallery_cams, generator)
        for drawn in images.split(max(1, size // 2)):  # half: they are gathered before they are copied
            draw.count_shard(shard(draw, drawn))
        draws.append(draw.compute().cmc)
    for piece in pieces:
        ranks.count_shard(whole or shard(ranks, piece))
    result = ranks.compute()
    return result._replace(cmc=torch.stack(draws).mean(0)) if draws else result


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
    junk: int | None = -1,
    unknown_camera: int | None = -1,
) -> RankMetrics:
    """CMC, mAP and mINP, exactly, of distances that somebody else has computed.

    Args:
        distances: shape (Q, G), smaller is nearer; float16, bfloat16, float32 or float64, any strides. It is read in
            blocks of rows, 64 MB at a time.
        query_ids, gallery_ids, query_cams, gallery_cams, ap, ties, max_rank, exclude, junk, unknown_camera: as in
            `rank_metrics`.

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
    check_floating("distances", distances)
    if distances.dim() != 2:
        raise ValueError(f"distances: expected shape (Q, G), got {tuple(distances.shape)}")
    queries, images = distances.shape
    check_labels(query_ids, gallery_ids, query_cams, gallery_cams, (queries, images), distances.device)
    if exclude is not None:
        check_integers("exclude", exclude, queries, distances.device)
    check_options(ap, ties, max_rank)
    unlabelled = checked_unlabelled(junk, unknown_camera)
    if distances.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("rank_metrics: expected a call outside CUDA graph capture; its steps depend on the data")
    if exclude is not None:
        check_own(exclude, query_ids, gallery_ids, unlabelled)
    dtype = internal_dtype(distances)
    at_once = 1 if distances.is_cuda else torch.get_num_threads()  # blocks
    return metrics_of_blocks(
        lambda rows: distances[rows].to(dtype),
        max(1, _BLOCK_ELEMENTS // at_once // max(1, images)),
        query_ids,
        gallery_ids,
        query_cams,
        gallery_cams,
        ap=ap,
        ties=ties,
        max_rank=max_rank,
        unlabelled=unlabelled,
        exclude=exclude,
    )
