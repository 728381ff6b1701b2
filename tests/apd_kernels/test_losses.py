from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import METRICS, assert_close, distances, features, leaf, masks, pairing_options, tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apd_kernels import Pair, batch_hard, triplet_loss

pytestmark = pytest.mark.oldest


def expected_triplet(
    x: Tensor,
    labels: Tensor,
    y: Tensor | None = None,
    y_labels: Tensor | None = None,
    margin: float | None = 0.3,
    reverse: bool = False,
    metric: str = "euclidean",
) -> Tensor:
    """The loss from the whole distance matrix in float64."""
    d = distances(x, x if y is None else y, metric)
    positive, negative = masks(labels, y_labels)
    valid = positive.any(1) & negative.any(1)
    farthest = d.masked_fill(~positive, -torch.inf).amax(1)[valid]
    nearest = d.masked_fill(~negative, torch.inf).amin(1)[valid]
    gap = nearest - farthest if reverse else farthest - nearest
    terms = F.softplus(gap) if margin is None else (gap + margin).clamp(min=0)
    return terms.sum() / max(1, len(terms))


# Every value of every option, each pair of options at least once.
OPTIONS = [
    (0.3, False, "euclidean", False),
    (None, True, "euclidean", True),
    (0.0, True, "sqeuclidean", False),
    (None, False, "sqeuclidean", True),
    (0.3, True, "cosine", True),
    (None, False, "cosine", False),
    (0.3, False, "dot", True),
    (None, True, "dot", False),
]


