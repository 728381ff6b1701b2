"""`pair_reduce` with reducers of one's own, and the three losses of examples/pair_losses.py."""

from __future__ import annotations

import random
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import example_losses
import pytest
import torch
from conftest import Backend
from kernel_backends import on_kernels
from oracle import METRICS, assert_close, distances, features, leaf, masks, pairing_options
from places import ROOT
from torch import Tensor
from torch.nn.functional import normalize

from apd_kernels import Pairing, PairReducer, pair_reduce, prepare_rows, use_backend
from apd_kernels._core import rows as row_arithmetic
from apd_kernels.pairs import jit, tl

losses = example_losses.load()


@jit
def weight_of(d, values):
    return values[0] * values[1] / (1 + d * d)


def tile(d, positive, negative, values):
    return tl.sum(tl.where(positive, weight_of(d, values), 0.0), 1), tl.sum(tl.where(negative, d * d, 0.0), 1)


def combine(state, later):
    return state[0] + later[0], state[1] + later[1]


def finish(state, values):
    return state[0] + 0 * state[1], 0.5 * state[1], state[0] - state[1]


def weights(d, positive, negative, values, results, gradients):
    near = -2 * d * weight_of(d, values) / (1 + d * d)
    return tl.where(positive, (gradients[0] + gradients[2]) * near, (gradients[1] - 2 * gradients[2]) * d)


SUMS = PairReducer(start=(0.0, 0.0), tile=tile, combine=combine, finish=finish, weights=weights, name="sums")
"""Σ_p v k / (1 + d²), ½ Σ_n d², and the first less twice the second, for a value v and a parameter k."""


def of_pairs(d: Tensor, positive: Tensor, negative: Tensor, v: Tensor, k: float) -> tuple[Tensor, ...]:
    near = (torch.where(positive, 1 / (1 + d * d), 0).sum(-1)) * v * k
    far = torch.where(negative, d * d, 0).sum(-1)
    return near, far / 2, near - far


