"""What a matrix of distances comes to, block of rows by block: positives, and the negatives counted against them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd_kernels._core.threads import each_block
from apd_kernels.evaluation.retrieval_metrics import (
    PositiveRanks,
    RankMetrics,
    Thresholds,
    Unlabelled,
    add_reached,
    match,
    nothing_to_count,
    one_of_each,
    positive_pairs,
    ranked,
    reached,
    summarised,
)


class Draw(NamedTuple):
    """One gallery image of each identity, and of each query's own one of its positives."""

    own: Tensor  # (n,): of the queries that have one
    images: Tensor


class Counted(NamedTuple):
    """Positives, and the negatives counted against them for `reached(thresholds, ties)`; for "stable" ties in order."""

    thresholds: Thresholds
    counts: list[Tensor]


class BlockCounts(NamedTuple):
    """What a matrix of distances came to."""

    query_rows: Tensor  # the queries that have a positive
    all: Counted
    draws: list[Counted]

    def metrics(self, queries: int, ap: str, ties: str, max_rank: int) -> RankMetrics:
        """The CMC is the mean of those of the draws, where there are some."""
        whole, *drawn = (
            summarised(counted.counts, counted.thresholds, self.query_rows, queries, ap, ties, max_rank)
            for counted in (self.all, *self.draws)
        )
        return whole._replace(cmc=torch.stack([draw.cmc for draw in drawn]).mean(0)) if drawn else whole

    def ranks(self, queries: int, ties: str) -> PositiveRanks:
        return ranked(self.all.counts, self.all.thresholds, self.query_rows, queries, ties)


def counts_of_blocks(
    distances_of: Callable[[Tensor], Tensor],
    size: int,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor | None,
    gallery_cams: Tensor | None,
    *,
    ties: str,
    unlabelled: Unlabelled,
    exclude: Tensor | None = None,
    draws: int = 0,
    seed: int = 0,
) -> BlockCounts:
    """What the figures of distances are made of that come in blocks of rows: `distances_of(queries)` is (n, G),
    float32 or float64, and may be written into. At most `size` queries at once."""
    query_ids, gallery_ids = query_ids.long(), gallery_ids.long()  # −1 is 255 among bytes
    queries, images = len(query_ids), len(gallery_ids)
    matched = match(query_ids, gallery_ids, query_cams, gallery_cams, unlabelled)
    row, column, _, kept = positive_pairs(matched)
    column = matched.gallery_rows[column]
    if exclude is not None:
        kept &= column != exclude.long()[row]
    row, column = row[kept], column[kept]
    positives = torch.bincount(row, minlength=queries)
    chosen = positives.nonzero()[:, 0]
    if not len(chosen):
        raise nothing_to_count(queries, images, query_cams is not None)
    starts = torch.cat([positives.new_zeros(1), positives[chosen].cumsum(0)])
    junk = unlabelled.is_junk(gallery_ids)
    drawn = _draws(row, column, query_ids, (~junk).nonzero()[:, 0], gallery_ids, draws, seed)
    among = positives.new_zeros(queries)
    among[chosen] = torch.arange(len(chosen), device=among.device)

    def work(at: int) -> tuple[Tensor, ...]:
        rows, bounds = chosen[at : at + size], starts[at : at + size + 1]
        block = distances_of(rows).neg_().add_(0)  # 0, and not -0
        broken = block.isnan().any(1)
        if broken.any():
            raise ValueError(f"distances: expected no NaN, got one in row {int(rows[broken][0])}")
        pairs = slice(int(bounds[0]), int(bounds[-1]))
        of_block, columns = torch.repeat_interleave(bounds.diff()), column[pairs]
        # Of equal ones the last column first: it is the farther one where the order is stable.
        order = columns.argsort(descending=True)
        order = order[block[of_block[order], columns[order]].argsort(stable=True)]
        order = order[of_block[order].argsort(stable=True)]
        columns = columns[order]
        thresholds = Thresholds(block[of_block, columns], bounds - bounds[0])
        own = [block.gather(1, draw.own[at : at + size, None]) for draw in drawn]
        block.masked_fill_((query_ids[rows, None] == gallery_ids) | junk, float("nan"))
        counts = [_reaching(block, edges, thresholds.starts) for edges in reached(thresholds.values, ties)]
        if ties == "stable":
            counts = [_in_order(block, thresholds, of_block, columns, *counts)]
        found = [thresholds.values, *counts]
        for draw, value in zip(drawn, own, strict=True):
            others = block[:, draw.images]
            counts = [(others >= edges).sum(1) for edges in reached(value, ties)]
            if ties == "stable":
                before = (others == value) & (draw.images < draw.own[at : at + size, None])
                counts = [counts[1] + before.sum(1)]
            found += [value[:, 0], *counts]
        return tuple(found)

    parts = each_block(starts, work, range(0, len(chosen), size))
    found = list(map(torch.cat, zip(*parts, strict=True)))
    of_each = [found[at : at + len(found) // (draws + 1)] for at in range(0, len(found), len(found) // (draws + 1))]
    whole, *others = of_each
    single = torch.arange(len(chosen) + 1, device=starts.device)
    return BlockCounts(
        chosen,
        Counted(Thresholds(whole[0], starts), whole[1:]),
        [Counted(Thresholds(values[0], single), values[1:]) for values in others],
    )


def _draws(
    row: Tensor, column: Tensor, query_ids: Tensor, known: Tensor, gallery_ids: Tensor, draws: int, seed: int
) -> list[Draw]:
    """The draws of `RankAccumulator.draw`: queries in the order of their identities."""
    if not draws:
        return []
    generator = torch.Generator("cpu").manual_seed(seed)
    place = torch.empty_like(query_ids)
    by_identity = query_ids.argsort(stable=True)
    place[by_identity] = torch.arange(len(place), device=place.device)
    order = column.argsort(stable=True)
    order = order[place[row[order]].argsort(stable=True)]
    result = []
    for _ in range(draws):
        pairs = order[one_of_each(place[row[order]], generator)]
        own = column[pairs][row[pairs].argsort()]
        result.append(Draw(own, known[one_of_each(gallery_ids[known], generator)]))
    return result


def _in_order(
    block: Tensor, thresholds: Thresholds, of_block: Tensor, columns: Tensor, at_least: Tensor, above: Tensor
) -> Tensor:
    """Negatives before each positive where equal distances are in the order of the gallery."""
    result = above.clone()
    for pair in (at_least > above).nonzero()[:, 0].tolist():  # few, but for distances of few values
        before = block[of_block[pair], : columns[pair]]
        result[pair] += (before == thresholds.values[pair]).sum()
    return result


def _reaching(block: Tensor, edges: Tensor, starts: Tensor) -> Tensor:
    """How many entries of a row reach each of its thresholds."""
    if not block.is_cuda:
        count = np.zeros(len(edges), dtype=np.int64)
        add_reached(count, block.numpy(), edges.numpy(), starts.tolist())
        return torch.from_numpy(count)
    lengths = starts.diff()
    row = torch.repeat_interleave(lengths)
    place = torch.arange(len(edges), device=edges.device) - starts[:-1][row]
    table = edges.new_full((len(block), int(lengths.max())), float("inf"))
    table[row, place] = edges
    below = torch.searchsorted(block.sort(1).values, table)  # NaN stands last
    return (~block.isnan()).sum(1)[row] - below[row, place]
