from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import Backend
from oracle import assert_close, features, leaf, masks, tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apd_kernels import circle_loss, prepare_rows, supervised_contrastive_loss, use_backend
from apd_kernels._core import rows as row_arithmetic
from apd_kernels._core.backend import HAS_TRITON
from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels.reference import contrastive as reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Loss = Callable[..., Tensor]


def circle_oracle(
    x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None,
    *, margin: float = 0.25, gamma: float = 128.0, **rules: Any,
) -> Tensor:  # fmt: skip
    """Sun et al., eq. 6, anchor by anchor; the weights are constants."""
    s = _unit(x) @ _unit(x if y is None else y).T
    terms = []
    for row, positive, negative in zip(s, *masks(labels, y_labels, **rules), strict=True):
        if positive.any() and negative.any():
            s_p, s_n = row[positive], row[negative]
            alpha_p, alpha_n = (1 + margin - s_p.detach()).clamp(min=0), (s_n.detach() + margin).clamp(min=0)
            of_positives = (-gamma * alpha_p * (s_p - (1 - margin))).logsumexp(0)
            of_negatives = (gamma * alpha_n * (s_n - margin)).logsumexp(0)
            terms.append(F.softplus(of_positives + of_negatives))
    return torch.stack(terms).mean() if terms else 0 * x.nan_to_num(0).sum()


def contrastive_oracle(
    x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None,
    *, temperature: float = 0.1, metric: str = "cosine", **rules: Any,
) -> Tensor:  # fmt: skip
    """Khosla et al., eq. 2, anchor by anchor."""
    other = x if y is None else y
    logits = (_unit(x) @ _unit(other).T if metric == "cosine" else x @ other.T) / temperature
    terms = [
        row[positive | negative].logsumexp(0) - row[positive].mean()
        for row, positive, negative in zip(logits, *masks(labels, y_labels, **rules), strict=True)
        if positive.any()
    ]
    return torch.stack(terms).mean() if terms else 0 * x.nan_to_num(0).sum()


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, x / torch.where(norm == 0, 1, norm))


# Name: loss, oracle, options, and how much larger its rounding is than that of a distance. The logits of a circle loss
# are γ (1 + 2m) times a similarity, and so is their error, which the gradient takes as a relative one.
LOSSES: dict[str, tuple[Loss, Loss, dict[str, Any], float]] = {
    "circle": (circle_loss, circle_oracle, {}, 40.0),
    "circle_of_a_memory": (circle_loss, circle_oracle, {"margin": 0.4, "gamma": 80.0}, 40.0),
    "contrastive": (supervised_contrastive_loss, contrastive_oracle, {}, 5.0),
    "contrastive_dot": (
        supervised_contrastive_loss,
        contrastive_oracle,
        {"metric": "dot", "temperature": 5.0},
        5.0,
    ),
}
ALL_LOSSES = pytest.mark.parametrize("name", LOSSES)
ONE_OF_EACH = pytest.mark.parametrize("name", ["circle", "contrastive", "contrastive_dot"])


def served(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")


def compare(
    name: str, x: Tensor, labels: Tensor, y: Tensor | None = None, y_labels: Tensor | None = None,
    *, device: str = "cpu", factor: float = 1.0, **rules: Any,
) -> None:  # fmt: skip
    """Loss and gradients against the oracle."""
    loss, oracle, options, sensitivity = LOSSES[name]
    a, b = leaf(x, device), None if y is None else leaf(y, device)
    p, q = leaf(x, dtype=torch.float64), None if y is None else leaf(y, dtype=torch.float64)
    there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in rules.items()}
    others = None if y_labels is None else y_labels.to(device)
    ours = loss(a, labels.to(device), b, others, precision="fp32", **options, **there)
    expected = oracle(p, labels, q, y_labels, **options, **rules)
    (3 * ours).backward()
    (3 * expected).backward()
    relative = tolerance(x.dtype) * sensitivity * factor
    assert ours.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert_close(ours, expected, relative, "loss", scale=1e-2)
    rounding = max(relative, {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(x.dtype, 0))
    for mine, exact, what in ((a, p, "x"), (b, q, "y")):
        if mine is not None:
            assert mine.grad.dtype == x.dtype
            expected_gradient = torch.zeros_like(exact) if exact.grad is None else exact.grad
            assert_close(mine.grad, expected_gradient, rounding, f"gradient of {what}", scale=2e-3)


@ALL_LOSSES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, name: str) -> None:
    served(backend, dtype)
    x, labels = features(37, 50, dtype=dtype)
    y, y_labels = features(19, 50, dtype=dtype, seed=1, identities=9)
    compare(name, x, labels, device=backend.device)
    compare(name, x, labels, y, y_labels, device=backend.device)


