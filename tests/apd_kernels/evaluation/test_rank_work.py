"""How much the counting kernels do, in Triton's interpreter: which tiles they multiply, how far a tile walks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from traffic import counted

pytest.importorskip("triton")

from apd_kernels._core.backend import INTERPRETED
from apd_kernels.evaluation.retrieval_metrics import tiles_of_pairs
from apd_kernels.kernels import ranking

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")

DIMENSION = 4


def _rows(count: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, (count, DIMENSION), generator=torch.Generator().manual_seed(seed)).float()


def _counted_lists(lengths: list[int], images: int) -> tuple[Tensor, Tensor, list[int]]:
    """Counts, those of a loop, and how often each program read thresholds; the gallery holds negatives alone."""
    query, gallery = _rows(len(lengths), 0), _rows(images, 1)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    drawn = torch.randint(-20, 20, (int(starts[-1]),), generator=torch.Generator().manual_seed(2)).float()
    thresholds = torch.cat([part.sort().values for part in drawn.split(lengths)])
    nothing = torch.zeros(len(lengths), dtype=torch.int64)
    operands = [ranking.prepared_rows(rows, None, "fp32") for rows in (query, gallery)]
    with counted() as traffic:
        count = ranking.count_negatives(*operands, nothing, nothing, thresholds, starts)
    ends = thresholds.data_ptr(), thresholds.data_ptr() + thresholds.nbytes
    reads: Counter[int] = Counter()
    for program, at in traffic.loads:
        reads[program] += int(np.any((at >= ends[0]) & (at < ends[1])))
    row = torch.repeat_interleave(torch.tensor(lengths))
    wanted = ((query @ gallery.T)[row] >= thresholds[:, None]).sum(1)
    return count, wanted, list(reads.values())


def test_a_query_with_thousands_of_positives_holds_up_nobody() -> None:
    """A tile walks through at most LIST thresholds, and the tiles of the other queries through no more than before."""
    few, many = [5] * 100, 3000
    count, wanted, without = _counted_lists(few, 150)
    assert torch.equal(count.long(), wanted)
    count, wanted, reads = _counted_lists([*few[:50], many, *few[50:]], 150)
    assert torch.equal(count.long(), wanted)
    searched = ranking.LIST.bit_length()
    assert max(reads) <= ranking.LIST + searched
    extra = -(-many // ranking.LIST) + 64  # rows that its lists fill, and the rest of a tile of 64
    assert sum(reads) <= sum(without) + -(-extra // 64) * -(-150 // 64) * (ranking.LIST + searched)
    assert sorted(reads)[: len(without) // 2] == sorted(without)[: len(without) // 2]


def test_lists_hold_every_threshold_once() -> None:
    starts = torch.tensor([0, 0, 1, 500, 500 + ranking.LIST, 2000])
    row, begin, end = ranking.lists_of(starts)
    assert (end > begin).all()
    assert (end - begin <= ranking.LIST).all()
    assert ((end - begin).diff() <= 0).all()
    held = [(int(place), int(i)) for i, one, other in zip(row, begin, end, strict=True) for place in range(one, other)]
    assert sorted(held) == [(place, int((starts <= place).sum()) - 1) for place in range(2000)]


@pytest.mark.parametrize("queries", [1, 70, 200])
def test_tiles_of_pairs(queries: int) -> None:
    """Those that hold a pair of one identity, and no others; most do not where identities are few images each."""
    generator = torch.Generator().manual_seed(queries)
    first = torch.randint(0, 900, (queries,), generator=generator).sort().values
    last = first + torch.randint(0, 40, (queries,), generator=generator)
    holds = torch.zeros(-(-queries // 64), -(-1000 // 32), dtype=torch.bool)
    for i, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        for column in range(begin, end):
            holds[i // 64, column // 32] = True
    found = tiles_of_pairs(first, last, 1000, 64, 32)
    assert found.tolist() == holds.flatten().nonzero()[:, 0].tolist()


def test_positives_are_read_from_their_tiles_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[Any] = []
    launch = ranking.launch
    monkeypatch.setattr(ranking, "launch", lambda kernel, grid, *rest, **options: (
        grids.append(grid), launch(kernel, grid, *rest, **options)))  # fmt: skip
    query, gallery = _rows(66, 0), _rows(330, 1)
    first = 5 * torch.arange(66)
    starts = 5 * torch.arange(67)
    operands = [ranking.prepared_rows(rows, None, "fp32") for rows in (query, gallery)]
    found = ranking.same_identity_similarities(*operands, first, first + 5, starts, 330)
    row = torch.repeat_interleave(torch.arange(66), 5)
    assert torch.equal(found, (query[row] * gallery).sum(1))
    assert grids == [(6,)]  # of 2 × 6
