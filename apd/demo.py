"""The demonstration: drawn domains, a baseline and APD trained on three of them, both tested on a fourth."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from apd import report
from apd.comparison import Chance, ColourHistogram, Difference, Retrieval, chance, paired_difference, retrieve
from apd.config_files import load_config
from apd.data.images import ImageStore
from apd.data.market import FOLDERS, ReidFolder, read_market
from apd.data.pedestrians import SOURCES, UNSEEN, Domain, write_domain
from apd.display import console, count, print_written
from apd.environment import describe_environment
from apd.errors import InputError
from apd.extraction import Extractor, extract_folder, load_extractor
from apd.features import FeatureSet
from apd.files import write_json
from apd.retrieval import RankedLists, describe_queries, extractor_of, index_features, note_run, search_features
from apd.run import CONFIG, METRICS, Run
from apd.synthesis import synthesized_path
from apd.training.log import read_metrics
from apd.training.train import SYNTHESIZED, start_run, train_run
from apd_kernels import Gallery

DATA, BASELINE, APD, GALLERY, REPORT, FIGURES = "data", "baseline", "apd", "gallery", "report.html", "demo.json"
_MADE_BY = "apd demo"
_LISTED = 10  # gallery images in a ranked list
_PAIRS = 6  # synthesized images shown of each source
_STAGES = {"mpg": "stage 1, MPG-Net", "synthesize": "synthesize images", "sp": "stage 2, SP-Net"}


class Stages:
    """Prints each stage, and its time as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        console.print(f"[bold]{name}[/bold]")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        console.print(f"{name}: {self.seconds[name]:.0f} s\n", style="bold green")


@dataclass(frozen=True)
class Tested:
    """What was measured on the test images of one domain."""

    size: str  # queries, identities, gallery images, in words
    chance: Chance
    rankers: dict[str, Retrieval]  # colours, the baseline, and APD last

    def differences(self) -> dict[str, Difference]:
        """Of APD and the baseline."""
        ours, theirs = self.rankers["APD"], self.rankers["baseline"]
        return {
            "rank-1": paired_difference(ours.right, theirs.right, ours.identities),
            "mAP": paired_difference(ours.ap, theirs.ap, ours.identities),
        }


@dataclass(frozen=True)
class Demo:
    """What the demonstration found."""

    unseen: str
    tested: dict[str, Tested]  # by domain
    lists: RankedLists  # APD's, of the unseen domain
    seconds: dict[str, float]  # by stage


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    sources: Sequence[Domain] = SOURCES,
    unseen: Domain = UNSEEN,
    train_identities: int = 40,
    test_identities: int = 60,
    frames: int = 4,
    overrides: Sequence[str] = (),
) -> Demo:
    """Draw domains, train the baseline and APD on the sources, test both on all, search, and write a report.

    Args:
        output: folder to make; an earlier demonstration in it is replaced.
        seed: of the people drawn and of both trainings.
        device: where to compute.
        sources: domains to train on.
        unseen: domain that is only tested on.
        train_identities: of each source, for training.
        test_identities: of every domain, for testing.
        frames: images of an identity in each of two cameras.
        overrides: texts ``key=value`` on top of the configuration ``demo``, of both trainings.

    Raises:
        InputError: `output` holds something else than a demonstration.
    """
    prepare_folder(output)
    stages = Stages()
    folders = {domain.name: output / DATA / domain.name for domain in (*sources, unseen)}
    with stages("draw the domains"):
        (output / DATA).mkdir()
        for domain in (*sources, unseen):
            identities = 0 if domain is unseen else train_identities
            write_domain(
                folders[domain.name],
                domain,
                seed,
                train_identities=identities,
                test_identities=test_identities,
                frames=frames,
            )
    training = [folders[domain.name] for domain in sources]
    both = [f"seed={seed}", *overrides]
    with stages("train the baseline"):
        config = load_config("demo", ["perturbation=none", "model.ssd=none", *both])
        baseline = start_run(output / BASELINE, config, training)
        train_run(baseline, device)
    with stages("train APD"):
        config = load_config("demo", [f"mpg.trunk_weights={baseline.path.absolute()}", *both])
        apd = start_run(output / APD, config, training)
        train_run(apd, device)
    with stages("test on every domain"):
        extractors = {
            "colours": _colours(False, baseline.size, device),
            "normalized colours": _colours(True, baseline.size, device),
            "baseline": load_extractor(str(baseline.path), device),
            "APD": load_extractor(str(apd.path), device),
        }
        data = {name: read_market(folder, ("query", "gallery")) for name, folder in folders.items()}
        tested = {name: _test(folder, extractors) for name, folder in data.items()}
    with stages("index and search the unseen domain"):
        _index(extractors["APD"], data[unseen.name], output / GALLERY)
        lists = _search([sample.path for sample in data[unseen.name].query], output / GALLERY, device)
    found = Demo(unseen.name, tested, lists, stages.seconds)
    with stages("write the report"):
        commands = _commands(output, found)
        _write_report(output / REPORT, found, {"baseline": baseline, "APD": apd}, training, seed, commands)
        write_json(output / FIGURES, _as_json(found, seed, device))
    _print(found, seed)
    print_written(output / REPORT, output / FIGURES)
    console.print("\nHow to go on:")
    for line in commands:
        console.print(f"  {line}", soft_wrap=True, markup=False)
    return found


