"""The operations at the sizes that they have goals for, what they must give, and what users run today instead.

Goals are figures for one H100 80GB (SXM), set before the kernels ran on any GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels import (
    batch_hard,
    circle_loss,
    identity_derangement,
    knn,
    metric_perturb,
    metric_perturbation_loss,
    paired_distance,
    pairwise_distance,
    prepare_rows,
    rank_metrics,
    ssd_mask,
    triplet_loss,
)
from benchmarks import eager
from benchmarks.units import Skip
from benchmarks.workload import DEVICE, identities, ranking_features

Inputs = tuple[Any, ...]
SAMPLE = 64  # rows of a large result that are held against float64


@dataclass(frozen=True)
class Case:
    """One operation at one size. Functions take the inputs that `inputs` made."""

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[..., Any]
    error: Callable[[Inputs, Callable[..., Any]], float]  # of a candidate, relative to the largest value
    tolerance: float
    goal: dict[str, float] = field(default_factory=dict)  # by the name of what is measured
    floor: Callable[..., Any] | None = None  # the product or copy that no implementation can leave out
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    capture: bool = True


def relative(found: Any, expected: Any) -> float:
    """The worst over the tensors of a result; NaN is inf.

    Of each the largest error, relative to the largest value or 1, and the error that 99 of 100 elements keep, relative
    to the largest value: that of a gradient is far less than 1, and where two rows are equally far to seven digits, a
    few rows of it are another row's.
    """
    worst = 0.0
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        error = (a.detach().double() - b.detach().double()).abs().flatten()
        largest = b.detach().abs().max()
        some = error[:: 1 + error.numel() // 100_000].sort().values
        of_most = some[int(0.99 * (len(some) - 1))] / largest.clamp(min=1e-30)
        both = torch.maximum(error.max() / largest.clamp(min=1), of_most)
        worst = max(worst, both.item() if both.isfinite() else float("inf"))
    return worst


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in _tensors(part)]


def _with_gradient(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """`function` of x and others, and the gradient to x."""

    def both(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        value = function(x, *others)
        return value, *torch.autograd.grad(value, x)

    return both


def _doubled(inputs: Inputs) -> Inputs:
    """The same in float64."""

    def double(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return tuple(double(t) for t in inputs)


def _against(reference: Callable[..., Any]) -> Callable[[Inputs, Callable[..., Any]], float]:
    return lambda inputs, work: relative(work(*inputs), reference(*_doubled(inputs)))


def later_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of `function` when it is first called."""
    made: list[Callable[..., Any]] = []

    def work(*arguments: Any) -> Any:
        if not made:
            made.append(torch.compile(function))
        return made[0](*arguments)

    return work


def _soft_margin_of_pytorch_metric_learning(x: Tensor, labels: Tensor) -> Tensor:
    try:
        from pytorch_metric_learning import distances, losses, miners, reducers
    except ImportError as error:
        raise Skip("pytorch-metric-learning is not installed") from error
    distance = distances.LpDistance(normalize_embeddings=False)
    pairs = miners.BatchHardMiner(distance=distance)(x, labels)
    criterion = losses.TripletMarginLoss(margin=0, smooth_loss=True, distance=distance, reducer=reducers.MeanReducer())
    return criterion(x, labels, pairs)