@pytest.mark.parametrize(("margin", "reverse", "metric", "memory"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_triplet_matches_float64(
    backend: Backend, dtype: torch.dtype, margin: float | None, reverse: bool, metric: str, memory: bool
) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    x, labels = features(37, 20, dtype=dtype)
    rows, row_labels = features(50, 20, dtype=dtype, seed=1, identities=12) if memory else (None, None)
    a, b = leaf(x, backend.device), None if rows is None else leaf(rows, backend.device)
    here = [None if t is None else t.to(backend.device) for t in (labels, row_labels)]
    loss, indices = triplet_loss(
        a, here[0], b, here[1], margin=margin, reverse=reverse, metric=metric, return_indices=True
    )
    (3 * loss).backward()

    p, q = leaf(x, dtype=torch.float64), None if rows is None else leaf(rows, dtype=torch.float64)
    expected = expected_triplet(p, labels, q, row_labels, margin, reverse, metric)
    (3 * expected).backward()
    relative = 5 * tolerance(dtype)
    assert_close(loss, expected, relative, "loss", scale=1.0)  # rounded like the distances, which are near 1 or larger
    rounding = 1e-3 if dtype == torch.float16 else 10 * tolerance(dtype)
    assert_close(a.grad, p.grad, rounding, "gradient of x")
    if b is not None:
        assert_close(b.grad, q.grad, rounding, "gradient of y")

    # The same winners given back: the same loss and gradient, bit for bit.
    c = leaf(x, backend.device)
    again = triplet_loss(
        c, here[0], b, here[1], margin=margin, reverse=reverse, metric=metric, indices=indices, return_indices=False
    )
    (3 * again).backward()
    assert torch.equal(again, loss)
    assert torch.equal(c.grad, a.grad)


def test_triplet_shares_one_mining(backend: Backend) -> None:
    """Winners mined on one set of features, the loss taken on another: what SP-Net's three losses do."""
    x, labels = features(24, 16, dtype=torch.float32)
    f, _ = features(24, 16, dtype=torch.float32, seed=9)
    labels = labels.to(backend.device)
    mined = batch_hard(x.to(backend.device), labels)
    a = leaf(f, backend.device)
    loss = triplet_loss(a, labels, indices=mined.indices, margin=None)
    loss.backward()
    b = leaf(f, dtype=torch.float64)
    positive, negative = (b - b[index.cpu()] for index in mined.indices)
    terms = F.softplus(positive.norm(dim=1) - negative.norm(dim=1))
    expected = terms[mined.valid.cpu()].mean()
    expected.backward()
    assert_close(loss, expected, 1e-6)
    assert_close(a.grad, b.grad, 1e-5)


def test_triplet_index_beyond_the_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error, or it shows; it never reads other memory."""
    x, labels = features(8, 6, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    index = torch.arange(8, device=backend.device).roll(1)
    wrong = index.clone()
    wrong[3] = 10**6
    if backend.name == "torch":
        if backend.device == "cpu":
            with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
                triplet_loss(x, labels, indices=(wrong, index))
        return
    a = leaf(x, backend.device)
    loss = triplet_loss(a, labels, indices=(wrong, index))
    loss.backward()
    assert loss.isnan()
    assert a.grad[3].isnan().all()
    # Many anchors, all of them: whole slabs of sorted winners that are no rows.
    monkeypatch.setattr("apd_kernels.kernels.mining.SCANNED_ANCHORS", 2)
    monkeypatch.setattr("apd_kernels.kernels.mining.SLAB", 8)
    a = leaf(x, backend.device)
    triplet_loss(a, labels, indices=(index * 0 + 10**6, index * 0 + 10**6)).backward()
    assert a.grad.isnan().all()


def test_triplet_sets(backend: Backend) -> None:
    """(S, N, D) gives one loss a set, with gradients of their own."""
    x, labels = features(3, 20, 12, dtype=torch.float32)
    labels = labels.to(backend.device)
    a = leaf(x, backend.device)
    losses = triplet_loss(a, labels, margin=None)
    assert losses.shape == (3,)
    (losses * torch.tensor([1.0, 2.0, 3.0], device=backend.device)).sum().backward()
    for s in range(3):
        b = leaf(x[s], backend.device)
        alone = triplet_loss(b, labels, margin=None)
        ((s + 1) * alone).backward()
        assert_close(losses[s], alone, 1e-6)
        assert_close(a.grad[s], b.grad, 1e-6)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_triplet_without_valid_anchors(backend: Backend, count: int) -> None:
    """No positives, no negatives, nobody: loss 0 and gradient 0, never NaN."""
    for labels in (torch.arange(count), torch.zeros(count, dtype=torch.int64)):
        a = torch.randn(count, 6, device=backend.device, requires_grad=True)
        loss = triplet_loss(a, labels.to(backend.device))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(a.grad, torch.zeros_like(a))


def test_triplet_of_duplicates(backend: Backend) -> None:
    """All rows equal: distance 0 everywhere, loss = margin, gradient 0."""
    a = torch.ones(8, 5, device=backend.device, requires_grad=True)
    loss = triplet_loss(a, torch.arange(8, device=backend.device) // 2, margin=0.25)
    loss.backward()
    assert loss.item() == 0.25
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_hinge_has_slope_zero_at_its_corner(backend: Backend) -> None:
    a = leaf(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), backend.device)
    labels = torch.tensor([0, 0, 1, 1], device=backend.device)
    b = leaf(torch.tensor([[0.0], [1.0], [2.0]]), backend.device)
    for x, y in ((a, labels), (b, torch.tensor([0, 0, 1], device=backend.device))):
        triplet_loss(x, y, margin=0.0).backward()
    # Anchors 1 and 2 have d_p = d_n = 1, the others d_p < d_n.
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert torch.equal(b.grad, torch.zeros_like(b))


def test_triplet_shows_nan(backend: Backend) -> None:
    """A NaN feature gives a NaN loss with a hinge as with a soft margin: it is never clamped away."""
    x, _ = features(8, 5, dtype=torch.float32)
    labels = torch.arange(8, device=backend.device) // 2
    x[3, 2] = float("nan")
    for margin in (0.3, None):
        assert triplet_loss(x.to(backend.device), labels, margin=margin).isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_triplet_gradcheck(metric: str) -> None:
    x, labels = features(9, 5)
    y, y_labels = features(8, 5, seed=1, identities=3)
    x.requires_grad_()
    y.requires_grad_()
    for margin, reverse in ((0.3, False), (None, True)):
        assert torch.autograd.gradcheck(
            lambda a, m=margin, r=reverse: triplet_loss(a, labels, margin=m, reverse=r, metric=metric), (x,)
        )
        assert torch.autograd.gradcheck(
            lambda a, b, m=margin, r=reverse: triplet_loss(a, labels, b, y_labels, margin=m, reverse=r, metric=metric),
            (x, y),
        )


def test_triplet_compiles_in_one_graph(backend: Backend) -> None:
    x, labels = features(24, 12, dtype=torch.float32)
    labels = labels.to(backend.device)

    def function(a: Tensor) -> Tensor:
        loss, indices = triplet_loss(a, labels, return_indices=True)
        return loss + 0.5 * triplet_loss(a.flip(-1), labels, indices=indices, reverse=True, margin=None)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    a, b = leaf(x, backend.device), leaf(x, backend.device)
    compiled(a).backward()
    function(b).backward()
    assert torch.equal(a.grad, b.grad)


def test_triplet_under_autocast(backend: Backend) -> None:
    """Autocast changes nothing: inputs are taken as they come and computed in float32."""
    x, labels = features(24, 12, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert torch.equal(triplet_loss(x, labels), triplet_loss(x, labels).float())
        inside = triplet_loss(x, labels)
    assert torch.equal(inside, triplet_loss(x, labels))


def _golden(folder: Path, name: str) -> list[tuple[str, dict[str, np.ndarray]]]:
    with np.load(folder / "golden" / f"{name}.npz", allow_pickle=False) as file:
        return [
            (str(case), {key.partition("__")[2]: file[key] for key in file if key.startswith(f"{case}__")})
            for case in file["cases"]
        ]


@pytest.mark.parametrize("peer", ["transreid", "torchreid", "bau", "strongbaseline"])
def test_triplet_equals_other_projects(real_data: Path, peer: str) -> None:
    """The batch-hard losses of other code bases, from their own float64 outputs: value and gradient.

    They count an anchor as its own positive, which matters only where an identity is alone in the batch; those cases
    are left to their drop-ins.
    """
    compared = 0
    for case, arrays in _golden(real_data, f"{peer}_TripletLoss"):
        labels = torch.from_numpy(arrays["labels"])
        if torch.bincount(labels).eq(1).any():
            continue
        for tag, margin in (("_m0.3", 0.3), ("_mNone", None)):
            if f"loss{tag}_f64" not in arrays:
                continue
            x = torch.from_numpy(arrays["embeddings"]).double().requires_grad_()
            loss = triplet_loss(x, labels, margin=margin)
            loss.backward()
            assert loss.item() == pytest.approx(float(arrays[f"loss{tag}_f64"]), rel=1e-8), case
            if f"grad{tag}_f64" in arrays:  # not saved where exact ties leave the gradient open
                assert_close(x.grad, torch.from_numpy(arrays[f"grad{tag}_f64"]), 1e-8, case)
            compared += 1
    assert compared > 0


def test_seeded_cases(backend: Backend) -> None:
    """200 random cases on the PyTorch path: sizes, sets, all options, who may be paired with whom."""
    for seed in range(8 if backend.interpreted else 200):
        choose = random.Random(seed)
        dtype = torch.float32 if backend.name == "triton" else choose.choice((torch.float32, torch.float64))
        sets = choose.choice(((), (choose.randint(1, 3),)))
        n, m, d = choose.randint(0, 40), choose.choice((None, choose.randint(0, 90))), choose.randint(2, 40)
        margin, reverse = choose.choice((None, 0.0, 0.3)), choose.random() < 0.5
        metric, identities = choose.choice(METRICS), choose.randint(1, 12)
        x, labels = features(*sets, n, d, dtype=dtype, seed=seed, identities=identities)
        y = y_labels = None
        if m is not None:
            y, y_labels = features(*sets, m, d, dtype=dtype, seed=seed + 1, identities=identities)
        options = pairing_options(choose, n, m)
        a, b = leaf(x, backend.device), None if y is None else leaf(y, backend.device)
        here = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        here |= {"margin": margin, "reverse": reverse, "metric": metric}
        moved = [None if t is None else t.to(backend.device) for t in (labels, y_labels)]
        loss, indices = triplet_loss(a, moved[0], b, moved[1], return_indices=True, **here)
        loss.sum().backward()

        p, q = leaf(x, dtype=torch.float64), None if y is None else leaf(y, dtype=torch.float64)
        d_all = distances(p, p if q is None else q, metric)
        positive, negative = masks(labels, y_labels, **options)
        valid = positive.any(1) & negative.any(1)
        at = [index.cpu().clamp(min=0) for index in indices]
        if d_all.shape[-1] == 0:
            assert torch.equal(loss.cpu(), torch.zeros_like(loss.cpu()))
            continue
        far, near = (d_all.gather(-1, index[..., None])[..., 0] for index in at)
        assert_close(far[..., valid], d_all.masked_fill(~positive, -torch.inf).amax(-1)[..., valid], 1e-5)
        assert_close(near[..., valid], d_all.masked_fill(~negative, torch.inf).amin(-1)[..., valid], 1e-5)
        gap = near - far if reverse else far - near
        terms = (F.softplus(gap, threshold=40) if margin is None else (gap + margin).clamp(min=0)) * valid
        expected = terms.sum(-1) / max(1, int(valid.sum()))
        expected.sum().backward()
        relative = 5 * tolerance(dtype)
        assert_close(loss, expected, relative, f"loss of case {seed}", scale=1e-2)
        assert_close(a.grad, p.grad, 2 * relative, f"gradient of x of case {seed}", scale=1e-2)
        if b is not None:
            assert_close(b.grad, q.grad, 2 * relative, f"gradient of y of case {seed}", scale=1e-2)


@pytest.mark.parametrize("margin", [0.3, None])
def test_weighted_mining(backend: Backend, margin: float | None) -> None:
    """Means over softmax-weighted pairs instead of the hardest ones, anchors without a pair left out."""
    x, labels = features(30, 12, dtype=torch.float32, identities=9)
    labels[0] = 99
    a = leaf(x, backend.device)
    loss = triplet_loss(a, labels.to(backend.device), margin=margin, mining="weighted")
    loss.backward()
    p = leaf(x, dtype=torch.float64)
    d = distances(p, p, "euclidean")
    positive, negative = masks(labels)
    valid = positive.any(1) & negative.any(1)
    far = (d.masked_fill(~positive, -torch.inf)[valid].softmax(1) * d[valid]).sum(1)
    near = ((-d).masked_fill(~negative, -torch.inf)[valid].softmax(1) * d[valid]).sum(1)
    expected = (F.softplus(far - near) if margin is None else (far - near + margin).clamp(min=0)).mean()
    expected.backward()
    assert_close(loss, expected, 5e-6)
    assert_close(a.grad, p.grad, 5e-6)
    alone = triplet_loss(x.to(backend.device), labels.to(backend.device) * 0, margin=margin, mining="weighted")
    assert alone.item() == 0


def test_two_launches_forward_and_one_backward() -> None:
    """Small batches are bound by launches: 2 and 1 of our kernels up to N = 256 at D = 2048, and no other work."""
    pytest.importorskip("triton")
    from apd_kernels._core.operands import Operands
    from apd_kernels._core.pairing import Pairing
    from apd_kernels.kernels import losses, mining
    from apd_kernels.kernels._launch import recording

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for n in (1, 64, 256):
        x, labels = torch.empty(n, 2048, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
        calls = Calls()
        calls.names = set()
        with recording(90) as forward, calls:
            saved = losses.triplet_loss(x, None, Operands(), Pairing(labels), 0.3, False, "euclidean", "fp32")
        loss, *weights_and_winners = saved
        with recording(90) as backward, calls:
            mining.pair_gradient(x, None, *weights_and_winners, loss, "euclidean", True, False)
        assert (len(forward), len(backward)) == (2, 1)
        assert calls.names <= {"empty", "empty_strided", "unsqueeze", "slice", "view"}, calls.names


INDEX = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"margin": -0.1}, ValueError, r"margin: expected a finite number of at least 0, got -0.1"),
        ({"margin": "0.3"}, TypeError, r"margin: expected a number, got str"),
        ({"margin": float("nan")}, ValueError, r"margin: expected a finite number"),
        ({"indices": 3}, TypeError, r"indices: expected a pair of tensors"),
        (
            {"indices": (torch.zeros(4), INDEX)},
            TypeError,
            r"indices.positive: expected an int64 tensor, got torch.float",
        ),
        (
            {"indices": Pair(INDEX, INDEX[:3])},
            ValueError,
            r"indices.negative: expected shape \(4,\) on cpu, got \(3,\)",
        ),
        ({"y_labels": torch.zeros(4).long()}, ValueError, r"y: expected with y_labels, got None"),
        ({"mining": "semihard"}, ValueError, r"mining: expected 'hard' or 'weighted', got 'semihard'"),
        ({"mining": "weighted", "return_indices": True}, ValueError, r"return_indices: expected mining='hard'"),
        ({"mining": "weighted", "indices": (INDEX, INDEX)}, ValueError, r"indices: expected mining='hard'"),
    ],
)
def test_triplet_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        triplet_loss(torch.zeros(4, 2), torch.arange(4), **change)
