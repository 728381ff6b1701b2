from __future__ import annotations

import random

import pytest
import torch
from conftest import Backend
from oracle import METRICS, assert_close, distances, features, leaf, tolerance
from test_distance import DTYPES, served
from torch import Tensor

from apd_kernels import paired_distance

pytestmark = pytest.mark.oldest


def oracle(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Row by row in float64; differentiable except at 0."""
    return distances(x[..., None, :], y[..., None, :], metric)[..., 0, 0]


def check(backend: Backend, x: Tensor, y: Tensor, metric: str, relative: float, rounding: float) -> None:
    """Values and both gradients."""
    a, b = leaf(x, backend.device), leaf(y, backend.device)
    weights = torch.randn(x.shape[:-1], dtype=torch.float64, generator=torch.manual_seed(2))
    ours = paired_distance(a, b, metric=metric)
    (ours * weights.to(ours)).sum().backward()
    p, q = leaf(x, dtype=torch.float64), leaf(y, dtype=torch.float64)
    expected = oracle(p, q, metric)
    (expected * weights).sum().backward()
    assert ours.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert_close(ours, expected, relative)
    assert_close(a.grad, p.grad, rounding, "gradient of x")
    assert_close(b.grad, q.grad, rounding, "gradient of y")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, metric: str) -> None:
    served(backend, dtype)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, tolerance(dtype))
    for shape in ((37, 50), (2, 5, 1100)):
        x, _ = features(*shape, dtype=dtype)
        y, _ = features(*shape, dtype=dtype, seed=1)
        check(backend, x, y, metric, tolerance(dtype), rounding)


@pytest.mark.parametrize("metric", METRICS)
def test_seeded_cases(backend: Backend, metric: str) -> None:
    """200 random cases on the PyTorch path: shapes, sets, strides, scales."""
    for seed in range(8 if backend.interpreted else 200):
        choose = random.Random(seed)
        dtype = torch.float32 if backend.name == "triton" else choose.choice((torch.float32, torch.float64))
        shape = (*choose.choice(((), (choose.randint(1, 3),))), choose.randint(0, 40), choose.randint(2, 70))
        generator = torch.Generator().manual_seed(seed)
        scale = 10.0 ** choose.randint(-6, 6)
        x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2))
        if choose.random() < 0.3:
            x, y = x.mT.contiguous().mT, y.flip(-2)
        check(backend, x, y, metric, tolerance(dtype), tolerance(dtype))


def test_near_duplicates_zero_and_nan(backend: Backend) -> None:
    """What makes distances hard: all digits of a small distance, 0 with gradient 0, zero rows, NaN rows."""
    x, _ = features(12, 64, dtype=torch.float64)
    x = 30 * x
    y = x + 1e-5 * torch.randn(12, 64, dtype=torch.float64, generator=torch.manual_seed(3))
    x, y = x.float(), y.float()
    for metric in ("euclidean", "sqeuclidean"):
        check(backend, x, y, metric, 1e-6, 1e-6)
        same = leaf(x, backend.device)
        distance = paired_distance(same, x.to(backend.device), metric=metric)
        assert torch.equal(distance.cpu(), torch.zeros(12))
        distance.sum().backward()
        assert torch.equal(same.grad.cpu(), torch.zeros_like(x))
    zero, other = leaf(torch.zeros(12, 64), backend.device), leaf(y, backend.device)
    distance = paired_distance(zero, other, metric="cosine")
    assert_close(distance, torch.ones(12), 1e-6)
    distance.sum().backward()
    assert torch.equal(zero.grad.cpu(), torch.zeros_like(x))
    assert torch.equal(other.grad.cpu(), torch.zeros_like(x))
    y[3, 2] = float("nan")
    for metric in METRICS:
        assert paired_distance(x.to(backend.device), y.to(backend.device), metric=metric).isnan().tolist() == [
            row == 3 for row in range(12)
        ]


def test_cosine_of_any_finite_row(backend: Backend) -> None:
    """The squares of these rows overflow or vanish in float32; their angle, and its gradient by a factor, do not."""
    x, _ = features(4, 16, dtype=torch.float32)
    y, _ = features(4, 16, dtype=torch.float32, seed=1)
    scale = torch.tensor([1e30, 1e-30, 1.0, 1e36])[:, None]
    a = leaf(x * scale, backend.device)
    ours = paired_distance(a, y.to(backend.device), metric="cosine")
    ours.sum().backward()
    p = leaf(x * scale, dtype=torch.float64)
    expected = oracle(p, y, "cosine")
    expected.sum().backward()
    assert_close(ours, expected, 2e-6)
    assert_close(a.grad.cpu().double() * scale, p.grad * scale, 2e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: str) -> None:
    x, _ = features(5, 4)
    y, _ = features(5, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda a, b: paired_distance(a, b, metric=metric), (x.requires_grad_(), y.requires_grad_())
    )


def test_compiles_in_one_graph(backend: Backend) -> None:
    x, _ = features(8, 12, dtype=torch.float32)
    compiled = torch.compile(lambda a, b: paired_distance(a, b).sum(), fullgraph=True, backend="aot_eager")
    a, b = leaf(x, backend.device), leaf(x, backend.device)
    compiled(a, x.to(backend.device).flip(0)).backward()
    paired_distance(b, x.to(backend.device).flip(0)).sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(5, 2), {}, ValueError, r"y: expected shape \(4, 2\) as x, got \(5, 2\)"),
        (torch.zeros(4, 2), torch.zeros(4, 3), {}, ValueError, r"y: expected shape \(M, 2\), got \(4, 3\)"),
        (torch.zeros(4, 2), torch.zeros(4, 2).half(), {}, TypeError, r"y: expected torch.float32 as x, got"),
        (torch.zeros(4, 2), torch.zeros(4, 2, device="meta"), {}, ValueError, r"y: expected device cpu as x, got meta"),
        (torch.zeros(4, 2).long(), torch.zeros(4, 2).long(), {}, TypeError, r"x: expected float16, .*got torch.int64"),
        (torch.zeros(4, 0), torch.zeros(4, 0), {}, ValueError, r"x: expected at least one feature dimension"),
        (torch.zeros(4), torch.zeros(4), {}, ValueError, r"x: expected shape \(N, D\) or \(S, N, D\), got \(4,\)"),
        (torch.zeros(4, 2), torch.zeros(4, 2), {"metric": "l1"}, ValueError, r"metric: expected 'euclidean' or"),
    ],
)
def test_bad_input(x: Tensor, y: Tensor, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paired_distance(x, y, **options)