@ONE_OF_EACH
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 70, 3), (65, 33, 17), (0, 5, 4), (5, 0, 4), (0, 0, 4)])
def test_sizes(backend: Backend, n: int, m: int, d: int, name: str) -> None:
    x, labels = features(n, d, dtype=torch.float32) if n else (torch.zeros(0, d), torch.zeros(0, dtype=torch.int64))
    y, y_labels = (
        features(m, d, dtype=torch.float32, seed=1) if m else (torch.zeros(0, d), torch.zeros(0, dtype=torch.int64))
    )
    compare(name, x, labels, y, y_labels, device=backend.device)
    compare(name, x, labels, device=backend.device)
    loss, _, options, _ = LOSSES[name]
    if 0 in (n, m):
        a, b = leaf(x, backend.device), leaf(y, backend.device)
        value = loss(a, labels.to(backend.device), b, y_labels.to(backend.device), **options)
        value.backward()
        assert value.item() == 0
        assert not a.grad.any()
        assert not b.grad.any()


@ONE_OF_EACH
def test_sets_and_strides(backend: Backend, name: str) -> None:
    """(S, N, D), slices with a row stride and transposed memory give what each set alone gives."""
    loss, oracle, options, sensitivity = LOSSES[name]
    base = torch.randn(2, 40, 30, generator=torch.manual_seed(0)).to(backend.device)
    for x, y in (
        (base, base.flip(1) + 1),
        (base[:, ::2, 3:20], base[:, 5:, 3:20] + 1),
        (base.transpose(1, 2), base.transpose(1, 2)[:, :7] + 1),
    ):
        labels, y_labels = (torch.arange(t.shape[1], device=backend.device) % 5 for t in (x, y))
        for others in ((), (y, y_labels)):
            a = leaf(x)
            inputs = (a, *others[:1])
            values = loss(a, labels, *others, **options)
            values.sum().backward()
            for one in range(len(x)):
                p = leaf(x[one], "cpu", torch.float64)
                rest = (others[0][one].cpu().double(), y_labels.cpu()) if others else ()
                expected = oracle(p, labels.cpu(), *rest, **options)
                expected.backward()
                assert_close(values[one], expected, tolerance(x.dtype) * sensitivity)
                assert_close(a.grad[one], p.grad, tolerance(x.dtype) * sensitivity)
            strided = loss(x, labels, *others, **options)
            dense = loss(x.contiguous(), labels, *(t.contiguous() for t in others), **options)
            assert_close(strided, dense, 2e-6)
            assert len(inputs) == 1 + bool(others)


RULES: dict[str, dict[str, Any]] = {
    "own": {"own": torch.tensor([3, 0, -1, 7, 7, 2, 1, 8, 0, -1, 3, 5])},
    "y_valid": {"y_valid": torch.arange(14) % 3 != 0},
    "nothing_valid": {"y_valid": torch.zeros(14, dtype=torch.bool)},
    "within": {"positives": "within", "domains": True},
    "across": {"negatives": "across", "domains": True},
    "both": {"positives": "across", "negatives": "within", "domains": True},
    "all_of_them": {
        "own": torch.arange(12, dtype=torch.int32),
        "y_valid": torch.arange(14) != 4,
        "positives": "across",
        "negatives": "within",
        "domains": True,
    },
}


def _rules(which: str) -> dict[str, Any]:
    rules = dict(RULES[which])
    if rules.pop("domains", False):
        rules.update(domains=torch.arange(12) % 2, y_domains=torch.arange(14) % 2)
    return rules


