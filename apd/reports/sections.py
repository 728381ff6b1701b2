"""What several reports say of a run: ranked lists, synthesized images, attention maps, how the training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd.console import count
from apd.data.datasets import domains, read_source
from apd.data.images import load_image
from apd.data.loading import as_floats
from apd.data.market import ReidFolder
from apd.reports import page as report
from apd.retrieval.comparison import Retrieval, nearest_is_right
from apd.retrieval.ranked_lists import RankedLists
from apd.run import METRICS, Run
from apd.training.log import read_metrics
from apd.training.sources import gather_sources
from apd.training.synthesis import synthesized_folders, synthesized_path
from apd.training.train import SYNTHESIZED, make_trunk

STAGES = {"mpg": "stage 1, MPG-Net", "synthesize": "synthesized images", "sp": "stage 2, SP-Net"}  # of run.json
_TRAINED_ON = {
    "both": "{}, each of which gives its place to its synthesized image in {} % of the batches after {} % of the steps",
    "synthesized": "one synthesized image of each of {}",
    "original": "{}, not on what was synthesized of each",
}
_PAIRS = 6  # synthesized images shown of each source
_FLIPS = 1000  # images by which flips are counted: all pairs of them are compared
_BATCH = 128


def describe_size(folder: ReidFolder) -> str:
    """How much there is to test on, in words."""
    identities = len({sample.pid for sample in folder.query})
    cameras = len({sample.camid for sample in (*folder.query, *folder.gallery)})
    return (
        f"{count(len(folder.query), 'query', 'queries')} of {count(identities, 'identity', 'identities')}, "
        f"{count(len(folder.gallery), 'gallery image')}, {count(cameras, 'camera')}"
    )


def lists_section(
    title: str, subject: str, found: Retrieval, lists: RankedLists, folder: Path, *, folded: bool = False
) -> report.Section:
    """Four ranked lists, chosen by rule.

    Args:
        title: of the section.
        subject: which model on which domain.
        found: what was measured.
        lists: of all queries, with image files as their names.
        folder: the gallery's data set.
        folded: show the title only, until it is opened.
    """
    chosen = report.choose_queries(found)
    notes = [
        f"{'Right' if found.right[row] else 'Wrong'} at rank 1, average precision {found.ap[row]:.2f}" for row in chosen
    ]
    text = (
        f"{subject}: {int(found.right.sum())} of {len(found.right)} queries are right at rank 1. Shown are, in the "
        "order of average precision, those at a quarter and at three quarters of the right ones, and the same of the "
        "wrong ones. Green ✓: the query's identity; red ✗: another. Below: camera and distance."
    )
    strips = report.ranked_strips(lists, found.queries[chosen].tolist(), folder, notes)
    return report.Section(title, [text], strips, folded=folded)


def synthesized_section(run: Run, name: str, sources: Sequence[Path | str], device: str) -> report.Section:
    """Originals beside their synthesized images, and how many of these are nearest to another identity.

    Args:
        run: with synthesized images of every source.
        name: of the run, for the text.
        sources: its data sets, as run.json names them.
        device: where to compute.
    """
    groups: dict[str, list[report.Synthesized]] = {}
    pairs: list[report.Synthesized] = []
    folders = [read_source(source) for source in sources]
    trained = [list(domains(folder.train)) for folder in folders]
    targets = synthesized_folders(run.path / SYNTHESIZED, [folder.path for folder in folders])
    for samples_of, made in zip(trained, targets, strict=True):
        images = [
            report.Synthesized(
                sample.path,
                synthesized_path(made, "train", sample),
                (f"identity {sample.pid}", f"camera {sample.camid}"),
            )
            for samples in samples_of
            for sample in samples
        ]
        pairs += images
        groups[made.name] = [images[place] for place in _spread(len(images), _PAIRS)]
    labels = gather_sources([samples for samples_of in trained for samples in samples_of], 0, run.config.seed)[0].labels
    chosen = _spread(len(pairs), _FLIPS)
    flips = measure_flips(run, [pairs[i] for i in chosen], labels[chosen], device)
    compared = (
        f"the {flips.images:,} originals" if len(pairs) <= _FLIPS else f"{flips.images:,} originals, evenly chosen,"
    )
    data = run.config.data
    trained_on = _TRAINED_ON[data.train_on].format(
        count(len(pairs), "original"), report.points(data.synthesized_probability), report.points(data.synthesized_from)
    )
    text = [
        f"Stage 2 of {name} is trained on {trained_on}. "
        f"They differ by {report.points(flips.change)} % of the range of brightness, on average over pixels and "
        "channels. Shown are images at even distances in the order of file names.",
        f"{flips.right:,} of {compared} have an image of their identity as the nearest "
        f"other one, by ψ, {_psi(run)}. The nearest one is of another identity for the synthesized images of "
        f"{flips.made:,} of these ({report.points(flips.made / max(1, flips.right))} %), and, with noise of the same "
        f"average size instead, for {flips.noise:,} ({report.points(flips.noise / max(1, flips.right))} %).",
    ]
    return report.Section("Originals and synthesized hard samples", text, report.synthesized_strips(groups))


def _psi(run: Run) -> str:
    return "the baseline's descriptor" if run.info().get("trunk_choice") == "self" else f"of {run.info().get('trunk')}"


def _spread(images: int, most: int) -> np.ndarray:
    """Places at even distances, the first and the last among them."""
    return np.linspace(0, images - 1, min(most, images)).astype(int)


class Flips(NamedTuple):
    """Training images whose nearest neighbour becomes one of another identity."""

    images: int
    change: float  # mean absolute change of the synthesized images, of the range of brightness
    right: int  # originals whose nearest other original has their identity
    made: int  # of these, those whose synthesized image is nearest to another identity
    noise: int  # and those whose noisy image is


@torch.no_grad()
def measure_flips(run: Run, pairs: Sequence[report.Synthesized], labels: np.ndarray, device: str) -> Flips:
    """How many images the generator moves to another identity, by ψ; and uniform noise of as large a mean change.

    Args:
        run: whose ψ judges.
        pairs: N images and what was made of them; all of them are held in memory and compared with one another.
        labels: their identities, int64 (N,).
        device: where to compute.
    """
    trunk = make_trunk(run, device).to(device)
    identities = torch.from_numpy(labels)

    def deep(images: Tensor) -> Tensor:
        return torch.cat([trunk(part.to(device)).deep.cpu() for part in images.split(_BATCH)])

    before, after = (_read(paths, run.size) for paths in zip(*((p.original, p.made) for p in pairs), strict=True))
    change = (after - before).abs().mean((1, 2, 3), keepdim=True)
    noise = 2 * torch.rand(before.shape, generator=torch.Generator().manual_seed(run.config.seed)) - 1
    bank = deep(before)
    kept, made, noisy = (
        nearest_is_right(deep(images), bank, identities)
        for images in (before, after, (before + 2 * change * noise).clamp(0, 1))
    )
    return Flips(len(pairs), float(change.mean()), *(int(n.sum()) for n in (kept, kept & ~made, kept & ~noisy)))


def _read(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Images (N, 3, H, W) in [0, 1]."""
    return as_floats(torch.from_numpy(np.stack([load_image(path, size) for path in paths])).permute(0, 3, 1, 2))