def triplet(n: int, d: int, goal: dict[str, float]) -> Case:
    def inputs() -> Inputs:
        x, labels = identities(n // 4, 4, d)
        return x.requires_grad_(), labels

    def theirs(x: Tensor, labels: Tensor) -> Tensor:
        return eager.triplet_loss(x, labels, None)

    return Case(
        f"triplet_loss {n}x{d} forward+backward",
        inputs,
        _with_gradient(lambda x, labels: triplet_loss(x, labels, margin=None, precision="fp32")),
        _against(_with_gradient(theirs)),
        1e-5,
        goal,
        floor=lambda x, labels: (x.detach() @ x.detach().t(), x.detach() + 1),
        peers={
            "eager": _with_gradient(theirs),
            "torch.compile": _with_gradient(later_compiled(theirs)),
            "pytorch-metric-learning": _with_gradient(_soft_margin_of_pytorch_metric_learning),
        },
    )


def perturb(n: int, d: int, norm: str, goal: dict[str, float], steps: int = 10) -> Case:
    epsilon = 2.0 if norm == "l2" else 2.0 / d**0.5

    def ascent(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def work(x: Tensor, labels: Tensor) -> Tensor:
            moved = x
            for _ in range(steps):
                moved = step(moved, x, labels, epsilon, 2.5 * epsilon / steps, norm)
            return moved

        return work

    return Case(
        f"metric_perturb {n}x{d}, {steps} {'L2' if norm == 'l2' else 'L-infinity'} steps",
        lambda: identities(n // 4, 4, d),
        lambda x, labels: metric_perturb(x, labels, epsilon=epsilon, steps=steps, norm=norm),
        _against(ascent(eager.ascent_step)),
        1e-4,
        goal,
        peers={"eager": ascent(eager.ascent_step), "torch.compile": ascent(later_compiled(eager.ascent_step))},
    )


def distance(n: int, d: int, backward: bool, precision: str, goal: dict[str, float]) -> Case:
    def inputs() -> Inputs:
        x, y = torch.randn(n, d, device=DEVICE), torch.randn(n, d, device=DEVICE)
        return (x.requires_grad_(), y, torch.rand(n, n, device=DEVICE)) if backward else (x, y)

    def of(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def work(x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
            value = function(x, y)
            return (value,) if weights is None else (value, *torch.autograd.grad(value, x, weights))

        return work

    def error(given: Inputs, work: Callable[..., Any]) -> float:
        x, y, *weights = _doubled(given)
        a = x[:SAMPLE].detach().requires_grad_(backward)
        exact = torch.cdist(a, y, compute_mode="donot_use_mm_for_euclid_dist")
        expected = (exact, *torch.autograd.grad(exact, a, weights[0][:SAMPLE], retain_graph=True)) if weights else exact
        return relative([part[:SAMPLE] for part in work(*given)], expected)

    def product(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Any:
        with torch.no_grad(), fp32_precision(precision):
            return x @ y.t() if weights is None else (x @ y.t(), weights @ y)

    grade = precision == "fp32"
    return Case(
        f"pairwise_distance {n}x{n}x{d} {'forward+backward' if backward else 'forward'}, {precision}",
        inputs,
        of(lambda x, y: pairwise_distance(x, y, precision=precision)),
        error,
        1e-5 if grade else 3e-3,
        goal,
        floor=product,
        peers={
            "eager": of(eager.distance),
            "torch.compile": of(later_compiled(eager.distance)),
            "cdist": of(torch.cdist),
        }
        if grade
        else {},
    )


class fp32_precision:
    """PyTorch's own float32 products in TF32 inside the block, or in float32."""

    def __init__(self, precision: str) -> None:
        self.tf32 = precision == "tf32"

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.before


def paired(n: int, d: int) -> Case:
    return Case(
        f"paired_distance {n}x{d} forward",
        lambda: (torch.randn(n, d, device=DEVICE), torch.randn(n, d, device=DEVICE)),
        paired_distance,
        _against(lambda x, y: (x - y).norm(dim=1)),
        1e-5,
        {"times_floor": 1 / 0.9},
        floor=lambda x, y: x.copy_(y),  # as many bytes
        peers={"eager": F.pairwise_distance, "torch.compile": later_compiled(F.pairwise_distance)},
    )


def memory(anchors: int, people: int, each: int, d: int, kind: str, kept: bool, goal: dict[str, float]) -> Case:
    """The hardest pairs of anchors in a memory; `kind` is a precision, or fp16 for rows of that dtype."""
    precision, dtype = ("fp32", torch.float16) if kind == "fp16" else (kind, torch.float32)

    def inputs() -> Inputs:
        y, y_labels = identities(people, each, d)
        x, labels = (y[::each][:anchors] + 0.1).contiguous(), y_labels[::each][:anchors].contiguous()
        x, y = x.to(dtype), y.to(dtype)
        return x, labels, prepare_rows(y, precision=precision) if kept else y, y_labels, y

    def product(x: Tensor, labels: Tensor, rows: Any, y_labels: Tensor, y: Tensor) -> Tensor:
        with fp32_precision(precision):
            return x @ y.t()

    def best(x: Tensor, labels: Tensor, _: Any, y_labels: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return eager.batch_hard(x, labels, y, y_labels)

    return Case(
        f"batch_hard {anchors}x{people * each}x{d}, {kind}, {'kept' if kept else 'stateless'}",
        inputs,
        lambda x, labels, rows, y_labels, _: batch_hard(x, labels, rows, y_labels, precision=precision).distances,
        _against(best),
        1e-5 if kind == "fp32" else 3e-3,  # of the winners: in less than float32 grade another row may be mined
        goal,
        floor=product,
        peers={} if kept or kind != "fp32" else {"eager": best, "torch.compile": later_compiled(best)},
    )


def ranking(size: tuple[int, int, int, int], name: str, dtype: torch.dtype, goal: dict[str, float]) -> Case:
    def inputs() -> Inputs:
        query, gallery, *rest = ranking_features(*size, spread=1.0)
        return query.to(dtype), gallery.to(dtype), *rest

    def ours(*given: Any) -> tuple[Tensor, Tensor]:
        result = rank_metrics(*given, metric="cosine", precision="fp32")
        return torch.tensor(result.mAP), result.cmc[0]

    def error(given: Inputs, work: Callable[..., Any]) -> float:
        query, gallery, ids, gallery_ids, cams, gallery_cams = given
        some = slice(0, 8 * SAMPLE)
        few = query[some], gallery, ids[some], gallery_ids, cams[some], gallery_cams
        found = work(*few)
        found = torch.stack([value.double().cpu() for value in found])
        return relative(found, eager.rank_metrics(*_doubled(few)).cpu())

    half = dtype == torch.float16
    return Case(
        f"rank_metrics {name} {size[0]}x{size[1]}x{size[2]}, {'fp16' if half else 'fp32'}",
        inputs,
        ours,
        error,
        1e-2 if half else 1e-4,
        goal,
        floor=lambda query, gallery, *_: [query[i : i + 1024] @ gallery.t() for i in range(0, len(query), 1024)][-1],
        peers={"eager": eager.rank_metrics},
        capture=False,
    )


def neighbors(size: tuple[int, int, int, int], name: str, k: int, goal: dict[str, float]) -> Case:
    def inputs() -> Inputs:
        return ranking_features(*size, spread=1.0)[:2]

    def error(given: Inputs, work: Callable[..., Any]) -> float:
        query, gallery = given
        exact = torch.cdist(query[:SAMPLE].double(), gallery.double()).topk(k, largest=False).values
        return relative(work(query, gallery)[:SAMPLE], exact)

    def matrix(query: Tensor, gallery: Tensor) -> Tensor:
        return torch.cat(
            [torch.cdist(rows, gallery).topk(k, largest=False).values for rows in query.split(2048)]  # a part at a time
        )

    return Case(
        f"knn {name} {size[0]}x{size[1]}x{size[2]}, k={k}",
        inputs,
        lambda query, gallery: knn(query, gallery, k, metric="euclidean", precision="fp32").distances,
        error,
        1e-5,
        goal,
        floor=lambda query, gallery: [query[i : i + 1024] @ gallery.t() for i in range(0, len(query), 1024)][-1],
        peers={"cdist and topk": matrix},
        capture=False,
    )


def ssd(shape: tuple[int, ...], dtype: torch.dtype, goal: dict[str, float]) -> Case:
    def inputs() -> Inputs:
        maps = tuple(torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for _ in range(4))
        permutation = identity_derangement(torch.arange(shape[0], device=DEVICE) // 4)
        return *maps, permutation, torch.randn(3, *shape, device=DEVICE).to(dtype)

    def of(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def work(features: Tensor, a: Tensor, b: Tensor, c: Tensor, permutation: Tensor, weights: Tensor) -> Any:
            found = tuple(function(features, [a, b, c], permutation))
            return *found, *torch.autograd.grad(found, [features, a, b, c], weights.unbind())

        return work

    def copy(features: Tensor, *_: Any) -> Tensor:
        """Forward and backward read 11 and write 7 maps: as many as a copy of 9."""
        return torch.stack([features.detach()] * 9)

    name = str(dtype).removeprefix("torch.")
    return Case(
        f"ssd_mask {'x'.join(map(str, shape))} {name}, 3 maps, forward+backward",
        inputs,
        of(ssd_mask),
        _against(of(eager.ssd_mask)),
        1e-5 if dtype == torch.float32 else 2e-2,
        goal,
        floor=copy,
        peers={"eager": of(eager.ssd_mask), "torch.compile": of(later_compiled(eager.ssd_mask))},
    )


def circle(n: int, d: int) -> Case:
    def inputs() -> Inputs:
        x, labels = identities(n // 4, 4, d)
        return x.requires_grad_(), labels

    def theirs(x: Tensor, labels: Tensor) -> Tensor:
        return eager.circle_loss(x, labels, x, labels)

    return Case(
        f"circle_loss {n}x{d} forward+backward",
        inputs,
        _with_gradient(lambda x, labels: circle_loss(x, labels, precision="fp32")),
        _against(_with_gradient(theirs)),
        1e-4,
        floor=lambda x, labels: (x.detach() @ x.detach().t(), x.detach() + 1),
        peers={"eager": _with_gradient(theirs), "torch.compile": _with_gradient(later_compiled(theirs))},
    )


def perturbation(n: int, m: int, d: int) -> Case:
    def inputs() -> Inputs:
        x, negatives, original = (torch.randn(*shape, d, device=DEVICE) for shape in ((n,), (n, m), (n,)))
        return x.requires_grad_(), negatives, original

    return Case(
        f"metric_perturbation_loss {n}x{m}x{d} forward+backward",
        inputs,
        _with_gradient(metric_perturbation_loss),
        _against(_with_gradient(eager.perturbation_loss)),
        1e-5,
        {"times_floor": 1.15},
        floor=lambda x, negatives, original: (x.detach() + original, negatives.sum()),
        peers={
            "eager": _with_gradient(eager.perturbation_loss),
            "torch.compile": _with_gradient(later_compiled(eager.perturbation_loss)),
        },
    )


def cases(toy: bool) -> Iterator[Case]:
    """What matters most comes first."""
    if toy:
        yield triplet(8, 32, {"wall_us": 1.0})
        yield perturb(8, 32, "l2", {}, steps=2)
        yield distance(24, 16, True, "fp32", {})
        yield memory(4, 4, 2, 16, "fp32", True, {})
        yield ranking((8, 24, 16, 4), "toy", torch.float32, {})
        yield neighbors((6, 24, 16, 4), "toy", 3, {})
        yield ssd((8, 8, 2, 2), torch.float32, {})
        yield paired(16, 32)
        yield perturbation(8, 2, 32)
        return
    market, msmt = (3368, 19732, 2048, 751), (11659, 82161, 2048, 3060)
    half = torch.float16
    yield triplet(64, 2048, {"graph_us": 15, "wall_us": 150})
    yield perturb(64, 2048, "l2", {"graph_us": 60, "wall_us": 100})
    yield triplet(4096, 2048, {"event_us": 610})
    yield perturb(4096, 2048, "l2", {"event_us": 4700})
    yield distance(8192, 2048, True, "fp32", {"event_us": 4800})
    yield distance(8192, 2048, False, "tf32", {"times_floor": 1.1})
    yield memory(256, 4096, 16, 2048, "fp32", True, {"event_us": 500})
    yield memory(256, 4096, 16, 2048, "tf32", True, {"event_us": 231})
    yield memory(256, 4096, 16, 2048, "fp16", True, {"event_us": 121})
    yield ranking(market, "Market-1501", torch.float32, {"wall_us": 2000})
    yield ranking(market, "Market-1501", half, {"wall_us": 700})
    yield ssd((256, 768, 16, 8), torch.float32, {"event_us": 690})
    yield ssd((64, 768, 16, 8), torch.bfloat16, {"graph_us": 150})
    yield ranking(msmt, "MSMT17", torch.float32, {"wall_us": 30_000})
    yield ranking(msmt, "MSMT17", half, {"wall_us": 10_000})
    yield neighbors(msmt, "MSMT17", 100, {"wall_us": 34_000})
    yield memory(256, 4096, 16, 2048, "fp32", False, {"event_us": 1000})
    yield memory(256, 4096, 16, 2048, "tf32", False, {"event_us": 420})
    yield perturb(64, 2048, "linf", {})
    yield perturb(256, 2048, "l2", {})
    yield distance(8192, 2048, False, "fp32", {})
    yield neighbors(market, "Market-1501", 100, {})
    yield paired(65536, 2048)
    yield circle(4096, 2048)
    yield perturbation(64, 4, 2048)
    yield ssd((64, 768, 16, 8), torch.float32, {})
    yield ssd((256, 768, 16, 8), torch.bfloat16, {})
