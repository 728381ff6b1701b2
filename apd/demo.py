"""The demonstration: evaluation, gallery search and metric perturbation on generated features."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from apd.display import console, print_written
from apd.evaluation import Evaluation, evaluate, features_tensor
from apd.features import FeatureSet, load_features
from apd.files import write_json
from apd.retrieval import index_features, search_features
from apd_kernels import Gallery, metric_perturb, pairwise_distance

DIMENSIONS = 256
EPSILONS = (0.05, 0.1, 0.2)  # of each row's norm
STEPS = 5


@dataclass(frozen=True)
class Domain:
    """One place with its own people and cameras. Strengths are relative to the spread between identities."""

    name: str
    identities: int
    cameras: int
    views: int  # images of an identity in a camera; one of them is the query
    camera_shift: float
    noise: float


DOMAINS = (
    Domain("campus", identities=100, cameras=4, views=4, camera_shift=0.35, noise=0.65),
    Domain("mall", identities=100, cameras=6, views=4, camera_shift=0.6, noise=0.7),
    Domain("station", identities=150, cameras=3, views=4, camera_shift=0.5, noise=0.8),
)


def generate_features(domain: Domain, seed: int) -> dict[str, np.ndarray]:
    """Arrays of a feature file: non-negative features, as after a ReLU.

    A feature is ReLU(m + W (z + c + n)): m and W belong to the domain, z to the identity, c to its camera, n to the
    image. W has fewer columns than rows, so that images vary in few directions, as real features do.
    """
    random = np.random.default_rng([seed, *domain.name.encode()])
    latent = 24
    mixing = random.standard_normal((latent, DIMENSIONS)) / np.sqrt(latent)
    mean = 0.5 * random.standard_normal(DIMENSIONS)
    identity = random.standard_normal((domain.identities, 1, 1, latent))
    camera = domain.camera_shift * random.standard_normal((domain.cameras, 1, latent))
    views = domain.noise * random.standard_normal((domain.identities, domain.cameras, domain.views, latent))
    features = np.maximum(mean + (identity + camera + views) @ mixing, 0).astype(np.float16)
    pid, camid, view = np.indices(features.shape[:3]) + 1
    split = np.where(view == 1, 1, 2)
    folders = np.where(view == 1, "query", "bounding_box_test")
    names = [
        f"{folder}/{p:04d}_c{c}s1_{v:06d}_00.jpg"
        for folder, p, c, v in zip(*(values.ravel().tolist() for values in (folders, pid, camid, view)), strict=True)
    ]
    order = np.argsort(split.ravel(), kind="stable")
    return {
        "features": features.reshape(-1, DIMENSIONS)[order],
        "pids": pid.ravel()[order].astype(np.int32),
        "camids": camid.ravel()[order].astype(np.int32),
        "split": split.ravel()[order].astype(np.int8),
        "names": np.array(names)[order],
    }


def nearest_is_right(x: Tensor, labels: Tensor) -> Tensor:
    """Whether each row's nearest other row, by Euclidean distance, has the row's identity; bool (N,)."""
    return labels[pairwise_distance(x).fill_diagonal_(torch.inf).argmin(1)] == labels


def flipped_share(before: Tensor, after: Tensor, labels: Tensor) -> float:
    """Of the rows whose nearest other row had their identity, the share whose nearest now has another one."""
    right = nearest_is_right(before, labels)
    return float((~nearest_is_right(after, labels))[right].double().mean())


def random_perturb(x: Tensor, epsilon: float, seed: int) -> Tensor:
    """The control: a step of relative length epsilon in a random direction."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + epsilon * x.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(direction)


@dataclass(frozen=True)
class DomainResult:
    """What the demonstration found in one domain."""

    images: int
    evaluation: Evaluation
    rank1_by_search: float
    flipped: list[float]  # `flipped_share` for each of EPSILONS
    flipped_by_noise: list[float]