def compare(
    backend: Backend, x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None,
    *, metric: str, prepared: bool = False, **rules: Any,
) -> None:  # fmt: skip
    """Results and the gradients of a weighted sum of them against the formula in float64."""
    on = backend.device
    value = torch.linspace(0.5, 1.5, x.shape[-2])
    pairing = Pairing(
        labels.to(on), None if y_labels is None else y_labels.to(on),
        **{key: rule.to(on) if isinstance(rule, Tensor) else rule for key, rule in rules.items()},
    )  # fmt: skip
    a, b = leaf(x, on), None if y is None else leaf(y, on, x.dtype) if not prepared else y.to(on)
    others = prepare_rows(b, metric=metric, precision="fp32") if prepared else b
    ours = pair_reduce(a, others, SUMS, pairing, values=(value.to(on),), parameters=(3.0,), metric=metric,
                       precision="fp32")  # fmt: skip
    p, q = leaf(x, dtype=torch.float64), None if y is None else leaf(y, dtype=torch.float64)
    expected = of_pairs(
        distances(p, p if q is None else q, metric), *masks(labels, y_labels, **rules), value.double(), 3.0
    )
    assert len(ours) == 3
    mix = torch.randn(3, *x.shape[:-1], dtype=torch.float64, generator=torch.manual_seed(1))
    sum((result * w.to(result)).sum() for result, w in zip(ours, mix, strict=True)).backward()
    sum((result * w).sum() for result, w in zip(expected, mix, strict=True)).backward()
    bound = {torch.float64: 1e-11, torch.float32: 2e-5}[x.dtype]
    for k, (mine, exact) in enumerate(zip(ours, expected, strict=True)):
        assert mine.dtype == x.dtype
        assert_close(mine, exact, bound, f"result {k}", scale=0.1)
    assert_close(a.grad, p.grad, 5 * bound, "gradient of x", scale=0.1)
    if b is not None and not prepared:
        assert_close(b.grad, q.grad, 5 * bound, "gradient of y", scale=0.1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_the_formula(backend: Backend, metric: str, dtype: torch.dtype) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    x, labels = features(37, 20, dtype=dtype)
    y, y_labels = features(83, 20, dtype=dtype, seed=1, identities=9)
    compare(backend, x, labels, metric=metric)
    compare(backend, x, labels, y, y_labels, metric=metric)
    compare(backend, x, labels, y, y_labels, metric=metric, prepared=True)


@pytest.mark.parametrize("seed", range(4))
def test_pairings(backend: Backend, seed: int) -> None:
    choose = random.Random(seed)
    x, labels = features(23, 9, dtype=torch.float32, identities=4)
    y, y_labels = features(70, 9, dtype=torch.float32, seed=1, identities=5)
    compare(backend, x, labels, metric="euclidean", **pairing_options(choose, 23, None))
    compare(backend, x, labels, y, y_labels, metric="euclidean", **pairing_options(choose, 23, 70))


def test_sets(backend: Backend) -> None:
    """(S, N, D) with one value for all sets or one for each gives what each set alone gives."""
    x = torch.randn(2, 18, 7, generator=torch.manual_seed(0)).to(backend.device)
    labels, own = torch.arange(18, device=backend.device) % 4, torch.rand(2, 18, device=backend.device)
    for value in (own, own[0]):
        found = pair_reduce(x, None, SUMS, Pairing(labels), values=(value,), parameters=(2.0,))
        for s in range(2):
            alone = pair_reduce(x[s], None, SUMS, Pairing(labels), parameters=(2.0,),
                                values=(value.expand(2, 18)[s].contiguous(),))  # fmt: skip
            for both, one in zip(found, alone, strict=True):
                assert_close(both[s], one, 1e-6)


@pytest.mark.parametrize("splits", [1, 2, 4])
@on_kernels
def test_splits(backend: Backend, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the columns are combined in their order, whatever their number."""
    from apd_kernels.kernels import _pairs

    monkeypatch.setattr(_pairs, "MAX_SPLITS", splits)
    x, labels = features(9, 12, dtype=torch.float32)
    y, y_labels = features(130, 12, dtype=torch.float32, seed=1, identities=3)
    compare(backend, x, labels, y, y_labels, metric="euclidean")


def test_blocks_of_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_arithmetic, "BLOCK_ELEMENTS", 700)
    x, labels = features(45, 9, dtype=torch.float32)
    y, y_labels = features(33, 9, dtype=torch.float32, seed=1, identities=15)
    compare(backend, x, labels, metric="euclidean")
    compare(backend, x, labels, y, y_labels, metric="dot")


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_few_rows(backend: Backend, n: int, m: int) -> None:
    """Anchors that meet nobody have the results of the start."""
    x, y = (torch.ones(size, 4, device=backend.device, requires_grad=True) for size in (n, m))
    labels, y_labels = torch.zeros(n, dtype=torch.int64), torch.ones(m, dtype=torch.int64)
    pairing = Pairing(labels.to(x.device), y_labels.to(x.device))
    found = pair_reduce(x, y, losses.LIFTED, pairing, parameters=(1.0,))
    assert [result.shape for result in found] == [(n,)] * 2
    assert found[0].tolist() == pytest.approx([-1e30] * n)
    (found[0].sum() + found[1].sum()).backward()
    assert x.grad.shape == x.shape
    assert not x.grad.any()


def lifted(d: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    sides = ((d, positive), (0.7 - d, negative))
    p, n = (logits.masked_fill(~mask, -torch.inf).logsumexp(1) for logits, mask in sides)
    return (p + n).clamp(min=0).mean()


def multi_similarity(d: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    s, terms = 1 - d, []
    for row, p, n in zip(s, positive, negative, strict=True):
        near = row[p & (row < row[n].max() + 0.1)] if n.any() else row[p & False]
        far = row[n & (row > row[p].min() - 0.1)] if p.any() else row[n & False]
        of_near, of_far = (-2 * (near - 0.5)).exp().sum(), (20 * (far - 0.5)).exp().sum()
        terms.append(of_near.log1p() / 2 + of_far.log1p() / 20)
    return torch.stack(terms).mean()


def smooth_ap(d: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    means = []
    for row, p, n in zip(1 - d, positive, negative, strict=True):
        shares = []
        for at in p.nonzero()[:, 0]:
            others, all_others = p.clone(), p | n
            others[at] = all_others[at] = False
            ranks = [1 + torch.sigmoid((row[mask] - row[at]) / 0.1).sum() for mask in (others, all_others)]
            shares.append(ranks[0] / ranks[1])
        if shares:
            means.append(torch.stack(shares).mean())
    return 1 - torch.stack(means).mean()


EXAMPLES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], str, dict[str, float]]] = {
    "lifted": (losses.lifted_structured_loss, lifted, "euclidean", {"margin": 0.7}),
    "multi_similarity": (losses.multi_similarity_loss, multi_similarity, "cosine", {"beta": 20.0}),
    "smooth_ap": (losses.smooth_ap_loss, smooth_ap, "cosine", {"temperature": 0.1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_match_their_formulas(backend: Backend, name: str, dtype: torch.dtype) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    loss, formula, metric, options = EXAMPLES[name]
    x = normalize(torch.randn(45, 16, dtype=torch.float64, generator=torch.manual_seed(0)), dim=1)
    labels = torch.arange(45) // 4  # the last identity has one row and no positive
    a, p = leaf(x.to(dtype), backend.device), leaf(x)
    ours = loss(a, labels.to(backend.device), **options)
    expected = formula(distances(p, p, metric), *masks(labels))
    ours.backward()
    expected.backward()
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    assert_close(ours, expected, bound)
    assert_close(a.grad, p.grad, bound, "gradient", scale=0.1)


@pytest.mark.parametrize("name", ["lifted", "multi_similarity"])
def test_examples_match_pytorch_metric_learning(backend: Backend, name: str) -> None:
    peer = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.losses import GeneralizedLiftedStructureLoss, MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    assert peer
    x, labels = torch.randn(48, 16, generator=torch.manual_seed(0)), torch.arange(48) // 4
    a, b = leaf(x, backend.device), leaf(x)
    if name == "lifted":  # theirs takes rows of unit length
        ours = losses.lifted_structured_loss(normalize(a, dim=1), labels.to(backend.device), margin=1.0)
        theirs = GeneralizedLiftedStructureLoss(neg_margin=1, pos_margin=0)(b, labels)
    else:
        ours = losses.multi_similarity_loss(a, labels.to(backend.device))
        theirs = MultiSimilarityLoss(alpha=2, beta=50, base=0.5)(b, labels, MultiSimilarityMiner(0.1)(b, labels))
    ours.backward()
    theirs.backward()
    assert_close(ours, theirs, 1e-5)
    assert_close(a.grad, b.grad, 5e-5, "gradient", scale=0.1)


def test_loss_of_the_documentation(backend: Backend, tmp_path: Path) -> None:
    """docs/pair-reduce.md's is the lifted structured loss."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pair-reduce.md").read_text(), re.DOTALL)
    (tmp_path / "documented.py").write_text(code)
    loss = runpy.run_path(str(tmp_path / "documented.py"))["lifted_structured_loss"]
    x, labels = torch.randn(44, 6, dtype=torch.float64, generator=torch.manual_seed(0)), torch.arange(44) // 4
    a, p = leaf(x.float(), backend.device), leaf(x)
    ours, expected = (
        loss(a, labels.to(backend.device), margin=0.7),
        lifted(distances(p, p, "euclidean"), *masks(labels)),
    )
    ours.backward()
    expected.backward()
    assert_close(ours, expected, 1e-5)
    assert_close(a.grad, p.grad, 1e-4, "gradient", scale=0.1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradcheck(name: str) -> None:
    loss, _, _, options = EXAMPLES[name]
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.manual_seed(3), requires_grad=True)
    labels = torch.arange(9) // 3
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda z: loss(z, labels, **options), (x,))


def test_compiled() -> None:
    x, labels = features(8, 5, dtype=torch.float32)
    expected = losses.lifted_structured_loss(x, labels)
    compiled = torch.compile(losses.lifted_structured_loss, fullgraph=True, backend="aot_eager")
    a = leaf(x)
    compiled(a, labels).backward()
    assert torch.equal(compiled(x, labels), expected)
    b = leaf(x)
    losses.lifted_structured_loss(b, labels).backward()
    assert torch.equal(a.grad, b.grad)


def test_without_weights_no_gradient(backend: Backend) -> None:
    x, labels = features(8, 5, dtype=torch.float32)
    found = pair_reduce(leaf(x, backend.device), None, losses.EXTREMES, Pairing(labels.to(backend.device)))
    assert not any(result.requires_grad for result in found)


def test_first_derivatives_only() -> None:
    x, labels = features(8, 5, dtype=torch.float32)
    a = leaf(x)
    (gradient,) = torch.autograd.grad(losses.lifted_structured_loss(a, labels), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_refused_arguments() -> None:
    x, pairing = torch.ones(4, 3), Pairing(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="reducer: expected a PairReducer, got function"):
        pair_reduce(x, None, tile, pairing)
    with pytest.raises(TypeError, match="pairing: expected a Pairing, got Tensor"):
        pair_reduce(x, None, SUMS, pairing.labels)
    with pytest.raises(ValueError, match=r"y: expected with y_labels, got None"):
        pair_reduce(x, None, SUMS, pairing._replace(y_labels=pairing.labels))
    with pytest.raises(ValueError, match=r"values\[0\]: expected shape \(4,\), got \(3,\)"):
        pair_reduce(x, None, SUMS, pairing, values=(torch.ones(3),), parameters=(1.0,))
    with pytest.raises(TypeError, match=r"values\[1\]: expected a torch.Tensor, got float"):
        pair_reduce(x, None, SUMS, pairing, values=(torch.ones(4), 1.0))
    with pytest.raises(ValueError, match=r"values\[0\]: expected values without a gradient"):
        pair_reduce(x, None, SUMS, pairing, values=(torch.ones(4, requires_grad=True),), parameters=(1.0,))


def test_refused_reducers() -> None:
    outside = 3.0
    with pytest.raises(TypeError, match="tile: expected a function without captured variables, got outside"):
        PairReducer(start=(0.0,), tile=lambda d, positive, negative, values: (outside * d,), combine=combine)
    with pytest.raises(TypeError, match="combine: expected a function, got int"):
        PairReducer(start=(0.0,), tile=tile, combine=3)
    with pytest.raises(ValueError, match=r"start: expected at least one number, got \(\)"):
        PairReducer(start=(), tile=tile, combine=combine)


def test_without_triton() -> None:
    """The same reducers where Triton is not installed."""
    code = """import runpy, sys
sys.modules["triton"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    example = str(ROOT / "examples" / "pair_losses.py")
    without, with_it = (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for command in ([sys.executable, "-c", code, example], [sys.executable, example])
    )
    assert without == with_it
    assert without.count("_loss: ") == 3
