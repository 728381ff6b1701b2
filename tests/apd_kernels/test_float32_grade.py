"""Float32 grade: split products keep less error than a float32 product does, because they are promoted.

On a CPU the tensor cores are emulated: sixteen exact products at a time, added to an accumulator that truncates. The
factors are the parts that the shipped kernel makes; how many elements a chunk has is read from the table of tiles.
With `-m gpu` the kernels themselves are held against PyTorch's float32 product on the same card.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from kernel_backends import on_kernels
from torch import Tensor

pytest.importorskip("triton")

from apd_kernels import pairwise_distance, use_backend
from apd_kernels.kernels import _tuning, prepared
from benchmarks import grade

ROWS, DIMENSION = 24, 2048
MMA = 16  # elements of one float16 instruction
CHUNK = _tuning.TABLE["distance.split"][90].options["BK"]


def one_signed(seed: int) -> Tensor:
    """Unit rows after a ReLU: sums of one sign, in which a truncated sum is always too small."""
    return F.normalize(torch.randn(ROWS, DIMENSION, generator=torch.manual_seed(seed)).relu())


def truncated(x: Tensor) -> Tensor:
    """float64 to float32, towards zero."""
    nearest = x.float()
    return torch.where(nearest.double().abs() > x.abs(), torch.nextafter(nearest, torch.zeros(())), nearest)


def mma(a: Tensor, b: Tensor, acc: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """acc + a bᵀ as tensor cores add: some products exactly, then the accumulator is rounded."""
    for k in range(0, a.shape[1], MMA):
        acc = rounding(acc.double() + a[:, k : k + MMA].double() @ b[:, k : k + MMA].double().T)
    return acc


def split_product(
    x: prepared.Operands, y: prepared.Operands, unit: float, chunk: int, rounding: Callable[[Tensor], Tensor]
) -> Tensor:
    """x yᵀ from prepared rows as `_split.split_product` takes it: hi·hi added in chunks, hi·lo + lo·hi in one sum."""
    padded = x.parts.shape[-1] // 2
    (a, a_low), (b, b_low) = ((t.parts[0, :, :padded], t.parts[0, :, padded:]) for t in (x, y))
    zeros = torch.zeros(len(a), len(b))
    acc, cross = zeros, zeros
    for k in range(0, padded, chunk):
        part = slice(k, k + chunk)
        acc = acc + mma(a[:, part], b[:, part], zeros, rounding)
    for k in range(0, padded, MMA):
        part = slice(k, k + MMA)
        cross = mma(a_low[:, part], b[:, part], mma(a[:, part], b_low[:, part], cross, rounding), rounding)
    root = x.root[0][:, None] * y.root[0]
    return (acc + cross * unit) * root * root


def parts_of(rows: Tensor, device: str) -> prepared.Operands:
    """As the shipped kernel splits them, on the CPU."""
    made = prepared.prepare_rows(rows.to(device), False, "fp32")
    assert made.parts is not None
    assert made.root is not None
    return prepared.Operands(made.parts.cpu(), root=made.root.cpu())


def low_unit(rows: Tensor, x: prepared.Operands) -> float:
    """What a lo part counts for beside the hi part of its element, as the parts of these rows say."""
    padded = x.parts.shape[-1] // 2
    high, low = (t.double() for t in (x.parts[0, :, :padded], x.parts[0, :, padded:]))
    left = rows.double() / x.root[0].double()[:, None] ** 2 - high
    return 2.0 ** ((left * low).sum() / low.square().sum()).log2().round().item()


def sequential(x: Tensor, y: Tensor) -> Tensor:
    """A float32 product as GPUs add it: one fused multiply-add after another, each rounded."""
    acc = torch.zeros(len(x), len(y))
    for k in range(x.shape[1]):
        acc = (acc.double() + x[:, k, None].double() * y[:, k].double()).float()
    return acc


@on_kernels
def test_promotion_keeps_float32_grade(backend: Backend) -> None:
    """The promoted product, truncated as tensor cores do, has less error than a float32 one; without promotion it has
    many times as much, all of one sign."""
    x, y = one_signed(0), one_signed(1)
    a, b = (parts_of(rows, backend.device) for rows in (x, y))
    unit = low_unit(x, a)
    assert unit == 2.0**-11
    exact = x.double() @ y.double().T

    def error(product: Tensor) -> Tensor:
        return product.double() - exact

    promoted = error(split_product(a, b, unit, CHUNK, truncated))
    unpromoted = error(split_product(a, b, unit, DIMENSION, truncated))
    float32 = error(sequential(x, y))
    rms = {
        name: grade.root_mean_square(value)
        for name, value in (("promoted", promoted), ("unpromoted", unpromoted), ("float32", float32))
    }
    assert rms["promoted"] <= rms["float32"], rms
    assert rms["unpromoted"] > 5 * rms["promoted"], rms
    assert unpromoted.mean() < -0.9 * rms["unpromoted"]  # a bias, not noise
    assert abs(promoted.mean()) < 0.5 * abs(unpromoted.mean())

    rounded = error(split_product(a, b, unit, CHUNK, Tensor.float))
    assert rounded.abs().max() <= 2**-22  # of products that do not truncate: of the split itself and of float32 sums


@on_kernels
def test_emulation_is_of_the_kernel(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's product is the promoted one of the same parts, not the other: on a CPU, which truncates nothing,
    up to the order of sums; on tensor cores nearer to it than the bias of a sum without promotion."""
    monkeypatch.setattr(prepared, "LARGE_PRODUCTS", 0)
    x, y = one_signed(0), one_signed(1)
    ours = -pairwise_distance(x.to(backend.device), y.to(backend.device), metric="dot", precision="fp32").cpu()
    a, b = (parts_of(rows, backend.device) for rows in (x, y))
    rounding = Tensor.float if backend.interpreted else truncated
    emulated = split_product(a, b, low_unit(x, a), CHUNK, rounding)
    unpromoted = split_product(a, b, low_unit(x, a), DIMENSION, truncated)
    difference = grade.root_mean_square(ours - emulated)
    assert difference <= 6e-8
    assert difference < 0.25 * grade.root_mean_square(unpromoted - emulated)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(grade.products(False)))
def test_error_of_products(name: str) -> None:
    """The root mean square error is at most that of PyTorch's float32 product of the same rows: plain against plain,
    centred against centred."""
    found = grade.products(False)[name]()
    assert found["ours_rms"] <= found["float32_rms"], found


def test_products_run() -> None:
    """Some products of that list at a toy size, in the interpreter or on the device: near a float32 product's error."""
    with use_backend("triton"):
        products = grade.products(True)
        for name in list(products)[:: max(1, len(products) // 12)]:
            found = products[name]()
            assert found["ours_rms"] <= 3 * found["float32_rms"], (name, found)
