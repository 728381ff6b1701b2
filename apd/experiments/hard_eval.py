"""The "hard testing set": how far a generator's images make a network fail that had no part in its training.

The judge is a baseline that is not ψ. Query and gallery of people that no training saw go through the generator, and
the judge searches one in the other. A fall of its rank-1 says something about metric perturbation only if the content
stays and other changes of the same size do less harm. So, fixed beforehand:

    content   mean φ-distance of G(x) and x  ≤  0.5 × that of two images of a person from different cameras
    controls  Gaussian noise, blur and colour jitter, and a generator trained without L_MP, each as strong as gives G's
              mean φ-distance
    goal      the judge's rank-1 falls at least 1.5 × as far as with the strongest of the first three

The φ-distance is that of eq. 4: the mean |φ(a) − φ(b)| over elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from apd.console import progress
from apd.data.images import ImageStore
from apd.data.loading import images_in_order
from apd.data.market import DISTRACTOR, ReidFolder
from apd.errors import InputError
from apd.models.trunk import Trunk
from apd.reports.page import Table, points
from apd.retrieval.comparison import Difference, Retrieval, paired_difference, retrieve
from apd.retrieval.features import FeatureSet
from apd.run import WEIGHTS, Run
from apd.training.monitors import camera_distance
from apd.training.train import BASELINE, make_trunk

CONTENT_BOUND = 0.5  # of the mean φ-distance between a person's images from different cameras
GOAL = 1.5  # times the fall of rank-1 under the strongest control
ORIGINALS, GENERATED, WITHOUT_MP = "originals", "G(x)", "G without L_MP"
_BATCH = 64
_PROBES = 512  # images by which a control's strength is found; what it reaches is measured on all
_TOLERANCE = 0.005  # of the φ-distance that a control is to have
_HALVINGS = 24
_STREAM = 5  # of the seed: no other part of the package draws the same numbers

# Images (B, 3, H, W) in [0, 1], a random generator for each, and a strength, at 0 of which nothing changes.
Change = Callable[[Tensor, Sequence[torch.Generator], float], Tensor]


def unchanged(images: Tensor, randoms: Sequence[torch.Generator], strength: float) -> Tensor:
    """The images, whatever the strength."""
    return images


def gaussian_noise(images: Tensor, randoms: Sequence[torch.Generator], strength: float) -> Tensor:
    """Noise of the standard deviation `strength`, independent in each pixel and channel."""
    noise = torch.stack([torch.randn(images.shape[1:], generator=random) for random in randoms])
    return images + strength * noise.to(images.device)


def gaussian_blur(images: Tensor, randoms: Sequence[torch.Generator], strength: float) -> Tensor:
    """A Gaussian of `strength` pixels, cut off at three of them or where the image ends."""
    reach = min(math.ceil(3 * strength), min(images.shape[2:]) - 1)
    return transforms.gaussian_blur(images, [2 * reach + 1] * 2, [strength] * 2) if reach else images


def colour_jitter(images: Tensor, randoms: Sequence[torch.Generator], strength: float) -> Tensor:
    """Brightness, contrast and saturation times e^±strength at most, hue turned by a quarter of it; evenly drawn."""
    jittered = []
    for image, random in zip(images, randoms, strict=True):
        *exponents, turn = (strength * (2 * torch.rand(4, generator=random) - 1)).tolist()
        brightness, contrast, saturation = map(math.exp, exponents)
        image = transforms.adjust_brightness(image, brightness)
        image = transforms.adjust_contrast(image, contrast)
        image = transforms.adjust_saturation(image, saturation)
        jittered.append(transforms.adjust_hue(image, min(max(turn / 4, -0.5), 0.5)))
    return torch.stack(jittered)


def generated(generator: nn.Module, images: Tensor, randoms: Sequence[torch.Generator], strength: float) -> Tensor:
    """What the generator changes, times `strength`: 1 is G(x)."""
    return images + strength * (generator(images) - images)


class Control(NamedTuple):
    change: Change
    strongest: float  # more is not tried


_CONTROLS = {
    "noise": Control(gaussian_noise, 2.0),
    "blur": Control(gaussian_blur, 32.0),
    "colour jitter": Control(colour_jitter, 4.0),
}


@dataclass(frozen=True)
class Row:
    """One kind of images, and what was found with them."""

    name: str
    strength: float  # 1 is G(x); of a control what its change means by it
    distance: float  # mean φ-distance to the originals
    judge: Retrieval
    network: Retrieval | None  # of the run's own SP-Net, where its training has come to an end


@dataclass(frozen=True)
class HardTest:
    """The result."""

    across_cameras: float  # mean φ-distance of two images of a person from different cameras
    rows: tuple[Row, ...]  # originals, G(x), then the controls

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def content(self) -> float:
        """Mean φ-distance of G(x) and x over that between cameras."""
        return self.row(GENERATED).distance / self.across_cameras

    @property
    def content_kept(self) -> bool:
        return self.content <= CONTENT_BOUND

    def drop(self, name: str) -> Difference:
        """By how much the judge's rank-1 falls from the originals to these images, paired by query."""
        before, after = self.row(ORIGINALS).judge, self.row(name).judge
        return paired_difference(before.right, after.right, before.identities)

    @property
    def strongest_control(self) -> str:
        return max(_CONTROLS, key=lambda name: self.drop(name).mean)

    @property
    def weaker_controls(self) -> list[str]:
        """Controls that cannot change images as much as G does, at any strength that was tried."""
        enough = (1 - 4 * _TOLERANCE) * self.row(GENERATED).distance
        return [row.name for row in self.rows[2:] if row.distance < enough]

    @property
    def ratio(self) -> float | None:
        """The fall with G(x) over that with the strongest control; None where no control lets rank-1 fall."""
        control = self.drop(self.strongest_control).mean
        return self.drop(GENERATED).mean / control if control > 0 else None

    @property
    def reached(self) -> bool:
        """Whether the content is kept and rank-1 falls far enough."""
        fall = self.drop(GENERATED).mean
        return self.content_kept and fall > 0 and fall >= GOAL * self.drop(self.strongest_control).mean

    def verdict(self) -> str:
        """The result in a line, composed from the numbers."""
        content = f"content {self.content:.2f} (bound {CONTENT_BOUND}, {'kept' if self.content_kept else 'not kept'})"
        times = "no control lets it fall" if self.ratio is None else f"{self.ratio:.2f} × {self.strongest_control}"
        fall = f"rank-1 falls by {100 * self.drop(GENERATED).mean:.1f} points, {times} (goal {GOAL} ×)"
        return f"{'reached' if self.reached else 'missed'}: {content}; {fall}"

    def defence(self) -> str | None:
        """What training on such images is good for, in a line: the run's own network beside the judge."""
        shares = [
            f"{row.name} {100 * row.judge.rank1:.1f} → {100 * row.network.rank1:.1f}"
            for row in self.rows[:2]
            if row.network is not None
        ]
        return f"defence: rank-1 of the judge → of the run's own network: {', '.join(shares)}" if shares else None

    def conclusions(self) -> list[str]:
        """What the figures say, in lines."""
        short = [f"note: {name} at its strongest changes less than the generator does" for name in self.weaker_controls]
        return [*short, self.verdict(), *filter(None, [self.defence()])]

    def table(self) -> Table:
        """Each kind of images: their change, the judge's figures, and those of the run's own network."""
        own = ("SP-Net rank-1", "SP-Net mAP") if self.rows[0].network is not None else ()
        head = ("", "strength", "content", "rank-1, %", "mAP, %", "fall of rank-1", *own)
        rows = []
        for row in self.rows:
            drop, found = self.drop(row.name), row.judge
            cells = [row.name, f"{row.strength:.3f}", f"{row.distance / self.across_cameras:.3f}"]
            cells += [f"{points(found.rank1)} ± {points(found.rank1_error)}", points(found.mAP)]
            cells.append(f"{points(drop.mean)} ± {points(drop.error)}")
            rows.append([*cells, *([points(row.network.rank1), points(row.network.mAP)] if row.network else [])])
        return Table(head, rows, strong=1)

    def as_json(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for row in self.rows:
            drop = self.drop(row.name)
            rows[row.name] = {
                "strength": row.strength,
                "distance": row.distance,
                "content": row.distance / self.across_cameras,
                "judge": _figures(row.judge),
                "drop": {"mean": drop.mean, "error": drop.error},
                **({"network": _figures(row.network)} if row.network is not None else {}),
            }
        return {
            "across_cameras": self.across_cameras,
            "content": self.content,
            "content_bound": CONTENT_BOUND,
            "strongest_control": self.strongest_control,
            "ratio": self.ratio,
            "goal": GOAL,
            "reached": self.reached,
            "weaker_controls": self.weaker_controls,
            "queries": len(self.row(ORIGINALS).judge.right),
            "rows": rows,
        }


def _figures(found: Retrieval) -> dict[str, float]:
    return {"rank1": found.rank1, "rank1_error": found.rank1_error, "mAP": found.mAP}


def run_hard_test(
    run: Run, judge: Run, folder: ReidFolder, *, control: Run | None = None, device: str = "cpu", seed: int = 0
) -> HardTest:
    """Test a run's generator, and how its SP-Net stands its images.

    Args:
        run: with a finished stage 1.
        judge: a finished baseline, other than the run's ψ.
        folder: query and gallery of people that neither of them was trained on.
        control: a run like `run` with ``mpg.weight_mp=0``.
        device: where to compute.
        seed: of noise, jitter and the pairs across cameras.

    Raises:
        InputError: a run is not of the kind that is expected, or an image cannot be read.
    """
    _check_runs(run, judge, control)
    made = partial(generated, run.load_generator(device))
    trunk = make_trunk(run, device).to(device)
    models = {"judge": judge.load_model(device)}
    if (run.path / WEIGHTS).is_file():
        models["network"] = run.load_model(device)
    bench = _Bench(folder, run.size, trunk, models, device, seed)
    scale = across_cameras(folder, run.size, trunk, device, seed)

    controls = dict(_CONTROLS)
    if control is not None:
        controls[WITHOUT_MP] = Control(partial(generated, control.load_generator(device)), 32.0)
    with progress("hard testing set", 2 + len(controls)) as advance:

        def measured(name: str, change: Change, strength: float) -> Row:
            row = bench.measure(name, change, strength)
            advance(1)
            return row

        rows = [measured(ORIGINALS, unchanged, 0.0), measured(GENERATED, made, 1.0)]
        target = bench.probe(made, 1.0)
        for name, (change, strongest) in controls.items():
            strength = matching_strength(partial(bench.probe, change), target, strongest)
            rows.append(measured(name, change, strength))
    return HardTest(scale, tuple(rows))


def _check_runs(run: Run, judge: Run, control: Run | None) -> None:
    if judge.config.model.ssd != "none" or judge.config.perturbation != "none":
        found = f"model.ssd={judge.config.model.ssd}, perturbation={judge.config.perturbation}"
        raise InputError(f"--judge {judge.path}: expected a baseline (model.ssd=none perturbation=none), got {found}")
    if run.config.mpg.trunk_weights is not None and Path(run.config.mpg.trunk_weights).is_dir():
        trunk = Path(run.config.mpg.trunk_weights)
    else:
        trunk = run.path / BASELINE
    if (trunk / WEIGHTS).is_file() and Run(trunk).fingerprint() == judge.fingerprint():
        raise InputError(f"--judge {judge.path}: is ψ of {run.path}; expected another baseline, of another seed say")
    for option, other in (("--judge", judge), ("--control", control)):
        if other is not None and other.size != run.size:
            raise InputError(
                f"{option} {other.path}: expected images of {run.size} pixels as {run.path}, got {other.size}"
            )
    if control is not None and control.config.mpg.weight_mp:
        weight = control.config.mpg.weight_mp
        raise InputError(f"--control {control.path}: expected a run with mpg.weight_mp=0, got {weight:g}")


def matching_strength(distance: Callable[[float], float], target: float, strongest: float) -> float:
    """The strength with a distance, by bisection; the strongest one where that does not reach it.

    Args:
        distance: of a strength; 0 at 0.
        target: to be met within half a percent.
        strongest: upper end of the search.
    """
    if distance(strongest) <= target:
        return strongest
    low, high = 0.0, strongest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = distance(middle)
        if abs(found - target) <= _TOLERANCE * target:
            return middle
        low, high = (middle, high) if found < target else (low, middle)
    return (low + high) / 2


def across_cameras(folder: ReidFolder, size: tuple[int, int], trunk: Trunk, device: str, seed: int) -> float:
    """Mean φ-distance of each test image to one of the same person from another camera, which is drawn.

    Raises:
        InputError: no person was seen by two cameras.
    """
    samples = [sample for sample in (*folder.query, *folder.gallery) if sample.pid != DISTRACTOR]
    found = camera_distance(
        trunk,
        ImageStore([sample.path for sample in samples], size, cache=False),
        np.array([sample.pid for sample in samples], np.int64),
        np.array([sample.camid for sample in samples], np.int64),
        batch_size=_BATCH,
        seed=seed,
        device=torch.device(device),
    )
    if found is None:
        raise InputError(f"{folder.path}: expected a person whom two cameras saw among query and gallery, found none")
    return found


def _distances(trunk: Trunk, a: Tensor, b: Tensor) -> Tensor:
    """φ-distance of each pair of images, (B,)."""
    return (trunk(a).shallow - trunk(b).shallow).flatten(1).abs().mean(1)


class _Bench:
    """The test images, and all that looks at them."""

    def __init__(
        self,
        folder: ReidFolder,
        size: tuple[int, int],
        trunk: Trunk,
        models: Mapping[str, nn.Module],
        device: str,
        seed: int,
    ) -> None:
        self.folder = folder
        self.samples = (*folder.query, *folder.gallery)
        self.size = size
        self.trunk = trunk
        self.models = models
        self.device = device
        self.seed = seed
        chosen = np.linspace(0, len(self.samples) - 1, min(_PROBES, len(self.samples))).astype(int).tolist()
        self.probes = list(self._batches(chosen))

    def _batches(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Sequence[int]]]:
        store = ImageStore([self.samples[row].path for row in rows], self.size, cache=False)
        for i, images in enumerate(images_in_order(store, _BATCH, 0)):
            yield images.to(self.device), rows[i * _BATCH : (i + 1) * _BATCH]

    @torch.no_grad()
    def _changed(self, change: Change, images: Tensor, rows: Sequence[int], strength: float) -> Tensor:
        """In 8 bits, as an image file has them; an image's random numbers depend on its place alone."""
        seeds = [int(np.random.SeedSequence((_STREAM, self.seed, row)).generate_state(1)[0]) for row in rows]
        randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
        return (change(images, randoms, strength).clamp(0, 1) * 255).round() / 255

    @torch.no_grad()
    def probe(self, change: Change, strength: float) -> float:
        """Mean φ-distance on the probes."""
        found = [
            _distances(self.trunk, self._changed(change, images, rows, strength), images)
            for images, rows in self.probes
        ]
        return float(torch.cat(found).mean())

    @torch.no_grad()
    def measure(self, name: str, change: Change, strength: float) -> Row:
        """On all images."""
        distances: list[Tensor] = []
        found: dict[str, list[Tensor]] = {model: [] for model in self.models}
        for images, rows in self._batches(range(len(self.samples))):
            changed = self._changed(change, images, rows, strength)
            distances.append(_distances(self.trunk, changed, images))
            for model, network in self.models.items():
                found[model].append(network(changed).cpu())
        results = {model: self._retrieved(torch.cat(rows).numpy()) for model, rows in found.items()}
        distance = float(torch.cat(distances).mean())
        return Row(name, strength, distance, results["judge"], results.get("network"))

    def _retrieved(self, features: np.ndarray) -> Retrieval:
        queries = len(self.folder.query)
        rows = FeatureSet(
            path=self.folder.path,
            rows="query and gallery",
            features=features,
            names=np.array([sample.path.name for sample in self.samples]),
            pids=np.array([sample.pid for sample in self.samples], np.int64),
            camids=np.array([sample.camid for sample in self.samples], np.int64),
            split=np.repeat((1, 2), (queries, len(self.samples) - queries)),
        )
        return retrieve(rows.part("query"), rows.part("gallery"))
