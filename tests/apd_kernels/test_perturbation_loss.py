from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import Backend
from oracle import assert_close, features, leaf, tolerance
from torch import Tensor
from traffic import counted

from apd_kernels import batch_hard, metric_perturbation_loss
from apd_kernels.kernels import perturbation_loss as kernels
from apd_kernels.perturbation_loss import _metric_perturbation_loss


def oracle(perturbed: Tensor, negatives: Tensor, original: Tensor, indices: Tensor | None = None) -> Tensor:
    """APD, eq. 3, term by term."""

    def rows(i: int) -> Tensor:
        return negatives[i] if indices is None else negatives[[k for k in indices[i].tolist() if k != -1]]

    terms = [
        F.softplus((perturbed[i] - row).norm() - (perturbed[i] - original[i]).norm())
        for i in range(len(perturbed))
        for row in rows(i)
    ]
    return torch.stack(terms).mean() if terms else perturbed.sum() * 0


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def drawn_indices(n: int, m: int, bank: int, missing: bool = True) -> Tensor:
    return torch.randint(-1 if missing else 0, bank, (n, m), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows_of_any_length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as if they were too long for registers, without the size."""
    if request.param:
        monkeypatch.setattr(kernels, "WHOLE_ROW", 0)


@pytest.mark.parametrize("rows_of_any_length", [False, True], ids=["short", "long"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 3, 37), (5, 1, 260), (37, 2, 8)])
@pytest.mark.parametrize("with_bank", [False, True], ids=["rows", "bank"])
@pytest.mark.parametrize("wanted", [(0,), (0, 2), (0, 1, 2)], ids=str)
def test_matches_float64(
    backend: Backend,
    rows_of_any_length: None,
    dtype: torch.dtype,
    n: int,
    m: int,
    d: int,
    with_bank: bool,
    wanted: tuple[int, ...],
) -> None:
    """Loss and gradients, of `perturbed` alone (from the forward pass) as of all."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    if with_bank and 1 in wanted:
        pytest.skip("a bank has no gradient")
    indices = drawn_indices(n, m, 11) if with_bank else None
    inputs = drawn((n, d), (11, d) if with_bank else (n, m, d), (n, d), dtype=dtype)
    ours = [leaf(x, backend.device).requires_grad_(at in wanted) for at, x in enumerate(inputs)]
    exact = [leaf(x, dtype=torch.float64) for x in inputs]
    loss = metric_perturbation_loss(*ours, indices=None if indices is None else indices.to(backend.device))
    expected = oracle(*exact, indices)
    (2 * loss).backward()
    (2 * expected).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, expected, 5 * tolerance(dtype))
    rounding = 1e-3 if dtype == torch.float16 else 10 * tolerance(dtype)
    for at in wanted:
        assert ours[at].grad.dtype == dtype
        # The two pulls on a sample, each of 1 / (n m) or more, may cancel.
        assert_close(ours[at].grad, exact[at].grad, rounding, f"gradient {at}", scale=1 / (n * m))


@pytest.mark.parametrize("rows_of_any_length", [False, True], ids=["short", "long"], indirect=True)
def test_loss_is_the_same_with_and_without_gradient(backend: Backend, rows_of_any_length: None) -> None:
    inputs = [x.to(backend.device) for x in drawn((6, 40), (6, 3, 40), (6, 40))]
    loss = metric_perturbation_loss(*inputs)
    alone = [inputs[0].clone().requires_grad_(), *inputs[1:]]
    everything = [x.clone().requires_grad_() for x in inputs]
    assert torch.equal(metric_perturbation_loss(*alone), loss)
    assert torch.equal(metric_perturbation_loss(*everything), loss)
    metric_perturbation_loss(*alone).backward()
    metric_perturbation_loss(*everything).backward()
    assert_close(alone[0].grad, everything[0].grad, 2e-6)
    with torch.no_grad():
        assert not metric_perturbation_loss(*alone).requires_grad


def test_forms(backend: Backend) -> None:
    """(N, D) negatives are (N, 1, D); strided, transposed and expanded inputs; one input alone may want a gradient."""
    p, o, n = (x.to(backend.device) for x in drawn((6, 12), (6, 12), (6, 12)))
    loss = metric_perturbation_loss(p, n, o)
    assert torch.equal(loss, metric_perturbation_loss(p, n[:, None], o))
    wide = torch.zeros(6, 30, device=backend.device)
    wide[:, 3:15] = p
    assert torch.equal(metric_perturbation_loss(wide[:, 3:15], n.t().contiguous().t(), o), loss)
    for position in range(3):
        inputs = [p, n, o]
        inputs[position] = inputs[position].clone().requires_grad_()
        metric_perturbation_loss(*inputs).backward()
        assert inputs[position].grad.abs().sum() > 0


