"""What the demonstration says of its result: sentences, tables, the page, and demo.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apd.console import count
from apd.data.market import ReidFolder
from apd.environment import describe_environment
from apd.reports import page as report
from apd.reports.sections import STAGES, describe_size, lists_section, synthesized_section, training_section
from apd.retrieval.comparison import Chance, Difference, Retrieval, paired_difference
from apd.retrieval.ranked_lists import RankedLists
from apd.run import Run

# The networks, with what is said of each on top of the configuration. Noise: as strong as APD's images may be.
TRAININGS = {
    "baseline": ("perturbation=none", "model.ssd=none"),
    "SP-Net": ("perturbation=none",),
    "noise": ("perturbation=noise",),
    "APD": (),
}
CONTROLS = ("baseline", "noise")  # of APD
CAVEAT = "One seed and drawn people: this shows the mechanics, it is no evidence about the method."


@dataclass(frozen=True)
class Tested:
    """What was measured on the test images of one domain."""

    folder: ReidFolder
    chance: Chance
    rankers: dict[str, Retrieval]  # "colours", "normalized colours", those of TRAININGS

    def size(self) -> str:
        return describe_size(self.folder)

    def differences(self, control: str = "baseline") -> dict[str, Difference]:
        """Of APD and a control."""
        ours, theirs = self.rankers["APD"], self.rankers[control]
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
    runs: dict[str, Run]  # of TRAININGS
    tested: dict[str, Tested]  # by domain
    lists: RankedLists  # APD's, of the unseen domain
    seconds: dict[str, float]  # by stage

    @property
    def apd(self) -> Run:
        return self.runs["APD"]

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
    tested = demo.on_unseen()
    identities = count(tested.differences()["rank-1"].identities, "identity", "identities")
    collapsed = {name: run.info().get("collapsed") for name, run in demo.runs.items()}
    return [
        *(f"{name} collapsed at step {found['step']}." for name, found in collapsed.items() if found),
        *(
            report.verdict(name, "APD", control, difference)
            for control in CONTROLS
            for name, difference in tested.differences(control).items()
        ),
        f"±: one standard error; of a rank-1 √(p (1 − p) / n), of a difference that of its mean over {identities}, "
        "paired by query. How much another seed of the training would change is not in it.",
    ]


def result_table(demo: Demo) -> report.Table:
    """The unseen domain."""
    tested = demo.on_unseen()
    differences = {f"APD − {control}": list(tested.differences(control).values()) for control in CONTROLS}
    return report.results_table(tested.chance, tested.rankers, differences)


def domains_table(demo: Demo) -> report.Table:
    """Rank-1 on every domain."""
    names = {name: f"{name}, unseen" if name == demo.unseen else name for name in demo.tested}
    return report.domains_table({names[name]: (tested.chance, tested.rankers) for name, tested in demo.tested.items()})


def times_table(demo: Demo) -> report.Table:
    """Each stage, and what the training of APD spent its time on."""
    seconds = demo.apd.info().get("seconds", {})
    parts = {name: seconds[key] for key, name in STAGES.items() if key in seconds}
    return report.times_table(demo.seconds, {"train APD": parts})


def write_demo_report(path: Path, demo: Demo, commands: Sequence[str]) -> None:
    """Write or replace the page.

    Args:
        path: the ``.html`` file.
        demo: what was made and found.
        commands: with which to go on.
    """
    unseen = demo.on_unseen()
    sources = ", ".join(folder.name for folder in demo.sources)
    train = demo.apd.config.train
    sections = [
        report.Section(
            "Result",
            [
                f"{demo.unseen}: {unseen.size()}. Left out of a query's ranking: images of its identity in "
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
        lists_section("Ranked lists", f"APD on {demo.unseen}", unseen.rankers["APD"], demo.lists, unseen.folder.path),
        synthesized_section(demo.apd, "APD", demo.sources, demo.device),
        training_section(
            demo.runs,
            f"Stage 2 takes {train.steps or 0:,} steps of {train.batch_size} images in all; in a step of SP-Net each "
            "image passes through the transformer three times (K, K*, NK).",
        ),
        report.Section("Time", [], [times_table(demo)]),
        report.Section(
            "How to go on",
            ["In the folder where the demonstration was called:"],
            [report.Commands(commands)],
        ),
        report.configuration_section({name: run.config for name, run in demo.runs.items()}),
        report.environment_section(describe_environment()),
    ]
    summary = [headline(demo), f"Trained on {sources}; seed {demo.seed}. {CAVEAT}"]
    report.write_report(path, "APD on drawn pedestrians", summary, sections)


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
            **{
                f"APD − {control}": {
                    name: {"mean": difference.mean, "error": difference.error, "resolved": difference.resolved}
                    for name, difference in tested.differences(control).items()
                }
                for control in CONTROLS
            },
        }

    return {
        "seed": demo.seed,
        "device": demo.device,
        "unseen": demo.unseen,
        "domains": {name: of(tested) for name, tested in demo.tested.items()},
        "seconds": {name: round(value, 1) for name, value in demo.seconds.items()},
    }
