"""The N×N form of the L2 ascent against autograd ascent in float64, beside the direct float32 form."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from oracle import assert_close
from test_adversarial import ascent
from torch import Tensor

from apd_kernels import metric_perturb
from apd_kernels._core.backend import implementation

KINDS = (
    "plain",
    "unequal",
    "lone rows",
    "same-identity duplicates",
    "other-identity duplicates",
    "near-duplicates",
    "tight",
    "far apart",
    "one far row",
)


def case(seed: int, n: int, d: int) -> tuple[Tensor, Tensor, str]:
    """Features and labels of one of the KINDS, exactly representable in float32."""
    generator = torch.Generator().manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    labels = torch.arange(n) // 4
    if kind == "unequal":
        labels = torch.randint(0, max(2, n // 5), (n,), generator=generator)
    if kind == "lone rows":
        labels[::5] = 100 + torch.arange(n)[::5]
    centres = torch.randn(int(labels.max()) + 1, d, generator=generator)
    x = centres[labels] + torch.randn(n, d, generator=generator)
    if kind == "same-identity duplicates":
        x[1] = x[0]
    if kind == "other-identity duplicates":
        x[0] = x[n // 2]
    if kind == "near-duplicates":
        x[1] = x[0] + 1e-5 * torch.randn(d, generator=generator)
    if kind == "one far row":
        labels[n - 1] = 1000
        x[n - 1] *= 1e5
    if kind == "tight":  # every cosine above 0.999
        x = 10 * torch.randn(1, d, generator=generator) + 0.1 * x
    if kind == "far apart":
        x = 30 * centres[labels] + x
    return x, labels, kind


def displacement_error(ours: Tensor, x: Tensor, expected: Tensor) -> float:
    moved = expected - x.double()
    return ((ours.double() - expected).norm() / moved.norm().clamp(min=1e-12)).item()


def test_reference_solver_in_200_cases() -> None:
    """Beyond the rounding of the output at most 1e-5 of the displacement; the direct float32 form is printed beside."""
    solve, direct = implementation("torch", "adversarial").solve, implementation("torch", "adversarial")
    worst: dict[str, list[float]] = {}
    for seed in range(225):
        n, d = (8, 12, 20, 33)[seed % 4], (64, 150)[seed % 2]
        x, labels, kind = case(seed, n, d)
        steps = (1, 2, 5, 10)[seed // 3 % 4]
        epsilon = (0.1, 1.0, 5.0)[seed // 2 % 3] * (0.1 if kind == "tight" else 1)
        relative = seed % 5 == 0
        if relative:
            epsilon = 0.05
        step = 2.5 * epsilon / steps
        # Mining may tie exactly between duplicates, and then the direct float64 form decides as the solver does.
        expected = direct.metric_perturb(
            x.double(), labels, None, None, None, epsilon, step, steps, relative, "l2", "fp32"
        )
        ours = solve(x, labels, epsilon, step, steps, relative)
        if ours is None:  # left to the direct form
            assert kind == "one far row", seed
            continue
        share, direct.SOLVER_SHARE = direct.SOLVER_SHARE, 0
        try:
            plain = direct.metric_perturb(x, labels, None, None, None, epsilon, step, steps, relative, "l2", "fp32")
        finally:
            direct.SOLVER_SHARE = share
        # No float32 result lies closer than the exact one rounded to float32: where a small step meets large features
        # that is more than 1e-5 of the displacement.
        rounding = displacement_error(expected.float(), x, expected)
        errors = worst.setdefault(kind, [0.0, 0.0, 0.0])
        errors[0] = max(errors[0], displacement_error(ours, x, expected) - rounding)
        errors[1] = max(errors[1], displacement_error(plain, x, expected) - rounding)
        errors[2] = max(errors[2], rounding)
        size = (ours.double() - x.double()).norm(dim=1)
        radius = epsilon * (x.double().norm(dim=1) if relative else torch.ones(n))
        assert (size <= radius * (1 + 1e-6) + x.abs().max() * 2**-22).all(), (seed, kind)
    for kind, (ours_error, plain_error, rounding) in worst.items():
        print(
            f"{kind}: solver {ours_error:.1e}, direct float32 {plain_error:.1e}; rounding of the output {rounding:.1e}"
        )
        assert ours_error <= 1e-5, kind


@pytest.mark.parametrize(
    ("seed", "n", "d", "steps", "relative"),
    [(0, 12, 64, 3, False), (1, 19, 100, 2, True), (2, 15, 64, 1, False), (3, 12, 64, 2, False), (5, 17, 70, 2, False)],
)
def test_every_backend_takes_the_solver(
    backend: Backend, seed: int, n: int, d: int, steps: int, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public function, on sizes that go to the N×N form, one set and several."""
    x, labels, _ = case(seed, n, d)
    taken: list[bool] = []
    module = implementation(backend.name, "adversarial")
    solve = module.solve
    monkeypatch.setattr(module, "solve", lambda *arguments: taken.append(True) or solve(*arguments))
    epsilon = 0.1 if relative else 0.5
    ours = metric_perturb(
        x.to(backend.device),
        labels.to(backend.device),
        epsilon=epsilon,
        epsilon_mode="relative" if relative else "absolute",
        steps=steps,
    ).cpu()
    assert taken
    expected = ascent(x, labels, epsilon, steps, 2.5 * epsilon / steps, relative=relative)
    assert displacement_error(ours, x, expected) <= 1e-5


