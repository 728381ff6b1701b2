"""Equal rows tie, and the lowest index wins, also where a BLAS library rounds equal columns differently."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from apd_kernels import batch_hard, use_backend
from apd_kernels.reference import mining

pytestmark = pytest.mark.oldest


@pytest.fixture(autouse=True)
def _columns_are_rounded_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = mining.column_keys

    def rounded(a: Tensor, b: Tensor, half: Tensor | None, scale: int = 1) -> Tensor:
        keys = exact(a, b, half, scale)
        noise = torch.rand(keys.shape[-1], generator=torch.Generator().manual_seed(0), dtype=keys.dtype)
        return keys * (1 + 4 * torch.finfo(keys.dtype).eps * noise)

    monkeypatch.setattr(mining, "column_keys", rounded)


def _first(allowed: Tensor) -> Tensor:
    """The lowest allowed column of each row, −1 for none."""
    return torch.where(allowed.any(1), allowed.to(torch.uint8).argmax(1), -1)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [3, 37, 300, 2500])
def test_a_collapsed_batch(size: int, dtype: torch.dtype, metric: str) -> None:
    """All rows equal: the first of each side, past the anchor itself."""
    x = torch.randn(1, 19, generator=torch.Generator().manual_seed(size)).to(dtype).expand(size, 19).contiguous()
    labels = torch.arange(size) % 7
    with use_backend("torch"):
        found = batch_hard(x, labels, metric=metric)
    same = labels[:, None] == labels
    other = ~torch.eye(size, dtype=torch.bool)
    torch.testing.assert_close(found.indices.positive, _first(same & other))
    torch.testing.assert_close(found.indices.negative, _first(~same))


@pytest.mark.parametrize("dimension", [1, 2, 16, 50])
@pytest.mark.parametrize("rules", [False, True], ids=["all pairs", "own rows, valid rows, domains"])
def test_a_memory_with_copies(dimension: int, rules: bool) -> None:
    """Three rows many times over, in two sets: the farthest copy and the nearest copy of lowest place that may win."""
    generator = torch.Generator().manual_seed(dimension)
    distinct = 3 * torch.randn(2, 3, dimension, generator=generator)
    kind = torch.randint(0, 3, (400,), generator=generator)
    x, y = torch.randn(2, 40, dimension, generator=generator), distinct[:, kind]
    labels, y_labels = torch.arange(40) % 3, torch.randint(0, 3, (400,), generator=generator)
    options, allowed = {}, torch.ones(40, 400, dtype=torch.bool)
    if rules:
        own, valid = torch.arange(40) * 3, torch.rand(400, generator=generator) < 0.8
        domains, y_domains = torch.arange(40) % 2, torch.randint(0, 2, (400,), generator=generator)
        options = {"own": own, "y_valid": valid, "domains": domains, "y_domains": y_domains, "negatives": "within"}
        allowed = valid & (torch.arange(400) != own[:, None])
    same = labels[:, None] == y_labels
    within = domains[:, None] == y_domains if rules else True
    with use_backend("torch"):
        found = batch_hard(x, labels, y, y_labels, **options)
    for number in range(2):
        distance = torch.cdist(x[number].double(), y[number].double())
        for index, mask, sign in (
            (found.indices.positive[number], same & allowed, -1),
            (found.indices.negative[number], ~same & allowed & within, 1),
        ):
            keys = torch.where(mask, sign * distance, torch.inf)
            best = keys <= keys.min(1, keepdim=True).values + 1e-9
            torch.testing.assert_close(index, _first(best & mask))


def test_rows_that_only_look_equal() -> None:
    """Of 64 elements the mark of a row sees 16: rows that differ in another element are not taken for one another."""
    y = torch.zeros(6, 64)
    y[:, 0] = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    y[1, 1] = y[3, 1] = 0.5
    with use_backend("torch"):
        found = batch_hard(torch.zeros(1, 64), torch.tensor([0]), y, torch.tensor([0, 1, 1, 1, 1, 0]))
    assert found.indices.negative.item() == 2
    assert found.indices.positive.item() == 0


@pytest.mark.parametrize("kind", ["marked elements are zero", "sparse", "first elements are zero"])
def test_rows_that_look_equal_cost_no_search(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that differ are told apart before anchors are looked at, one by one: that took 100 times as long."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    if kind == "sparse":
        x = (x - 1).relu()
        x[:100, 1:] = 0
        x[:100, 0] = torch.arange(1.0, 101)
    elif kind == "marked elements are zero":
        x[:, ::4] = 0
    else:
        x = torch.cat([torch.zeros(300, 16), x[:, :4]], 1)
    assert mining.marks_of_equal_rows(x) is None
    monkeypatch.setattr(mining, "_first", None)  # would be called
    with use_backend("torch"):
        batch_hard(x, torch.arange(300) % 7)


def test_zeros_of_either_sign_are_equal() -> None:
    y = torch.zeros(50, 20)
    y[:, 3] = 1
    y[0, 5] = y[7, 19] = -0.0
    with use_backend("torch"):
        found = batch_hard(torch.ones(2, 20), torch.tensor([0, 1]), y, torch.zeros(50, dtype=torch.int64))
    assert found.indices.positive.tolist() == [0, -1]
    assert found.indices.negative.tolist() == [-1, 0]


CODE = """
import sys, torch
from apd_kernels import batch_hard, knn, metric_perturb, rank_metrics
for threads in (1, 2, 3, 6):
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.float64):
        for q, g, d in ((37, 199, 50), (300, 1600, 64)):
            torch.manual_seed(q)
            y = torch.randn(1, d, dtype=dtype).expand(g, d).contiguous()
            query = torch.randn(q, d, dtype=dtype)
            q_ids, g_ids = torch.arange(q) % 5, torch.arange(g) % 5
            found = batch_hard(query, q_ids, y, g_ids).indices
            assert torch.equal(found.positive, q_ids) and found.negative.max() == 1, (threads, dtype, q)
            assert torch.equal(knn(query, y, 10).indices, torch.arange(10).expand(q, 10)), (threads, dtype, q)
            assert rank_metrics(y[:q], y, q_ids, g_ids).cmc[0] == 0, (threads, dtype, q)
    x = torch.randn(16, 256)[torch.arange(64) // 4 // 2]  # 8 copies of each row, under two identities
    twice = metric_perturb(torch.cat([x, x]), torch.arange(128) // 4, epsilon=0.1, steps=3)
    assert twice.isfinite().all()
print("tied")
"""


@pytest.mark.parametrize("instructions", ["AVX2", "SSE4_2"])
def test_mkl_with_other_instructions(instructions: str) -> None:
    """What Intel's desktop processors without AVX-512 run; a library other than MKL ignores the variable."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions, "MKL_DYNAMIC": "FALSE"}
    environment.update({"OMP_NUM_THREADS": "6", "OMP_WAIT_POLICY": "PASSIVE", "APD_KERNELS_BACKEND": "torch"})
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "tied", result.stderr
