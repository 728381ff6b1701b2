"""From pairs of one identity, and negatives counted against them, to CMC, AP and INP."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apd_kernels._core.checks import check_choice, check_integers
from apd_kernels.evaluation.rows import check_places

AVERAGE_PRECISIONS = ("rectangular", "trapezoidal")
TIES = ("pessimistic", "optimistic", "expected", "grouped")
TIES_OF_DISTANCES = (*TIES, "stable")
_LONGEST_CMC = 1 << 24  # 128 MB
_SUMMED = 64  # images at one distance up to which a sum is taken term by term


class Unlabelled(NamedTuple):
    """The numbers that are no identity and no camera, for every figure and every list; None where there is none.

    An image of identity `junk` counts neither for nor against, and as a query it is not counted. Camera
    `unknown_camera` says that the camera is not known: it equals no camera, and so removes nothing. The methods take
    tensors and NumPy arrays.
    """

    junk: int | None = -1
    unknown_camera: int | None = -1

    def is_junk(self, ids: Any) -> Any:
        return ids != ids if self.junk is None else ids == self.junk

    def is_unknown(self, cams: Any) -> Any:
        return cams != cams if self.unknown_camera is None else cams == self.unknown_camera

    def removes_nothing(self, ids: Any, cams: Any) -> Any:
        return self.is_junk(ids) | self.is_unknown(cams)

    def removed(self, query_ids: Any, query_cams: Any, ids: Any, cams: Any) -> Any:
        """Whether images are of a query's identity and in its camera; the arguments are broadcast."""
        return (query_ids == ids) & (query_cams == cams) & ~self.removes_nothing(query_ids, query_cams)


class RankMetrics(NamedTuple):
    """What an evaluation measured; means are over the valid queries."""

    cmc: Tensor  # (max_rank,) float64: share of queries with a positive among the first k = 1, 2, …
    mAP: float
    mINP: float
    ap: Tensor  # (Q,) float64: average precision of each query, NaN where it is not counted
    valid: Tensor  # (Q,) bool: the query has a positive and is counted
    inp: Tensor  # (Q,) float64: positives / rank of the last positive, NaN where it is not counted
    first_rank: Tensor  # (Q,) float64: rank of the first positive, from 1, NaN where it is not counted


class PositiveRanks(NamedTuple):
    """Where the positives of all queries stand in their ranked lists: what every figure of retrieval is made of.

    By query, nearest first. What is removed or junk has no place in a list.

    >>> import torch
    >>> from apd_kernels import positive_ranks_from_distances
    >>> distances = torch.tensor([[0.3, 0.1, 0.5]])
    >>> ranks = positive_ranks_from_distances(distances, torch.tensor([7]), torch.tensor([7, 8, 7]))
    >>> ranks.rank, ranks.hit, ranks.r_precision()
    (tensor([2, 3]), tensor([1, 2]), tensor([0.5000], dtype=torch.float64))
    """

    query: Tensor  # (P,) int64: the query of each positive
    rank: Tensor  # (P,) int64: its place in the list, from 1
    hit: Tensor  # (P,) int64: how many positives there are up to it
    positives: Tensor  # (Q,) int64: how many each query has, 0 where it is not counted

    def r_precision(self) -> Tensor:
        """The precision among the first R of each query, R its number of positives; (Q,) float64, NaN without one."""
        return self._mean_of((self.rank <= self.positives[self.query]).double())

    def ap_at_r(self) -> Tensor:
        """Average precision of each query that looks no further than R (MAP@R: Musgrave et al., 2020); (Q,) float64."""
        within = self.rank <= self.positives[self.query]
        return self._mean_of(torch.where(within, self.hit / self.rank.double(), 0))

    def reciprocal_rank(self, k: int | None = None) -> Tensor:
        """1 / rank of the first positive of each query, 0 where it is behind place k (MRR@k is its mean); (Q,)
        float64, NaN without a positive."""
        if k is not None:
            _check_place("k", k)
        first = self._first()
        inverse = 1 / self.rank[first].double()
        if k is not None:
            inverse = torch.where(self.rank[first] <= k, inverse, 0)
        result = torch.full(self.positives.shape, float("nan"), dtype=torch.float64, device=self.rank.device)
        result[self.query[first]] = inverse
        return result

    def cmc(self, max_rank: int, *, every_match: bool = False) -> Tensor:
        """Share of the valid queries with a positive among the first k = 1 … max_rank; (max_rank,) float64.

        Args:
            max_rank: length of the curve.
            every_match: count every positive, by 1 over their number and as if it were the only one in its list
                (open-reid's default, ``first_match_break=False``).
        """
        _check_place("max_rank", max_rank)
        if every_match:
            place, weight = self.rank - self.hit, 1 / self.positives[self.query].double()
        else:
            first = self._first()
            place, weight = self.rank[first] - 1, torch.ones_like(self.rank[first], dtype=torch.float64)
        within = place < max_rank
        found = torch.bincount(place[within], weights=weight[within], minlength=max_rank)
        return found.cumsum(0) / (self.positives > 0).sum()

    def _first(self) -> Tensor:
        first = torch.ones_like(self.query, dtype=torch.bool)
        first[1:] = self.query[1:] != self.query[:-1]
        return first

    def _mean_of(self, values: Tensor) -> Tensor:
        total = torch.bincount(self.query, weights=values, minlength=len(self.positives))
        return torch.where(self.positives > 0, total / self.positives, float("nan"))