@pytest.fixture(params=["one program", "several programs"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How many programs of the kernels take the steps of a set: several, on sizes that the interpreter can bear."""
    if request.param == "several programs":
        pytest.importorskip("triton")
        from apd_kernels.kernels import adversarial_solver

        monkeypatch.setattr(adversarial_solver, "ONE_PROGRAM_ROWS", 0)
        monkeypatch.setattr(adversarial_solver, "COLUMNS", 16)
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_in_every_kind(backend: Backend, programs: str, kind: str) -> None:
    """As the reference in the 200 cases; sizes on both sides of the tiles, mining that changes between the steps."""
    if backend.name == "torch":
        pytest.skip("served in test_reference_solver_in_200_cases")
    solve = implementation(backend.name, "adversarial").solve
    for n, d, steps, relative in ((13, 60, 3, False), (20, 81, 2, True)):
        x, labels, _ = case(KINDS.index(kind), n, d)
        epsilon = 0.1 if relative else 1.0
        arguments = epsilon, 2.5 * epsilon / steps, steps, relative
        expected = implementation("torch", "adversarial").metric_perturb(
            x.double(), labels, None, None, None, *arguments, "l2", "fp32"
        )
        ours = solve(x.to(backend.device), labels.to(backend.device), *arguments).cpu()
        # Of the rows that moved: the rounding of a far one would hide the others.
        near = x.norm(dim=1) < 1e3 * x.norm(dim=1).median()
        rounding = displacement_error(expected.float()[near], x[near], expected[near])
        assert displacement_error(ours[near], x[near], expected[near]) <= 1e-5 + 2 * rounding, (n, d)
        assert torch.equal(ours[~near], x[~near]) or kind != "one far row"


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # of the interpreter
def test_rows_that_are_not_finite(backend: Backend, programs: str) -> None:
    """They are the hardest of all, so every anchor becomes NaN; a row that is no anchor and that none chose stays."""
    x, labels, _ = case(0, 16, 64)
    labels[5], labels[9] = 50, 60
    x[9] += 100  # the farthest, of an identity of its own: nobody's winner
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[2, 7] = value
        ours = metric_perturb(broken.to(backend.device), labels.to(backend.device), epsilon=0.5, steps=2).cpu()
        assert torch.equal(ours[9], x[9])
        anchors = torch.ones(16, dtype=torch.bool)
        anchors[[5, 9]] = False
        if value != value:
            assert ours[anchors].isnan().any(1).all()


def test_sets_through_the_solver(backend: Backend, programs: str) -> None:
    x = torch.stack([case(seed, 12, 64)[0] for seed in (0, 9)])
    labels = case(0, 12, 64)[1].to(backend.device)
    sets = metric_perturb(x.to(backend.device), labels, epsilon=0.5, steps=2)
    for s in range(2):
        assert_close(sets[s], metric_perturb(x[s].to(backend.device), labels, epsilon=0.5, steps=2), 1e-6)


def test_duplicates_stay_finite(backend: Backend) -> None:
    """All rows equal, two points only, near-duplicates of both kinds: finite, inside the ball."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 64, generator=generator)
    for x in (
        base[:1].expand(12, 64).clone(),
        base.repeat(6, 1),
        base[:1] + 1e-6 * torch.randn(12, 64, generator=generator),
    ):
        labels = torch.arange(12, device=backend.device) // 3
        ours = metric_perturb(x.to(backend.device), labels, epsilon=0.3, steps=4).cpu()
        assert ours.isfinite().all()
        assert ((ours - x).norm(dim=1) <= 0.3 * (1 + 1e-5)).all()


@pytest.mark.parametrize("scale", [1e4, 1e7, 1e10])
def test_one_far_row(backend: Backend, scale: float) -> None:
    """It costs the others no digits, whichever form serves."""
    x, labels, _ = case(0, 16, 64)
    labels[15] = 50
    x[15] *= scale
    ours = metric_perturb(x.to(backend.device), labels.to(backend.device), epsilon=0.5, steps=3).cpu()
    expected = ascent(x[:15], labels[:15], 0.5, 3, 2.5 * 0.5 / 3)
    assert displacement_error(ours[:15], x[:15], expected) <= 1e-5