def test_strided_and_expanded_negatives(backend: Backend) -> None:
    """Read as they lie: loss and gradients of dense copies, bit for bit; nothing is copied for the kernels."""
    p, o, all_negatives = (x.to(backend.device) for x in drawn((6, 12), (6, 12), (4, 7, 24)))
    for negatives in (
        all_negatives[0, :6, None, :12].expand(6, 4, 12),
        all_negatives[:, 0, :12].expand(6, 4, 12),  # the same four for all
        all_negatives.transpose(0, 1)[1:, ::2, ::2],
        all_negatives[1, 1:, :12].t().contiguous().t()[:, None],
    ):
        for rest in (o, o[:1].expand(6, 12)):
            strided, dense = ([p.clone().requires_grad_(), n, rest] for n in (negatives, negatives.contiguous()))
            losses = [metric_perturbation_loss(*inputs) for inputs in (strided, dense)]
            assert torch.equal(*losses)
            torch.stack(losses).sum().backward()
            assert torch.equal(strided[0].grad, dense[0].grad)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "contiguous", lambda *_, **__: pytest.fail("copied"))
        metric_perturbation_loss(p, all_negatives.transpose(0, 1)[1:, ::2, ::2], o[:1].expand(6, 12))


def test_empty(backend: Backend) -> None:
    """No sample, no negative, none but missing ones, an empty bank: loss 0 and gradient 0, never NaN."""
    p, o = (x.to(backend.device) for x in drawn((6, 12), (6, 12)))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=backend.device)

    none = torch.full((6, 2), -1, device=backend.device)
    for inputs, indices in (
        ((p[:0], zeros(0, 4, 12), o[:0]), None),
        ((p, zeros(6, 0, 12), o), None),
        ((p, zeros(3, 12), o), none),
        ((p, zeros(0, 12), o), none),
        ((p, zeros(3, 12), o), none[:, :0]),
        ((p[:0], zeros(3, 12), o[:0]), none[:0, 0]),
    ):
        for both in (False, True):
            perturbed, negatives, original = inputs
            a, b = perturbed.clone().requires_grad_(), original.clone().requires_grad_(both)
            loss = metric_perturbation_loss(a, negatives, b, indices=indices)
            loss.backward()
            assert loss.item() == 0
            assert torch.equal(a.grad, torch.zeros_like(a))


def test_bank_is_not_gathered(backend: Backend) -> None:
    """Indices into a bank, in any layout: loss and gradient of the gathered rows."""
    p, o, bank = (x.to(backend.device) for x in drawn((6, 12), (6, 12), (9, 24)))
    indices = drawn_indices(6, 3, 9, missing=False).to(backend.device)
    for rows, at in (
        (bank[:, :12], indices),
        (bank[:, ::2], indices.t().contiguous().t()),
        (bank[:1, :12].expand(9, 12), indices[:, 0]),
        (bank[:, :12].t().contiguous().t(), indices[:, :1]),
    ):
        a, b = (p.clone().requires_grad_() for _ in range(2))
        loss, gathered = metric_perturbation_loss(a, rows, o, indices=at), metric_perturbation_loss(b, rows[at], o)
        assert_close(loss, gathered, 1e-6)
        (loss + gathered).backward()
        assert_close(a.grad, b.grad, 1e-6)


def test_indices_of_batch_hard(backend: Backend) -> None:
    """What mining in a memory returns is what the loss takes; anchors without a negative are left out."""
    x, labels = (t.to(backend.device) for t in features(8, 6, dtype=torch.float32))
    memory, memory_labels = (t.to(backend.device) for t in features(12, 6, dtype=torch.float32, seed=1, identities=2))
    for others in (memory_labels, torch.zeros_like(memory_labels)):
        mined = batch_hard(x, labels, memory, others).indices.negative
        loss = metric_perturbation_loss(x + 1, memory, x, indices=mined)
        some = mined >= 0
        expected = metric_perturbation_loss((x + 1)[some], memory[mined[some]], x[some])
        assert_close(loss, expected, 1e-6)


@pytest.mark.parametrize("rows_of_any_length", [False, True], ids=["short", "long"], indirect=True)
def test_index_outside_the_bank(backend: Backend, rows_of_any_length: None) -> None:
    """A ValueError on the CPU's PyTorch path; elsewhere NaN for that sample, and nothing is read outside the bank."""
    p, o, bank = (x.to(backend.device) for x in drawn((3, 4), (3, 4), (5, 4)))
    for wrong in (5, -2, 2**40, -(2**62)):
        indices = torch.tensor([[0, 1], [2, wrong], [-1, 4]], device=backend.device)
        for both in (False, True):
            a, b = p.clone().requires_grad_(), o.clone().requires_grad_(both)
            if backend.name == "torch" and backend.device == "cpu":
                with pytest.raises(ValueError, match=rf"indices: expected −1, or a row of 5 negatives, got {wrong}"):
                    metric_perturbation_loss(a, bank, b, indices=indices)
                continue
            loss = metric_perturbation_loss(a, bank, b, indices=indices)
            loss.backward()
            assert loss.isnan()
            assert a.grad.isnan().all(1).tolist() == [False, True, False]