class Matched(NamedTuple):
    """A gallery without junk, sorted by identity and camera, and each query's ranges in it.

    The gallery images of a query's identity are the contiguous range first … last of `gallery_rows`, and those of its
    camera among them, which are removed, the range removed_first … removed_last inside it.
    """

    gallery_rows: Tensor
    first: Tensor
    last: Tensor
    removed_first: Tensor
    removed_last: Tensor


def match(
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None,
    gallery_cams: Tensor | None,
    unlabelled: Unlabelled,
) -> Matched:
    query_ids, gallery_ids = query_ids.long(), gallery_ids.long()
    identity = torch.unique(torch.cat([query_ids, gallery_ids]), return_inverse=True)[1]
    cameras = 1
    code = identity  # one number for identity and camera, sorted by identity first
    if query_cams is not None and gallery_cams is not None:
        names, camera = torch.unique(torch.cat([query_cams.long(), gallery_cams.long()]), return_inverse=True)
        cameras = max(1, names.numel())
        code = identity * cameras + camera
    queries = query_ids.numel()
    gallery_rows = (~unlabelled.is_junk(gallery_ids)).nonzero()[:, 0]
    gallery_rows = gallery_rows[code[queries:][gallery_rows].argsort(stable=True)]
    code_of_gallery, code_of_query = code[queries:][gallery_rows], code[:queries]
    first_code = identity[:queries] * cameras
    first = torch.searchsorted(code_of_gallery, first_code)
    last = torch.searchsorted(code_of_gallery, first_code + cameras)
    removed_first, removed_last = last, last
    if query_cams is not None:
        unknown = unlabelled.is_unknown(query_cams.long())
        removed_first = torch.where(unknown, last, torch.searchsorted(code_of_gallery, code_of_query))
        removed_last = torch.where(unknown, last, torch.searchsorted(code_of_gallery, code_of_query, right=True))
    return Matched(gallery_rows, first, last, removed_first, removed_last)


