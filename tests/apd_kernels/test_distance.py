from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo.testing
from conftest import Backend
from oracle import METRICS, assert_close, distances, features, leaf, tolerance

from apd_kernels import pairwise_distance, prepare_rows

pytestmark = pytest.mark.oldest

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def served(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, metric: str) -> None:
    """Values and gradients against the differences of the rows in float64, for y and for x against itself."""
    served(backend, dtype)
    x, _ = features(37, 50, dtype=dtype)
    y, _ = features(19, 50, dtype=dtype, seed=1)
    # An fp32 Euclidean distance comes from a difference of squares: its error is that of d², divided by 2d.
    relative = tolerance(dtype) * (5 if metric == "euclidean" else 1)
    for other in (y, None):
        a = leaf(x, backend.device)
        b = None if other is None else leaf(other, backend.device)
        weights = torch.randn(37, 37 if b is None else 19, dtype=torch.float64, generator=torch.manual_seed(2))
        ours = pairwise_distance(a, b, metric=metric, precision="fp32")
        (ours * weights.to(ours)).sum().backward()

        p = leaf(x, dtype=torch.float64)
        q = None if other is None else leaf(other, dtype=torch.float64)
        expected = distances(p, p if q is None else q, metric)
        (expected * weights).sum().backward()

        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(ours, expected, relative)
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, relative)  # of the gradient, in x's dtype
        assert_close(a.grad, p.grad, rounding, "gradient of x")
        if b is not None:
            assert_close(b.grad, q.grad, rounding, "gradient of y")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 199, 3), (65, 33, 17), (0, 5, 4), (5, 0, 4), (0, 0, 4)])
def test_sizes(backend: Backend, n: int, m: int, d: int, metric: str) -> None:
    x, _ = features(n, d, dtype=torch.float32) if n else (torch.zeros(0, d), None)
    y, _ = features(m, d, dtype=torch.float32, seed=1) if m else (torch.zeros(0, d), None)
    a, b = leaf(x, backend.device), leaf(y, backend.device)
    ours = pairwise_distance(a, b, metric=metric)
    assert_close(ours, distances(x, y, metric), 1e-5)
    ours.sum().backward()
    assert a.grad.shape == x.shape
    assert not a.grad.isnan().any()
    assert not b.grad.isnan().any()


def test_sets_and_strides(backend: Backend) -> None:
    """(S, N, D), slices with a row stride and transposed memory give what contiguous copies give."""
    base = torch.randn(3, 40, 30, generator=torch.manual_seed(0)).to(backend.device)
    for x, y in (
        (base, base.flip(1) + 1),
        (base[:, ::2, 3:20], base[:, 5:, 3:20] + 1),
        (base[0, :, 1:], base[1, ::3, 1:]),
        (base[:1, :4].transpose(0, 1), base[1:2, :4].transpose(0, 1)),  # one row a set, the sets apart
        (base.transpose(1, 2), base.transpose(1, 2)[:, :7] + 1),
    ):
        expected = pairwise_distance(x.contiguous(), y.contiguous())
        assert_close(pairwise_distance(x, y), expected, 1e-6)
        assert_close(expected, distances(x.cpu(), y.cpu(), "euclidean"), 1e-5)


def test_zero_distances_and_rows(backend: Backend) -> None:
    """Duplicates are at 0 with a finite gradient, a zero row is at cosine distance 1, a NaN row gives NaN."""
    x = torch.randn(6, 20, generator=torch.manual_seed(0)).to(backend.device)
    x[3] = x[1]
    x.requires_grad_()
    for metric in ("euclidean", "sqeuclidean"):
        d = pairwise_distance(x, metric=metric)
        assert torch.equal(d.diagonal(), torch.zeros(6, device=d.device))
        (gradient,) = torch.autograd.grad(d.sum(), x)
        assert gradient.isfinite().all()

    zero = torch.zeros(2, 20, device=backend.device, requires_grad=True)
    d = pairwise_distance(zero, x.detach(), metric="cosine")
    assert torch.equal(d, torch.ones_like(d))
    (gradient,) = torch.autograd.grad(d.sum(), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))

    bad = x.detach().clone()
    bad[2, 5] = float("nan")
    for metric in METRICS:
        nan = pairwise_distance(bad, metric=metric).isnan().cpu()
        expected = torch.zeros(6, 6, dtype=torch.bool)
        expected[2], expected[:, 2] = True, True
        assert torch.equal(nan, expected), metric