@torch.no_grad()
def attention_section(run: Run, images: Sequence[Path]) -> report.Section:
    """Where MSP looks: its three attention maps and their mean over each image.

    Args:
        run: with MSP, and a finished training.
        images: files.
    """
    maps = run.load_network().attention(_read(images, run.size))
    strips = []
    for path, attention in zip(images, maps, strict=True):
        shown = load_image(path, run.size)
        named = {**{f"a{i}": values for i, values in enumerate(attention, 1)}, "mean": attention.mean(0)}
        tiles = [
            report.Tile(
                [report.heat_picture(shown, values.numpy())],
                (name, f"{float(values.min()):.2f}–{float(values.max()):.2f}"),
            )
            for name, values in named.items()
        ]
        strips.append(report.Strip(path.name, report.Tile([report.picture(path)], ("image",)), tiles))
    text = (
        "K is F times the mean of three attention maps (APD, eq. 6). Shown is each map's mean over the channels, from "
        "its smallest value in the image, dark, to its largest, light; below, these two values."
    )
    return report.Section("Attention of MSP", [text], strips)


def training_section(runs: Mapping[str, Run], text: str) -> report.Section:
    """Losses and monitors over steps."""
    metrics = {name: read_metrics(run.path / METRICS) for name, run in runs.items()}
    return report.Section("Training", [text], report.curve_plots(metrics))