def positive_pairs(matched: Matched) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and place in the sorted gallery of each pair of one identity, by query; where each query's begin, (Q + 1,);
    and which pairs are not removed."""
    lengths = matched.last - matched.first
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row = torch.repeat_interleave(lengths)
    column = torch.arange(row.numel(), device=row.device) + (matched.first - starts[:-1])[row]
    kept = (column < matched.removed_first[row]) | (column >= matched.removed_last[row])
    return row, column, starts, kept


def tiles_of_pairs(first: Tensor, last: Tensor, images: int, rows: int, columns: int) -> Tensor:
    """The tiles of rows × columns that hold gallery images first[i] … last[i] of a query i, numbered row by row."""
    begin = first // columns
    across = torch.where(last > first, (last - 1) // columns + 1 - begin, 0)
    query = torch.repeat_interleave(across)
    place = torch.arange(query.numel(), device=query.device) - (across.cumsum(0) - across)[query]
    return torch.unique(query // rows * -(-images // columns) + begin[query] + place)


def nothing_to_count(queries: int, images: int, cameras: bool) -> ValueError:
    where = " from another camera" if cameras else ""
    return ValueError(
        f"query_ids: expected at least one query with a gallery image of the same identity{where}, got none among "
        f"{queries} queries and {images} gallery images"
    )


class Thresholds(NamedTuple):
    """Similarities of the positive pairs, ascending for each query; those of query i are starts[i] … starts[i + 1]."""

    values: Tensor
    starts: Tensor


def sorted_thresholds(similarity: Tensor, row: Tensor, queries: int) -> Thresholds:
    order = similarity.argsort()
    order = order[row[order].argsort(stable=True)]
    starts = torch.cat([row.new_zeros(1), torch.bincount(row, minlength=queries).cumsum(0)])
    return Thresholds(similarity[order], starts)


def reached(thresholds: Tensor, ties: str) -> list[Tensor]:
    """What a similarity has to reach to come before a positive: itself, or the next number above it, or both."""
    above = torch.nextafter(thresholds, torch.full_like(thresholds, float("inf")))
    smallest = torch.finfo(thresholds.dtype).tiny  # the number above 0 that is there where denormals are flushed
    above = torch.where((thresholds >= 0) & (thresholds < smallest), smallest, above)
    both = [thresholds, above]
    return {"optimistic": [above], "expected": both, "stable": both}.get(ties, [thresholds])


def summarised(
    counts: list[Tensor],
    thresholds: Thresholds,
    query_rows: Tensor,
    queries: int,
    ap: str,
    ties: str,
    max_rank: int,
) -> RankMetrics:
    """The metrics from the counts of negatives for `reached(thresholds, ties)`."""
    if ties == "expected":
        return expected_summary(counts[0], counts[1], thresholds, query_rows, queries, ap, max_rank)
    rank, hit = ranks_of(counts[0], thresholds, ties)
    return summary(rank, hit, thresholds.starts, query_rows, queries, ap, max_rank)


def ranked(counts: list[Tensor], thresholds: Thresholds, query_rows: Tensor, queries: int, ties: str) -> PositiveRanks:
    """The ranks from the same; not for "expected" ties."""
    rank, hit = ranks_of(counts[0], thresholds, ties)
    positives = thresholds.starts.diff().cpu()
    row = query_rows.cpu()[torch.repeat_interleave(positives)]
    # By query as they were given, nearest first: the places of a query were in the opposite order.
    order = row.flip(0).argsort(stable=True)
    count = row.new_zeros(queries).index_add_(0, query_rows.cpu(), positives)
    query, rank, hit = (values.flip(0)[order].to(thresholds.values.device) for values in (row, rank, hit))
    return PositiveRanks(query, rank, hit, count.to(thresholds.values.device))


def ranks_of(negatives: Tensor, thresholds: Thresholds, ties: str) -> tuple[Tensor, Tensor]:
    """Rank and hit of every positive, in the order of the thresholds, on the CPU."""
    starts = thresholds.starts.cpu()
    row = torch.repeat_interleave(starts.diff())
    place = torch.arange(row.numel(), device=row.device)
    if ties == "grouped" and row.numel():  # all positives at one distance have the place of the last of them
        values = thresholds.values.cpu()
        opens = torch.ones_like(row, dtype=torch.bool)
        opens[1:] = (row[1:] != row[:-1]) | (values[1:] != values[:-1])
        place = torch.where(opens, place, 0).cummax(0).values
    hit = starts[1:][row] - place
    return hit + negatives.cpu().long(), hit


def add_reached(
    count: npt.NDArray[np.int64], block: npt.NDArray[np.floating], edges: npt.NDArray[np.floating], starts: list[int]
) -> None:
    """Add to the count of each threshold of a row, ascending, how many entries of the row reach it; NaN does not.

    NumPy compares, sorts and searches short rows 3 times faster than PyTorch.
    """
    for row, start, stop in zip(block, starts[:-1], starts[1:], strict=True):
        near = row[row >= edges[start]]
        near.sort()
        count[start:stop] += near.size - near.searchsorted(edges[start:stop])


def one_of_each(values: Tensor, generator: torch.Generator) -> Tensor:
    """One random place of each value, by ascending value."""
    drawn = torch.rand(len(values), dtype=torch.float64, generator=generator, device="cpu")
    order = drawn.argsort().to(values.device)
    order = order[values[order].argsort(stable=True)]
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = values[order[1:]] != values[order[:-1]]
    return order[first]


def check_options(ap: str, ties: str, max_rank: int, all_ties: tuple[str, ...] = TIES) -> None:
    check_choice("ap", ap, AVERAGE_PRECISIONS)
    check_choice("ties", ties, all_ties)
    _check_place("max_rank", max_rank)


def _check_place(name: str, value: int) -> None:
    """A place in a list: as far as a CMC may reach."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 1 <= value <= _LONGEST_CMC:
        raise ValueError(f"{name}: expected from 1 to {_LONGEST_CMC:,}, got {value}")