def test_at_its_original(backend: Backend) -> None:
    """At the start p = o: the gradient of d(p, o) at 0 is 0, so only the pull of the negatives is left."""
    for both in (False, True):
        p, o = leaf(torch.ones(3, 4), backend.device), leaf(torch.ones(3, 4), backend.device).requires_grad_(both)
        loss = metric_perturbation_loss(p, torch.zeros(3, 4, device=backend.device), o)
        loss.backward()
        assert_close(loss, torch.tensor(np.log1p(np.exp(2.0))), 1e-6)
        assert_close(p.grad, torch.full((3, 4), float(1 / (1 + np.exp(-2.0)) * 0.5 / 3)), 1e-6)
        everywhere = leaf(torch.ones(3, 4), backend.device)
        metric_perturbation_loss(everywhere, torch.ones(3, 4, device=backend.device), o).backward()
        assert torch.equal(everywhere.grad, torch.zeros_like(p))


def test_nan_stays_in_its_sample(backend: Backend) -> None:
    p, n, o = (x.to(backend.device) for x in drawn((3, 4), (3, 2, 4), (3, 4)))
    for spoiled in range(3):
        inputs = [x.clone() for x in (p, n, o)]
        inputs[spoiled][(1, *(0,) * (inputs[spoiled].dim() - 1))] = float("nan")
        inputs[0].requires_grad_()
        loss = metric_perturbation_loss(*inputs)
        loss.backward()
        assert loss.isnan()
        assert inputs[0].grad.isnan().all(1).tolist() == [False, True, False]


def test_half_gradient_survives_a_scaled_loss(backend: Backend) -> None:
    """Far more pairs than float16 has digits for, and a loss scaled for it: the gradient is rounded, not lost."""
    inputs = drawn((256, 16), (16, 16), (256, 16), dtype=torch.float16)
    indices = drawn_indices(256, 4, 16, missing=False)
    scale = 2.0**14
    gradients = []
    for device, dtype in ((backend.device, torch.float16), ("cpu", torch.float64)):
        p, bank, o = leaf(inputs[0], device, dtype), *(x.to(device, dtype) for x in inputs[1:])
        at = indices.to(device)
        loss = metric_perturbation_loss(p, bank, o, indices=at) if dtype == torch.float16 else oracle(p, bank, o, at)
        (scale * loss).backward()
        gradients.append(p.grad)
    assert_close(gradients[0], gradients[1], 1e-3)
    rounded = gradients[1].half() == gradients[0].cpu()  # scales by a power of two: rounded once
    assert rounded.double().mean() > 0.99


