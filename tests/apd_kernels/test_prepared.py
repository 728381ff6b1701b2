"""Split products: rows as float16 parts, distances and gradients from them, against float64."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from kernel_backends import on_kernels
from oracle import METRICS, assert_close, distances, leaf
from torch import Tensor

pytest.importorskip("triton")

from apd_kernels import pairwise_distance, prepare_rows
from apd_kernels._core.operands import Operands
from apd_kernels.kernels import _launch, _tuning, prepared
from apd_kernels.kernels import distance as kernels

pytestmark = on_kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EUCLIDEAN = ("euclidean", "sqeuclidean")


@pytest.fixture(autouse=True)
def _small_problems_split(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems take the route of large ones; in the interpreter with tiles that they fill several of, on a GPU
    with its own."""
    monkeypatch.setattr(prepared, "LARGE_PRODUCTS", 0)
    for kernel in ("distance.split", "distance.plain", "gradient.split") if backend.interpreted else ():
        rows = _tuning.TABLE[kernel]
        options = {**rows[0].options, "BM": 32, "BK": 32} | ({"BD": 64} if "gradient" in kernel else {"BN": 32})
        monkeypatch.setitem(rows, 0, _tuning.Tile(options, "for small problems"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed)).to(DEVICE)


def badly_scaled(n: int, d: int, seed: int) -> Tensor:
    return normal(n, d, seed=seed) * torch.logspace(-30, 30, n, device=DEVICE)[torch.randperm(n).to(DEVICE), None]


DATA = {
    "normal": lambda n, d, seed: normal(n, d, seed=seed),
    "one-signed": lambda n, d, seed: normal(n, d, seed=seed).relu(),
    "offset": lambda n, d, seed: normal(n, d, seed=seed) + 1000,
    "badly scaled": badly_scaled,
    "tiny": lambda n, d, seed: normal(n, d, seed=seed) * 1e-38,
    "large": lambda n, d, seed: normal(n, d, seed=seed) * 5e37,
    "wide": lambda n, d, seed: normal(n, d, seed=seed) * torch.logspace(-12, 0, d, device=DEVICE),
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("d", [3, 70, 300])
def test_split_error(kind: str, d: int) -> None:
    """x·y from the parts, in float64, is within 2⁻²² ‖x‖‖y‖ (2⁻²¹ where few elements decide); half squares and
    scales fit them."""
    for euclidean in (False, True):
        x, y = (DATA[kind](50, d, seed) for seed in (0, 1))
        if euclidean and kind == "badly scaled":
            continue
        b = prepared.prepare_rows(y, euclidean, "fp32")
        a = prepared.prepare_rows(x, euclidean, "fp32", b.centre)
        centre = b.centre if euclidean else 0
        rows = [(t - centre).double() for t in (x, y)]
        parts = []
        for o, row in zip((a, b), rows, strict=True):
            padded = o.parts.shape[-1] // 2
            assert padded % 64 == 0
            assert o.largest.item() == o.root.max().item()
            scale = o.root[0].double()[:, None] ** 2
            high, low = (scale * t.double() for t in o.parts[0].split(padded, -1))
            assert not high[:, d:].any()
            assert not low[:, d:].any()
            parts.append((high[:, :d], low[:, :d] / 2048))
            if euclidean:
                assert_close((o.half[0].double()[:, None] * scale**2)[:, 0], row.square().sum(1) / 2, 1e-6)
        (high, low), (y_high, y_low) = parts
        approximate = high @ y_high.T + (high @ y_low.T + low @ y_high.T)
        norms = rows[0].norm(dim=1)[:, None] * rows[1].norm(dim=1)
        error = ((approximate - rows[0] @ rows[1].T).abs() / norms)[norms > 0].max().item()
        assert error <= (2**-22 if d > 3 and kind != "wide" else 2**-21), error


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 1, 1), (70, 37, 50), (33, 100, 64), (20, 5, 130), pytest.param(700, 390, 2048, marks=pytest.mark.gpu)],
)
def test_matches_float64(n: int, m: int, d: int, metric: str) -> None:
    x, y = normal(n, d), normal(m, d, seed=1)
    for other in (y, None):
        expected = distances(x, x if other is None else other, metric)
        if other is None and metric in EUCLIDEAN:
            expected.fill_diagonal_(0)
        ours = pairwise_distance(x, other, metric=metric, precision="fp32")
        assert_close(ours, expected, 5e-7 if n > 1 else 2e-6, scale=1.0)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_sets_and_strides(metric: str) -> None:
    """(S, N, D), row strides and transposed memory: what single contiguous sets give, bit by bit."""
    base = normal(3, 35, 40)
    for x, y in (
        (base, base[:, 5:].flip(1) + 1),
        (base[:, ::2, 3:20], base[:, 5:20, 3:20]),
        (base.transpose(1, 2), base.transpose(1, 2)[:, :7]),
    ):
        for other in (y, None):
            ours = pairwise_distance(x, other, metric=metric, precision="fp32")
            for s in (0, 2):
                one = None if other is None else other[s].contiguous()
                assert torch.equal(ours[s], pairwise_distance(x[s].contiguous(), one, metric=metric, precision="fp32"))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter, where a result overflows