def prepare_folder(output: Path) -> None:
    """Make the folder, or remove from it what an earlier demonstration made.

    Raises:
        InputError: it is a file, or a folder with contents that no demonstration made.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: expected a folder, found a file")
    if output.is_dir() and any(output.iterdir()):
        if not _is_demo(output):
            raise InputError(f"{output}: not empty, and not made by apd demo; choose another --output")
        for name in (REPORT, DATA, BASELINE, APD, GALLERY):
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / FIGURES, {"made_by": _MADE_BY, "finished": False})


def _is_demo(output: Path) -> bool:
    try:
        content = json.loads((output / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("made_by") == _MADE_BY


def _colours(normalized: bool, size: tuple[int, int], device: str) -> Extractor:
    return Extractor(ColourHistogram(normalized), size, "colour histogram", "", device)


def _test(folder: ReidFolder, extractors: Mapping[str, Extractor]) -> Tested:
    rankers = {}
    for name, extractor in extractors.items():
        rows = extract_folder(extractor, folder)
        query, gallery = rows.part("query"), rows.part("gallery")
        rankers[name] = retrieve(query, gallery)
    identities, cameras = ({getattr(s, what) for s in folder.query} for what in ("pid", "camid"))
    size = report.contents(len(folder.query), len(folder.gallery), len(identities), len(cameras))
    return Tested(size, chance(query, gallery), rankers)


def _index(extractor: Extractor, folder: ReidFolder, path: Path) -> None:
    """As ``apd index --checkpoint`` does."""
    rows: FeatureSet = extract_folder(extractor, ReidFolder(folder.path, (), (), folder.gallery)).part("gallery")
    gallery = index_features(rows, "cosine", device="cpu")
    note_run(gallery, extractor, folder.path)
    gallery.save(path)


def _search(images: Sequence[Path], path: Path, device: str) -> RankedLists:
    """As ``apd search --query … --exclude-same-camera`` does."""
    gallery = Gallery.load(path, device="cpu")
    queries = describe_queries(extractor_of(gallery, path, device), images, None, None)
    return search_features(queries, gallery, _LISTED, exclude_same_camera=True)


# What is said of the result


def headline(found: Demo) -> str:
    """The result in a sentence, composed from the numbers."""
    tested = found.tested[found.unseen]
    shares = {name: f"{report.points(ranked.rank1)} %" for name, ranked in tested.rankers.items()}
    return (
        f"Rank-1 on {found.unseen}, a domain that no training saw: APD {shares['APD']}, baseline {shares['baseline']}; "
        f"a random ranking {report.points(tested.chance.rank1)} %, colours alone {shares['colours']}, normalized "
        f"{shares['normalized colours']}."
    )


def verdicts(found: Demo) -> list[str]:
    """What the numbers say of APD and the baseline, and what they do not."""
    differences = found.tested[found.unseen].differences()
    identities = count(differences["rank-1"].identities, "identity", "identities")
    return [
        *(report.verdict(name, "APD", "baseline", difference) for name, difference in differences.items()),
        f"±: one standard error; of a rank-1 √(p (1 − p) / n), of a difference that of its mean over {identities}, "
        "paired by query. How much another seed of the training would change is not in it.",
    ]


CAVEAT = "One seed and drawn people: this shows the mechanics, it is no evidence about the method."


def _print(found: Demo, seed: int) -> None:
    tested = found.tested[found.unseen]
    result = report.results_table(tested.chance, tested.rankers, tested.differences())
    console.print(f"{found.unseen}, unseen: {tested.size}; seed {seed}", soft_wrap=True)
    _print_table(result)
    _print_table(_domains_table(found))
    for line in (headline(found), *verdicts(found), CAVEAT):
        console.print(line, soft_wrap=True)
    console.print()
    _print_table(report.times_table(found.seconds, {}))


def _domains_table(found: Demo) -> report.Table:
    names = {name: f"{name}, unseen" if name == found.unseen else name for name in found.tested}
    return report.domains_table({names[name]: (tested.chance, tested.rankers) for name, tested in found.tested.items()})


def _print_table(table: report.Table) -> None:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i, heading in enumerate(table.head):
        shown.add_column(heading, justify="right" if i else "left")
    for i, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if i == table.strong else None)
    console.print(shown)
    console.print()


def _commands(output: Path, found: Demo) -> list[str]:
    """With which a newcomer goes on; they can be typed as they are in the folder where the demonstration was called."""
    data = output / DATA / found.unseen
    query = data / FOLDERS["query"] / Path(found.lists.query.names[0]).name
    picture = output / "ranked.png"
    commands = (
        (
            "apd",
            "search",
            "--gallery",
            output / GALLERY,
            "--query",
            query,
            "--exclude-same-camera",
            "--picture",
            picture,
        ),
        ("apd", "evaluate", "--checkpoint", output / APD, "--data", data),
        ("apd", "config", "show", output / APD / CONFIG),
        ("tensorboard", "--logdir", output),
    )
    return [shlex.join([_program(name), *map(str, arguments)]) for name, *arguments in commands]


def _program(name: str) -> str:
    """A program of this environment: its name where the shell finds it, otherwise its path."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not own.exists() or (found is not None and Path(found).resolve() == own.resolve()):
        return name
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def _write_report(
    path: Path, found: Demo, runs: Mapping[str, Run], training: Sequence[Path], seed: int, commands: Sequence[str]
) -> None:
    tested = found.tested[found.unseen]
    metrics = {name: read_metrics(run.path / METRICS) for name, run in runs.items()}
    sources = [folder.name for folder in training]
    config = runs["APD"].config
    sections = [
        report.Section(
            "Result",
            [
                f"{found.unseen}: {tested.size}. A query's images of the same identity in its own camera are left "
                "out; cosine distance, no re-ranking, no flip test.",
            ],
            [report.results_table(tested.chance, tested.rankers, tested.differences())],
            verdicts(found),
        ),
        report.Section(
            "Every domain",
            [
                "Rank-1, %. The sources are tested with other people than in training, seen by the same cameras. Colours: "
                "ranked by an RGB histogram of 64 bins; normalized: of the middle half of the width, each channel relative "
                "to its mean and standard deviation there.",
            ],
            [_domains_table(found)],
        ),
        _lists_section(found),
        _synthesized_section(runs["APD"], training, metrics["APD"]),
        report.Section(
            "Training",
            [
                f"Stage 2 is {config.train.steps:,} steps of {config.train.batch_size} images for both; a step of APD passes "
                "through the transformer three times (K, K*, NK).",
            ],
            report.curve_plots(metrics),
        ),
        report.Section(
            "Time",
            [],
            [report.times_table(found.seconds, {"train APD": _named(runs["APD"].info().get("seconds", {}))})],
        ),
        report.Section("How to go on", [], [report.Commands(commands)]),
        report.configuration_section({name: run.config for name, run in runs.items()}),
        report.environment_section(describe_environment()),
    ]
    summary = [headline(found), f"Trained on {', '.join(sources)}; seed {seed}. {CAVEAT}"]
    report.write_report(path, "APD on drawn pedestrians", summary, sections)


