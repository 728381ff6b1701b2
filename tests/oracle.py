"""Float64 oracles written from the formulas, independent of the library, and comparisons that know about rounding."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

METRICS = ("euclidean", "sqeuclidean", "cosine", "dot")


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """All pairs in float64, by the difference of the rows; differentiable except at 0."""
    x, y = x.double(), y.double()
    if metric == "dot":
        return -(x[..., :, None, :] * y[..., None, :, :]).sum(-1)
    if metric == "cosine":
        a, b = (t / t.norm(dim=-1, keepdim=True) for t in (x, y))
        return 1 - (a[..., :, None, :] * b[..., None, :, :]).sum(-1)
    squared = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    if metric == "sqeuclidean":
        return squared
    return torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).sqrt())


def masks(
    labels: Tensor,
    y_labels: Tensor | None = None,
    *,
    own: Tensor | None = None,
    y_valid: Tensor | None = None,
    domains: Tensor | None = None,
    y_domains: Tensor | None = None,
    positives: str = "all",
    negatives: str = "all",
) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each anchor, (N, M), pair by pair; without y_labels an anchor is not its own."""
    columns = labels if y_labels is None else y_labels
    column_domains = domains if y_labels is None else y_domains
    positive = torch.zeros(len(labels), len(columns), dtype=torch.bool)
    negative = torch.zeros_like(positive)
    for i, label in enumerate(labels.tolist()):
        for j, other in enumerate(columns.tolist()):
            if y_labels is None and i == j:
                continue
            if (own is not None and int(own[i]) == j) or (y_valid is not None and not y_valid[j]):
                continue
            rule = positives if label == other else negatives
            if domains is not None and rule != "all":
                same_domain = int(domains[i]) == int(column_domains[j])
                if same_domain != (rule == "within"):
                    continue
            (positive if label == other else negative)[i, j] = True
    return positive, negative


def pairing_options(choose: random.Random, n: int, m: int | None) -> dict[str, Any]:
    """Some of own, y_valid, domains and their rules, for n anchors and m other rows (None: the anchors themselves)."""
    options: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(choose.randint(0, 10**6))
    if m is not None and m > 0 and choose.random() < 0.5:
        options["own"] = torch.randint(-1, m, (n,), generator=generator)
    if m is not None and choose.random() < 0.5:
        options["y_valid"] = torch.rand(m, generator=generator) < 0.8
    if choose.random() < 0.6:
        options["domains"] = torch.randint(0, 3, (n,), generator=generator)
        if m is not None:
            options["y_domains"] = torch.randint(0, 3, (m,), generator=generator)
        options["positives"] = choose.choice(("all", "within", "across"))
        options["negatives"] = choose.choice(("all", "within", "across"))
    return options


def features(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, identities: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows around identity centres, exactly representable in `dtype`, and labels with unequal counts."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[-2]
    identities = identities or max(1, n // 3)
    labels = torch.randint(0, identities, (n,), generator=generator)
    centres = torch.randn(identities, shape[-1], generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (centres[labels] + 0.5 * noise).to(dtype), labels


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator on the CPU held at most during `work`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def leaf(x: Tensor, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """A copy of x that collects a gradient."""
    return x.detach().to(device=device, dtype=dtype or x.dtype, copy=True).requires_grad_()


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the scale of a result, for sums over some hundred products."""
    return 1e-10 if dtype == torch.float64 else 2e-6


def assert_close(actual: Tensor, expected: Tensor, relative: float, what: str = "result", scale: float = 1e-30) -> None:
    """|actual − expected| ≤ relative · max(scale, max|expected|), NaN where NaN is expected."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    expected, actual = expected.nan_to_num(0), actual.nan_to_num(0)
    error = (actual - expected).abs().max().item()
    bound = relative * max(expected.abs().max().item(), scale)
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"