class _Stages:
    """Prints each stage with its time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        console.print(f"{len(self.seconds) + 1}  {what} … ", end="")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        console.print(f"{self.seconds[name]:.1f} s", style="dim")


def run_demo(output: Path, *, seed: int = 0, device: str = "cpu") -> dict[str, DomainResult]:
    """Run every stage, print what happens, and write features, galleries, figures and the plot to a folder.

    Args:
        output: the folder; made where it does not exist.
        seed: of the generated features.
        device: where metrics and perturbations are computed.
    """
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    stage = _Stages()
    files = {domain.name: output / f"{domain.name}.npz" for domain in DOMAINS}
    with stage("features", f"generate the features of {len(DOMAINS)} domains, {DIMENSIONS} dimensions"):
        for domain in DOMAINS:
            np.savez_compressed(files[domain.name], **generate_features(domain, seed))  # type: ignore[arg-type]
    parts = {name: _parts(load_features(path)) for name, path in files.items()}
    with stage("evaluation", "evaluate each domain: CMC, mAP and mINP, cosine distance"):
        evaluations = {name: evaluate(*part, device=device) for name, part in parts.items()}
    with stage("gallery", "index each gallery with FAISS, save it, load it again and search it"):
        by_search = {name: _rank1_by_search(*part, output / f"{name}_gallery") for name, part in parts.items()}
    console.print(f"   rank-1 found by search: {', '.join(f'{name} {share:.3f}' for name, share in by_search.items())}")
    flips, noise_flips = {}, {}
    with stage("perturbation", f"metric_perturb the query features: {STEPS} steps, {len(EPSILONS)} radii ε"):
        for name, (query, _) in parts.items():
            x = features_tensor(query, device)
            labels = torch.from_numpy(query.identities().astype(np.int64)).to(device)
            hard = [
                metric_perturb(x, labels, epsilon=epsilon, epsilon_mode="relative", steps=STEPS) for epsilon in EPSILONS
            ]
            flips[name] = [flipped_share(x, moved, labels) for moved in hard]
            noise = [random_perturb(x, epsilon, seed) for epsilon in EPSILONS]
            noise_flips[name] = [flipped_share(x, moved, labels) for moved in noise]
    results = {
        name: DomainResult(
            images=sum(map(len, part)),
            evaluation=evaluations[name],
            rank1_by_search=by_search[name],
            flipped=flips[name],
            flipped_by_noise=noise_flips[name],
        )
        for name, part in parts.items()
    }
    plot, figures = output / "demo.png", output / "demo.json"
    with stage("plot", "draw the plot"):
        _draw(results, plot)
    write_json(figures, _as_json(results, stage.seconds, seed, device))
    _print(results)
    print_written(plot, figures)
    print_written(*files.values())
    example = files[DOMAINS[0].name]
    console.print(f"\n{time.perf_counter() - start:.0f} s in all. The files work with the other commands, for example:")
    console.print(f"  apd evaluate --features {example} --metric euclidean", soft_wrap=True)
    gallery = output / f"{DOMAINS[0].name}_gallery"
    console.print(f"  apd search --gallery {gallery} --features {example} -k 5", soft_wrap=True)
    return results


def _parts(rows: FeatureSet) -> tuple[FeatureSet, FeatureSet]:
    return rows.part("query"), rows.part("gallery")


def _rank1_by_search(query: FeatureSet, gallery: FeatureSet, folder: Path) -> float:
    """Index, save, load, search; the share of queries whose nearest image from another camera is right."""
    index_features(gallery, "cosine").save(folder)
    found = search_features(query, Gallery.load(folder), 10, exclude_same_camera=True).found
    return float((found.ids[:, 0].numpy() == query.identities()).mean())


def _print(results: dict[str, DomainResult]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("domain", "images", "rank-1", "rank-5", "mAP", "mINP", *(f"ε={epsilon:g}" for epsilon in EPSILONS)):
        table.add_column(heading, justify="left" if heading == "domain" else "right", no_wrap=True)
    for name, result in results.items():
        figures = result.evaluation
        retrieval = (figures.cmc[1], figures.cmc[5], figures.mAP, figures.mINP)
        shares = (f"{100 * share:.0f}%" for share in result.flipped)
        table.add_row(name, f"{result.images:,}", *(f"{value:.3f}" for value in retrieval), *shares)
    console.print()
    console.print(table)
    noise = max(share for result in results.values() for share in result.flipped_by_noise)
    console.print(
        "\nε: of the queries whose nearest other query has their identity, the share for\n"
        "which it has another one after metric_perturb moved each by ε times its norm.\n"
        f"Random directions instead: at most {100 * noise:.0f}%.\n"
    )


def _as_json(results: dict[str, DomainResult], seconds: dict[str, float], seed: int, device: str) -> dict[str, Any]:
    domains = {name: {**asdict(result), "evaluation": result.evaluation.as_json()} for name, result in results.items()}
    return {
        "seed": seed,
        "device": device,
        "epsilons": EPSILONS,
        "steps": STEPS,
        "domains": domains,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _draw(results: dict[str, DomainResult], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [f"C{i}" for i in range(len(results))]
    for i, (name, result) in enumerate(results.items()):
        values = (result.evaluation.cmc[1], result.evaluation.cmc[5], result.evaluation.mAP, result.evaluation.mINP)
        width = 0.8 / len(results)
        bars = left.bar([x + (i - 1) * width for x in range(4)], values, width * 0.92, color=colours[i], label=name)
        left.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        for shares, style in ((result.flipped, "o-"), (result.flipped_by_noise, "x:")):
            right.plot([0, *EPSILONS], [0, *(100 * share for share in shares)], style, color=colours[i])
    left.set_xticks(range(4), ("rank-1", "rank-5", "mAP", "mINP"))
    left.set_ylim(0, 1.05)
    left.set_title("Retrieval in each domain (cosine)")
    left.legend(frameon=False)
    right.plot([], [], "ko-", label="metric_perturb")
    right.plot([], [], "kx:", label="random direction")
    right.set_xticks([0, *EPSILONS])
    right.set_xlabel("ε: radius as a share of each feature's norm")
    right.set_ylabel("right nearest neighbours lost, %")
    right.set_ylim(0, 100)
    right.set_title("Query features moved by ε")
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    draft = path.with_suffix(".tmp.png")
    figure.savefig(draft)
    draft.replace(path)
