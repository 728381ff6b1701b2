"""Random re-rankings and Jaccard distances against dense float64 loops, with every pair of options among them."""

from __future__ import annotations

import itertools
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from dense_rerank import clustered, reranked, rounded, squared
from torch import Tensor

from apd_kernels import jaccard_distance, k_reciprocal_rerank
from apd_kernels.reference import rerank as reference

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
CASES = 160
OPTIONS: dict[str, list[Any]] = {
    "kind": ["euclidean", "sqeuclidean", "cosine", "transreid"],
    "rows": ["around centres", "lone", "duplicates", "one row many times", "integers"],
    "count": [2, 9, 30, 55],
    "queries": ["one", "a third", "all but one"],
    "k1": [1, 5, 20, 70],
    "k2": [1, 3, 6, 80],
    "lambda_value": [0.0, 0.3, 1.0],
    "output": ["dense", "blocks", "topk", "sparse"],
}


def options_of(seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    return {name: choose.choice(values) for name, values in OPTIONS.items()}


def rows_of(case: dict[str, Any], seed: int) -> Tensor:
    """float64; integers, of which many pairs are at one distance, in float32, which they are exact in.

    Their angles are not: where equal ones come from different rows, rounding decides. So "cosine" takes duplicates.
    """
    kind, count = case["rows"], case["count"]
    if kind == "integers" and case["kind"] == "cosine":
        kind = "duplicates"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    if kind == "around centres":
        x = 3 * x[torch.arange(count) // 4] + torch.randn(count, 6, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        x = x[torch.randint(0, max(1, count // 3), (count,), generator=generator)]
    if kind == "one row many times":
        x[: count - count // 4] = x[0]
    return torch.randint(-2, 3, (count, 6), generator=generator).float() if kind == "integers" else x


def queries_of(kind: str, count: int) -> int:
    return {"one": 1, "a third": max(1, count // 3), "all but one": count - 1}[kind]


def test_every_pair_of_options_is_among_the_cases() -> None:
    cases = [options_of(seed) for seed in range(CASES)]
    for one, other in itertools.combinations(OPTIONS, 2):
        drawn = {(case[one], case[other]) for case in cases}
        assert drawn == set(itertools.product(OPTIONS[one], OPTIONS[other])), (one, other)


@pytest.mark.parametrize("tens", range(CASES // 10))
def test_random_rerankings(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        case = options_of(seed)
        x, queries = rows_of(case, seed), queries_of(case["queries"], case["count"])
        options = {name: case[name] for name in ("k1", "k2", "lambda_value")}
        how = {"variant": "transreid"} if case["kind"] == "transreid" else {"metric": case["kind"]}
        found = k_reciprocal_rerank(x[:queries], x[queries:], **options, **how)
        s = squared(x, "cosine" if case["kind"] == "cosine" else "euclidean")
        if case["kind"] in ("cosine", "sqeuclidean"):
            s = s**2
        wanted = (rounded if case["kind"] == "transreid" else reranked)(s, queries, **options)
        tolerance = 1e-3 if case["kind"] == "transreid" else 2e-6 if x.dtype == torch.float32 else 1e-11
        dense = found.dense()
        np.testing.assert_allclose(dense.double().numpy(), wanted, rtol=0, atol=tolerance, err_msg=f"{seed}: {case}")
        if case["output"] == "blocks":
            assert torch.equal(torch.cat([block for _, block in found.blocks()]), dense), seed
        elif case["output"] == "topk":
            lists, ordered = found.topk(7), dense.sort(dim=1, stable=True)
            kept = min(7, dense.shape[1])
            assert torch.equal(lists.indices[:, :kept], ordered.indices[:, :7]), seed
            assert torch.equal(lists.distances[:, :kept], ordered.values[:, :7]), seed
            assert bool((lists.indices[:, kept:] == -1).all()), seed


@pytest.mark.parametrize("tens", range(CASES // 10))
def test_random_jaccard_distances(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        case = options_of(seed)
        metric = "cosine" if case["kind"] == "cosine" else "euclidean"
        x = rows_of(case, seed)
        sparse = case["output"] == "sparse"
        found = jaccard_distance(x, k1=case["k1"], k2=case["k2"], metric=metric, sparse=sparse)
        if sparse:
            stored, found = found, torch.ones(found.shape, dtype=found.dtype)
            row = torch.repeat_interleave(stored.crow_indices().diff())
            found[row, stored.col_indices()] = stored.values()
        s = squared(x, metric)
        wanted = clustered(s, case["k1"], case["k2"]) if s.max() > 0 else np.zeros_like(s)
        np.fill_diagonal(wanted, 0)  # by definition: with k1 = 1 a row's only neighbour may be its copy
        tolerance = 2e-6 if x.dtype == torch.float32 else 1e-11
        np.testing.assert_allclose(found.double().numpy(), wanted, rtol=0, atol=tolerance, err_msg=f"{seed}: {case}")


def test_threads_and_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve blocks of the smallest size, which three threads take; tiles of half the size make do with fewer rows."""
    monkeypatch.setattr(reference, "TILE_ROWS", 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=generator)[torch.randint(0, 300, (1500,), generator=generator)]
    x += 0.3 * torch.randn(1500, 16, generator=generator)
    ids = torch.randint(0, 300, (1500,), generator=generator)
    before = torch.get_num_threads()

    def everything() -> list[Tensor]:
        found = k_reciprocal_rerank(x[:1400], x[1400:])
        sparse = jaccard_distance(x, sparse=True)
        metrics = found.rank_metrics(ids[:1400], ids[1400:])
        return [found.dense(), *found.topk(5), metrics.ap.nan_to_num(), sparse.values(), sparse.col_indices()]

    try:
        torch.set_num_threads(2)
        wanted = everything()
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1 << 16)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, everything(), wanted))
    finally:
        torch.set_num_threads(before)


def test_threads_have_a_limited_number_of_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads and room for two blocks: two are worked on, on four threads each."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(reference, "IN_FLIGHT", 2 * reference.TILE_ROWS * 100)
    lock, running, most, inner = threading.Lock(), 0, 0, set()

    def work(rows: slice) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            inner.add(torch.get_num_threads())
        time.sleep(0.01)
        with lock:
            running -= 1
        return rows.start

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        found = reference.each_rows(torch.empty(0), work, 20 * reference.TILE_ROWS, 100)
    finally:
        torch.set_num_threads(before)
    assert found == [reference.TILE_ROWS * i for i in range(20)]
    assert most == 2
    assert inner == {4}
