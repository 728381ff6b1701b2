"""Root mean square errors of every float32-grade product, beside float32 products of the same rows.

The contract: ours ≤ PyTorch's float32 product on the same card, plain rows against plain rows and centred against
centred. Errors are against float64 and relative to ‖x‖‖y‖ (of distances to ‖x‖ + ‖y‖, of gradients to their largest
value). What ours centres by itself is compared with a product of rows less the same centre.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apd_kernels import batch_hard, knn, pairwise_distance, prepare_rows
from benchmarks.calls import large_routes
from benchmarks.cases import fp32_precision
from benchmarks.workload import DEVICE

Rows = tuple[Tensor, Tensor]
Size = tuple[int, int, int]
Measure = Callable[[Rows], dict[str, Any]]


def gaussian(n: int, m: int, d: int) -> Rows:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.randn(rows, d, device=DEVICE, generator=generator) for rows in (n, m))
    return x, y


def one_signed(n: int, m: int, d: int) -> Rows:
    """Unit rows after a ReLU: sums of one sign, whose bias does not cancel."""
    x, y = (F.normalize((rows + 0.5).relu()) for rows in gaussian(n, m, d))
    return x, y


def offset(n: int, m: int, d: int) -> Rows:
    """Rows around a common vector that is three times as long as what they differ by: ours centres them."""
    x, y = gaussian(n, m, d)
    return x + 3, y + 3


KINDS: dict[str, Callable[[int, int, int], Rows]] = {"Gaussian": gaussian, "unit, ≥ 0": one_signed, "offset": offset}


def centre_of(y: Tensor, metric: str, centred: bool) -> Tensor:
    """What ours subtracts from rows that are compared with y; 0 where it subtracts nothing, as of small problems."""
    if not centred:
        return y.new_zeros(y.shape[-1])
    from apd_kernels.kernels.prepared import prepare_rows as kernel

    centre = kernel(y, metric in ("euclidean", "sqeuclidean"), "fp32").centre
    return y.new_zeros(y.shape[-1]) if centre is None else centre[0]


def root_mean_square(error: Tensor) -> float:
    value = error.double().square().mean().sqrt().item()
    return value if value == value else float("inf")


def compared(ours: Tensor, theirs: Tensor, exact: Tensor, scale: Tensor | float) -> dict[str, float]:
    return {
        "ours_rms": root_mean_square((ours.double() - exact) / scale),
        "float32_rms": root_mean_square((theirs.double() - exact) / scale),
    }


def distance_by_product(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The formula on PyTorch's product, in the dtype of the rows."""
    with fp32_precision("fp32"):
        if metric == "dot":
            return -(x @ y.t())
        if metric == "cosine":
            return 1 - F.normalize(x) @ F.normalize(y).t()
        squared = (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * (x @ y.t())).clamp(min=0)
    return squared if metric == "sqeuclidean" else squared.sqrt()


