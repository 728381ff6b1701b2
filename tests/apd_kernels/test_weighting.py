from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import Backend
from oracle import METRICS, assert_close, distances, features, leaf, masks, tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apd_kernels import batch_hard, prepare_rows, use_backend, weighted_pairs
from apd_kernels._core import rows as row_arithmetic
from apd_kernels._core.backend import HAS_TRITON
from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.reference import weighting as reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def oracle(
    x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None,
    *, metric: str = "euclidean", **rules: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_p, d_n and which anchors have both, anchor by anchor."""
    found = []
    for d, positive, negative in zip(
        distances(x, x if y is None else y, metric), *masks(labels, y_labels, **rules), strict=True
    ):
        sides = [
            (values * (sign * values).softmax(0)).sum() if len(values) else 0 * x.nan_to_num(0).sum()
            for sign, values in ((1, d[positive]), (-1, d[negative]))
        ]
        found.append((*sides, torch.tensor(bool(positive.any() and negative.any()))))
    if not found:
        return x.sum(1), x.sum(1), torch.zeros(0, dtype=torch.bool)
    d_p, d_n, valid = (torch.stack(values) for values in zip(*found, strict=True))
    return d_p, d_n, valid


def served(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")


def compare(
    x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None,
    *, metric: str, device: str = "cpu", factor: float = 1.0, **rules: Any,
) -> None:  # fmt: skip
    """Distances, validity and the gradients of a weighted sum against the oracle."""
    a, b = leaf(x, device), None if y is None else leaf(y, device)
    p, q = leaf(x, dtype=torch.float64), None if y is None else leaf(y, dtype=torch.float64)
    there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in rules.items()}
    others = None if y_labels is None else y_labels.to(device)
    ours = weighted_pairs(a, labels.to(device), b, others, metric=metric, precision="fp32", **there)
    d_p, d_n, valid = oracle(p, labels, q, y_labels, metric=metric, **rules)
    weights = torch.randn(2, len(x), dtype=torch.float64, generator=torch.manual_seed(2))
    to = weights.to(ours.distances.positive)
    (to[0] * ours.distances.positive + to[1] * ours.distances.negative).sum().backward()
    (weights[0] * d_p + weights[1] * d_n).sum().backward()
    # Of squares the rounding grows with them, and is in the exponent; a distance's is that of its square over 2d.
    relative = tolerance(x.dtype) * factor * {"euclidean": 10, "sqeuclidean": 40, "cosine": 2, "dot": 20}[metric]
    assert ours.distances.positive.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert ours.valid.cpu().tolist() == valid.tolist()
    assert_close(ours.distances.positive, d_p, relative, "positive", scale=0.1)
    assert_close(ours.distances.negative, d_n, relative, "negative", scale=0.1)
    rounding = max(5 * relative, {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(x.dtype, 0))
    for mine, exact, what in ((a, p, "x"), (b, q, "y")):
        if mine is not None:
            assert mine.grad.dtype == x.dtype
            expected = torch.zeros_like(exact) if exact.grad is None else exact.grad
            assert_close(mine.grad, expected, rounding, f"gradient of {what}", scale=0.1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, metric: str) -> None:
    served(backend, dtype)
    x, labels = features(37, 20, dtype=dtype)
    y, y_labels = features(19, 20, dtype=dtype, seed=1, identities=9)
    compare(x, labels, metric=metric, device=backend.device)
    compare(x, labels, y, y_labels, metric=metric, device=backend.device)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 70, 3), (65, 33, 17), (0, 5, 4), (5, 0, 4), (0, 0, 4)])
def test_sizes(backend: Backend, n: int, m: int, d: int, metric: str) -> None:
    x, labels = features(n, d, dtype=torch.float32) if n else (torch.zeros(0, d), torch.zeros(0, dtype=torch.int64))
    y, y_labels = (
        features(m, d, dtype=torch.float32, seed=1) if m else (torch.zeros(0, d), torch.zeros(0, dtype=torch.int64))
    )
    if n and m:
        compare(x, labels, y, y_labels, metric=metric, device=backend.device)
        compare(x, labels, metric=metric, device=backend.device)
        return
    a, b = leaf(x, backend.device), leaf(y, backend.device)
    found = weighted_pairs(a, labels.to(backend.device), b, y_labels.to(backend.device), metric=metric)
    (found.distances.positive + found.distances.negative).sum().backward()
    assert found.distances.positive.tolist() == found.distances.negative.tolist() == [0.0] * n
    assert not found.valid.any()
    assert not a.grad.any()
    assert not b.grad.any()


def test_sets_and_strides(backend: Backend) -> None:
    """(S, N, D), slices with a row stride and transposed memory give what each set alone gives."""
    base = torch.randn(2, 40, 30, generator=torch.manual_seed(0)).to(backend.device)
    for x, y in (
        (base, base.flip(1) + 1),
        (base[:, ::2, 3:20], base[:, 5:, 3:20] + 1),
        (base.transpose(1, 2), base.transpose(1, 2)[:, :7] + 1),
    ):
        labels, y_labels = (torch.arange(t.shape[1], device=backend.device) % 5 for t in (x, y))
        for others in ((), (y, y_labels)):
            a = leaf(x)
            found = weighted_pairs(a, labels, *others)
            (2 * found.distances.positive - found.distances.negative).sum().backward()
            assert found.valid.shape == x.shape[:2]
            for one in range(len(x)):
                p = leaf(x[one], "cpu", torch.float64)
                rest = (others[0][one].cpu().double(), y_labels.cpu()) if others else ()
                d_p, d_n, _ = oracle(p, labels.cpu(), *rest)
                (2 * d_p - d_n).sum().backward()
                assert_close(found.distances.positive[one], d_p, 1e-5)
                assert_close(found.distances.negative[one], d_n, 1e-5)
                assert_close(a.grad[one], p.grad, 1e-4)


RULES: dict[str, dict[str, Any]] = {
    "own": {"own": torch.tensor([3, 0, -1, 7, 7, 2, 1, 8, 0, -1, 3, 5])},
    "y_valid": {"y_valid": torch.arange(14) % 3 != 0},
    "nothing_valid": {"y_valid": torch.zeros(14, dtype=torch.bool)},
    "domains": {
        "positives": "across",
        "negatives": "within",
        "domains": torch.arange(12) % 2,
        "y_domains": torch.arange(14) % 2,
    },
}


@pytest.mark.parametrize("which", RULES)
def test_which_pairs_count(backend: Backend, which: str) -> None:
    x, labels = features(12, 9, dtype=torch.float32)
    y, y_labels = features(14, 9, dtype=torch.float32, seed=1, identities=4)
    compare(x, labels, y, y_labels, metric="euclidean", device=backend.device, **RULES[which])
    if which == "domains":
        rules = {key: value for key, value in RULES[which].items() if key != "y_domains"}
        compare(x, labels, metric="euclidean", device=backend.device, **rules)


def test_missing_sides(backend: Backend) -> None:
    """One identity, all alone: 0 for the missing side, not valid, and a gradient from the other side only."""
    x, _ = features(7, 6, dtype=torch.float32)
    for labels in (torch.zeros(7, dtype=torch.uint8), torch.arange(7), torch.tensor([0, 0, 1, 2, 3, 4, 5])):
        compare(x, labels, metric="euclidean", device=backend.device)


def test_hard_pairs_are_the_limit(backend: Backend) -> None:
    """At any distance: far apart, the weights are those of `batch_hard`; where fast-reid's vanish, ours sum to 1."""
    x, labels = (t.to(backend.device) for t in features(24, 16, dtype=torch.float32))
    for scale in (1e3, 1e6):
        soft, hard = weighted_pairs(scale * x, labels), batch_hard(scale * x, labels)
        assert torch.equal(soft.valid, hard.valid)
        for side in range(2):
            assert_close(soft.distances[side], hard.distances[side], 1e-5)
    points, alone = torch.tensor([[0.0], [50.0], [110.0]]), torch.arange(3)
    far = weighted_pairs(points.to(backend.device), alone.to(backend.device))
    assert_close(far.distances.negative, torch.tensor([50.0, 50.000454, 60.0]), 1e-6)


def test_duplicates(backend: Backend) -> None:
    """A distance of 0 has gradient 0. What rounding leaves of it stays within the bound of the documentation."""
    same = torch.ones(4, 5, device=backend.device, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1], device=backend.device)
    found = weighted_pairs(same, labels)
    (found.distances.positive - found.distances.negative).sum().backward()
    assert not found.distances.positive.any()
    assert not same.grad.any()

    x, labels = features(30, 64, dtype=torch.float32, identities=6)
    near = torch.cat([x, x + 1e-4 * torch.randn(30, 64, generator=torch.manual_seed(0))])
    labels = torch.cat([labels, labels])
    largest = near.norm(dim=1).max().item()
    found = weighted_pairs(near.to(backend.device), labels.to(backend.device))
    d_p, d_n, _ = oracle(near.double(), labels)
    assert (found.distances.positive.cpu() - d_p).abs().max() <= 1e-3 * largest
    assert_close(found.distances.negative, d_n, 1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_not_hidden_and_stays_with_its_pairs(backend: Backend, metric: str) -> None:
    x, labels = (t.to(backend.device) for t in features(9, 6, dtype=torch.float32, identities=3))
    y, y_labels = (t.to(backend.device) for t in features(8, 6, dtype=torch.float32, identities=3, seed=1))
    bad = x.clone()
    bad[2, 1] = float("nan")
    found = weighted_pairs(bad, labels, metric=metric)
    expected = oracle(bad.cpu().double(), labels.cpu(), metric=metric)
    for side in range(2):
        assert found.distances[side].isnan().tolist() == expected[side].isnan().tolist()

    spoiled = y.clone()
    spoiled[[1, 5]] = torch.tensor([float("nan"), float("inf")], device=y.device)[:, None]
    valid = torch.ones(8, dtype=torch.bool, device=y.device)
    valid[[1, 5]] = False
    anchors = [leaf(t, backend.device) for t in (bad, x)]
    others = [leaf(t, backend.device) for t in (spoiled, y)]
    kept = torch.arange(9, device=y.device) != 2
    for a, b in zip(anchors, others, strict=True):
        pairs = weighted_pairs(a, labels, b, y_labels, y_valid=valid, metric=metric).distances
        (2 * pairs.positive - pairs.negative)[kept].sum().backward()
    assert anchors[0].grad[kept].isfinite().all()
    assert_close(anchors[0].grad[kept], anchors[1].grad[kept], 1e-4)
    assert_close(others[0].grad[valid], others[1].grad[valid], 1e-4)
    if metric != "cosine":
        assert not anchors[0].grad[2].any()
        assert not others[0].grad[~valid].any()


@pytest.mark.parametrize("metric", METRICS)
def test_prepared_rows(backend: Backend, metric: str) -> None:
    """Rows prepared once give what the rows give, to x alone."""
    x, labels = (t.to(backend.device) for t in features(9, 6, dtype=torch.float32))
    y, y_labels = (t.to(backend.device) for t in features(13, 6, dtype=torch.float32, seed=1, identities=3))
    results = []
    for other in (prepare_rows(y, metric=metric), y):
        a = leaf(x, backend.device)
        found = weighted_pairs(a, labels, other, y_labels, metric=metric)
        (found.distances.positive - found.distances.negative).sum().backward()
        results.append((found.distances.positive, found.distances.negative, a.grad))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


def _random_case(seed: int, dtype: torch.dtype, most: int) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    random = np.random.default_rng(seed)
    # Not on a line: there rows come so close that a distance, and more so a gradient, is mostly rounding.
    n, m, d = (int(value) for value in random.integers([1, 1, 3], [most, most, 40]))
    metric = METRICS[seed % 4]
    x, labels = features(n, d, dtype=dtype, seed=seed, identities=int(random.integers(1, n + 1)))
    if random.random() < 0.4:
        return metric, (x, labels), {}
    y, y_labels = features(m, d, dtype=dtype, seed=seed + 1000, identities=int(random.integers(1, m + 1)))
    rules: dict[str, Any] = {}
    if random.random() < 0.5:
        rules["own"] = torch.from_numpy(random.integers(-1, m, n))
    if random.random() < 0.5:
        rules["y_valid"] = torch.from_numpy(random.random(m) < 0.7)
    if random.random() < 0.5:
        rules.update(domains=torch.from_numpy(random.integers(0, 3, n)))
        rules.update(y_domains=torch.from_numpy(random.integers(0, 3, m)))
        rules["positives"], rules["negatives"] = random.choice(["all", "within", "across"], 2).tolist()
    return metric, (x, labels, y, y_labels), rules


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_200_random_cases(dtype: torch.dtype) -> None:
    with use_backend("torch"):
        for seed in range(200):
            metric, inputs, rules = _random_case(seed, dtype, 60)
            compare(*inputs, metric=metric, factor=10, **rules)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_random_cases_in_kernels(backend: Backend) -> None:
    if backend.name == "torch":
        pytest.skip("more of them in the test before")
    for seed in range(12):
        metric, inputs, rules = _random_case(seed, torch.float32, 70)
        compare(*inputs, metric=metric, device=backend.device, factor=10, **rules)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("splits", [1, 2])
def test_tiles_of_a_program(backend: Backend, monkeypatch: pytest.MonkeyPatch, metric: str, splits: int) -> None:
    """One program goes through several tiles, as in memories that are large: sums shrink where a larger logit comes."""
    if backend.name == "torch":
        pytest.skip("its rows are whole")
    from apd_kernels.kernels import _pairs

    monkeypatch.setattr(_pairs, "MAX_SPLITS", splits)
    x, labels = features(9, 12, dtype=torch.float32)
    y, y_labels = features(120, 12, dtype=torch.float32, seed=1, identities=3)
    for order in (torch.arange(120), torch.arange(120).flip(0)):
        compare(x, labels, y[order], y_labels[order], metric=metric, device=backend.device)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_blocks_of_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """Many blocks of pair weights give what one block gives."""
    monkeypatch.setattr(row_arithmetic, "BLOCK_ELEMENTS", 700)
    x, labels = features(45, 9, dtype=torch.float32)
    y, y_labels = features(33, 9, dtype=torch.float32, seed=1, identities=15)
    compare(x, labels, metric=metric, device=backend.device)
    compare(x, labels, y, y_labels, metric=metric, device=backend.device)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is larger than a block or the inputs, forward and backward."""
    monkeypatch.setattr(row_arithmetic, "BLOCK_ELEMENTS", 30000)
    x, labels = features(300, 5, dtype=torch.float32)
    y, y_labels = features(2000, 5, dtype=torch.float32, seed=1, identities=100)
    for other, others in ((None, None), (y, y_labels)):
        with _Largest() as largest:
            choices = Operands(), Pairing(labels, others), "euclidean", "fp32"
            found = reference.weighted_pairs(x, other, *choices)
            reference.weighted_pairs_backward(*found[:2], *found, x, other, *choices, True, other is not None)
        assert largest.elements <= 30000


def test_bits_repeat_and_autocast_is_ignored(backend: Backend) -> None:
    x, labels = features(33, 20, dtype=torch.float32)
    y, y_labels = features(40, 20, dtype=torch.float32, seed=1, identities=11)
    results = []
    for autocast in (False, False, True):
        a, b = leaf(x, backend.device), leaf(y, backend.device)
        with torch.autocast(backend.device, dtype=torch.bfloat16, enabled=autocast):
            found = weighted_pairs(a, labels.to(backend.device), b, y_labels.to(backend.device)).distances
        (found.positive - found.negative).sum().backward()
        results.append((*found, a.grad, b.grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: str) -> None:
    x, labels = features(7, 4)
    y, y_labels = features(6, 4, seed=1, identities=2)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: weighted_pairs(a, labels, metric=metric).distances, (x,))
    assert torch.autograd.gradcheck(
        lambda a, b: weighted_pairs(a, labels, b, y_labels, metric=metric).distances, (x, y)
    )


def test_first_derivatives_only() -> None:
    x, labels = features(7, 4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(weighted_pairs(x, labels).distances.positive.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_compiles_in_one_graph(backend: Backend) -> None:
    """One graph, and at most one recompilation over batch sizes."""
    x, labels = (t.to(backend.device) for t in features(20, 9, dtype=torch.float32))
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def gap(a: Tensor, of_a: Tensor) -> Tensor:
        pairs = weighted_pairs(a, of_a)
        return torch.where(pairs.valid, pairs.distances.positive - pairs.distances.negative, 0).sum()

    compiled = torch.compile(gap, fullgraph=True, backend=counter)
    for n in (20, 5, 11, 13):
        a, b = leaf(x[:n], backend.device), leaf(x[:n], backend.device)
        values = compiled(a, labels[:n]), gap(b, labels[:n])
        torch.stack(values).sum().backward()
        assert_close(*values, 1e-5)
        assert_close(a.grad, b.grad, 1e-4)
    assert counter.frame_count <= 2


def _golden(folder: Path, file: str) -> tuple[list[str], Any]:
    archive = np.load(folder / "golden" / f"{file}.npz", allow_pickle=False)
    return [str(case) for case in archive["cases"]], archive


def test_weighted_mining_equals_fast_reid(real_data: Path) -> None:
    """There the anchor is its own positive, a cosine distance is 2 − 2 cos, and 1e-6 is added to a sum of weights."""
    cases, archive = _golden(real_data, "fastreid_weighted_example_mining")
    for case in cases:
        x = torch.from_numpy(archive[f"{case}__embeddings"]).double()
        labels = torch.from_numpy(archive[f"{case}__labels"])
        for kind, metric, rows in (("euclidean", "euclidean", x), ("cosine", "sqeuclidean", _unit(x))):
            found = weighted_pairs(rows, labels, rows.clone(), labels, metric=metric)
            for side, name in zip(found.distances, ("ap", "an"), strict=True):
                theirs = torch.from_numpy(archive[f"{case}__{kind}_weighted_{name}_f64"])
                # Their negative weights are exp(−d), of which 1e-6 may be some part.
                least = torch.exp(-theirs).min().item() if name == "an" else 1.0
                assert_close(side[theirs != 0], theirs[theirs != 0], 3e-6 / least, f"{case} {kind} {name}")


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def test_weights_have_the_gradient_of_fast_reid(real_data: Path) -> None:
    """Its triplet loss without hard mining: the weights are not detached."""
    cases, archive = _golden(real_data, "fastreid_triplet_loss")
    for case in ("pk_normalised", "unequal_and_single"):
        assert case in cases
        labels = torch.from_numpy(archive[f"{case}__labels"])
        for tag, normalised in (("_m0.3_norm0_hard0", False), ("_m0.3_norm1_hard0", True)):
            x = torch.from_numpy(archive[f"{case}__embeddings"]).double().requires_grad_()
            rows, metric = (_unit(x), "sqeuclidean") if normalised else (x, "euclidean")
            found = weighted_pairs(rows, labels, rows.clone(), labels, metric=metric).distances
            loss = (found.positive - found.negative + 0.3).clamp(min=0).mean()
            loss.backward()
            assert_close(loss, torch.from_numpy(archive[f"{case}__loss{tag}_f64"]), 1e-4, f"{case} {tag}")
            assert_close(x.grad, torch.from_numpy(archive[f"{case}__grad{tag}_f64"]), 1e-4, f"gradient of {case} {tag}")


X, LABELS = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.long()}, TypeError, r"x: expected float16, .*, got torch.int64"),
        ({"x": X[0]}, ValueError, r"x: expected shape \(N, D\) or \(S, N, D\), got \(3,\)"),
        ({"labels": LABELS[:3]}, ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
        ({"labels": LABELS.float().requires_grad_()}, TypeError, r"labels: expected an integer dtype"),
        ({"y": X}, ValueError, r"y_labels: expected with y, got None"),
        ({"y": X.half(), "y_labels": LABELS}, TypeError, r"y: expected torch.float32 as x, got torch.float16"),
        ({"y": X.to("meta"), "y_labels": LABELS}, ValueError, r"y: expected device cpu as x, got meta"),
        ({"own": LABELS}, ValueError, r"y: expected with own, got None"),
        ({"positives": "within"}, ValueError, r"domains: expected with positives='within', got None"),
        ({"metric": "manhattan"}, ValueError, r"metric: expected 'euclidean' or .*, got 'manhattan'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call: Callable[..., Any] = weighted_pairs
    with pytest.raises(error, match=message):
        call(**{"x": X, "labels": LABELS, **change})
