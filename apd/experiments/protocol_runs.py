"""Running a protocol: its trainings, the tests on unseen targets, and the table.

The folder of a protocol:

protocol.json   what is run: protocol, data sets, configuration
runs/           a run a training
splits/         lists of query and gallery of each target that is tested in ten splits
results/        the figures of each training and target
table.md, table.json
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apd.config.values import Config
from apd.console import console, progress
from apd.data.datasets import DATASETS, DataSpec, read_dataset
from apd.data.images import check_readable
from apd.data.market import ReidFolder, check_answers
from apd.data.splits import Split, read_splits, write_splits
from apd.errors import DataWarning, InputError
from apd.experiments.protocols import AVERAGE, Protocol, Task
from apd.files import write_json, write_text
from apd.retrieval.extraction import Extractor, extract_folder, load_extractor
from apd.retrieval.features import FeatureSet
from apd.run import CONFIG, Run
from apd.training.train import start_run, train_run
from apd_kernels import rank_metrics

FIGURES = ("mAP", "rank-1", "rank-5", "rank-10")
_SPLIT_SEED = 0  # the splits are the protocol's, not the training's: every seed is tested on the same ones


@dataclass(frozen=True)
class TargetResult:
    """The figures of a network on a data set that it never saw: of its query and gallery, or of each of its splits."""

    queries: int  # that had an answer, of all splits
    left_out: int
    splits: list[dict[str, float]]

    def mean(self, figure: str) -> float:
        return float(np.mean([split[figure] for split in self.splits]))

    def deviation(self, figure: str) -> float | None:
        """Standard deviation over the splits; None where there is only one."""
        return float(np.std([split[figure] for split in self.splits], ddof=1)) if len(self.splits) > 1 else None


def run_protocol(
    protocol: Protocol, data: Mapping[str, DataSpec], config: Config, output: Path, device: str
) -> dict[str, dict[str, TargetResult]]:
    """Train and test, or go on with it, and write the table.

    Args:
        protocol: what to do.
        data: where its data sets are (`apd.experiments.protocols.locate`).
        config: of every training.
        output: folder of the protocol; one of the same protocol, data and configuration goes on where it stopped.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        the results by training (`Task.name`) and target.

    Raises:
        InputError: the folder holds another protocol's runs, or the data or the configuration cannot be used.
    """
    _check_folder(protocol, data, config, output)
    _check_targets(protocol, data, output)
    results: dict[str, dict[str, TargetResult]] = {}
    for number, task in enumerate(protocol.tasks, 1):
        console.print(f"training {number} of {len(protocol.tasks)}: {task.name}", style="bold", soft_wrap=True)
        run = _trained(task, data, config, output / "runs" / task.folder, device)
        results[task.name] = _tested(run, task, data, output, device)
    write_json(output / "table.json", _as_json(protocol, results))
    write_text(output / "table.md", as_markdown(protocol, data, results))
    return results


def _check_folder(protocol: Protocol, data: Mapping[str, DataSpec], config: Config, output: Path) -> None:
    """Write down what is run; a folder where something else was written down is refused."""
    wanted = {
        "protocol": protocol.name,
        "trainings": [task.name for task in protocol.tasks],
        "data": {name: str(data[name]) for name in protocol.data_sets},
        "config": asdict(config),
    }
    wanted = json.loads(json.dumps(wanted))
    path = output / "protocol.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from error
    for key, before, now in _changes("", found, wanted):
        raise InputError(f"{output}: was begun with {key} {before}, not {now}; choose another --output")


def _changes(key: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [(key, before, now)]
    names = dict.fromkeys((*before, *now))
    return [one for name in names for one in _changes(f"{key}.{name}".strip("."), before.get(name), now.get(name))]


def _check_targets(protocol: Protocol, data: Mapping[str, DataSpec], output: Path) -> None:
    """Look at the targets of the trainings that are to come: a test that cannot be taken would waste them.

    Nothing of a target reaches a training.

    Raises:
        InputError: a target cannot be read, allows no splits, or no query has an answer.
    """
    runs = {task: output / "runs" / task.folder for task in protocol.tasks}
    coming = [
        task for task, path in runs.items() if not (path / CONFIG).is_file() or "finished" not in Run(path).info()
    ]
    images: list[Path] = []
    for target in dict.fromkeys(target for task in coming for target in task.targets):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # they are given when it is tested
            folder = read_dataset(data[target], ("query", "gallery"))
        lists, splits = output / "splits" / f"{target}.json", data[target].dataset.splits
        if splits is None:
            check_answers(folder)
        elif not lists.exists():
            splits(folder, _SPLIT_SEED)
        images += [sample.path for sample in (*folder.query, *folder.gallery)]
    with progress("looking at targets", len(images)) as advance:
        check_readable(images, advance)


def _trained(task: Task, data: Mapping[str, DataSpec], config: Config, path: Path, device: str) -> Run:
    """The finished run of a training, which may go on with an interrupted one."""
    if (path / CONFIG).is_file():
        run = Run(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        run = start_run(path, config, [_source(data[name], task.all_images) for name in task.sources])
    if "finished" not in run.info():
        train_run(run, device)
    return run


def _source(spec: DataSpec, all_images: bool) -> DataSpec:
    assert spec.name is not None
    return replace(spec, all_images=all_images and len(DATASETS[spec.name].parts) > 1)


def _tested(run: Run, task: Task, data: Mapping[str, DataSpec], output: Path, device: str) -> dict[str, TargetResult]:
    extractor: Extractor | None = None
    results = {}
    for target in task.targets:
        path = output / "results" / f"{task.folder}-{target}.json"
        lists = output / "splits" / f"{target}.json"
        result = _read_result(path, _of(run, lists))
        if result is None:
            extractor = extractor or load_extractor(str(run.path), device)
            result = evaluate_target(extractor, data[target], lists)
            path.parent.mkdir(exist_ok=True)
            write_json(path, {**_of(run, lists), **asdict(result)})
        console.print(f"{target}: mAP {_cell(result, 'mAP')}, rank-1 {_cell(result, 'rank-1')}, in %", soft_wrap=True)
        results[target] = result
    return results


def evaluate_target(extractor: Extractor, spec: DataSpec, lists: Path) -> TargetResult:
    """Test a network on an unseen data set by the field's rule: its query and gallery, or the mean over ten splits.

    Args:
        extractor: the network.
        spec: the data set, by name.
        lists: file of the splits' lists, written where it is not there yet.

    Raises:
        InputError: the data set cannot be read, or the lists name other images.
    """
    folder = read_dataset(spec, ("query", "gallery"))
    with progress("images", len(folder.query) + len(folder.gallery)) as advance:
        rows = extract_folder(extractor, folder, advance=advance)
    return _measure(rows, _splits(spec, folder, rows, lists), extractor.device)


def _splits(spec: DataSpec, folder: ReidFolder, rows: FeatureSet, lists: Path) -> list[Split]:
    """The splits, as rows of the features."""
    assert rows.split is not None
    if spec.dataset.splits is None:
        return [Split(np.flatnonzero(rows.split == 1), np.flatnonzero(rows.split == 2))]
    names = [str(name) for name in rows.names]
    if not lists.exists():
        images = [sample.path.relative_to(folder.path).as_posix() for sample in (*folder.query, *folder.gallery)]
        lists.parent.mkdir(exist_ok=True)
        write_splits(lists, spec.dataset.splits(folder, _SPLIT_SEED), images)
    return read_splits(lists, names)


def _measure(rows: FeatureSet, splits: Sequence[Split], device: str) -> TargetResult:
    columns = (rows.features, rows.identities().astype(np.int64), rows.cameras().astype(np.int64))
    features, pids, camids = (torch.from_numpy(column).to(device) for column in columns)
    found, queries, left_out = [], 0, 0
    for split in splits:
        query, gallery = (torch.from_numpy(part).to(device) for part in (split.query, split.gallery))
        result = rank_metrics(
            features[query],
            features[gallery],
            pids[query],
            pids[gallery],
            camids[query],
            camids[gallery],
            metric="cosine",
        )
        ranks = {f"rank-{k}": float(result.cmc[k - 1]) for k in (1, 5, 10)}
        found.append({"mAP": result.mAP, **ranks})
        queries += int(result.valid.sum())
        left_out += int((~result.valid).sum())
    return TargetResult(queries, left_out, found)


def _of(run: Run, lists: Path) -> dict[str, str | None]:
    """What a result is of: the network, and the splits where there are some."""
    splits = hashlib.sha256(lists.read_bytes()).hexdigest() if lists.exists() else None
    return {"weights": run.fingerprint(), "lists": splits}


def _read_result(path: Path, of: Mapping[str, str | None]) -> TargetResult | None:
    """A result that was written before; None where there is none, or that of another network or of other splits."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if {key: content.pop(key, "") for key in of} == of:
            return TargetResult(**content)
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    return None