def exact_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    x, y = x.double(), y.double()
    if metric in ("dot", "cosine"):
        return distance_by_product(x, y, metric)
    blocks = [torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist") for rows in x.split(256)]
    distance = torch.cat(blocks)
    return distance if metric == "euclidean" else distance.square()


def _scale(x: Tensor, y: Tensor, metric: str) -> Tensor | float:
    a, b = x.double().norm(dim=1)[:, None], y.double().norm(dim=1)
    return {"dot": a * b, "cosine": 1.0, "euclidean": a + b, "sqeuclidean": (a + b).square()}[metric]


def pairwise(rows: Rows, metric: str, centred: bool, *, kept: bool = False) -> dict[str, Any]:
    """Pairwise distances; `centred`: both sides' products are of rows less the centre that ours finds by itself."""
    x, y = rows
    centre = centre_of(y, metric, centred)
    ours = pairwise_distance(x, prepare_rows(y, metric=metric) if kept else y, metric=metric, precision="fp32")
    theirs = distance_by_product(x - centre, y - centre, metric)
    found = compared(ours, theirs, exact_distance(x, y, metric), _scale(x - centre, y - centre, metric))
    return {**found, "centred": bool(centre.any())}


def itself(rows: Rows, metric: str) -> dict[str, Any]:
    """x against itself: the tiles above the diagonal."""
    x = rows[1]
    centre = centre_of(x, metric, True)
    ours = pairwise_distance(x, metric=metric, precision="fp32")
    theirs = distance_by_product(x - centre, x - centre, metric)
    exact = exact_distance(x, x, metric)
    keep = ~torch.eye(len(x), dtype=torch.bool, device=x.device)  # at 0 ours is exact
    scale = torch.as_tensor(_scale(x - centre, x - centre, metric), device=x.device).expand_as(exact)
    return {**compared(ours[keep], theirs[keep], exact[keep], scale[keep]), "centred": bool(centre.any())}


def gradient(rows: Rows, metric: str, centred: bool) -> dict[str, Any]:
    """The gradient to x of a weighted sum of distances, beside the product weights · y."""
    x, y = rows
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.rand(len(x), len(y), device=DEVICE, generator=generator)

    def of(a: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
        a = a.clone().requires_grad_()
        with fp32_precision("fp32"):
            return torch.autograd.grad((distance(a) * weights.to(a.dtype)).sum(), a)[0]

    centre = centre_of(y, metric, centred)
    ours = of(x, lambda a: pairwise_distance(a, y, metric=metric, precision="fp32"))
    theirs = of(x - centre, lambda a: distance_by_product(a, y - centre, metric))
    exact = of(x.double(), lambda a: distance_by_product(a, y.double(), metric))
    return {**compared(ours, theirs, exact, exact.abs().max()), "centred": bool(centre.any())}


def mined(rows: Rows, metric: str, centred: bool) -> dict[str, Any]:
    """Distances of the hardest pairs, each against the best distance in float64, beside those by product."""
    x, y = rows
    labels, y_labels = (torch.arange(len(t), device=t.device) % 16 for t in rows)
    centre = centre_of(y, metric, centred)
    ours = batch_hard(x, labels, y, y_labels, metric=metric, precision="fp32").distances
    same = labels[:, None] == y_labels

    def best(d: Tensor) -> Tensor:
        return torch.cat([d.masked_fill(~same, -torch.inf).amax(1), d.masked_fill(same, torch.inf).amin(1)])

    theirs = best(distance_by_product(x - centre, y - centre, metric))
    scale = (x - centre).double().norm(dim=1).repeat(2) * (
        1.0 if metric == "euclidean" else y.double().norm(dim=1).mean()
    )
    return {
        **compared(torch.cat([ours.positive, ours.negative]), theirs, best(exact_distance(x, y, metric)), scale),
        "centred": bool(centre.any()),
    }


def nearest(rows: Rows, metric: str) -> dict[str, Any]:
    """Distances of `knn`, beside the least by product."""
    x, y = rows
    k = min(20, len(y) // 2)
    centre = centre_of(y, metric, True)
    ours = knn(x, y, k, metric=metric, precision="fp32").distances
    theirs = distance_by_product(x - centre, y - centre, metric).topk(k, largest=False).values
    exact = exact_distance(x, y, metric).topk(k, largest=False).values
    norm = (x - centre).double().norm(dim=1, keepdim=True)
    scale = norm if metric == "euclidean" else norm * y.double().norm(dim=1).mean()
    return {**compared(ours, theirs, exact, scale), "centred": bool(centre.any())}


def ranked(rows: Rows) -> dict[str, Any]:
    """The similarities that `rank_metrics` compares, of all pairs at once."""
    from apd_kernels.kernels import ranking

    x, y = rows
    n, m = len(x), len(y)
    query, gallery = (ranking.prepared_rows(t, None, "fp32") for t in rows)
    first, last = (torch.full((n,), end, dtype=torch.int64, device=x.device) for end in (0, m))
    starts = torch.arange(n + 1, device=x.device) * m
    ours = ranking.same_identity_similarities(query, gallery, first, last, starts, n * m).view(n, m)
    return {
        **compared(-ours, distance_by_product(x, y, "dot"), exact_distance(x, y, "dot"), _scale(x, y, "dot")),
        "centred": False,
    }


def _measured(measure: Measure, rows: Callable[..., Rows], size: Size, split: bool) -> dict[str, Any]:
    if not split:
        return measure(rows(*size))
    with large_routes():  # which toy sizes would not take
        return measure(rows(*size))


def products(toy: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every product by name."""
    small, large = ((12, 20, 70), (12, 20, 70)) if toy else ((256, 512, 2048), (2048, 4096, 2048))
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def add(name: str, size: Size, measure: Measure, euclidean: bool, split: bool = True) -> None:
        for kind, rows in KINDS.items():
            if euclidean or kind != "offset":
                found[f"{name}, {kind}"] = partial(_measured, measure, rows, size, split)

    for metric in ("dot", "cosine", "euclidean", "sqeuclidean"):
        euclidean = metric.endswith("euclidean")
        for route, size, operation in (
            ("split", large, partial(pairwise, metric=metric, centred=True)),
            ("kept rows", large, partial(pairwise, metric=metric, centred=True, kept=True)),
            ("small", small, partial(pairwise, metric=metric, centred=False)),
        ):
            add(f"pairwise_distance {metric}, {route}", size, operation, euclidean, route != "small")
        if metric not in ("dot", "euclidean"):
            continue
        add(f"pairwise_distance {metric}, x with itself", large, partial(itself, metric=metric), euclidean)
        for route, size in (("split", large), ("small", small)):
            centred = route == "split"
            add(
                f"gradient of {metric}, {route}",
                size,
                partial(gradient, metric=metric, centred=centred),
                euclidean,
                centred,
            )
            add(
                f"batch_hard {metric}, {route}",
                size,
                partial(mined, metric=metric, centred=centred),
                euclidean,
                centred,
            )
        add(f"knn {metric}", large, partial(nearest, metric=metric), euclidean)
    add("similarities of rank_metrics", small, ranked, False)
    return found