def test_range() -> None:
    """Any finite row serves dot and cosine; of Euclidean rows the largest sets the unit, and only what is too large
    for float32 becomes infinite."""
    x, y = badly_scaled(40, 30, 0), badly_scaled(35, 30, 1)
    exact = distances(x, y, "dot")
    ours = pairwise_distance(x, y, metric="dot", precision="fp32").double()
    inside = exact.abs() < 3.4e38
    bound = 2**-21 * x.double().norm(dim=1)[:, None] * y.double().norm(dim=1) + 1e-44
    assert ((ours - exact).abs() <= bound)[inside].all()
    assert ours[~inside].isinf().all()
    assert_close(pairwise_distance(x, y, metric="cosine", precision="fp32"), distances(x, y, "cosine"), 1e-6)

    x, y = normal(20, 30), normal(25, 30, seed=1)
    for scale in (1e-37, 1e-30, 1e-15, 1e15, 1e37):
        ours = pairwise_distance(x * scale, y * scale, precision="fp32")
        assert_close(ours, distances(x * scale, y * scale, "euclidean"), 1e-6)
    mixed = torch.cat([x, x * 1e-4, y * 1e4])
    norm = mixed.double().norm(dim=1)
    squared = pairwise_distance(mixed, metric="sqeuclidean", precision="fp32")
    assert ((squared - distances(mixed, mixed, "sqeuclidean")).abs() <= 2**-22 * (norm[:, None] + norm) ** 2).all()
    assert pairwise_distance(x * 1e37, y * 1e37, metric="sqeuclidean", precision="fp32").isinf().all()


def test_offset_and_duplicates() -> None:
    """A common offset costs no digits; near-duplicates are right to the rounding of their squares."""
    x = normal(60, 50) + 1000
    assert_close(pairwise_distance(x, precision="fp32"), distances(x, x, "euclidean"), 1e-6)

    x = normal(30, 50)
    close = torch.cat([x, x + 1e-5 * normal(30, 50, seed=1), x])
    squared = pairwise_distance(close, metric="sqeuclidean", precision="fp32")
    assert (squared >= 0).all()
    error = (squared - distances(close, close, "sqeuclidean")).abs().max().item()
    assert error <= 2**-21 * close.square().sum(1).max().item()
    assert (squared.diagonal() == 0).all()


