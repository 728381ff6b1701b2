from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import assert_close, features, leaf, masks
from torch import Tensor

from apd_kernels import metric_perturb


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
        ({"objective": "circle"}, ValueError, r"objective: expected 'triplet', got 'circle'"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"labels": torch.arange(4), "epsilon": 0.1, **change}
    with pytest.raises(error, match=message):
        metric_perturb(torch.zeros(4, 2), **arguments)
