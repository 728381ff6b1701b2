"""Train what is missing of an ablation, several runs at once, and test what is finished.

The folder of an ablation:

runs/ROW/SEED         a run as `apd train` makes it; its ``ablation.log`` holds what the training printed
results.jsonl         a line for every run that is finished and tested
queries/ROW/SEED.npz  what every query found, for paired comparisons
splits/TARGET.json    the lists of query and gallery images
results.md            the table
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apd.config.values import SETTINGS, Config, shown, value_of
from apd.console import console, progress
from apd.data.datasets import read_source
from apd.data.images import check_readable
from apd.data.market import read_market
from apd.errors import DataWarning, InputError
from apd.experiments.ablation.plan import Bracket, Plan, Row
from apd.experiments.ablation.results import ResultFile
from apd.files import only_writer, write_bytes
from apd.retrieval.extraction import load_extractor
from apd.retrieval.features import FeatureSet, load_features
from apd.retrieval.targets import Target, Tested, load_target, save_queries
from apd.run import CONFIG, GENERATOR, WEIGHTS, Run
from apd.training.sources import gather_sources
from apd.training.sp import total_steps
from apd.training.threads import available_threads
from apd.training.train import start_run

RESULTS, TABLE, LOG = "results.jsonl", "results.md", "ablation.log"
_STAGE1 = ("seed", "data.height", "data.width")  # with all of mpg: what decides a generator


@dataclass(frozen=True)
class Job:
    """One run of the ablation."""

    row: Row
    seed: int
    path: Path
    config: Config
    steps: int  # of stage 2

    @property
    def name(self) -> str:
        return f"{self.row.name}/{self.seed}"

    @property
    def needs(self) -> list[str]:
        """Names of the jobs that come first."""
        return [f"{row}/{self.seed}" for row in (self.row.trunk, self.row.generator) if row is not None]

    def finished(self) -> bool:
        return (self.path / WEIGHTS).is_file() and "finished" in Run(self.path).info()

    def digest(self) -> str:
        """Names the configuration: SHA-256, shortened; a trunk counts by its row, wherever the folder lies."""
        values = asdict(self.config)
        if self.row.trunk is not None:
            values["mpg"]["trunk_weights"] = f"row {self.row.trunk}"
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Ablation:
    """A plan with its data, in a folder.

    Args:
        plan: of `apd.experiments.ablation.plan.load_plan`.
        data: folders of the source domains.
        targets: folder of each target of the plan, by name.
        output: folder of the ablation; runs that are there are taken.
        device: ``"cpu"`` or ``"cuda"``.
        features: folder of the feature files that brackets name; without it they are left out.

    Raises:
        InputError: rows differ in their steps without saying so, a run that is there has another configuration or
            other data, a target is missing or one of the sources, or data cannot be read. Nothing was trained then.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        data: Sequence[Path],
        targets: Mapping[str, Path],
        output: Path,
        device: str,
        features: Path | None = None,
    ) -> None:
        self.plan, self.output, self.device = plan, output, device
        self._data, self._features = list(data), features
        self.jobs = {job.name: job for job in _jobs(plan, self._data, output / "runs")}
        for job in self.jobs.values():
            _check_existing(job, self._data)
            _check_generator(job, self.jobs)
        self.targets = _targets(plan, self._data, targets)
        self.results = ResultFile(output / RESULTS)
        self._testing = threading.Lock()  # one test at a time: it may take all threads
        self._stopped = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def execute(self, at_once: int, *, train: bool = True) -> dict[str, str]:
        """Train and test; with `train` False only test what is finished.

        Args:
            at_once: trainings at the same time, which share the threads.

        Returns:
            what went wrong, by the name of the run; the others went on.
        """
        with only_writer(self.output):
            return self._execute(at_once, train)

    def _execute(self, at_once: int, train: bool) -> dict[str, str]:
        for target in self.targets.values():
            (self.output / "splits").mkdir(parents=True, exist_ok=True)
            target.write(self.output / "splits" / f"{target.name}.json")
        chosen = [job for job in self.jobs.values() if train or job.finished()]
        if not all(job.finished() for job in chosen):
            self._look()
        for bracket in self.plan.brackets.values():
            self._test_bracket(bracket)
        futures: dict[str, Future[None]] = {}
        threads = max(1, available_threads() // at_once)
        pool = ThreadPoolExecutor(at_once)
        try:
            for job in chosen:  # in the order of the file: what a job waits for has begun before it
                first = {name: futures[name] for name in job.needs if name in futures}
                futures[job.name] = pool.submit(self._finish, job, first, threads)
            return {name: message for name, future in futures.items() if (message := _failure(future))}
        finally:
            self._stopped.set()
            for process in list(self._processes):
                process.kill()
            pool.shutdown(cancel_futures=True)

    def _look(self) -> None:
        """Decode all images before the first training; a damaged one would else end many, or their tests."""
        folders = [target.folder for target in self.targets.values()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            folders += [read_source(folder) for folder in self._data]
        images = [sample.path for one in folders for sample in (*one.train, *one.query, *one.gallery)]
        with progress("looking at images", len(images)) as advance:
            check_readable(images, advance)

    def current(self, job: Job) -> dict[str, Any] | None:
        """The result of a run, if it is of this configuration and of these tests."""
        line = self.results.latest.get((job.row.name, job.seed))
        return line if line is not None and line["config"] == job.digest() and self._has_tests(line) else None

    def _finish(self, job: Job, first: Mapping[str, Future[None]], threads: int) -> None:
        if not job.finished():
            for name, future in first.items():
                if _failure(future):
                    raise InputError(f"needs {name}, which failed")
            self._train(job, threads)
        with self._testing:
            self._test_run(job)

    def _train(self, job: Job, threads: int) -> None:
        """In a process of its own, from where the run stands."""
        if not (job.path / CONFIG).is_file():
            start_run(job.path, job.config, self._data, threads=threads, look=False)
        threads = Run(job.path).info().get("threads", threads)  # runs of older versions do not say
        generator = job.path / GENERATOR
        if job.row.generator is not None and not generator.is_file():
            source = self.jobs[f"{job.row.generator}/{job.seed}"]
            write_bytes(generator, (source.path / GENERATOR).read_bytes())
        console.print(f"{job.name}: training, {threads} thread{'s' * (threads > 1)}")
        command = [sys.executable, "-m", "apd.experiments.ablation.worker", str(job.path.resolve()), self.device]
        # Run from anywhere, it must find the package that this process runs, and nothing that lies where it is run.
        path = os.pathsep.join(
            os.path.abspath(place)
            for place in [str(Path(__file__).parents[3]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            if place
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        with (job.path / LOG).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, cwd=job.path
            )
            self._processes.add(process)
            if self._stopped.is_set():
                process.kill()
            code = process.wait()
            self._processes.discard(process)
        if code:
            lines = (job.path / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise InputError(f"{lines[-1] if lines else f'ended with code {code}'} ({job.path / LOG})")

    def _test_run(self, job: Job) -> None:
        run = Run(job.path)
        line: dict[str, Any] = {
            "row": job.row.name,
            "seed": job.seed,
            "config": job.digest(),
            "weights": run.fingerprint()[:16],
            "steps": job.steps,
            "seconds": run.info().get("seconds", {}),
        }
        queries = queries_path(self.output, job.row.name, job.seed)
        if self._is_known(line) and queries.is_file():
            return
        extractor = load_extractor(str(job.path), self.device)
        tested = {name: target.test(target.describe(extractor)) for name, target in self.targets.items()}
        queries.parent.mkdir(parents=True, exist_ok=True)
        save_queries(queries, {name: one.queries for name, one in tested.items()})
        self._add(line, tested)

    def _test_bracket(self, bracket: Bracket) -> None:
        if bracket.features is not None and self._features is None:
            console.print(f"note: {bracket.title}: left out; --features names the folder of its files", soft_wrap=True)
            return
        weights, described = self._describer(bracket)
        line = {"row": bracket.name, "seed": None, "bracket": asdict(bracket), "weights": weights}
        if not self._is_known(line):
            self._add(line, {name: target.test(described(target)) for name, target in self.targets.items()})

    def _describer(self, bracket: Bracket) -> tuple[str, Callable[[Target], FeatureSet]]:
        """What names a bracket's network or features, and its descriptors of a target."""
        if bracket.model is not None:
            extractor = load_extractor(bracket.model, self.device, size=bracket.size, flip_test=bracket.flip_test)
            return extractor.fingerprint[:16], lambda target: target.describe(extractor)
        assert bracket.features is not None
        assert self._features is not None
        files = {name: self._features / bracket.features.replace("{target}", name) for name in self.targets}
        rows = {name: self.targets[name].arranged(load_features(file)) for name, file in files.items()}
        return _digest(rows), lambda target: rows[target.name]

    def _is_known(self, line: Mapping[str, Any]) -> bool:
        """Whether the last result of the run says the same of it, and is of the same tests."""
        known = self.results.latest.get((line["row"], line["seed"]), {})
        same = all(known.get(key) == json.loads(json.dumps(value)) for key, value in line.items())
        return same and self._has_tests(known)

    def _has_tests(self, line: Mapping[str, Any]) -> bool:
        tests = {name: test["splits"] for name, test in line.get("tests", {}).items()}
        return tests == {name: target.digest() for name, target in self.targets.items()}

    def _add(self, line: dict[str, Any], tested: Mapping[str, Tested]) -> None:
        tests = {name: {"splits": self.targets[name].digest(), **one.figures} for name, one in tested.items()}
        self.results.add({**line, "tests": tests})
        name = line["row"] if line["seed"] is None else f"{line['row']}/{line['seed']}"
        figures = "; ".join(f"{target} rank-1 {one.figures['rank-1']:.3f}" for target, one in tested.items())
        console.print(f"{name}: {figures}", soft_wrap=True)


def queries_path(output: Path, row: str, seed: int) -> Path:
    return output / "queries" / row / f"{seed}.npz"


def _jobs(plan: Plan, data: Sequence[Path], runs: Path) -> list[Job]:
    """All runs in the order of the rows, that is of their priority."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # a training gives them
        samples = [read_market(folder, ("train",)).train for folder in data]
    base = _steps(plan.config(Row("base", "base", (0,)), 0, runs), samples)
    jobs = []
    for row in plan.rows.values():
        for seed in row.seeds:
            config = plan.config(row, seed, runs)
            steps = _steps(config, samples)
            if steps != round(base * row.times):
                raise InputError(
                    f"{plan.path}: rows.{row.name}: expected {round(base * row.times):,} steps of stage 2, as the base "
                    f"has{f' × {row.times:g}' * (row.times != 1)}, got {steps:,}; a row of another length says so by "
                    "times"
                )
            jobs.append(Job(row, seed, runs / row.name / str(seed), config, steps))
    return jobs


def _steps(config: Config, samples: Sequence[Any]) -> int:
    sources, _ = gather_sources(samples, config.train.validation_identities, config.seed)
    return total_steps(config.train, sources.originals)


def _check_existing(job: Job, data: Sequence[Path]) -> None:
    """A run that is there must be the one that would be trained."""
    if not (job.path / CONFIG).is_file():
        return
    run = Run(job.path)
    for key in SETTINGS:
        found, wanted = value_of(run.config, key), value_of(job.config, key)
        if found != wanted and not (key == "mpg.trunk_weights" and _same_network(found, wanted)):
            raise InputError(
                f"{job.path}: {key}: expected {shown(wanted)}, as {job.row.name} with seed {job.seed} has it, got a "
                f"run with {shown(found)}"
            )
    recorded = run.info().get("data", [])
    if [Path(folder).resolve() for folder in recorded] != [folder.resolve() for folder in data]:
        raise InputError(f"{job.path}: data: expected {', '.join(map(str, data))}, got {', '.join(recorded) or 'none'}")


def _same_network(found: str | None, wanted: str | None) -> bool:
    """Whether two folders are, or were copied from, one run."""
    if found is None or wanted is None:
        return False
    if Path(found).resolve() == Path(wanted).resolve():
        return True
    files = [Path(folder) / WEIGHTS for folder in (found, wanted)]
    return all(file.is_file() for file in files) and Run(found).fingerprint() == Run(wanted).fingerprint()


def _check_generator(job: Job, jobs: Mapping[str, Job]) -> None:
    """A generator is that of another row only if its own stage 1 would make the same."""
    if job.row.generator is None:
        return
    source = jobs[f"{job.row.generator}/{job.seed}"]
    if not source.config.uses_generator:
        raise InputError(f"rows.{job.row.name}.generator: {source.row.name} has no stage 1")
    for key in (*_STAGE1, *(key for key in SETTINGS if key.startswith("mpg."))):
        ours, theirs = value_of(job.config, key), value_of(source.config, key)
        if ours != theirs:
            raise InputError(
                f"rows.{job.row.name}.generator: expected {key} as in {source.row.name} ({shown(theirs)}), got "
                f"{shown(ours)}"
            )


def _targets(plan: Plan, data: Sequence[Path], folders: Mapping[str, Path]) -> dict[str, Target]:
    for name in folders:
        if name not in plan.targets:
            raise InputError(f"--target {name}: {plan.path} has the targets {', '.join(plan.targets)}")
    targets = {}
    for name, rule in plan.targets.items():
        if name not in folders:
            raise InputError(f"--target: no folder of {name}; give NAME=FOLDER, or a folder of that name")
        if folders[name].resolve() in [folder.resolve() for folder in data]:
            raise InputError(f"--target {name}: {folders[name]} is a source; a target is never trained on")
        targets[name] = load_target(name, folders[name], rule)
    return targets


def _digest(rows: Mapping[str, FeatureSet]) -> str:
    sha = hashlib.sha256()
    for one in rows.values():
        sha.update(one.features.tobytes())
    return sha.hexdigest()[:16]


def _failure(future: Future[None]) -> str | None:
    """Waits for a job; what it raised, where that is something the user can act on."""
    try:
        future.result()
    except CancelledError:
        return "cancelled"
    except (InputError, OSError) as error:
        return str(error)
    return None
