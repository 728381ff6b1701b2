"""Retrieval metrics of a gallery that comes in pieces: shards on disk, on several GPUs, on several ranks."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apd_kernels._core.backend import implementation, resolve_backend
from apd_kernels._core.checks import check_choice, check_features, check_integers, check_same_kind
from apd_kernels._core.operands import METRICS, Operands
from apd_kernels._core.operators import implementation_context, internal_dtype
from apd_kernels._core.precision import resolve_precision
from apd_kernels.distributed import gathered_rows
from apd_kernels.evaluation.retrieval_metrics import (
    Matched,
    PositiveRanks,
    RankMetrics,
    Thresholds,
    check_cameras,
    check_options,
    checked_unlabelled,
    match,
    nothing_to_count,
    one_of_each,
    positive_pairs,
    ranked,
    reached,
    sorted_thresholds,
    summarised,
)
from apd_kernels.evaluation.rows import centred_products, half_squares, largest_of, padded, scale_of, sorted_rows


class Shard(NamedTuple):
    """A piece of the gallery ready for the products: sorted by identity, each query's ranges in it, and the rows."""

    matched: Matched
    operands: Operands
    images: int  # junk included
    mark: int  # of its identities and cameras


class RankAccumulator:
    """CMC, mAP and mINP over a gallery in pieces, bit for bit those of `rank_metrics` on the whole.

    Two passes over the pieces: `add_positives` for each, then `count` for each, in any order and of any sizes; then
    `compute`. The first pass takes the similarities of the positive pairs, the second counts the negatives that reach
    them. What is kept is a copy of the queries and a few numbers per positive pair, so the gallery may be larger than
    the memory: pieces can be read from memory-mapped files and forgotten. On several ranks, each with all queries and
    its own pieces, call `exchange` after the first pass and after the second.

    Args:
        query: features, shape (Q, D); float16, bfloat16, float32 or float64.
        query_ids, query_cams: shape (Q,), as in `rank_metrics`.
        metric, ap, ties, max_rank, precision, junk, unknown_camera: as in `rank_metrics`. Euclidean rows are centred
            amid the queries and scaled by their magnitude; gallery rows 10¹⁵ times as long are infinitely
            far.
        exclude: (Q,) int64, the number of each query's own image in the gallery, in the order in which the pieces are
            added, or −1: it is not compared with itself. With several ranks the pieces of rank 0 come first. It has the
            query's identity: an image of another, which `rank_metrics` refuses, is not left out.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice; features that are not finite.

    >>> import torch
    >>> gallery, ids = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([8, 7, 7])
    >>> ranks = RankAccumulator(gallery[:1], torch.tensor([7]), max_rank=3)
    >>> for piece in (slice(0, 2), slice(2, 3)):
    ...     ranks.add_positives(gallery[piece], ids[piece])
    >>> for piece in (slice(0, 2), slice(2, 3)):
    ...     ranks.count(gallery[piece], ids[piece])
    >>> round(ranks.compute().mAP, 4)
    0.5833
    """

    def __init__(
        self,
        query: Tensor,
        query_ids: Tensor,
        query_cams: Tensor | None = None,
        *,
        metric: str = "cosine",
        ap: str = "rectangular",
        ties: str = "pessimistic",
        max_rank: int = 50,
        precision: str | None = None,
        exclude: Tensor | None = None,
        junk: int | None = -1,
        unknown_camera: int | None = -1,
    ) -> None:
        check_features("query", query, sets=False)
        check_integers("query_ids", query_ids, query.shape[0], query.device)
        if query_cams is not None:
            check_integers("query_cams", query_cams, query.shape[0], query.device)
        if exclude is not None:
            check_integers("exclude", exclude, query.shape[0], query.device)
        check_choice("metric", metric, METRICS)
        check_options(ap, ties, max_rank)
        self._unlabelled = checked_unlabelled(junk, unknown_camera)
        self._ap, self._ties, self._max_rank, self._metric = ap, ties, max_rank, metric
        self._precision = resolve_precision(precision)
        self._backend = resolve_backend(query)
        self._ranking = implementation(self._backend, "ranking")
        self._like = query[:0]
        self._order = query_ids.long().argsort(stable=True)
        self._ids = query_ids[self._order]
        self._cams = None if query_cams is None else query_cams[self._order]
        self._exclude = None if exclude is None else exclude.long()[self._order]
        with torch.no_grad(), implementation_context(query, self._backend):
            self._queries = self._ranking.prepared_rows(self._prepare(query), None, self._precision)
        none = torch.zeros(0, dtype=torch.int64, device=query.device)
        self._row, self._similarity = none, none.to(self._internal)
        self._image = none  # the number of a positive in the gallery
        self._added = self._counted = 0
        self._difference = 0  # of the marks of the pieces in the two passes
        self._thresholds: Thresholds | None = None
        self._chosen: Tensor | None = None  # which of the sorted queries have a positive
        self._negatives: list[Tensor] = []

    def _prepare(self, query: Tensor) -> Tensor:
        """The rows of the queries in their order, and what the gallery's are scaled and centred with. Powers of two
        change no bit of a ranking, and no product leaves the range of float32."""
        largest = largest_of("query", query)
        self._internal = dtype = internal_dtype(query)
        self._scale: Tensor | None = None
        self._centre: Tensor | None = None
        count = query.shape[0]
        if self._metric == "cosine":
            self._dtype = dtype
            return sorted_rows(query, self._order, dtype, unit=True)[:count]
        if self._backend == "triton":
            dtype = query.dtype  # products of half inputs are exact in float32
        self._dtype = dtype
        if self._metric == "dot":
            rows = sorted_rows(query, self._order, dtype, scale_of(largest, dtype))[:count]
            if dtype != torch.float16:  # the gallery's rows stay as they are: leave room for sums of their products
                rows *= 2.0 ** -(padded(query.shape[1]).bit_length() + 3)
            return rows
        self._scale = scale_of(largest.amax() if count else largest.new_ones(()), dtype)
        self._dtype, self._centre = centred_products(query, self._scale, self._backend)
        return sorted_rows(query, self._order, self._dtype, self._scale, self._centre)[:count]

    @torch.no_grad()
    def add_positives(self, gallery: Tensor, gallery_ids: Tensor, gallery_cams: Tensor | None = None) -> None:
        """First pass over a piece of the gallery.

        Args:
            gallery: features, shape (n, D), n ≥ 0, dtype and device of the queries.
            gallery_ids, gallery_cams: shape (n,), as in `rank_metrics`.

        Raises:
            TypeError, ValueError: as the constructor.
            RuntimeError: after `count` or `exchange`, when the positives are complete; during CUDA graph capture.
        """
        self.check(gallery, gallery_ids, gallery_cams)
        self.add(self.shard_of(gallery, gallery_ids, gallery_cams))

    @torch.no_grad()
    def count(self, gallery: Tensor, gallery_ids: Tensor, gallery_cams: Tensor | None = None) -> None:
        """Second pass over a piece of the gallery; the arguments and errors as in `add_positives`."""
        self.check(gallery, gallery_ids, gallery_cams)
        self.count_shard(self.shard_of(gallery, gallery_ids, gallery_cams))

    @torch.no_grad()
    def exchange(self, group: dist.ProcessGroup | None = None) -> None:
        """Collective: after `add_positives` of all pieces every rank gets the positives of all ranks, after `count` the
        sum of their counts. O(Q · P) numbers each.

        Args:
            group: of the ranks; all of them when None.

        Raises:
            RuntimeError: no process group is initialised.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("exchange: expected an initialised torch.distributed process group, got none")
        if self._thresholds is None:
            ours = torch.tensor(self._added, device=self._row.device)
            everybody = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
            dist.all_gather(everybody, ours, group=group)
            images = [int(theirs) for theirs in everybody]
            self._leave_out(sum(images[: dist.get_rank(group)]))
            self._added = sum(images)
            dist.all_gather(everybody, torch.tensor(len(self._row), device=self._row.device), group=group)
            sizes = [int(theirs) for theirs in everybody]
            if sum(sizes):
                self._row = gathered_rows(self._row, sizes, group)
                self._similarity = gathered_rows(self._similarity, sizes, group)
            self._close()
            return
        sums = torch.tensor([self._counted, self._difference], device=self._row.device)
        dist.all_reduce(sums, group=group)
        self._counted, self._difference = sums.tolist()
        for negatives in self._negatives:
            dist.all_reduce(negatives, group=group)

    @torch.no_grad()
    def compute(self) -> RankMetrics:
        """The metrics, once every piece has been added and counted.

        Returns:
            `RankMetrics` ``(cmc, mAP, mINP, ap, valid, inp, first_rank)``, tensors on the device of the features.

        Raises:
            ValueError: no query has a positive.
            RuntimeError: other pieces were counted than were added.
        """
        thresholds, rows = self._complete("compute")
        queries = len(self._order)
        return summarised(self._negatives, thresholds, rows, queries, self._ap, self._ties, self._max_rank)

    @torch.no_grad()
    def positive_ranks(self) -> PositiveRanks:
        """The rank of every positive, once every piece has been added and counted; the errors as in `compute`, and a
        ValueError with ``ties="expected"``, where a positive has no single rank."""
        if self._ties == "expected":
            raise ValueError("ties: expected one rank for a positive, got 'expected'")
        return ranked(self._negatives, *self._complete("positive_ranks"), len(self._order), self._ties)

    def _complete(self, name: str) -> tuple[Thresholds, Tensor]:
        """The thresholds, and the queries that have a positive."""
        if self._thresholds is None:
            self._close()
        thresholds, chosen = self._thresholds, self._chosen
        assert thresholds is not None
        assert chosen is not None
        if len(chosen) == 0:
            raise nothing_to_count(len(self._order), self._added, self._cams is not None)
        if self._counted != self._added:
            raise RuntimeError(
                f"{name}: expected every piece of the gallery in both passes, got {self._added} images in "
                f"add_positives and {self._counted} in count"
            )
        if self._difference:
            raise RuntimeError(
                f"{name}: expected the same pieces of the gallery in both passes, got others in count than in "
                "add_positives, by their identities and cameras"
            )
        return thresholds, self._order[chosen]

    def draw(
        self, gallery_ids: Tensor, gallery_cams: Tensor | None, generator: torch.Generator
    ) -> tuple[RankAccumulator, Tensor]:
        """An evaluation of one drawn image of each identity, once all positives have been added: of each query's own
        one of its positives. With it the numbers of the drawn images in the gallery, which it has to count."""
        self._leave_out(0)
        draw = copy(self)
        gallery_ids = gallery_ids.long()
        order = self._image.argsort()
        order = order[self._row[order].argsort(stable=True)]  # the same draws from a gallery in other pieces
        pairs = order[one_of_each(self._row[order], generator)]
        draw._row, draw._similarity, draw._image = self._row[pairs], self._similarity[pairs], self._image[pairs]
        known = (~self._unlabelled.is_junk(gallery_ids)).nonzero()[:, 0]
        images = known[one_of_each(gallery_ids[known], generator)]
        draw._added = len(images)
        draw._difference = _mark(gallery_ids[images], None if gallery_cams is None else gallery_cams[images])
        return draw, images

    def check(self, gallery: Tensor, gallery_ids: Tensor, gallery_cams: Tensor | None) -> None:
        check_features("gallery", gallery, sets=False)
        check_same_kind("gallery", gallery, "query", self._like)
        if gallery.shape[1] != self._like.shape[1]:
            raise ValueError(f"gallery: expected shape (G, {self._like.shape[1]}), got {tuple(gallery.shape)}")
        check_integers("gallery_ids", gallery_ids, gallery.shape[0], gallery.device)
        check_cameras(self._cams, gallery_cams)
        if gallery_cams is not None:
            check_integers("gallery_cams", gallery_cams, gallery.shape[0], gallery.device)
        if gallery.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("rank_metrics: expected a call outside CUDA graph capture; its steps depend on the data")
        largest_of("gallery", gallery)

    def shard_of(self, gallery: Tensor, gallery_ids: Tensor, gallery_cams: Tensor | None) -> Shard:
        matched = match(self._ids, gallery_ids, self._cams, gallery_cams, self._unlabelled)
        images = len(matched.gallery_rows)
        unit = self._metric == "cosine"
        padded_rows = sorted_rows(gallery, matched.gallery_rows, self._dtype, self._scale, self._centre, unit=unit)
        rows, squares = padded_rows[:images], None
        if self._metric in ("euclidean", "sqeuclidean"):
            squares = half_squares(padded_rows)[:images]
            far = ~squares.isfinite()  # ∞ − ∞ would be nowhere: these tie behind all others
            if far.any():
                rows[far] = 0
                squares[far] = torch.finfo(squares.dtype).max
        with implementation_context(gallery, self._backend):
            operands = self._ranking.prepared_rows(rows, squares, self._precision)
        return Shard(matched, operands, gallery.shape[0], _mark(gallery_ids, gallery_cams))

    def add(self, shard: Shard) -> None:
        if self._thresholds is not None:
            raise RuntimeError("add_positives: expected before count, which needs the positives of all pieces")
        row, column, starts, kept = positive_pairs(shard.matched)
        before = self._added
        self._added += shard.images
        self._difference = _wrapped(self._difference + shard.mark)
        if not row.numel():
            return
        first, last = shard.matched.first, shard.matched.last
        with implementation_context(row, self._backend):
            similarity = self._ranking.same_identity_similarities(
                self._queries, shard.operands, first, last, starts, row.numel()
            )
        self._image = torch.cat([self._image, shard.matched.gallery_rows[column[kept]] + before])
        self._row = torch.cat([self._row, row[kept]])
        self._similarity = torch.cat([self._similarity, similarity[kept].to(self._internal)])

    def _leave_out(self, before: int) -> None:
        """Drop what `exclude` names, where `before` images of other ranks precede this rank's."""
        if self._exclude is not None:
            kept = self._image + before != self._exclude[self._row]
            self._row, self._similarity, self._image = self._row[kept], self._similarity[kept], self._image[kept]
            self._exclude = None

    def _close(self) -> None:
        """The positives are complete."""
        self._leave_out(0)
        positives = torch.bincount(self._row, minlength=len(self._order))
        self._chosen = positives.nonzero()[:, 0]
        among = positives.new_full(positives.shape, -1)
        among[self._chosen] = torch.arange(len(self._chosen), device=among.device)
        self._thresholds = sorted_thresholds(self._similarity, among[self._row], len(self._chosen))
        kinds = 2 if self._ties == "expected" else 1
        self._negatives = [torch.zeros_like(self._thresholds.values, dtype=torch.int64) for _ in range(kinds)]
        if len(self._chosen) < len(self._order):
            self._queries = self._queries.of_rows(self._chosen)

    def count_shard(self, shard: Shard) -> None:
        if self._thresholds is None:
            self._close()
        thresholds, chosen = self._thresholds, self._chosen
        assert thresholds is not None
        assert chosen is not None
        self._counted += shard.images
        self._difference = _wrapped(self._difference - shard.mark)
        if not len(chosen) or not len(shard.matched.gallery_rows):
            return
        first, last = shard.matched.first[chosen].contiguous(), shard.matched.last[chosen].contiguous()
        for negatives, values in zip(self._negatives, reached(thresholds.values, self._ties), strict=True):
            with implementation_context(values, self._backend):
                negatives += self._ranking.count_negatives(
                    self._queries, shard.operands, first, last, values, thresholds.starts
                )


def _wrapped(value: int) -> int:
    """As int64 adds."""
    return (value + 2**63) % 2**64 - 2**63


def _mark(ids: Tensor, cams: Tensor | None) -> int:
    """A number of a piece that tells it from others, whatever the order of its images; sums of them tell sums."""
    code = ids.long() * 0x1E3779B97F4A7C15 + (0 if cams is None else cams.long() * 0x42B2AE3D27D4EB4F)
    code = (code ^ (code >> 29)) * 0x3F58476D1CE4E5B9
    return int((code ^ (code >> 32)).sum())
