"""Ways through the kernels that only large problems take, on small ones: sorting, split products, half of the tiles."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import Backend
from kernel_backends import on_kernels
from oracle import assert_close, distances, features, leaf, pairing_options
from test_mining import check
from torch import Tensor

from apd_kernels import batch_hard


def test_many_anchors_by_sorting(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond some anchors the kernels sort the winners: a row that everybody chose, rows that nobody did, two sets."""
    monkeypatch.setattr("apd_kernels._core.rows.BLOCK_ELEMENTS", 100)
    if backend.name == "triton":
        monkeypatch.setattr("apd_kernels.kernels.mining.SCANNED_ANCHORS", 10)
        monkeypatch.setattr("apd_kernels.kernels.mining.SLAB", 16)
    for shape, m in (((70, 9), None), ((70, 9), 12), ((2, 41, 9), 30)):
        x, _ = features(*shape, dtype=torch.float32)
        labels = torch.arange(shape[-2]) // 2
        labels[-1] = 999
        x[..., 5, :] = 0  # the nearest to most
        y = y_labels = None
        if m is not None:
            y, y_labels = features(*shape[:-2], m, 9, dtype=torch.float32, seed=1, identities=3)
            y[..., 3, :] = 0
        for metric in ("euclidean", "dot"):
            a, b = leaf(x, backend.device), None if y is None else leaf(y, backend.device)
            mined = batch_hard(
                a,
                labels.to(backend.device),
                b,
                None if y_labels is None else y_labels.to(backend.device),
                metric=metric,
            )
            weights = torch.randn(2, *shape[:-1], generator=torch.manual_seed(0))
            weights[:, ..., ::7] = 0
            sum((d * w.to(d)).sum() for d, w in zip(mined.distances, weights, strict=True)).backward()
            p, q = leaf(x, dtype=torch.float64), None if y is None else leaf(y, dtype=torch.float64)
            d = distances(p, p if q is None else q, metric)
            for side, index in enumerate(mined.indices):
                chosen = d.gather(-1, index.cpu().clamp(min=0)[..., None])[..., 0]
                (chosen * weights[side] * (index.cpu() >= 0)).sum().backward(retain_graph=True)
            assert_close(a.grad, p.grad, 2e-6, "gradient of x")
            if b is not None:
                assert_close(b.grad, q.grad, 2e-6, "gradient of y")


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@on_kernels
def test_split_rows(backend: Backend, metric: str, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float16 parts, through pointers and descriptors: winners, in all tiles and above the diagonal."""
    mining = pytest.importorskip("apd_kernels.kernels.mining")
    device = backend.device
    if tma and not backend.interpreted and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA")
    monkeypatch.setattr("apd_kernels.kernels.prepared.LARGE_PRODUCTS", 0)
    monkeypatch.setattr("apd_kernels.kernels.prepared.has_tma", lambda x: tma)
    sizes = [((), 70, 150), ((2,), 20, 70), ((), 130, None), ((2,), 67, None)]
    if not backend.interpreted:  # several tiles of a GPU's size
        sizes += [((), 300, 900), ((), 700, None)]
    for seed, (sets, n, m) in enumerate(sizes):
        monkeypatch.setattr(mining, "TRIANGLE_ROWS", (1, 16384) if seed % 2 == 0 else (10**9, 0))
        x, labels = features(*sets, n, 70, dtype=torch.float32, seed=seed, identities=9)
        y = y_labels = None
        if m is not None:
            y, y_labels = features(*sets, m, 70, dtype=torch.float32, seed=seed + 10, identities=9)
            y = y + 2
        x = x + 2
        options = pairing_options(random.Random(seed), n, m)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        rows = [None if t is None else t.to(device) for t in (x, labels, y, y_labels)]
        mined = batch_hard(*rows, metric=metric, **moved)
        check(mined, x, labels, y, y_labels, metric, 1e-5, **options)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@on_kernels
def test_tiles_above_the_diagonal(backend: Backend, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows against themselves by half of the tiles find what all tiles find."""
    mining = pytest.importorskip("apd_kernels.kernels.mining")
    device = backend.device
    for n, options in (
        (150, {}),
        (130, {"domains": torch.arange(130) % 3, "positives": "across", "negatives": "within"}),
    ):
        x, labels = features(n, 20, dtype=torch.float32, seed=n)
        x[n - 1] = x[3]  # duplicates in different tiles
        x, labels = x.to(device), labels.to(device)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        monkeypatch.setattr(mining, "TRIANGLE_ROWS", (10**9, 0))
        full = batch_hard(x, labels, metric=metric, **options)
        monkeypatch.setattr(mining, "TRIANGLE_ROWS", (1, 16384))
        half = batch_hard(x, labels, metric=metric, **options)
        check(
            half,
            x.cpu(),
            labels.cpu(),
            None,
            None,
            metric,
            1e-5,
            **{k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()},
        )
        for ours, expected in zip(half.indices, full.indices, strict=True):
            if not backend.interpreted:  # three products in another order: of equal rows in two tiles either may win
                ours, expected = (torch.where(index == n - 1, 3, index) for index in (ours, expected))
            assert torch.equal(ours, expected)