def test_cosine_of_any_finite_row(backend: Backend) -> None:
    """The squares of these rows overflow or vanish in float32; their angle does not."""
    x = torch.randn(5, 16, generator=torch.manual_seed(0))
    scale = torch.tensor([1e30, 1e-30, 1.0, 1e-38, 1e37])[:, None]
    ours = pairwise_distance((x * scale).to(backend.device), x.to(backend.device), metric="cosine")
    assert_close(ours, distances(x, x, "cosine"), 2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_ignores_autocast(backend: Backend, metric: str) -> None:
    """Inputs are taken as they come: float32 features are not rounded to bfloat16, forward or backward."""
    x, _ = features(12, 20, dtype=torch.float32)
    a, b = leaf(x, backend.device), leaf(x, backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        inside = pairwise_distance(a, metric=metric)
        inside.square().sum().backward()
    outside = pairwise_distance(b, metric=metric)
    outside.square().sum().backward()
    assert torch.equal(inside, outside)
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("metric", METRICS)
def test_seeded_cases(backend: Backend, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 random cases on the PyTorch path: sizes, sets, strides, offsets, scales, kept rows, blocks."""
    for seed in range(6 if backend.interpreted else 200):
        choose = random.Random(f"{metric} {seed}")
        monkeypatch.setattr("apd_kernels._core.rows.BLOCK_ELEMENTS", choose.choice((50, 1 << 24)))
        dtype = torch.float32 if backend.name == "triton" else choose.choice((torch.float32, torch.float64))
        sets = choose.choice(((), (choose.randint(1, 3),)))
        n, m, d = choose.randint(0, 40), choose.choice((None, choose.randint(0, 80))), choose.randint(2, 40)
        offset, scale = choose.choice((0, 0, 3)), 10.0 ** choose.randint(-4, 4)
        x, y = (
            ((features(*sets, max(1, rows or 0), d, seed=seed + k)[0] + offset) * scale).to(dtype)[..., :rows, :]
            for k, rows in enumerate((n, m))
        )
        if choose.random() < 0.3:
            x = x.mT.contiguous().mT
        a, b = leaf(x, backend.device), None if m is None else leaf(y, backend.device)
        kept = b is not None and choose.random() < 0.3
        ours = pairwise_distance(a, prepare_rows(b, metric=metric) if kept else b, metric=metric, precision="fp32")
        weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        (ours * weights.to(ours)).sum().backward()
        p, q = leaf(x, dtype=torch.float64), None if m is None else leaf(y, dtype=torch.float64)
        expected = distances(p, p if q is None else q, metric)
        (expected * weights).sum().backward()
        # Squares are rounded at ‖x‖²: that is up to (1 + offset²) times the squared distances.
        relative = (1 + offset**2) * tolerance(dtype) * (10 if metric == "euclidean" else 2)
        assert_close(ours, expected, relative, f"distances of case {seed}", 1.0 if metric == "cosine" else 1e-30)
        of_gradient = {"euclidean": 1.0, "cosine": 1 / scale}.get(metric, scale)  # sums may cancel to less
        assert_close(a.grad, p.grad, relative, f"gradient of x of case {seed}", of_gradient)
        if b is not None and not kept:
            assert_close(b.grad, q.grad, relative, f"gradient of y of case {seed}", of_gradient)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: str) -> None:
    x, y = (features(5, 4, seed=seed)[0].requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a: pairwise_distance(a, metric=metric).tril(-1), (x,))
    assert torch.autograd.gradcheck(lambda a, b: pairwise_distance(a, b, metric=metric), (x, y))


def test_compiles_in_one_graph(backend: Backend) -> None:
    """One graph, and at most one recompilation over batch sizes."""
    x, _ = features(37, 50, dtype=torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a: pairwise_distance(a, metric="cosine"), fullgraph=True, backend=counter)
    for n in (37, 5, 11, 20):
        a, b = leaf(x[:n], backend.device), leaf(x[:n], backend.device)
        compiled(a).sum().backward()
        pairwise_distance(b, metric="cosine").sum().backward()
        assert_close(a.grad, b.grad, 1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, r"x: expected a torch.Tensor, got list"),
        ((torch.zeros(3, 2, dtype=torch.int64),), TypeError, r"x: expected float16.*got torch.int64"),
        ((torch.zeros(3),), ValueError, r"x: expected shape \(N, D\) or \(S, N, D\), got \(3,\)"),
        ((torch.zeros(3, 0),), ValueError, r"x: expected at least one feature dimension, got shape \(3, 0\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 4)), ValueError, r"y: expected shape \(M, 2\), got \(3, 4\)"),
        ((torch.zeros(2, 3, 2), torch.zeros(1, 3, 2)), ValueError, r"y: expected shape \(2, M, 2\), got \(1, 3, 2\)"),
        (
            (torch.zeros(3, 2), torch.zeros(3, 2).double()),
            TypeError,
            r"y: expected torch.float32 as x, got torch.float64",
        ),
        ((torch.zeros(3, 2), torch.zeros(3, 2, device="meta")), ValueError, r"y: expected device cpu as x, got meta"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pairwise_distance(*arguments)


def test_bad_choices() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"metric: expected 'euclidean' or .*, got 'manhattan'"):
        pairwise_distance(x, metric="manhattan")
    with pytest.raises(ValueError, match=r"precision: expected 'fp32' or 'tf32' or 'bf16', got 'fp16'"):
        pairwise_distance(x, precision="fp16")