def _by_target(results: Mapping[str, Mapping[str, TargetResult]]) -> dict[str, TargetResult]:
    return {target: result for tested in results.values() for target, result in tested.items()}


def _as_json(protocol: Protocol, results: Mapping[str, Mapping[str, TargetResult]]) -> dict[str, Any]:
    measured = {
        name: {
            target: {
                **{figure: result.mean(figure) for figure in FIGURES},
                "sd": {figure: result.deviation(figure) for figure in FIGURES},
                "splits": len(result.splits),
                "queries": result.queries,
                "left_out": result.left_out,
            }
            for target, result in tested.items()
        }
        for name, tested in results.items()
    }
    found = _by_target(results).values()
    return {
        "protocol": protocol.name,
        "results": measured,
        AVERAGE: {figure: math.fsum(result.mean(figure) for result in found) / len(found) for figure in FIGURES},
        "published, in %: mAP, rank-1": {figures.method: figures.by_target for figures in protocol.published},
    }


def as_markdown(
    protocol: Protocol, data: Mapping[str, DataSpec], results: Mapping[str, Mapping[str, TargetResult]]
) -> str:
    """The table in the field's format: mAP and rank-1 by target, and their average; published figures below ours."""
    found = _by_target(results)
    columns = [*found, *([AVERAGE] if len(found) > 1 else [])]
    titles = [DATASETS[column].short if column in found else "average" for column in columns]
    lines = [
        f"| {protocol.name}, in % | {' | '.join(f'{title} mAP | {title} R1' for title in titles)} |",
        f"|---|{'---|' * 2 * len(columns)}",
    ]
    ours = [cell for result in found.values() for cell in (_cell(result, "mAP"), _cell(result, "rank-1"))]
    if len(found) > 1:
        ours += [_percent(float(np.mean([result.mean(f) for result in found.values()]))) for f in ("mAP", "rank-1")]
    lines.append(f"| ours | {' | '.join(ours)} |")
    for figures in protocol.published:
        pairs = [figures.by_target.get(column) for column in columns]
        cells = [cell for pair in pairs for cell in (("–", "–") if pair is None else (f"{v:.1f}" for v in pair))]
        lines.append(f"| {figures.method} (published) | {' | '.join(cells)} |")
    read = ", ".join(f"{name}/{spec.variant}" if spec.variant else name for name, spec in data.items())
    notes = [
        f"{protocol.name}: {protocol.text}. Trainings: {'; '.join(results)}. Data: {read}.",
        "Cosine distance, no re-ranking, no flip test.",
    ]
    if any(len(result.splits) > 1 for result in found.values()):
        notes.append("±: standard deviation over the splits.")
    return "\n".join([*lines, "", " ".join(notes)]) + "\n"


def _cell(result: TargetResult, figure: str) -> str:
    return _percent(result.mean(figure), result.deviation(figure))


def _percent(value: float, spread: float | None = None) -> str:
    return f"{100 * value:.1f}" if spread is None else f"{100 * value:.1f} ± {100 * spread:.1f}"
