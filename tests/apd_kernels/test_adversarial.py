from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import assert_close, features, leaf, masks
from torch import Tensor

from apd_kernels import metric_perturb, use_backend


def ascent(
    x: Tensor, labels: Tensor, epsilon: float, steps: int, step_size: float, norm: str = "l2", relative: bool = False
) -> Tensor:
    """Projected gradient ascent of the soft-margin batch-hard loss by autograd in float64."""
    start = x.double()
    order = 2 if norm == "l2" else torch.inf
    scale = start.norm(p=order, dim=1, keepdim=True) if relative else torch.ones(len(x), 1, dtype=torch.float64)
    positive, negative = masks(labels, None)
    valid = positive.any(1) & negative.any(1)
    z = start.clone()
    for _ in range(steps):
        z = z.detach().requires_grad_()
        d = torch.cdist(z.detach(), z.detach(), compute_mode="donot_use_mm_for_euclid_dist")
        p = d.masked_fill(~positive, -1).argmax(1)
        n = d.masked_fill(~negative, torch.inf).argmin(1)
        loss = F.softplus((z - z[p]).norm(dim=1) - (z - z[n]).norm(dim=1))[valid].sum()
        (gradient,) = torch.autograd.grad(loss, z)
        if norm == "l2":
            offset = z.detach() + step_size * scale * F.normalize(gradient, eps=1e-300) - start
            offset = offset * (epsilon * scale / offset.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
        else:
            offset = z.detach() + step_size * scale * gradient.sign() - start
            offset = torch.maximum(torch.minimum(offset, epsilon * scale), -epsilon * scale)
        z = start + offset
    return z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("norm", "mode", "epsilon", "steps", "step_size"),
    [
        ("l2", "absolute", 0.5, 1, None),
        ("l2", "relative", 0.1, 4, None),
        ("l2", "absolute", 3.0, 3, 0.4),
        ("linf", "absolute", 0.1, 3, None),
        ("linf", "relative", 0.05, 1, 0.01),
    ],
)
def test_matches_autograd_ascent(
    backend: Backend, dtype: torch.dtype, norm: str, mode: str, epsilon: float, steps: int, step_size: float | None
) -> None:
    """Relative to the displacement; unequal identities and lone rows included."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    x, labels = features(19, 24, dtype=dtype)
    ours = metric_perturb(
        x.to(backend.device),
        labels.to(backend.device),
        epsilon=epsilon,
        epsilon_mode=mode,
        steps=steps,
        step_size=step_size,
        norm=norm,
    )
    expected = ascent(x, labels, epsilon, steps, step_size or 2.5 * epsilon / steps, norm, mode == "relative")
    moved = (expected - x.double()).abs().max().item()
    assert moved > 0.01
    assert ours.dtype == dtype
    bound = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype)
    if bound is None:  # rounded once, on output
        bound = x.abs().max().item() * 2**-11 / moved
    assert_close(ours.cpu().double() - x.double(), expected - x.double(), bound, "displacement")


def test_stays_in_the_ball_and_raises_the_loss(backend: Backend) -> None:
    x, labels = features(24, 32, dtype=torch.float32)
    positive, negative = masks(labels, None)
    valid = positive.any(1) & negative.any(1)

    def loss(z: Tensor) -> float:
        d = torch.cdist(z.double(), z.double())
        gap = d.masked_fill(~positive, -1).amax(1) - d.masked_fill(~negative, torch.inf).amin(1)
        return F.softplus(gap)[valid].mean().item()

    for norm, order in (("l2", 2), ("linf", torch.inf)):
        ours = metric_perturb(x.to(backend.device), labels.to(backend.device), epsilon=0.4, steps=5, norm=norm).cpu()
        size = (ours.double() - x.double()).norm(p=order, dim=1)
        assert size.max() <= 0.4 + 4 * x.abs().max().item() * 2**-24  # the last addition rounds
        assert loss(ours) > 1.5 * loss(x)


def test_zero_is_the_identity(backend: Backend) -> None:
    x, labels = features(8, 4, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    assert metric_perturb(x, labels, epsilon=0.5, steps=0) is x
    assert metric_perturb(x, labels, epsilon=0.0, steps=3) is x


def test_rows_without_gradient_stay(backend: Backend) -> None:
    """A batch of one identity, duplicates only, a lone row, an empty batch: nothing to ascend, nothing moves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator).to(backend.device)
    one = torch.zeros(6, dtype=torch.int64, device=backend.device)
    assert torch.equal(metric_perturb(x, one, epsilon=0.5, steps=2), x)
    same = torch.ones(6, 5, device=backend.device)
    assert torch.equal(metric_perturb(same, torch.arange(6, device=backend.device) // 2, epsilon=0.5, steps=2), same)
    assert torch.equal(metric_perturb(x[:1], one[:1], epsilon=0.5), x[:1])
    assert metric_perturb(x[:0], one[:0], epsilon=0.5).shape == (0, 5)


def test_saturated_loss_still_moves(backend: Backend) -> None:
    """Identities so far apart that the slope of the loss is 1e-35: its direction is as good as any other."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(8, 5, generator=generator)
    x[4:, 0] += 80
    labels = torch.arange(8) // 4
    ours = metric_perturb(x.to(backend.device), labels.to(backend.device), epsilon=0.05, steps=2).cpu()
    assert_close((ours - x).norm(dim=1), torch.full((8,), 0.05), 1e-3)


def test_zero_row_in_a_relative_ball(backend: Backend) -> None:
    """Its ball has radius 0: it stays, and is no NaN."""
    x, _ = features(8, 5, dtype=torch.float32)
    x[2] = 0
    labels = torch.arange(8) // 2
    ours = metric_perturb(
        x.to(backend.device), labels.to(backend.device), epsilon=0.2, epsilon_mode="relative", steps=3
    )
    assert torch.equal(ours[2].cpu(), x[2])
    assert ours.isfinite().all()


def test_sets_and_strides(backend: Backend) -> None:
    x, labels = features(3, 12, 10, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    sets = metric_perturb(x, labels, epsilon=0.3, steps=2)
    for s in range(3):
        assert_close(sets[s], metric_perturb(x[s], labels, epsilon=0.3, steps=2), 1e-6)
    transposed = x[0].t().contiguous().t()
    assert_close(metric_perturb(transposed, labels, epsilon=0.3, steps=2), sets[0], 1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_large_batches(backend: Backend, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many anchors for a row to look through: the gradient in the steps of batch_hard, sorted winners included."""
    if backend.name == "torch":
        pytest.skip("the PyTorch path makes no difference")
    from apd_kernels.kernels import adversarial, mining

    for module in (mining, adversarial):
        monkeypatch.setattr(module, "SCANNED_ANCHORS", 8)
    x, labels = features(2, 19, 24, dtype=torch.float32)
    for epsilon, relative in ((0.5, False), (0.1, True)):
        ours = metric_perturb(
            x.to(backend.device),
            labels.to(backend.device),
            epsilon=epsilon,
            epsilon_mode="relative" if relative else "absolute",
            steps=3,
            norm=norm,
        ).cpu()
        for s in range(2):
            expected = ascent(x[s], labels, epsilon, 3, 2.5 * epsilon / 3, norm, relative)
            assert_close(ours[s].double() - x[s].double(), expected - x[s].double(), 1e-5, "displacement")


def test_gradient_is_passed_straight_through(backend: Backend) -> None:
    x, labels = features(8, 4, dtype=torch.float32)
    a = leaf(x, backend.device)
    weights = torch.arange(32.0, device=backend.device).view(8, 4)
    (metric_perturb(a, labels.to(backend.device), epsilon=0.5, steps=2) * weights).sum().backward()
    assert torch.equal(a.grad, weights)


def test_compiles_in_one_graph(backend: Backend) -> None:
    x, labels = features(12, 6, dtype=torch.float32)
    a, labels = leaf(x, backend.device), labels.to(backend.device)
    compiled = torch.compile(
        lambda z: metric_perturb(z, labels, epsilon=0.2, steps=2), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(a), metric_perturb(a, labels, epsilon=0.2, steps=2))
    compiled(a).sum().backward()
    assert torch.equal(a.grad, torch.ones_like(a))


def test_memory(backend: Backend) -> None:
    """Partners come from the memory, which does not move: each row ascends its own term."""
    x, labels = features(9, 12, dtype=torch.float32)
    memory, memory_labels = features(30, 12, dtype=torch.float32, seed=1, identities=4)
    for norm in ("l2", "linf"):
        ours = metric_perturb(
            x.to(backend.device),
            labels.to(backend.device),
            epsilon=0.3,
            steps=3,
            norm=norm,
            memory=memory.to(backend.device),
            memory_labels=memory_labels.to(backend.device),
        )
        z, rows = x.double(), memory.double()
        positive, negative = masks(labels, memory_labels)
        valid = positive.any(1) & negative.any(1)
        for _ in range(3):
            z = z.detach().requires_grad_()
            d = torch.cdist(z.detach(), rows)
            p, n = d.masked_fill(~positive, -1).argmax(1), d.masked_fill(~negative, torch.inf).argmin(1)
            gap = (z - rows[p]).norm(dim=1) - (z - rows[n]).norm(dim=1)
            (gradient,) = torch.autograd.grad(F.softplus(gap)[valid].sum(), z)
            offset = z.detach() + 0.25 * (F.normalize(gradient) if norm == "l2" else gradient.sign()) - x.double()
            if norm == "l2":
                offset = offset * (0.3 / offset.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
            z = x.double() + offset.clamp(-0.3, 0.3)
        assert_close(ours.cpu().double() - x.double(), z - x.double(), 1e-5, "displacement")
    # A half-precision memory is read as it is, while the points between the steps are float32.
    x, memory = x.half(), memory.half()
    half, full = (
        metric_perturb(
            x.to(backend.device, dtype),
            labels.to(backend.device),
            epsilon=0.3,
            steps=3,
            memory=memory.to(backend.device, dtype),
            memory_labels=memory_labels.to(backend.device),
        )
        for dtype in (torch.float16, torch.float32)
    )
    assert_close(half, full, 2**-11)
    nothing = metric_perturb(
        x.to(backend.device),
        labels.to(backend.device),
        epsilon=0.3,
        memory=memory[:0].to(backend.device),
        memory_labels=memory_labels[:0].to(backend.device),
    )
    assert torch.equal(nothing.cpu(), x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("count", [1, 3])
def test_negative_objective(backend: Backend, norm: str, count: int) -> None:
    """Descends eq. 3 against given negatives, from a noisy start, as autograd does."""
    x, labels = features(7, 12, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    negatives = torch.randn(7, count, 12, generator=generator)
    noise = 0.05 * torch.randn(7, 12, generator=generator)
    epsilon, steps, step = 0.4, 3, 0.2
    ours = metric_perturb(
        x.to(backend.device),
        labels.to(backend.device),
        epsilon=epsilon,
        steps=steps,
        step_size=step,
        norm=norm,
        objective="negative",
        negatives=(negatives[:, 0] if count == 1 else negatives).to(backend.device),
        noise=noise.to(backend.device),
    )
    start = x.double()
    z = start + noise.double()
    for _ in range(steps):
        z = z.detach().requires_grad_()
        gap = (z[:, None] - negatives.double()).norm(dim=2) - (z - start).norm(dim=1)[:, None]
        (gradient,) = torch.autograd.grad(F.softplus(gap).mean(), z)
        offset = z.detach() - step * (F.normalize(gradient) if norm == "l2" else gradient.sign()) - start
        if norm == "l2":
            offset = offset * (epsilon / offset.norm(dim=1, keepdim=True)).clamp(max=1)
        z = start + offset.clamp(-epsilon, epsilon)
    assert_close(ours.cpu().double() - start, z - start, 1e-5, "displacement")


def test_negative_objective_mines_its_own(backend: Backend) -> None:
    """Without negatives a row moves straight to the nearest row of another identity, in the batch or the memory."""
    x, labels = features(9, 12, dtype=torch.float32)
    _, negative = masks(labels, None)
    nearest = x[torch.cdist(x, x).masked_fill(~negative, torch.inf).argmin(1)]
    ours = metric_perturb(
        x.to(backend.device), labels.to(backend.device), epsilon=0.2, steps=3, objective="negative"
    ).cpu()
    assert_close(ours - x, 0.2 * F.normalize(nearest - x), 1e-5)
    one = torch.zeros(9, dtype=torch.int64, device=backend.device)
    assert torch.equal(metric_perturb(x.to(backend.device), one, epsilon=0.2, objective="negative").cpu(), x)


def test_random_start(backend: Backend) -> None:
    """The same generator state gives the same bits; the start lies in the ball and is no fixed point."""
    x, labels = features(12, 10, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    for norm, order in (("l2", 2), ("linf", torch.inf)):
        runs = [
            metric_perturb(
                x,
                labels,
                epsilon=0.3,
                step_size=0.0,
                norm=norm,
                random_start=True,
                generator=torch.Generator(backend.device).manual_seed(seed),
            )
            for seed in (1, 1, 2)
        ]
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])
        size = (runs[0] - x).norm(p=order, dim=1)
        assert (size <= 0.3 * (1 + 1e-5)).all()
        assert size.mean() > 0.2  # uniform in the ball, not in the radius
    outside = metric_perturb(x, labels, epsilon=0.3, step_size=0.0, noise=torch.ones_like(x))
    assert_close((outside - x).norm(dim=1), torch.full((12,), 0.3), 1e-5)


def test_wide_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """More dimensions than a program holds: the automatic choice is PyTorch, a named backend says so."""
    x, labels = torch.zeros(2, 5000), torch.tensor([0, 1])
    with use_backend("triton"), pytest.raises(ValueError, match="at most 4096 dimensions, got 5000"):
        metric_perturb(x, labels, epsilon=0.1)
    monkeypatch.setattr("apd_kernels.adversarial.resolve_backend", lambda _: "triton")
    assert metric_perturb(x, labels, epsilon=0.1).shape == (2, 5000)


def test_info(backend: Backend) -> None:
    """Losses at every point and the share of flipped anchors; taking the steps one by one changes no bit of meaning."""
    x, labels = features(16, 12, dtype=torch.float32, identities=4)
    x, labels = x.to(backend.device), labels.to(backend.device)
    moved, info = metric_perturb(x, labels, epsilon=3.0, steps=3, return_info=True)
    assert_close(moved, metric_perturb(x, labels, epsilon=3.0, steps=3), 1e-5)
    assert info.losses.shape == (4,)
    assert info.losses[-1] > info.losses[0]

    def own_first(z: Tensor) -> Tensor:
        d = torch.cdist(z, z).fill_diagonal_(torch.inf)
        return labels[d.argmin(1)] == labels

    before = own_first(x)
    expected = (before & ~own_first(moved)).sum() / before.sum()
    assert_close(info.flipped, expected, 1e-6)
    assert 0 < info.flipped <= 1
    same, nothing = metric_perturb(x, labels, epsilon=1.0, steps=0, return_info=True)
    assert torch.equal(same, x)
    assert nothing.losses.shape == (1,)
    assert nothing.flipped == 0


def test_info_in_half_precision() -> None:
    """Points between the steps are not rounded: many small steps end where they do without info."""
    x, labels = features(16, 12, dtype=torch.bfloat16, identities=4)
    options = {"epsilon": 0.05, "epsilon_mode": "relative", "steps": 40}
    moved, info = metric_perturb(x, labels, **options, return_info=True)
    assert moved.dtype == torch.bfloat16
    assert_close(moved, metric_perturb(x, labels, **options), 2**-8)
    assert info.losses[-1] > info.losses[10] > info.losses[0]


def test_negatives_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank that is expanded over the rows is not copied whole."""
    x, _ = features(20, 12, dtype=torch.float32)
    bank = torch.randn(30, 12, generator=torch.Generator().manual_seed(1)).expand(20, 30, 12)
    arguments = {"labels": torch.arange(20), "epsilon": 0.3, "steps": 2, "objective": "negative", "negatives": bank}
    whole = metric_perturb(x, **arguments)
    monkeypatch.setattr("apd_kernels._core.rows.BLOCK_ELEMENTS", 3 * 30 * 12)
    assert_close(metric_perturb(x, **arguments), whole, 1e-6)


def test_info_of_negatives(backend: Backend) -> None:
    """Eq. 3 falls, and rows without a negative do not count."""
    x, labels = features(9, 12, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    for rows in (x, torch.stack([x, x.flip(-1)])):
        _, info = metric_perturb(rows, labels, epsilon=0.5, steps=2, objective="negative", return_info=True)
        assert info.losses.shape == (3, *rows.shape[:-2])
        assert (info.losses[1:] < info.losses[0]).all()
    one = torch.zeros_like(labels)
    _, info = metric_perturb(x, one, epsilon=0.5, objective="negative", return_info=True)
    assert torch.equal(info.losses, torch.zeros(2, device=info.losses.device))


def test_real_features_flip(real_data, backend: Backend) -> None:  # type: ignore[no-untyped-def]
    """On real query features a larger ball changes more anchors' nearest neighbours to another identity."""
    import numpy as np

    if backend.interpreted:
        pytest.skip("200 x 512 rows take the interpreter minutes")
    with np.load(real_data / "data" / "features" / "osnet_cuhk03.npz", allow_pickle=False) as file:
        query = file["split"] == 1
        x = torch.from_numpy(file["features"][query].astype("float32")).to(backend.device)
        labels = torch.from_numpy(file["pids"][query]).to(backend.device)

    def nearest(z: Tensor) -> Tensor:
        return labels[torch.cdist(z, z).fill_diagonal_(torch.inf).argmin(1)] == labels

    before, shares = nearest(x), []
    for epsilon in (0.05, 0.1, 0.2):
        moved = metric_perturb(x, labels, epsilon=epsilon, epsilon_mode="relative", steps=10)
        shares.append((before & ~nearest(moved)).sum().item() / before.sum().item())
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epsilon": -1.0}, ValueError, r"epsilon: expected a finite number of at least 0, got -1.0"),
        ({"epsilon": "1"}, TypeError, r"epsilon: expected a number, got str"),
        ({"steps": -1}, ValueError, r"steps: expected at least 0, got -1"),
        ({"steps": 1.5}, TypeError, r"steps: expected an int, got float"),
        ({"step_size": float("inf")}, ValueError, r"step_size: expected a finite number of at least 0, got inf"),
        ({"norm": "l1"}, ValueError, r"norm: expected 'l2' or 'linf', got 'l1'"),
        ({"epsilon_mode": "share"}, ValueError, r"epsilon_mode: expected 'absolute' or 'relative', got 'share'"),
        ({"objective": "circle"}, ValueError, r"objective: expected 'triplet' or 'negative', got 'circle'"),
        ({"negatives": torch.zeros(4, 2)}, ValueError, r"negatives: expected None for objective='triplet'"),
        (
            {"objective": "negative", "negatives": torch.zeros(3, 2)},
            ValueError,
            r"negatives: expected shape \(4, 2\) or \(4, M, 2\) for x \(N, D\), got \(3, 2\)",
        ),
        (
            {"objective": "negative", "negatives": torch.tensor(1.0)},
            ValueError,
            r"negatives: expected shape \(4, 2\) or \(4, M, 2\) for x \(N, D\), got \(\)",
        ),
        ({"memory": torch.zeros(4, 2)}, ValueError, r"memory_labels: expected with memory, got None"),
        ({"noise": torch.zeros(3, 2)}, ValueError, r"noise: expected shape \(4, 2\), got \(3, 2\)"),
        (
            {"noise": torch.zeros(4, 2), "random_start": True},
            ValueError,
            r"noise: expected None with random_start=True",
        ),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"labels": torch.arange(4), "epsilon": 0.1, **change}
    with pytest.raises(error, match=message):
        metric_perturb(torch.zeros(4, 2), **arguments)