@ONE_OF_EACH
@pytest.mark.parametrize("which", RULES)
def test_which_pairs_count(backend: Backend, which: str, name: str) -> None:
    x, labels = features(12, 9, dtype=torch.float32)
    y, y_labels = features(14, 9, dtype=torch.float32, seed=1, identities=4)
    rules = _rules(which)
    compare(name, x, labels, y, y_labels, device=backend.device, **rules)
    if "own" not in rules and "y_valid" not in rules:
        rules.pop("y_domains")
        compare(name, x, labels, device=backend.device, **rules)


@ONE_OF_EACH
def test_batches_without_pairs(backend: Backend, name: str) -> None:
    """One identity: no negatives. All alone: no positives. What has no term has no gradient."""
    x, _ = features(7, 6, dtype=torch.float32)
    for labels in (torch.zeros(7, dtype=torch.uint8), torch.arange(7), torch.tensor([0, 0, 1, 2, 3, 4, 5])):
        compare(name, x, labels, device=backend.device)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@ONE_OF_EACH
def test_nan_is_not_hidden_and_stays_with_its_pairs(backend: Backend, name: str) -> None:
    loss, _, options, _ = LOSSES[name]
    x, labels = (t.to(backend.device) for t in features(9, 6, dtype=torch.float32, identities=3))
    y, y_labels = (t.to(backend.device) for t in features(8, 6, dtype=torch.float32, identities=3, seed=1))
    bad = x.clone()
    bad[2, 1] = float("nan")
    assert loss(bad, labels, **options).isnan()
    assert loss(bad, labels, y, y_labels, **options).isnan()
    assert loss(x, labels, bad, labels, **options).isnan()

    # A row that may not be chosen, an anchor without a term: as if they were not there.
    spoiled = y.clone()
    spoiled[[1, 5]] = torch.tensor([float("nan"), float("inf")], device=y.device)[:, None]
    valid = torch.ones(8, dtype=torch.bool, device=y.device)
    valid[[1, 5]] = False
    alone = labels.clone()
    alone[2] = 99
    anchors = [leaf(t, backend.device) for t in (bad, x)]
    others = [leaf(t, backend.device) for t in (spoiled, y)]
    losses = [loss(a, alone, b, y_labels, y_valid=valid, **options) for a, b in zip(anchors, others, strict=True)]
    torch.stack(losses).sum().backward()
    assert torch.equal(*losses)
    assert losses[0].isfinite()
    kept = torch.arange(9, device=y.device) != 2
    assert torch.equal(anchors[0].grad[kept], anchors[1].grad[kept])
    assert torch.equal(others[0].grad[valid], others[1].grad[valid])
    if name == "contrastive_dot":  # the rows of others are normalised, and a NaN is not what it would be without one
        assert not anchors[0].grad[2].any()
        assert not others[0].grad[~valid].any()

    # The gradient of a NaN anchor reaches what it is paired with, not other anchors.
    a = leaf(bad, backend.device)
    loss(a, labels, y, y_labels, **options).backward()
    assert a.grad.isnan().any(1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("gamma", [128.0, 256.0, 1000.0])
def test_large_gamma(backend: Backend, gamma: float) -> None:
    """Terms between 0 and far beyond the range of exp: finite, and right."""
    generator = torch.Generator().manual_seed(0)
    tight = torch.eye(4, 8).repeat_interleave(3, 0) + 1e-3 * torch.randn(12, 8, generator=generator)
    labels = torch.arange(4).repeat_interleave(3)
    for x, y_labels in ((tight, labels), (tight, labels.flip(0)), (-tight.abs(), labels)):
        a, p = leaf(x, backend.device), leaf(x, dtype=torch.float64)
        loss = circle_loss(a, y_labels.to(backend.device), gamma=gamma)
        expected = circle_oracle(p, y_labels, gamma=gamma)
        loss.backward()
        expected.backward()
        assert a.grad.isfinite().all()
        assert_close(loss, expected, 1e-5, scale=1e-2)
        assert_close(a.grad, p.grad, 2e-6 * gamma, scale=1e-2)


def test_temperatures(backend: Backend) -> None:
    x, labels = features(20, 8, dtype=torch.float32)
    for temperature in (0.005, 0.05, 1.0, 100.0):
        a, p = leaf(x, backend.device), leaf(x, dtype=torch.float64)
        loss = supervised_contrastive_loss(a, labels.to(backend.device), temperature=temperature)
        expected = contrastive_oracle(p, labels, temperature=temperature)
        loss.backward()
        expected.backward()
        assert_close(loss, expected, 1e-5)
        assert_close(a.grad, p.grad, max(1e-5, 1e-6 / temperature), scale=1e-3)


def test_is_info_nce_and_cross_entropy(backend: Backend) -> None:
    """One positive: InfoNCE. Centroids for `y`: the cross-entropy of a cluster memory."""
    x, y = (torch.randn(11, 7, generator=torch.manual_seed(seed)).to(backend.device) for seed in (0, 1))
    places = torch.arange(11, device=backend.device)
    logits = F.normalize(x) @ F.normalize(y).T / 0.1
    assert_close(supervised_contrastive_loss(x, places, y, places), F.cross_entropy(logits, places), 1e-5)
    labels = places * 7 % 11
    centroids = F.normalize(y)
    ours = supervised_contrastive_loss(x, labels, centroids, places, metric="dot", temperature=0.5)
    assert_close(ours, F.cross_entropy(x @ centroids.T / 0.5, labels), 1e-5)


@ONE_OF_EACH
def test_prepared_rows(backend: Backend, name: str) -> None:
    """Rows prepared once give what the rows give, to x alone."""
    x, labels = (t.to(backend.device) for t in features(9, 6, dtype=torch.float32))
    y, y_labels = (t.to(backend.device) for t in features(13, 6, dtype=torch.float32, seed=1, identities=3))
    loss, _, options, _ = LOSSES[name]
    kept = prepare_rows(y, metric=options.get("metric", "cosine"))
    a, b = leaf(x, backend.device), leaf(x, backend.device)
    losses = loss(a, labels, kept, y_labels, **options), loss(b, labels, y, y_labels, **options)
    torch.stack(losses).sum().backward()
    assert torch.equal(*losses)
    assert torch.equal(a.grad, b.grad)


def _random_case(seed: int, dtype: torch.dtype, most: int) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    random = np.random.default_rng(seed)
    n, m, d = (int(value) for value in random.integers(1, [most, most, 40]))
    name = ("circle", "contrastive", "contrastive_dot")[seed % 3]
    x, labels = features(n, d, dtype=dtype, seed=seed, identities=int(random.integers(1, n + 1)))
    if random.random() < 0.4:
        return name, (x, labels), {}
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
    return name, (x, labels, y, y_labels), rules


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_200_random_cases(dtype: torch.dtype) -> None:
    with use_backend("torch"):
        for seed in range(200):
            name, inputs, rules = _random_case(seed, dtype, 60)
            compare(name, *inputs, factor=3, **rules)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_random_cases_in_kernels(backend: Backend) -> None:
    if backend.name == "torch":
        pytest.skip("more of them in the test before")
    for seed in range(12):
        name, inputs, rules = _random_case(seed, torch.float32, 70)
        compare(name, *inputs, device=backend.device, factor=3, **rules)


@ONE_OF_EACH
@pytest.mark.parametrize("splits", [1, 2])
def test_tiles_of_a_program(backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str, splits: int) -> None:
    """One program goes through several tiles, as in memories that are large: sums shrink where a larger logit comes."""
    if backend.name == "torch":
        pytest.skip("its rows are whole")
    from apd_kernels.kernels import _pairs

    monkeypatch.setattr(_pairs, "MAX_SPLITS", splits)
    x, labels = features(9, 12, dtype=torch.float32)
    y, y_labels = features(120, 12, dtype=torch.float32, seed=1, identities=3)
    for order in (torch.arange(120), torch.arange(120).flip(0)):
        compare(name, x, labels, y[order], y_labels[order], device=backend.device)


@ONE_OF_EACH
def test_blocks_of_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Many blocks of pair weights give what one block gives."""
    monkeypatch.setattr(row_arithmetic, "BLOCK_ELEMENTS", 700)
    x, labels = features(45, 9, dtype=torch.float32)
    y, y_labels = features(33, 9, dtype=torch.float32, seed=1, identities=15)
    compare(name, x, labels, device=backend.device)
    compare(name, x, labels, y, y_labels, device=backend.device)


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
    for form in ("circle", "contrastive"):
        for other, others in ((None, None), (y, y_labels)):
            with _Largest() as largest:
                pairing = Pairing(labels, others)
                choices = form, 10.0, 0.2, "fp32", True, other is not None
                reference.contrastive_loss(x, other, Operands(), pairing, *choices)
            assert largest.elements <= 30000


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_memory_of_kernels_is_bounded() -> None:
    """Of 16384×65536 pairs, 64 MB of weights at a time: the largest tensors of any launch are the inputs."""
    from apd_kernels.kernels import contrastive
    from apd_kernels.kernels._launch import recording

    x, y = (torch.empty(rows, 256, device="meta") for rows in (16384, 65536))
    labels, y_labels = (torch.empty(len(rows), dtype=torch.int64, device="meta") for rows in (x, y))
    with recording(90) as launches:
        choices = "circle", 10.0, 0.2, "fp32", True, True
        contrastive.contrastive_loss(x, y, Operands(), Pairing(labels, y_labels), *choices)
    sizes = [value.numel() for launch in launches for value in launch.arguments if isinstance(value, Tensor)]
    assert max(sizes) <= max(row_arithmetic.BLOCK_ELEMENTS, y.numel())


@ONE_OF_EACH
def test_bits_repeat_and_autocast_is_ignored(backend: Backend, name: str) -> None:
    loss, _, options, _ = LOSSES[name]
    x, labels = features(33, 20, dtype=torch.float32)
    y, y_labels = features(40, 20, dtype=torch.float32, seed=1, identities=11)
    results = []
    for autocast in (False, False, True):
        a, b = leaf(x, backend.device), leaf(y, backend.device)
        with torch.autocast(backend.device, dtype=torch.bfloat16, enabled=autocast):
            value = loss(a, labels.to(backend.device), b, y_labels.to(backend.device), **options)
        value.backward()
        results.append((value, a.grad, b.grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@ONE_OF_EACH
def test_gradient_only_where_needed(backend: Backend, name: str) -> None:
    """The same loss with and without gradients, and the same gradient alone and with the other one."""
    loss, _, options, _ = LOSSES[name]
    x, labels = (t.to(backend.device) for t in features(9, 6, dtype=torch.float32))
    y, y_labels = (t.to(backend.device) for t in features(13, 6, dtype=torch.float32, seed=1, identities=3))
    both = [leaf(x, backend.device), leaf(y, backend.device)]
    value = loss(both[0], labels, both[1], y_labels, **options)
    value.backward()
    alone = [leaf(x, backend.device), leaf(y, backend.device)]
    for at, inputs in enumerate(((alone[0], y), (x, alone[1]))):
        again = loss(inputs[0], labels, inputs[1], y_labels, **options)
        assert torch.equal(again, value)
        again.backward()
        assert torch.equal(alone[at].grad, both[at].grad)
    with torch.no_grad():
        assert torch.equal(loss(both[0], labels, both[1], y_labels, **options), value)


def test_gradcheck() -> None:
    """Of the contrastive loss; a circle loss has no function whose derivative its gradient is."""
    x, labels = features(7, 4)
    y, y_labels = features(6, 4, seed=1, identities=2)
    x.requires_grad_()
    y.requires_grad_()
    for metric in ("cosine", "dot"):
        options: dict[str, Any] = {"metric": metric, "temperature": 0.5}
        assert torch.autograd.gradcheck(lambda a: supervised_contrastive_loss(a, labels, **options), (x,))  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda a, b: supervised_contrastive_loss(a, labels, b, y_labels, **options),  # noqa: B023
            (x, y),
        )


def test_first_derivatives_only() -> None:
    x, labels = features(7, 4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(circle_loss(x, labels), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@ONE_OF_EACH
def test_compiles_in_one_graph(backend: Backend, name: str) -> None:
    """One graph, and at most one recompilation over batch sizes."""
    loss, _, options, _ = LOSSES[name]
    x, labels = (t.to(backend.device) for t in features(20, 9, dtype=torch.float32))
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a, of_a: loss(a, of_a, **options), fullgraph=True, backend=counter)
    for n in (20, 5, 11, 13):
        a, b = leaf(x[:n], backend.device), leaf(x[:n], backend.device)
        losses = compiled(a, labels[:n]), loss(b, labels[:n], **options)
        torch.stack(losses).sum().backward()
        assert_close(*losses, 1e-5)
        assert_close(a.grad, b.grad, 1e-4)
    assert counter.frame_count <= 2


def _golden(folder: Path, file: str) -> tuple[list[str], Any]:
    archive = np.load(folder / "golden" / f"{file}.npz", allow_pickle=False)
    return [str(case) for case in archive["cases"]], archive


@pytest.mark.parametrize("peer", ["fastreid_pairwise_circleloss", "pml_CircleLoss"])
def test_circle_loss_equals_other_projects(real_data: Path, peer: str) -> None:
    """fast-reid takes the mean over all anchors, pytorch-metric-learning over terms above 0."""
    cases, archive = _golden(real_data, peer)
    for case in cases:
        labels = torch.from_numpy(archive[f"{case}__labels"])
        positive, negative = masks(labels, None)
        valid = positive.any(1) & negative.any(1)
        tags = [key.split("loss")[1][:-4] for key in archive.files if key.startswith(f"{case}__loss") and "f64" in key]
        for tag in tags:
            margin, gamma = (float(part[1:]) for part in tag.split("_")[1:])
            for kind, dtype in (("f64", torch.float64), ("f32", torch.float32)):
                if f"{case}__loss{tag}_{kind}" not in archive.files:
                    continue
                x = torch.from_numpy(archive[f"{case}__embeddings"]).to(dtype).requires_grad_()
                loss = circle_loss(x, labels, margin=margin, gamma=gamma)
                if peer.startswith("fastreid"):
                    loss = loss * valid.sum().to(dtype) / len(labels)
                loss.backward()
                relative = 1e-6 if kind == "f64" else 1e-4
                expected, gradient = (
                    torch.from_numpy(np.asarray(archive[f"{case}__{what}{tag}_{kind}"])) for what in ("loss", "grad")
                )
                assert_close(loss, expected, relative, f"{case} {tag}")
                assert_close(x.grad, gradient, relative * 10, f"gradient of {case} {tag}")


def test_contrastive_loss_equals_clip_reid(real_data: Path) -> None:
    cases, archive = _golden(real_data, "clipreid_SupConLoss")
    for case in cases:
        for kind, dtype, relative in (("f64", torch.float64, 1e-8), ("f32", torch.float32, 1e-5)):
            text, image = (
                torch.from_numpy(archive[f"{case}__{side}_features"]).to(dtype).requires_grad_()
                for side in ("text", "image")
            )
            labels, y_labels = (torch.from_numpy(archive[f"{case}__{which}"]) for which in ("t_label", "i_targets"))
            loss = supervised_contrastive_loss(text, labels, image, y_labels, metric="dot", temperature=1.0)
            loss.backward()
            assert_close(loss, torch.from_numpy(np.asarray(archive[f"{case}__loss_{kind}"])), relative)
            for side, name in ((text, "text"), (image, "image")):
                assert_close(side.grad, torch.from_numpy(archive[f"{case}__grad_{name}_{kind}"]), relative)


def test_cross_entropy_of_a_memory_equals_cluster_contrast(real_data: Path) -> None:
    cases, archive = _golden(real_data, "clustercontrast_ClusterMemory")
    for case in (case for case in cases if case.startswith("hard0")):
        for kind, dtype, relative in (("f64", torch.float64, 1e-7), ("f32", torch.float32, 1e-5)):
            memory = torch.from_numpy(archive[f"{case}__features_before"]).to(dtype)
            for step in (1, 2):
                x = torch.from_numpy(archive[f"{case}__inputs{step}"]).to(dtype).requires_grad_()
                targets = torch.from_numpy(archive[f"{case}__targets{step}"])
                loss = supervised_contrastive_loss(
                    F.normalize(x), targets, memory, torch.arange(len(memory)),
                    metric="dot", temperature=float(archive[f"{case}__temp"]),
                )  # fmt: skip
                loss.backward()
                assert_close(loss, torch.from_numpy(np.asarray(archive[f"{case}__loss{step}_{kind}"])), relative)
                assert_close(x.grad, torch.from_numpy(archive[f"{case}__grad{step}_{kind}"]), relative * 10)
                memory = torch.from_numpy(archive[f"{case}__features_after{step}_{kind}"]).to(dtype)
