from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from oracle import features
from torch import Tensor

import apd_kernels
from apd_kernels import (
    batch_hard,
    circle_loss,
    identity_derangement,
    metric_perturb,
    metric_perturbation_loss,
    nn,
    ssd_mask,
    supervised_contrastive_loss,
    triplet_loss,
)

X, LABELS = features(12, 8, dtype=torch.float32, identities=4)
MEMORY, MEMORY_LABELS = features(20, 8, dtype=torch.float32, seed=1, identities=4)


@pytest.mark.parametrize(
    "configuration",
    [{}, {"margin": None, "metric": "cosine", "reverse": True}, {"margin": 0.0, "metric": "sqeuclidean"}],
    ids=str,
)
def test_triplet_loss(configuration: dict[str, object]) -> None:
    criterion = nn.TripletLoss(**configuration)
    assert torch.equal(criterion(X, LABELS), triplet_loss(X, LABELS, **configuration))
    in_memory = triplet_loss(X, LABELS, MEMORY, MEMORY_LABELS, **configuration)
    assert torch.equal(criterion(X, LABELS, MEMORY, MEMORY_LABELS), in_memory)
    indices = batch_hard(X.flip(1), LABELS).indices
    assert torch.equal(criterion(X, LABELS, indices=indices), triplet_loss(X, LABELS, indices=indices, **configuration))


