"""float32 grade as on tcgen05 (sm_100): three TF32 products with an accumulator each, right on any GPU with TF32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_close, distances, leaf
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from apd_kernels import (
    batch_hard,
    circle_loss,
    knn,
    metric_perturb,
    pairwise_distance,
    supervised_contrastive_loss,
    use_backend,
    weighted_pairs,
)
from apd_kernels.kernels import _launch
from apd_kernels.kernels._tiles import high_and_rest

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels multiply as on sm_100; tiles are those of the device."""
    monkeypatch.setattr(_launch, "architecture", lambda x: 100)
    return str(request.param)


def rows(n: int, d: int, device: str, seed: int = 0) -> Tensor:
    """Of one sign, as after a ReLU."""
    return torch.randn(n, d, generator=torch.manual_seed(seed)).relu().to(device)


def labels(n: int, device: str) -> Tensor:
    return (torch.arange(n) % 9).to(device)


def ruled(n: int, m: int, device: str) -> dict[str, Tensor]:
    return {"own": torch.arange(n).to(device), "y_valid": (torch.arange(m) % 5 > 0).to(device)}


def loss_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [leaf(x, str(x.device)) for x in inputs]
    total = loss(*leaves)
    total.backward()
    return [total, *(x.grad for x in leaves)]


def distance_and_gradients(x: Tensor, y: Tensor) -> list[Tensor]:
    found = []
    for metric in ("euclidean", "dot"):
        for inputs in ((x, y), (x,)):
            weights = torch.rand(len(x), len(inputs[-1]), generator=torch.manual_seed(2)).to(x)

            def weighted(a: Tensor, b: Tensor | None = None, metric: str = metric, w: Tensor = weights) -> Tensor:
                return (pairwise_distance(a, b, metric=metric, precision="fp32") * w).sum()

            found += loss_and_gradients(weighted, *inputs)
    return found


def contrastive(x: Tensor, y: Tensor) -> list[Tensor]:
    """Rows of length 1, whose similarities are within the losses' range."""
    own, others = labels(len(x), str(x.device)), labels(len(y), str(x.device))
    rules = ruled(len(x), len(y), str(x.device))
    a, b = (torch.nn.functional.normalize(t) for t in (x, y))
    return [
        *loss_and_gradients(lambda p: circle_loss(p, own, precision="fp32"), a),
        *loss_and_gradients(
            lambda p, q: supervised_contrastive_loss(p, own, q, others, precision="fp32", **rules), a, b
        ),
    ]


def weighted(x: Tensor, y: Tensor) -> list[Tensor]:
    own, others = labels(len(x), str(x.device)), labels(len(y), str(x.device))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        positive, negative = weighted_pairs(a, own, b, others, precision="fp32").distances
        return (positive - negative).sum()

    return loss_and_gradients(loss, x, y)


def mined(x: Tensor, y: Tensor) -> list[Tensor]:
    own, others = labels(len(x), str(x.device)), labels(len(y), str(x.device))
    found = []
    for metric in ("euclidean", "dot"):
        pairs = batch_hard(x, own, y, others, metric=metric, precision="fp32")
        found += [*pairs.distances, *pairs.indices]
    return found


def mined_in_large_batch(x: Tensor, y: Tensor) -> list[Tensor]:
    pairs = batch_hard(x, labels(len(x), str(x.device)), precision="fp32")
    return [*pairs.distances, *pairs.indices]


def neighbors(x: Tensor, y: Tensor) -> list[Tensor]:
    found = knn(x, y, 7, metric="euclidean", precision="fp32")
    return [found.distances, found.indices]


def perturbed(x: Tensor, y: Tensor) -> list[Tensor]:
    return [metric_perturb(x[:20], labels(20, str(x.device)), epsilon=0.1, steps=2)]


OPERATIONS = [distance_and_gradients, contrastive, weighted, mined, mined_in_large_batch, neighbors, perturbed]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_matches_pytorch_in_float64(
    operation: Callable[[Tensor, Tensor], list[Tensor]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel that multiplies rows of small problems, against the PyTorch path."""
    asked = []

    def dot_precision(x: Tensor, precision: str, original: Callable[..., str] = _launch.dot_precision) -> str:
        asked.append(original(x, precision))
        return asked[-1]

    for module in (
        "distance",
        "mining",
        "contrastive",
        "weighting",
        "_weighted_rows",
        "neighbors",
        "adversarial_solver",
    ):
        monkeypatch.setattr(f"apd_kernels.kernels.{module}.dot_precision", dot_precision)
    if operation is mined_in_large_batch:
        monkeypatch.setattr("apd_kernels.kernels.mining.TRIANGLE_ROWS", (1, 16384))
    x, y = rows(70, 100, device), rows(80, 100, device, seed=1)
    with use_backend("torch"):
        expected = operation(x.double(), y.double())
    with use_backend("triton"):
        ours = operation(x, y)
    assert set(asked) == {"tf32x3 apart"}
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        if other.is_floating_point():
            assert_close(one, other, 1e-5)
        else:
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter
def test_infinities_and_nan(device: str) -> None:
    """As float32 has them: the small products of an infinity are NaN, and left out."""
    x, y = rows(20, 40, device) + 1, rows(30, 40, device, seed=1) + 1
    x[3, 5], x[4, 6], y[7, 5], y[8, 6] = float("inf"), float("nan"), -float("inf"), float("nan")
    with use_backend("triton"):
        ours = pairwise_distance(x, y, metric="dot", precision="fp32")
    assert_close(ours.isnan().float(), (x @ y.T).isnan().float(), 0.0)
    assert torch.equal(ours.isinf(), (x @ y.T).isinf())
    finite = torch.ones_like(ours, dtype=torch.bool)
    finite[[3, 4]] = False
    finite[:, [7, 8]] = False
    assert_close(ours[finite], distances(x.cpu(), y.cpu(), "dot").to(device)[finite], 1e-6)


@triton.jit
def _parts(x, high, rest, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    h, r = high_and_rest(tl.load(x + i, mask=i < N, other=0.0))
    tl.store(high + i, h, mask=i < N)
    tl.store(rest + i, r, mask=i < N)


def _truncated(v: Tensor) -> Tensor:
    """What a tensor core takes of a float32 operand: 11 bits."""
    return (v.view(torch.int32) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_three_products_of_what_a_tensor_core_reads(scale: float, device: str) -> None:
    """high + rest is the number itself, TF32 holds high, and the three products of truncated parts are within
    2⁻²¹ ‖x‖‖y‖ of x·y."""
    x = torch.randn(2, 2048, generator=torch.manual_seed(0)).to(device) * scale
    high, rest = torch.empty_like(x), torch.empty_like(x)
    with use_backend("triton"):
        _parts[(1,)](x, high, rest, x.numel(), BLOCK=4096)
    assert torch.equal(high + rest, x)
    assert torch.equal(_truncated(high), high)
    high, rest = high.double(), _truncated(rest).double()
    product = high[0] @ high[1] + (high[0] @ rest[1] + rest[0] @ high[1])
    exact, norms = x[0].double() @ x[1].double(), x.double().norm(dim=1).prod()
    assert abs(product - exact) <= 2**-21 * norms
    for a, b in zip(x[0, :50], x[1, :50], strict=True):  # single products, where nothing averages out
        i, j = (x[0] == a).nonzero()[0, 0], (x[1] == b).nonzero()[0, 0]
        one = high[0, i] * high[1, j] + high[0, i] * rest[1, j] + rest[0, i] * high[1, j]
        assert abs(one - a.double() * b.double()) <= 2**-21 * abs(a.double() * b.double())
