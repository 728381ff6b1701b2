"""What the demonstration says of its result: sentences, tables, the page, and demo.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apd import report
from apd.comparison import Chance, Difference, Retrieval, nearest_is_right, paired_difference
from apd.data.images import load_image
from apd.data.market import ReidFolder, read_market
from apd.display import count
from apd.environment import describe_environment
from apd.ranked_lists import RankedLists
from apd.run import METRICS, Run
from apd.synthesis import synthesized_path
from apd.training.log import read_metrics
from apd.training.sources import gather_sources
from apd.training.train import SYNTHESIZED, make_trunk

CAVEAT = "One seed and drawn people: this shows the mechanics, it is no evidence about the method."
_PARTS = {"mpg": "stage 1, MPG-Net", "synthesize": "synthesized images", "sp": "stage 2, SP-Net"}
_PAIRS = 6  # synthesized images shown of each source
_BATCH = 128


@dataclass(frozen=True)
class Tested:
    """What was measured on the test images of one domain."""

    folder: ReidFolder
    chance: Chance
    rankers: dict[str, Retrieval]  # "colours", "normalized colours", "baseline", "APD"

    def size(self) -> str:
        query, gallery = self.folder.query, self.folder.gallery
        identities, cameras = len({s.pid for s in query}), len({s.camid for s in query})
        return (
            f"{count(len(query), 'query', 'queries')} of {count(identities, 'identity', 'identities')}, "
            f"{count(len(gallery), 'gallery image')}, {count(cameras, 'camera')}"
        )

    def differences(self) -> dict[str, Difference]:
        """Of APD and the baseline."""
        ours, theirs = self.rankers["APD"], self.rankers["baseline"]
        return {
            "rank-1": paired_difference(ours.right, theirs.right, ours.identities),
            "mAP": paired_difference(ours.ap, theirs.ap, ours.identities),
        }


@dataclass(frozen=True)
class Demo:
    """What the demonstration made and found."""

    seed: int
    device: str
    sources: Sequence[Path]  # data sets
    unseen: str
    baseline: Run
    apd: Run
    tested: dict[str, Tested]  # by domain
    lists: RankedLists  # APD's, of the unseen domain
    seconds: dict[str, float]  # by stage

    def on_unseen(self) -> Tested:
        return self.tested[self.unseen]


def headline(demo: Demo) -> str:
    """The result in a sentence, composed from the numbers."""
    tested = demo.on_unseen()
    shares = {name: f"{report.points(ranked.rank1)} %" for name, ranked in tested.rankers.items()}
    return (
        f"Rank-1 on {demo.unseen}, a domain that no training saw: APD {shares['APD']}, baseline {shares['baseline']}; "
        f"a random ranking {report.points(tested.chance.rank1)} %, colours alone {shares['colours']}, normalized "
        f"{shares['normalized colours']}."
    )


def verdicts(demo: Demo) -> list[str]:
    """What the numbers say of APD and the baseline, and what they do not."""
    differences = demo.on_unseen().differences()
    identities = count(differences["rank-1"].identities, "identity", "identities")
    return [
        *(report.verdict(name, "APD", "baseline", difference) for name, difference in differences.items()),
        f"±: one standard error; of a rank-1 √(p (1 − p) / n), of a difference that of its mean over {identities}, "
        "paired by query. How much another seed of the training would change is not in it.",
    ]


def result_table(demo: Demo) -> report.Table:
    """The unseen domain."""
    tested = demo.on_unseen()
    return report.results_table(tested.chance, tested.rankers, tested.differences())


def domains_table(demo: Demo) -> report.Table:
    """Rank-1 on every domain."""
    names = {name: f"{name}, unseen" if name == demo.unseen else name for name in demo.tested}
    return report.domains_table({names[name]: (tested.chance, tested.rankers) for name, tested in demo.tested.items()})


def times_table(demo: Demo) -> report.Table:
    """Each stage, and what the training of APD spent its time on."""
    seconds = demo.apd.info().get("seconds", {})
    parts = {name: seconds[key] for key, name in _PARTS.items() if key in seconds}
    return report.times_table(demo.seconds, {"train APD": parts})


def write_demo_report(path: Path, demo: Demo, commands: Sequence[str]) -> None:
    """Write or replace the page.

    Args:
        path: the ``.html`` file.
        demo: what was made and found.
        commands: with which to go on.
    """
    runs = {"baseline": demo.baseline, "APD": demo.apd}
    metrics = {name: read_metrics(run.path / METRICS) for name, run in runs.items()}
    sources = ", ".join(folder.name for folder in demo.sources)
    train = demo.apd.config.train
    sections = [
        report.Section(
            "Result",
            [
                f"{demo.unseen}: {demo.on_unseen().size()}. Left out of a query's ranking: images of its identity in "
                "its own camera. Cosine distance; flip test and re-ranking off."
            ],
            [result_table(demo)],
            verdicts(demo),
        ),
        report.Section(
            "Every domain",
            [
                "The sources are tested with other people than in training, seen by the same cameras. Colours: an RGB "
                "histogram of 64 bins ranks; normalized: of the middle half of the width, each channel relative to its "
                "mean and standard deviation there."
            ],
            [domains_table(demo)],
        ),
        _lists_section(demo),
        _synthesized_section(demo),
        report.Section(
            "Training",
            [
                f"Stage 2 takes {train.steps or 0:,} steps of {train.batch_size} images in both; in a step of APD each "
                "image passes through the transformer three times (K, K*, NK)."
            ],
            report.curve_plots(metrics),
        ),
        report.Section("Time", [], [times_table(demo)]),
        report.Section(
            "How to go on",
            ["In the folder where the demonstration was called:"],
            [report.Commands(commands)],
        ),
        report.configuration_section({name: run.config for name, run in runs.items()}),
        report.environment_section(describe_environment()),
    ]
    summary = [headline(demo), f"Trained on {sources}; seed {demo.seed}. {CAVEAT}"]
    report.write_report(path, "APD on drawn pedestrians", summary, sections)


def _lists_section(demo: Demo) -> report.Section:
    tested = demo.on_unseen()
    ranked = tested.rankers["APD"]
    queries = report.choose_queries(ranked)
    notes = [
        f"{'Right' if ranked.right[query] else 'Wrong'} at rank 1, average precision {ranked.ap[query]:.2f}"
        for query in queries
    ]
    text = (
        f"APD on {demo.unseen}: {int(ranked.right.sum())} of {len(ranked.right)} queries are right at rank 1. Shown "
        "are, in the order of average precision, those at a quarter and at three quarters of the right ones, and the "
        "same of the wrong ones. Green ✓: the query's identity; red ✗: another. Below: camera and distance."
    )
    return report.Section("Ranked lists", [text], report.ranked_strips(demo.lists, queries, tested.folder.path, notes))


def _synthesized_section(demo: Demo) -> report.Section:
    groups: dict[str, list[report.Synthesized]] = {}
    everything: list[list[report.Synthesized]] = []
    for folder in demo.sources:
        made = demo.apd.path / SYNTHESIZED / folder.name
        images = [
            report.Synthesized(
                sample.path,
                synthesized_path(made, "train", sample),
                (f"identity {sample.pid}", f"camera {sample.camid}"),
            )
            for sample in read_market(folder, ("train",)).train
        ]
        everything.append(images)
        places = np.linspace(0, len(images) - 1, min(_PAIRS, len(images))).astype(int)
        groups[folder.name] = [images[place] for place in places]
    flips = measure_flips(demo, [image.made for images in everything for image in images])
    text = [
        f"Stage 2 of APD is trained on {count(flips.images, 'original')} and one synthesized image of each. They "
        f"differ by {report.points(flips.change)} % of the range of brightness, on average over pixels and channels. "
        "Shown are images at even distances in the order of file names.",
        f"{flips.right:,} of the {flips.images:,} originals have an image of their identity as the nearest other one, "
        f"by ψ, the baseline's descriptor. The nearest one is of another identity for the synthesized images of "
        f"{flips.made:,} of these ({report.points(flips.made / max(1, flips.right))} %), and, with noise of the same "
        f"average size instead, for {flips.noise:,} ({report.points(flips.noise / max(1, flips.right))} %).",
    ]
    return report.Section("Originals and synthesized hard samples", text, report.synthesized_strips(groups))


class Flips(NamedTuple):
    """Training images whose nearest neighbour becomes one of another identity."""

    images: int
    change: float  # mean absolute change of the synthesized images, of the range of brightness
    right: int  # originals whose nearest other original has their identity
    made: int  # of these, those whose synthesized image is nearest to another identity
    noise: int  # and those whose noisy image is


@torch.no_grad()
def measure_flips(demo: Demo, made: Sequence[Path]) -> Flips:
    """How many images the generator moves to another identity, by ψ; and uniform noise of as large a mean change.

    Args:
        demo: its sources and its run of APD.
        made: the synthesized image of every training image, in the order of the sources.
    """
    sources, _ = gather_sources([read_market(folder, ("train",)).train for folder in demo.sources], 0, demo.seed)
    trunk = make_trunk(demo.apd, demo.device).to(demo.device)

    def read(paths: Sequence[Path]) -> Tensor:
        images = np.stack([load_image(path, demo.apd.size) for path in paths])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

    def right(images: Tensor) -> Tensor:
        deep = torch.cat([trunk(part.to(demo.device)).deep.cpu() for part in images.split(_BATCH)])
        return nearest_is_right(deep, bank, labels)

    before, after = read(sources.paths), read(made)
    change = (after - before).abs().mean((1, 2, 3), keepdim=True)
    noise = 2 * torch.rand(before.shape, generator=torch.Generator().manual_seed(demo.seed)) - 1
    bank = torch.cat([trunk(part.to(demo.device)).deep.cpu() for part in before.split(_BATCH)])
    labels = torch.from_numpy(sources.labels)
    kept = right(before)
    lost = [kept & ~right(images) for images in (after, (before + 2 * change * noise).clamp(0, 1))]
    return Flips(len(made), float(change.mean()), *(int(each.sum()) for each in (kept, *lost)))


def figures(demo: Demo) -> dict[str, Any]:
    """All numbers, as they are written to demo.json."""

    def of(tested: Tested) -> dict[str, Any]:
        return {
            "test": tested.size(),
            "random": tested.chance._asdict(),
            **{
                name: {"rank1": ranked.rank1, "rank1_error": ranked.rank1_error, "mAP": ranked.mAP}
                for name, ranked in tested.rankers.items()
            },
            "APD − baseline": {
                name: {"mean": difference.mean, "error": difference.error, "resolved": difference.resolved}
                for name, difference in tested.differences().items()
            },
        }

    return {
        "seed": demo.seed,
        "device": demo.device,
        "unseen": demo.unseen,
        "domains": {name: of(tested) for name, tested in demo.tested.items()},
        "seconds": {name: round(value, 1) for name, value in demo.seconds.items()},
    }