@pytest.mark.parametrize(
    ("module", "function", "configuration"),
    [
        (nn.CircleLoss, circle_loss, {}),
        (nn.CircleLoss, circle_loss, {"margin": 0.4, "gamma": 80.0}),
        (nn.SupervisedContrastiveLoss, supervised_contrastive_loss, {}),
        (nn.SupervisedContrastiveLoss, supervised_contrastive_loss, {"temperature": 0.5, "metric": "dot"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_losses_of_all_pairs(
    module: type[torch.nn.Module], function: Callable[..., Tensor], configuration: dict[str, object]
) -> None:
    criterion = module(**configuration)
    assert torch.equal(criterion(X, LABELS), function(X, LABELS, **configuration))
    options = {"y_valid": torch.arange(20) > 3}
    in_memory = function(X, LABELS, MEMORY, MEMORY_LABELS, **options, **configuration)
    assert torch.equal(criterion(X, LABELS, MEMORY, MEMORY_LABELS, **options), in_memory)


def test_metric_perturbation_loss() -> None:
    criterion = nn.MetricPerturbationLoss()
    indices = torch.arange(12) % 5
    assert torch.equal(criterion(X + 1, X.flip(0), X), metric_perturbation_loss(X + 1, X.flip(0), X))
    assert torch.equal(
        criterion(X + 1, MEMORY, X, indices=indices), metric_perturbation_loss(X + 1, MEMORY, X, indices=indices)
    )


@pytest.mark.parametrize(
    "configuration",
    [
        {"epsilon": 0.5},
        {"epsilon": 0.1, "epsilon_mode": "relative", "steps": 3, "step_size": 0.05, "norm": "linf"},
        {"epsilon": 0.5, "steps": 2, "objective": "negative", "random_start": True},
    ],
    ids=str,
)
def test_metric_perturb(configuration: dict[str, object]) -> None:
    perturb = nn.MetricPerturb(**configuration)
    for options in ({}, {"memory": MEMORY, "memory_labels": MEMORY_LABELS}):
        drawn = (torch.Generator().manual_seed(0) for _ in range(2))
        ours = perturb(X, LABELS, generator=next(drawn), **options)
        assert torch.equal(ours, metric_perturb(X, LABELS, generator=next(drawn), **configuration, **options))
        assert not torch.equal(ours, X)
    if not perturb.random_start:
        assert torch.equal(perturb(X, LABELS, noise=X / 99), metric_perturb(X, LABELS, noise=X / 99, **configuration))
    if perturb.objective == "negative":
        perturb.random_start = False
        configuration = {**configuration, "random_start": False}
        expected = metric_perturb(X, LABELS, negatives=X.flip(0), **configuration)
        assert torch.equal(perturb(X, LABELS, negatives=X.flip(0)), expected)
    assert torch.equal(perturb.eval()(X, LABELS, generator=torch.manual_seed(1)), perturb.train()(
        X, LABELS, generator=torch.manual_seed(1)
    ))  # fmt: skip


@pytest.mark.parametrize("stacked", [False, True])
def test_ssd_mask(stacked: bool) -> None:
    def same(a: object, b: object) -> bool:
        pairs = [(a, b)] if stacked else list(zip(a, b, strict=True))
        return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)

    mask = nn.SSDMask(stacked=stacked)
    maps, logits = torch.randn(12, 3, 2, 2), [torch.randn(12, 1, 2, 2)]
    labels = torch.arange(12) // 3
    permutation = identity_derangement(labels, torch.Generator().manual_seed(0))
    with_partner = ssd_mask(maps, logits, permutation, stacked=stacked)
    without = ssd_mask(maps, logits, None, stacked=stacked)
    assert same(mask(maps, logits, labels, generator=torch.Generator().manual_seed(0)), with_partner)
    assert same(mask(maps, logits), without)
    assert same(mask(maps, logits, permutation=permutation), with_partner)
    mask.eval()
    assert same(mask(maps, logits, labels), without)
    assert same(mask(maps, logits, permutation=permutation), with_partner)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"permutation: expected None with labels"):
            mask.train(training)(maps, logits, labels, permutation=permutation)


def test_repr_is_the_call() -> None:
    modules = [
        nn.TripletLoss(None, reverse=True),
        nn.CircleLoss(0.4, gamma=80.0),
        nn.SupervisedContrastiveLoss(0.07, metric="dot"),
        nn.MetricPerturbationLoss(),
        nn.MetricPerturb(0.1, epsilon_mode="relative", steps=5, norm="linf", random_start=True),
        nn.SSDMask(stacked=True),
        nn.CrossBatchMemory(8, 2, dtype=torch.float16),
        nn.ClusterMemory(8, 2, momentum=0.5),
    ]
    for module in modules:
        again = eval(repr(module), vars(nn))
        assert type(again) is type(module)
        assert repr(again) == repr(module)
    assert {type(module).__name__ for module in modules} == set(nn.__all__)


def test_modules_have_no_state() -> None:
    model = torch.nn.ModuleList([nn.TripletLoss(), nn.MetricPerturbationLoss(), nn.MetricPerturb(1.0), nn.SSDMask()])
    assert not model.state_dict()
    assert not list(model.parameters())


def test_changed_attributes_count() -> None:
    """A schedule may set the radius."""
    perturb = nn.MetricPerturb(0.1)
    perturb.epsilon = 0.4
    assert torch.equal(perturb(X, LABELS), metric_perturb(X, LABELS, epsilon=0.4))
    assert "epsilon=0.4" in repr(perturb)


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    mask, perturb, criterion = nn.SSDMask(stacked=True), nn.MetricPerturb(0.1, steps=2), nn.TripletLoss()

    def step(maps: Tensor, logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return mask(maps, [logits], labels).square().mean() + criterion(perturb(x, labels), labels)

    inputs = torch.randn(12, 3, 2, 2), torch.randn(12, 1, 2, 2), X, torch.arange(12) // 3
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = X.clone().requires_grad_()
        function(*inputs[:2], x, inputs[3]).backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_import_stays_lean() -> None:
    """``import apd_kernels`` brings the modules, and neither kernels nor the compiler nor FAISS."""
    assert apd_kernels.nn is nn
    heavy = ("triton", "faiss", "torch._dynamo", "torch._inductor")
    loaded = f"print([m for m in {heavy} if m in sys.modules])"
    code = f"import sys, torch; {loaded}; import apd_kernels; apd_kernels.nn.SSDMask; {loaded}"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    alone, ours = printed.splitlines()
    assert ours == alone