def check_labels(
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None,
    gallery_cams: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> None:
    """Of Q queries and G gallery images, `shape`, on a device."""
    check_integers("query_ids", query_ids, shape[0], device)
    check_integers("gallery_ids", gallery_ids, shape[1], device)
    check_cameras(query_cams, gallery_cams)
    if query_cams is not None and gallery_cams is not None:
        check_integers("query_cams", query_cams, shape[0], device)
        check_integers("gallery_cams", gallery_cams, shape[1], device)


def checked_unlabelled(junk: int | None, unknown_camera: int | None) -> Unlabelled:
    for name, value in (("junk", junk), ("unknown_camera", unknown_camera)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
        if value is not None and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected a number of 64 bits, got {value}")
    return Unlabelled(junk, unknown_camera)


def check_own(exclude: Tensor, query_ids: Tensor, gallery_ids: Tensor, unlabelled: Unlabelled) -> None:
    """`exclude` names images of the queries' identities (or junk): an image of another would count as a negative."""
    places = exclude.long()
    check_places("exclude", places, len(gallery_ids))
    named = (places >= 0).nonzero()[:, 0]
    own, found = query_ids.long()[named], gallery_ids.long()[places[named]]
    wrong = ((own != found) & ~unlabelled.is_junk(found)).nonzero()[:, 0]
    if wrong.numel():
        first = wrong[0]
        raise ValueError(
            f"exclude: expected each query's own image, of its identity, got image {int(places[named[first]])}, of "
            f"identity {int(found[first])}, for query {int(named[first])}, of {int(own[first])}"
        )


def check_cameras(query_cams: Tensor | None, gallery_cams: Tensor | None) -> None:
    if (query_cams is None) != (gallery_cams is None):
        given, missing = ("query_cams", "gallery_cams") if gallery_cams is None else ("gallery_cams", "query_cams")
        raise ValueError(f"{missing}: expected with {given}, got None")


def summary(
    rank: Tensor, hit: Tensor, starts: Tensor, query_rows: Tensor, queries: int, ap: str, max_rank: int
) -> RankMetrics:
    """The metrics from `ranks_of`; farthest positive first.

    Args:
        starts: (n + 1,); every query has a positive.
        query_rows: (n,) which of all `queries` those are.
    """
    device, starts = starts.device, starts.cpu()
    positives = starts.diff()
    row = torch.repeat_interleave(positives)
    precision = hit / rank.double()
    if ap == "trapezoidal":
        before = torch.where(rank > 1, (hit - 1) / (rank - 1).clamp(min=1).double(), 1.0)
        precision = (precision + before) / 2
    each = torch.bincount(row, weights=precision, minlength=positives.numel()) / positives
    worst, best = rank[starts[:-1]], rank[starts[1:] - 1]
    found = torch.bincount(best[best <= max_rank] - 1, minlength=max_rank)
    cmc = found.cumsum(0).double() / positives.numel()
    return _metrics(cmc, each, positives / worst.double(), best.double(), query_rows, queries, device)


def expected_summary(
    at_least: Tensor,
    above: Tensor,
    thresholds: Thresholds,
    query_rows: Tensor,
    queries: int,
    ap: str,
    max_rank: int,
) -> RankMetrics:
    """The expectation of the metrics over all orders of the images at one distance (AP: McSherry & Najork, 2008).

    `at_least` and `above` count negatives that are not farther than each positive, and nearer ones. Of T images at one
    distance, a of them positive, the r-th is a positive with probability a/T and has then 1 + (r−1)(a−1)/(T−1) hits up
    to itself. Sums of 1/(n + r) over many r are differences of ψ.
    """
    device = at_least.device
    at_least, above = at_least.cpu().double(), above.cpu().double()
    values, starts = thresholds.values.cpu(), thresholds.starts.cpu()
    positives = starts.diff()
    row = torch.repeat_interleave(positives)
    place = torch.arange(row.numel(), device=row.device)
    opens = torch.ones_like(row, dtype=torch.bool)  # the first of the positives of a query at one distance
    opens[1:] = (row[1:] != row[:-1]) | (values[1:] != values[:-1])
    of_group = opens.nonzero()[:, 0]
    a = torch.diff(of_group, append=place.new_full((1,), row.numel())).double()
    query = row[of_group]
    nearer = above[of_group]
    b = at_least[of_group] - nearer
    hits = (starts[1:][query] - of_group).double() - a  # nearer positives
    precision = _expected_precisions(a, b, hits, nearer)
    if ap == "trapezoidal":
        precision = (precision + _expected_precisions(a, b, hits, nearer, before=True)) / 2
    each = torch.bincount(query, weights=precision, minlength=positives.numel()) / positives
    farthest = torch.searchsorted(of_group, starts[:-1], right=True) - 1
    nearest = torch.searchsorted(of_group, starts[1:] - 1, right=True) - 1
    worst = _expected_inverse_of_last(a[farthest], b[farthest], (hits + nearer)[farthest])
    cmc, missed = worst.new_empty(max_rank), torch.ones_like(worst)
    in_order = query_rows.cpu().argsort()  # of the queries as they were given, so that no bit depends on their names
    for k in range(max_rank):
        passed = k - nearer[nearest]  # images of the nearest group that came before
        share = (b[nearest] - passed) / (a[nearest] + b[nearest] - passed).clamp(min=1)
        missed *= torch.where(passed >= 0, share.clamp(0, 1), 1)
        cmc[k] = 1 - missed[in_order].mean()
    # Of a + b images in random order the first of the a is at place (a + b + 1)/(a + 1) on average.
    first = nearer[nearest] + 1 + b[nearest] / (a[nearest] + 1)
    return _metrics(cmc, each, positives * worst, first, query_rows, queries, device)


def _expected_precisions(a: Tensor, b: Tensor, hits: Tensor, nearer: Tensor, *, before: bool = False) -> Tensor:
    """Sum over the a positives of a group of the expected precision at each; `before`: of that just before each."""
    size = a + b
    more = torch.where(size > 1, (a - 1) / (size - 1).clamp(min=1), 0)  # hits that each further place brings
    first = hits + (0 if before else 1)
    images = hits + nearer + (0 if before else 1)  # up to the first place
    total = torch.zeros_like(a)
    steps = torch.arange(_SUMMED, dtype=torch.float64, device=a.device)
    few = (size <= _SUMMED).nonzero()[:, 0]
    for part in few.split(1 << 16):
        above, below = first[part, None] + steps * more[part, None], images[part, None] + steps
        term = torch.where(below > 0, above / below.clamp(min=1), 1)  # before the very first place: 1
        total[part] = torch.where(steps < size[part, None], term, 0).sum(1)
    many = (size > _SUMMED).nonzero()[:, 0]
    first, more, images, count = first[many], more[many], images[many], size[many]
    # Σ_r (first + r·more)/(images + r) = count·more + (first − more·images) Σ_r 1/(images + r), r = 0 …
    start = images.clamp(min=1)
    inverse = torch.digamma(images + count) - torch.digamma(start)
    total[many] = torch.where(
        images > 0,
        count * more + (first - more * images) * inverse,
        1 + (count - 1) * more,  # the first place is the very first: first = images = 0
    )
    return a / size * total


def _expected_inverse_of_last(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """E[1/rank] of the last of a positives in random order with b negatives, after `before` other images."""
    size = a + b
    probability, place = a / size, size.clone()  # that it stands at the last place, then at the one before that …
    total = torch.zeros_like(a)
    for _ in range(int(b.max()) + 1 if b.numel() else 0):
        total += probability / (before + place).clamp(min=1)
        probability = probability * (place - a) / (place - 1).clamp(min=1)
        place -= 1
    return total


def _metrics(
    cmc: Tensor, ap: Tensor, inp: Tensor, first: Tensor, query_rows: Tensor, queries: int, device: torch.device
) -> RankMetrics:
    of_queries = torch.full((3, queries), float("nan"), dtype=torch.float64, device="cpu")
    of_queries[:, query_rows.cpu()] = torch.stack([ap, inp, first])
    valid = ~of_queries[0].isnan()
    average, inverse, rank = of_queries.to(device)
    return RankMetrics(
        cmc=cmc.to(device),
        mAP=float(of_queries[0, valid].mean()),
        mINP=float(of_queries[1, valid].mean()),
        ap=average,
        valid=valid.to(device),
        inp=inverse,
        first_rank=rank,
    )
