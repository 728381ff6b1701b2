"""The page of one run: how it was trained, what it reaches, and what it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apd.data.datasets import read_dataset, read_source
from apd.data.market import ReidFolder, check_answers, folder_of
from apd.environment import describe_environment
from apd.errors import InputError
from apd.reports import page as report
from apd.reports.sections import (
    STAGES,
    attention_section,
    describe_size,
    lists_section,
    synthesized_section,
    training_section,
)
from apd.retrieval.comparison import Chance, Retrieval, chance, retrieve
from apd.retrieval.extraction import Extractor, extract_folder, load_extractor
from apd.retrieval.ranked_lists import RankedLists
from apd.retrieval.search import index_features, search_features
from apd.run import INFO, Run
from apd.training.train import SYNTHESIZED

_LISTED = 10  # gallery images in a ranked list
_ATTENTION = 4  # images whose attention is shown


@dataclass(frozen=True)
class _Tested:
    """A data set's query and gallery."""

    folder: ReidFolder
    chance: Chance
    found: Retrieval
    lists: RankedLists


def write_run_report(path: Path, run: Run, targets: Sequence[Path], device: str) -> None:
    """Write or replace the page.

    Args:
        path: the ``.html`` file.
        run: with a finished training; its sources must still be where they were.
        targets: further data sets to test on.
        device: where to compute.

    Raises:
        InputError: the run is not finished, or an image of a data set cannot be read.
    """
    info = run.info()
    extractor = load_extractor(str(run.path), device)
    sources = [read_source(source) for source in info.get("data", [])]
    if not sources:
        raise InputError(f"{run.path / INFO}: names no data folders")
    own = [(folder, "own test") for folder in sources if str(folder.path) in info.get("own_test", {})]
    folders = [*own, *((read_dataset(data, ("query", "gallery")), "target") for data in targets)]
    for folder, _ in folders:
        check_answers(folder)
    names = [f"{folder.path.name}, {kind}" for folder, kind in folders]
    tested = {
        name if names.count(name) == 1 else f"{folder.path}, {kind}": _test(folder, extractor)
        for name, (folder, kind) in zip(names, folders, strict=True)
    }
    sections = [_figures_section(tested)] if tested else []
    sections += [
        lists_section(f"Ranked lists: {name}", f"{run.name} on {name}", one.found, one.lists, one.folder.path)
        for name, one in tested.items()
    ]
    if (run.path / SYNTHESIZED).is_dir():
        sections.append(synthesized_section(run, run.name, info["data"], device))
    if run.config.model.ssd != "none":
        sections.append(attention_section(run, _shown(tested, sources)))
    seconds = {name: info["seconds"][key] for key, name in STAGES.items() if key in info["seconds"]}
    sections += [
        training_section({run.name: run}, f"Started {info['started']}; {_length(run)}."),
        report.Section("Time", [], [report.times_table(seconds, {})]),
        report.configuration_section({run.name: run.config}),
        report.environment_section(describe_environment()),
    ]
    summary = [
        f"{run.name}: perturbation {run.config.perturbation}, model.ssd {run.config.model.ssd}, "
        f"{run.config.model.backbone} at {run.size[0]}×{run.size[1]}.",
        f"Trained on {', '.join(folder.path.name for folder in sources)}; seed {run.config.seed}; "
        f"weights {run.fingerprint()[:12]}. One run: how much another seed would change is not in these figures.",
    ]
    report.write_report(path, f"Run {run.name}", summary, sections)


def _test(data: ReidFolder, extractor: Extractor) -> _Tested:
    folder = folder_of(data.path, {"query": data.query, "gallery": data.gallery})
    rows = extract_folder(extractor, folder)
    query, gallery = rows.part("query"), rows.part("gallery")
    images = replace(query, names=np.array([str(folder.path / name) for name in query.names]))
    index = index_features(gallery, "cosine", device="cpu")
    lists = search_features(images, index, _LISTED, exclude_same_camera=True)
    return _Tested(folder, chance(query, gallery), retrieve(query, gallery), lists)


def _figures_section(tested: dict[str, _Tested]) -> report.Section:
    sizes = [f"{name}: {describe_size(one.folder)}." for name, one in tested.items()]
    text = (
        "Left out of a query's ranking: images of its identity in its own camera. Cosine distance; flip test and "
        "re-ranking off; ±: one standard error, √(p (1 − p) / n). The sources are tested with other people than in "
        "training, seen by the same cameras."
    )
    table = report.figures_table({name: (one.chance, one.found) for name, one in tested.items()})
    return report.Section("Result", [text], [table], sizes)


def _shown(tested: dict[str, _Tested], sources: Sequence[ReidFolder]) -> list[Path]:
    """Images for the attention maps: queries where something was tested, else of the training."""
    if tested:
        samples = [sample for one in tested.values() for sample in one.folder.query]
    else:
        samples = [sample for folder in sources for sample in folder.train]
    places = np.linspace(0, len(samples) - 1, min(_ATTENTION, len(samples))).astype(int)
    return [samples[place].path for place in places]


def _length(run: Run) -> str:
    train = run.config.train
    length = f"{train.steps:,} steps" if train.steps is not None else f"{train.epochs:g} epochs"
    return f"stage 2: {length} of {train.batch_size} images"