def _named(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds[key] for key, name in _STAGES.items() if key in seconds}


def _lists_section(found: Demo) -> report.Section:
    ranked = found.tested[found.unseen].rankers["APD"]
    queries = report.choose_queries(ranked)
    notes = [
        f"{'Right' if ranked.right[query] else 'Wrong'} at rank 1, average precision {ranked.ap[query]:.2f}"
        for query in queries
    ]
    right, of = int(ranked.right.sum()), len(ranked.right)
    text = (
        f"APD on {found.unseen}: {right} of {of} queries are right at rank 1. Shown are four: in the order of average "
        "precision, those a quarter and three quarters down the right ones, and the same of the wrong ones. "
        "Green ✓: the query's identity. Red ✗: another. Below each: camera and distance."
    )
    folder = Path(found.lists.query.names[0]).parent.parent
    return report.Section("Ranked lists", [text], report.ranked_strips(found.lists, queries, folder, notes))


def _synthesized_section(run: Run, training: Sequence[Path], metrics: Sequence[Mapping[str, str]]) -> report.Section:
    groups, change, images = {}, 0.0, 0
    for folder in training:
        samples = read_market(folder, ("train",)).train
        made = [synthesized_path(run.path / SYNTHESIZED / folder.name, "train", sample) for sample in samples]
        originals = ImageStore([sample.path for sample in samples], run.size, cache=True)
        results = ImageStore(made, run.size, cache=True)
        for i in range(len(samples)):
            change += float((originals[i].float() - results[i].float()).abs().mean()) / 255
        images += len(samples)
        places = torch.linspace(0, len(samples) - 1, min(_PAIRS, len(samples))).long().tolist()
        groups[folder.name] = [
            report.Synthesized(samples[i].path, made[i], (f"identity {samples[i].pid}", f"camera {samples[i].camid}"))
            for i in places
        ]
    text = [
        f"{images:,} images, one of each original, with which stage 2 is trained as well. They differ from the originals by {100 * change / images:.1f} % of "
        f"the range of brightness (mean over pixels and channels). Shown are {_PAIRS} of each source, evenly spaced in the order of file names."
    ]
    flipped = report.last_flipped(metrics)
    if flipped is not None:
        text.append(
            f"{report.points(flipped.share)} % flip: of the originals whose nearest other image (by ψ, the baseline's descriptor) has their identity, "
            f"the share whose synthesized image is nearest to another identity. Mean over {count(flipped.lines, 'batch', 'batches')} of {run.config.mpg.batch_size} at the end of stage 1."
        )
    return report.Section("Originals and synthesized hard samples", text, report.synthesized_strips(groups))


def _as_json(found: Demo, seed: int, device: str) -> dict[str, Any]:
    def figures(tested: Tested) -> dict[str, Any]:
        rankers = {
            name: {"rank-1": ranked.rank1, "standard_error": ranked.rank1_error, "mAP": ranked.mAP}
            for name, ranked in tested.rankers.items()
        }
        differences = {
            name: {"mean": difference.mean, "standard_error": difference.error, "resolved": difference.resolved}
            for name, difference in tested.differences().items()
        }
        return {
            "test": tested.size,
            "random": {"rank-1": tested.chance.rank1, "mAP": tested.chance.mAP},
            **rankers,
            "APD − baseline": differences,
        }

    return {
        "made_by": _MADE_BY,
        "finished": True,
        "seed": seed,
        "device": device,
        "unseen": found.unseen,
        "domains": {name: figures(tested) for name, tested in found.tested.items()},
        "seconds": {name: round(value, 1) for name, value in found.seconds.items()},
    }