def test_zero_nan_and_infinite_rows() -> None:
    x = normal(40, 50)
    x[3] = 0
    assert_close(pairwise_distance(x, metric="dot", precision="fp32"), distances(x, x, "dot"), 1e-6)
    assert (pairwise_distance(x, metric="cosine", precision="fp32")[3] == 1).all()
    zeros = torch.zeros(5, 50, device=DEVICE)
    for metric in METRICS:
        d = pairwise_distance(zeros, metric=metric, precision="fp32")
        assert (d == (metric == "cosine")).all()

    x[5, 2], x[9, 0], x[10, 49] = float("nan"), float("inf"), float("-inf")
    bad = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    bad[[5, 9, 10]] = True
    for metric in ("euclidean", "sqeuclidean", "dot"):
        for other in (x, None):
            ours = pairwise_distance(x, other, metric=metric, precision="fp32")
            assert torch.equal(ours.isfinite(), ~(bad[:, None] | bad)), metric
            expected = distances(x[~bad], x[~bad], metric)
            if metric != "dot":
                ours.fill_diagonal_(0)  # of equal rows: rounding
            assert_close(ours[~bad][:, ~bad], expected, 1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_triangle(metric: str) -> None:
    """x against itself: above the diagonal the bits of x against a copy, below their mirror image."""
    for n in (1, 50, 70, 130) if DEVICE == "cpu" else (1, 130, 260, 1000):
        x = normal(n, 20, seed=n)
        ours = pairwise_distance(x, metric=metric, precision="fp32")
        full = pairwise_distance(x, x.clone(), metric=metric, precision="fp32")
        assert torch.equal(ours, ours.T)
        assert torch.equal(ours.triu(1), full.triu(1))
        if metric in EUCLIDEAN:
            assert not ours.diagonal().any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_prepared_rows(metric: str, precision: str) -> None:
    """Kept rows: the bits of a stateless call where that splits too; for other precisions right to their rounding."""
    for shape in ((2, 20, 70), (33, 64)):
        x, y = normal(*shape), normal(*shape[:-2], 35, shape[-1], seed=1)
        kept = prepare_rows(y, metric=metric, precision=precision)
        ours = pairwise_distance(x, kept, metric=metric)
        if precision == "fp32":
            assert torch.equal(ours, pairwise_distance(x, y, metric=metric, precision=precision))
        expected = distances(x, y, metric)
        assert_close(ours, expected, {"fp32": 1e-6, "tf32": 3e-3, "bf16": 3e-2}[precision])
        a, b = leaf(x, DEVICE), leaf(x, DEVICE)
        (gradient,) = torch.autograd.grad(pairwise_distance(a, kept, metric=metric).sum(), a)
        (expected,) = torch.autograd.grad(pairwise_distance(b, y, metric=metric, precision=precision).sum(), b)
        assert_close(gradient, expected, 1e-6 if precision == "fp32" else 1e-2)


def test_prepared_half_rows() -> None:
    """Half-precision rows are multiplied where they lie; only their half squares are new."""
    x, y = normal(20, 128).half(), normal(30, 128, seed=1).half()
    for rows, kept_elements in ((y, 30), (y[:, :100], 30 * 128 * 2 // 4 + 30), (y[::2], 15 * 128 * 2 // 4 + 15)):
        kept = prepare_rows(rows)
        ours = pairwise_distance(x[:, : rows.shape[1]], kept)
        assert_close(ours, distances(x[:, : rows.shape[1]], rows, "euclidean"), 1e-6)
        assert kept.nbytes() == 4 * kept_elements


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_descriptors_and_pointers(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles loaded by descriptors and by pointers give the same bits, forward and backward, for every form."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA")
    results = []
    for tma in (False, True):
        for module in (prepared, kernels):
            monkeypatch.setattr(module, "has_tma", lambda _, tma=tma: tma)
        found = []
        for shape in ((40, 70), (2, 33, 40)) if DEVICE == "cpu" else ((40, 70), (2, 333, 400)):
            x, y = normal(*shape), normal(*shape[:-2], 20, shape[-1], seed=1)
            for other in (y, None):
                a, b = leaf(x, DEVICE), None if other is None else leaf(other, DEVICE)
                d = pairwise_distance(a, b, metric=metric, precision="fp32")
                inputs = [a] if b is None else [a, b]
                found += [d, *torch.autograd.grad(d, inputs, normal(*d.shape, seed=2))]
            found.append(pairwise_distance(x, prepare_rows(y, metric=metric, precision="tf32"), metric=metric))
        results.append(found)
    for pointers, descriptors in zip(*results, strict=True):
        assert torch.equal(pointers, descriptors)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(50, 40), (2, 20, 130), pytest.param((300, 2048), marks=pytest.mark.gpu)], ids=str)
def test_gradient(metric: str, shape: tuple[int, ...]) -> None:
    """Against float64, for weights of very different size: rows, and chunks of a row, are scaled on their own."""
    x, y = normal(*shape) + 10, normal(*shape[:-2], 45, shape[-1], seed=1) + 10
    for other in (y, None):
        a, b = leaf(x, DEVICE), None if other is None else leaf(other, DEVICE)
        d = pairwise_distance(a, b, metric=metric, precision="fp32")
        p, q = leaf(x, DEVICE, torch.float64), None if other is None else leaf(other, DEVICE, torch.float64)
        expected = distances(p, p if q is None else q, metric)
        g = normal(*d.shape, seed=2)
        if other is not None:
            g = g * torch.logspace(-20, 10, d.shape[-2], device=DEVICE)[:, None]
            g[..., 3, :] = 0
        d.backward(g)
        expected.backward(g.double())
        per_row = p.grad.norm(dim=-1, keepdim=True)
        scale = torch.where(per_row == 0, 1, per_row) if other is not None else per_row.max()
        assert_close(a.grad / scale, p.grad / scale, 2e-5 if metric == "cosine" else 4e-6, "gradient of x")
        if b is not None:
            assert_close(b.grad, q.grad, 2e-5 if metric == "cosine" else 4e-6, "gradient of y")


def test_gradient_of_duplicates_and_bad_weights() -> None:
    """A distance of 0 has no gradient; a weight that is not finite makes its own rows NaN, no others."""
    x = normal(20, 30)
    x[7] = x[4]
    a = leaf(x, DEVICE)
    d = pairwise_distance(a, precision="fp32")
    assert torch.autograd.grad(d, a, torch.ones_like(d))[0].isfinite().all()

    a, y = leaf(x, DEVICE), normal(40, 30, seed=1)
    g = torch.ones(20, 40, device=DEVICE)
    g[3, 8], g[5, 39] = float("nan"), float("inf")
    (gradient,) = torch.autograd.grad(pairwise_distance(a, y, metric="dot", precision="fp32"), a, g)
    assert gradient.isfinite().all(1).logical_not().nonzero()[:, 0].tolist() == [3, 5]


def test_which_calls_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large float32 problems at float32 grade; not those whose parts would take too much memory."""
    monkeypatch.undo()

    def kernel(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, precision: str = "fp32") -> str:
        x, y = (torch.empty(size, d, dtype=dtype, device="meta") for size in (n, m))
        with _launch.recording(90) as launches:
            kernels.pairwise_distance(x, y, Operands(), "euclidean", precision)
        launched = launches[-1].kernel
        return str(getattr(launched, "fn", launched).__name__)

    assert kernel(2048, 2048, 2048) == "_prepared_distance"
    assert kernel(2048, 2047, 2048) == "_distance"
    assert kernel(1 << 18, 1 << 10, 1 << 11) == "_distance"
    assert kernel(4096, 4096, 2048, precision="tf32") == "_distance"
    assert kernel(4096, 4096, 2048, torch.float16) == "_distance"


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows(metric: str) -> None:
    x, empty = normal(5, 4), torch.zeros(0, 4, device=DEVICE)
    for a, b in ((x, empty), (empty, x), (empty, None)):
        a = leaf(a, DEVICE)
        d = pairwise_distance(a, b, metric=metric, precision="fp32")
        assert d.shape == (len(a), len(a) if b is None else len(b))
        d.sum().backward()
        assert not a.grad.any()
    assert pairwise_distance(x, prepare_rows(empty, metric=metric), metric=metric).shape == (5, 0)