def test_bits_repeat_and_autocast_is_ignored(backend: Backend) -> None:
    results = []
    inputs = [x.to(backend.device) for x in drawn((6, 40), (6, 3, 40), (6, 40))]
    for autocast in (False, False, True):
        p = inputs[0].clone().requires_grad_()
        with torch.autocast(backend.device, dtype=torch.bfloat16, enabled=autocast):
            loss = metric_perturbation_loss(p, *inputs[1:])
        loss.backward()
        results.append((loss, p.grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_second_derivatives_are_refused(backend: Backend) -> None:
    """An error instead of a gradient penalty that is silently zero, also where the forward pass made the gradient."""
    x, _ = features(6, 4, dtype=torch.float32)
    for others in (x + 1, leaf(x + 1, backend.device)):
        a = leaf(x, backend.device)
        loss = metric_perturbation_loss(a, others.to(backend.device)[:, None], x.to(backend.device))
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            gradient.square().sum().backward()


def test_gradcheck() -> None:
    p, n, o, bank = (x.requires_grad_() for x in drawn((3, 5), (3, 2, 5), (3, 5), (4, 5), dtype=torch.float64))
    indices = torch.tensor([[0, -1], [2, 3], [3, 3]])
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(metric_perturbation_loss, (p, n, o))
    assert gradcheck(lambda a: metric_perturbation_loss(a, n.detach(), o.detach()), (p,))
    assert gradcheck(lambda a: metric_perturbation_loss(a, bank.detach(), o.detach(), indices=indices), (p,))
    assert gradcheck(lambda a, b: metric_perturbation_loss(a, bank.detach(), b, indices=indices), (p, o))


@pytest.mark.parametrize("wanted", [(0,), (0, 2)], ids=str)
@pytest.mark.parametrize("with_bank", [False, True], ids=["rows", "bank"])
def test_compiles_in_one_graph(backend: Backend, with_bank: bool, wanted: tuple[int, ...]) -> None:
    """One graph, and at most one recompilation over batch sizes."""
    tensors = drawn((9, 5), (7, 5) if with_bank else (9, 2, 5), (9, 5))
    torch.compiler.reset()  # the graphs of the cases before this one count toward the limit
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(metric_perturbation_loss, fullgraph=True, backend=counter)
    for size in (9, 5, 3, 6):
        indices = drawn_indices(size, 2, 7).to(backend.device) if with_bank else None
        results = []
        for function in (compiled, metric_perturbation_loss):
            inputs = [
                x.to(backend.device)[: None if with_bank and at == 1 else size].clone().requires_grad_(at in wanted)
                for at, x in enumerate(tensors)
            ]
            loss = function(*inputs, indices=indices)
            loss.backward()
            results.append((loss, *(inputs[at].grad for at in wanted)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count <= 2


def test_operators(backend: Backend) -> None:
    p, n, o, bank = (x.to(backend.device) for x in drawn((3, 5), (3, 2, 5), (3, 5), (4, 5)))
    indices = torch.tensor([[0, -1], [2, 3], [3, 3]], device=backend.device)
    for negatives, at in ((n, None), (bank, indices)):
        for with_gradient in (True, False):
            inputs = (p.clone().requires_grad_(), negatives, o, at, with_gradient, backend.name)
            torch.library.opcheck(_metric_perturbation_loss, inputs)


@pytest.mark.parametrize("with_bank", [False, True], ids=["rows", "bank"])
def test_every_row_is_read_once(with_bank: bool) -> None:
    """Forward: each row once, the gradient written once. Backward: that gradient read once, and no row again."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("counted in the interpreter, which is used where there is no CUDA device")
    p, n, o = drawn((5, 40), (15, 40) if with_bank else (5, 3, 40), (5, 40))
    indices = torch.randperm(15).view(5, 3) if with_bank else None
    one, zero = torch.ones(()), {0}
    with counted() as forward:
        _, share, _, _, total = kernels.metric_perturbation_loss(p, n, o, indices, True)
    for rows in (p, n, o):
        assert forward.read(rows).times == {1}
    assert forward.written(total).times == {1}
    assert forward.read(total).times == zero
    with counted() as backward:
        result = kernels.metric_perturbation_loss_scaled(one, share, total)
    assert backward.read(total).times == {1}
    assert backward.written(result).times == {1}
    assert all(backward.read(rows).times == zero for rows in (p, n, o))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 2), (3, 2), (4, 2)), r"negatives: expected shape \(4, 2\) or \(4, M, 2\), got \(3, 2\)"),
        (((4, 2), (4, 3, 5), (4, 2)), r"negatives: expected shape \(4, 2\) or \(4, M, 2\), got \(4, 3, 5\)"),
        (((4, 2), (4, 2), (3, 2)), r"original: expected shape \(4, 2\), got \(3, 2\)"),
        (((1, 4, 2), (4, 2), (4, 2)), r"perturbed: expected shape \(N, D\), got \(1, 4, 2\)"),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric_perturbation_loss(*(torch.zeros(shape) for shape in shapes))


BANK, INDICES = torch.zeros(5, 2), torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("bank", "indices", "error", "message"),
    [
        (BANK, [0] * 4, TypeError, r"indices: expected a torch.Tensor, got list"),
        (BANK, INDICES.int(), TypeError, r"indices: expected torch.int64, got torch.int32"),
        (BANK, INDICES[:3], ValueError, r"indices: expected shape \(4,\) or \(4, M\), got \(3, 3\)"),
        (BANK, INDICES[..., None], ValueError, r"indices: expected shape \(4,\) or \(4, M\), got \(4, 3, 1\)"),
        (BANK, INDICES.to("meta"), ValueError, r"indices: expected device cpu as perturbed, got meta"),
        (BANK[:, :1], INDICES, ValueError, r"negatives: expected shape \(K, 2\) with indices, got \(5, 1\)"),
        (BANK[None], INDICES, ValueError, r"negatives: expected shape \(K, 2\) with indices, got \(1, 5, 2\)"),
        (BANK.half(), INDICES, TypeError, r"negatives: expected torch.float32 as perturbed, got torch.float16"),
        (BANK.clone().requires_grad_(), INDICES, ValueError, r"negatives: expected a bank without requires_grad"),
    ],
)
def test_bad_indices(bank: Tensor, indices: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metric_perturbation_loss(torch.zeros(4, 2), bank, torch.zeros(4, 2), indices=indices)
