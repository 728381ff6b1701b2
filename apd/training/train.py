"""A whole training run: MPG-Net, the images it synthesizes, SP-Net, and what they reach on the sources' own tests."""

from __future__ import annotations

import hashlib
import json
import platform
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

from apd.config.files import load_config, save_config
from apd.config.values import PRETRAINED, Config
from apd.console import console, count, progress
from apd.data.datasets import DataSpec, domains, read_source
from apd.data.images import ImageStore, check_readable
from apd.data.market import NO_ANSWERS, ReidFolder, Sample, count_samples, first_of, labels, unanswered
from apd.errors import DataWarning, InputError
from apd.files import only_writer, sample_of, write_json
from apd.models.spnet import build_spnet
from apd.models.trunk import BaselineTrunk, Trunk, build_trunk, resolve_trunk
from apd.run import CONFIG, GENERATOR, INFO, WEIGHTS, Run, sha256_of, update_info
from apd.training.checkpoint import newest_step
from apd.training.distributed import join, on_first, own_rows, rank
from apd.training.engine import check_precision
from apd.training.interrupt import interruptible
from apd.training.monitors import REFERENCE_PAIRS, camera_distance
from apd.training.mpg import check_mpg, train_mpg
from apd.training.sources import Sources, gather_sources
from apd.training.sp import STAGE as SP
from apd.training.sp import check_sp, total_steps, train_sp
from apd.training.synthesis import HardImages, noisy, synthesize, synthesized_folders
from apd.training.threads import available_threads, training_threads, useful_threads
from apd.training.validation import evaluate_samples

BASELINE = "baseline"  # folder of the trunk's run
SYNTHESIZED = "synthesized"
EXTENDED = "extended"  # in run.json: a finished run is to be trained for more steps
CAMERA_DISTANCE = "camera_distance"  # in run.json: of φ, between two images of a person from different cameras


def start_run(
    path: Path,
    config: Config,
    data: Sequence[Path | str | DataSpec],
    *,
    threads: int | None = None,
    look: bool = True,
) -> Run:
    """Make the folder of a new run.

    Args:
        path: the folder; it may exist, but holds no run yet.
        config: every value.
        data: the source domains: folders, or what `DataSpec.parse` reads.
        threads: at most so many for a training on the CPU; default: as many as there are.
        look: decode every image, those of the sources' own tests too: a damaged one would else end the run on the way.

    Raises:
        InputError: the folder holds a run, or the data or the configuration cannot be used; then no folder is made.
    """
    if (path / CONFIG).exists():
        raise InputError(f"{path}: there is a run already; choose another --output, or go on with it by --resume")
    config = _with_absolute_paths(config)
    specs = [DataSpec.parse(source).resolved() for source in data]
    if len({spec.folder for spec in specs}) < len(specs):
        raise InputError(
            f"{', '.join(map(str, data))}: expected different folders; one that is named twice would count each of its "
            "people as two"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # they are given when the training begins
        folders = [read_source(spec) for spec in specs]
    sources, _ = _gathered(folders, config)
    if config.uses_generator:
        check_mpg(sources, config)
    check_sp(sources, config)
    if look:
        images = [sample.path for one in folders for sample in (*one.train, *_own_test(one))]
        with progress("looking at images", len(images)) as advance:
            check_readable(images, advance)
    with only_writer(path):
        if (path / CONFIG).exists():
            raise InputError(f"{path}: another process has begun a run in it meanwhile; choose another --output")
        _begin(path, config, specs, folders, threads)
    return Run(path)


def _begin(
    path: Path, config: Config, specs: Sequence[DataSpec], folders: Sequence[ReidFolder], threads: int | None
) -> None:
    update_info(
        path,
        data=[str(spec) for spec in specs],
        images=_listing(folders),
        contents=_contents(folders),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        threads=useful_threads(config, threads or available_threads()),
    )
    save_config(config, path / CONFIG)


def train_run(run: Run, device: str) -> dict[str, Any]:
    """Train a run from where it stands to its end.

    Of several processes (`apd.training.distributed`) all call it. Stage 2 is theirs in
    common; the first one alone does stage 1 and everything that writes files.

    Args:
        run: made by `start_run`; an interrupted one goes on from its last checkpoint.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        the contents of its run.json: seconds of each stage, results on the sources' own test images.

    Raises:
        InputError: the data or the configuration cannot be used, or another process trains this run.
    """
    join(device)
    check_precision(run.config, device)  # now, not after stage 1
    own_rows(run.config.train)
    began = on_first(lambda: run.info().get("threads"))
    alone = only_writer(run.path) if rank() == 0 else nullcontext()
    with alone, interruptible(), training_threads(began) if device == "cpu" else nullcontext():
        _train(run, device)
    return run.info()


def nothing_left(run: Run) -> bool:
    """Whether a run is finished.

    Raises:
        InputError: another process trains it.
    """
    with only_writer(run.path):
        return "finished" in run.info() and (run.path / WEIGHTS).is_file()


_LENGTH = ("train.steps", "train.epochs")


def extend_run(run: Run, values: Sequence[str]) -> Run:
    """Give a run another length; the schedule of its learning rate is then that of the new one.

    Args:
        run: a finished one, or one that was interrupted in stage 2.
        values: ``train.steps=N``, or ``train.epochs=N`` where the run counts epochs.

    Raises:
        InputError: another value, a length that is over already, or a run without a checkpoint to go on from, or one
            that was stopped because it had collapsed.
    """
    for value in values:
        if (key := value.partition("=")[0].strip()) not in _LENGTH:
            raise InputError(f"--resume RUN stands alone, but for {' or '.join(_LENGTH)}, its new length; got {key}")
    config = load_config(run.path / CONFIG, values)
    if config.train.epochs != run.config.train.epochs and config.train.steps is not None:
        raise InputError(
            f"train.epochs: the run counts steps; expected train.steps, of which it has {config.train.steps}"
        )
    with only_writer(run.path):
        info, done = run.info(), newest_step(run.path, SP)
        if done is None:
            raise InputError(f"{run.path}: no checkpoint of stage 2, from which it could be trained on")
        if "collapsed" in info and config.train.on_collapse == "stop":
            raise InputError(f"{run.path}: collapsed at step {info['collapsed']['step']}; it is not trained on")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            sources, _ = _gathered([read_source(source) for source in info["data"]], config)
        steps = total_steps(config.train, sources.originals)
        if steps <= done:
            raise InputError(
                f"train.steps: expected more than the {done:,} steps that {run.path} has done, got {steps:,}"
            )
        kept = {key: value for key, value in info.items() if key not in ("finished", "own_test", "weights")}
        write_json(run.path / INFO, {**kept, EXTENDED: True})
        save_config(config, run.path / CONFIG)
    return Run(run.path)


def _train(run: Run, device: str) -> None:
    config, path = run.config, run.path
    folders = on_first(lambda: _read_sources(run))
    sources, validation = _gathered(folders, config)
    if config.synthesizes:
        if not on_first(lambda: _has_stage_1(run)):
            _train_trunk(run, device)
            on_first(lambda: _stage_1(run, sources, device))
        sources = on_first(lambda: _synthesized(run, folders, sources, device))
    trained = on_first(lambda: (path / WEIGHTS).is_file() and not run.info().get(EXTENDED))
    if config.train.validation_identities or not trained:
        seconds = train_sp(path, sources, validation, config, device)
        on_first(lambda: _took(path, "sp", seconds))
    on_first(lambda: _report(run, folders, sources, device))


def _read_sources(run: Run) -> list[ReidFolder]:
    folders = [read_source(source) for source in run.info().get("data", [])]
    if not folders:
        raise InputError(f"{run.path / INFO}: names no data folders")
    began = run.info().get("images")  # runs of older versions do not say
    if began is not None and began != _listing(folders):
        names = ", ".join(str(folder.path) for folder in folders)
        raise InputError(
            f"{run.path}: began with other training images than there are now in {names}; expected the same files, "
            "identities and cameras"
        )
    before = run.info().get("contents", {})
    if changed := [name for name, sample in _contents(folders).items() if before.get(name, sample) != sample]:
        raise InputError(
            f"{run.path}: began with other contents of {count(len(changed), 'training image')}: {first_of(changed)}"
        )
    for folder in folders:
        console.print(f"source {folder.path.name}: {_counts(folder.train)}", soft_wrap=True)
        if not _own_test(folder):
            why = NO_ANSWERS if folder.query else "it has no query and gallery apart from the training images"
            console.print(f"note: {folder.path.name}: there will be no own test: {why}", soft_wrap=True)
    return folders


def _own_test(folder: ReidFolder) -> Sequence[Sample]:
    """The images of a source's own test; none where no query has an answer."""
    lost = unanswered(labels(folder.query), labels(folder.gallery))
    return (*folder.query, *folder.gallery) if lost < len(folder.query) else ()


def _listing(folders: Sequence[ReidFolder]) -> str:
    """SHA-256 of what there is to train on: with other files a run would go on with other classes and batches."""
    listed = [[(sample.path.name, sample.pid, sample.camid) for sample in folder.train] for folder in folders]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _has_stage_1(run: Run) -> bool:
    """Also of an older version, which wrote its images without measuring their content."""
    measured = CAMERA_DISTANCE in run.info() or (run.path / SYNTHESIZED).is_dir()
    return measured and (not run.config.uses_generator or (run.path / GENERATOR).is_file())


def _contents(folders: Sequence[ReidFolder]) -> dict[str, str]:
    """A sample of each training image, by its path."""
    return {str(one.path): sample_of(one.path) for folder in folders for one in folder.train}


def _stage_1(run: Run, sources: Sources, device: str) -> None:
    """Measure what the bound of the content is a share of, and train the generator where there is one."""
    config, trunk = run.config, make_trunk(run, device)
    console.print(f"{'MPG-Net' if config.uses_generator else 'noise'}: ψ and φ of {trunk.name}", soft_wrap=True)
    apart = camera_distance(
        trunk.to(device),
        ImageStore(sources.paths, run.size, cache=False),
        sources.labels,
        sources.cameras,
        most=REFERENCE_PAIRS,
        batch_size=config.mpg.batch_size,
        seed=config.seed,
        device=torch.device(device),
    )
    if apart is None and config.mpg.content_bound is not None:
        raise InputError(
            "mpg.content_bound: expected people seen by two cameras, whose images it compares with, got none; "
            "mpg.content_bound=none leaves G(x) as it is"
        )
    if config.uses_generator and not (run.path / GENERATOR).is_file():  # an ablation gives rows a common one
        _took(run.path, "mpg", train_mpg(run.path, sources, trunk, config, device, apart))
    update_info(run.path, **{"trunk": trunk.name, CAMERA_DISTANCE: apart})


def hard_images(run: Run, device: str) -> HardImages:
    """What a run makes of images.

    Raises:
        InputError: it has no finished stage 1.
    """
    change = run.load_generator(device) if run.config.uses_generator else noisy
    bound, apart = run.config.mpg.content_bound, run.info().get(CAMERA_DISTANCE)
    if bound is None or apart is None:  # runs of older versions did not measure it
        return HardImages(change, None, None)
    return HardImages(change, make_trunk(run, device).to(device), bound * apart)


def _trunk_choice(run: Run) -> str:
    """What ``auto`` stands for is decided once: a run that goes on has the ψ and φ that it began with, or an error."""
    options = run.config.mpg
    chosen = run.info().get("trunk_choice")
    if chosen is None:  # else nothing is written: a report may be of a run in a folder that is read-only
        chosen = resolve_trunk(options.trunk, options.trunk_weights)
        update_info(run.path, trunk_choice=chosen)
    return chosen


def _train_trunk(run: Run, device: str) -> None:
    """With ``trunk: self``: train the baseline in the run's folder ``baseline``, unless a run of one is given."""
    if run.config.mpg.trunk_weights is not None or on_first(lambda: _trunk_choice(run)) != "self":
        return
    path = run.path / BASELINE
    config = replace(run.config, perturbation="none", model=replace(run.config.model, ssd="none"))
    if not on_first((path / CONFIG).is_file):
        on_first(lambda: start_run(path, config, run.info()["data"], look=False))
    train_run(Run(path), device)


def make_trunk(run: Run, device: str) -> Trunk:
    """ψ and φ as configured; ``self`` trains the baseline first, in the run's folder ``baseline``, or takes a run's."""
    options = run.config.mpg
    torch.manual_seed(run.config.seed)  # the weights of random:NAME
    name = _trunk_choice(run)
    if name != "self":
        return build_trunk(name, options.trunk_weights)
    baseline = Run(options.trunk_weights or run.path / BASELINE)
    if baseline.config.model.ssd != "none" or baseline.size != run.size:
        raise InputError(
            f"mpg.trunk_weights: {baseline.path}: expected a baseline (model.ssd none) of {run.size[0]}×{run.size[1]} "
            f"images, got model.ssd {baseline.config.model.ssd}, {baseline.size[0]}×{baseline.size[1]}"
        )
    return BaselineTrunk(baseline.load_network(), "self: the baseline, trained on the sources")


def _with_absolute_paths(config: Config) -> Config:
    """A run may go on from another folder than it was begun in."""
    mpg, model = config.mpg, config.model
    if mpg.trunk_weights is not None:
        mpg = replace(mpg, trunk_weights=str(Path(mpg.trunk_weights).absolute()))
    if model.pretrained not in PRETRAINED:
        path = Path(model.pretrained).absolute()
        if path.is_dir():  # a run, which is trained on
            path = path / WEIGHTS
            if not path.is_file():
                raise InputError(
                    f"model.pretrained: {path.parent}: no {WEIGHTS}: it is no run whose training has ended"
                )
        model = replace(model, pretrained=str(path))
    return replace(config, mpg=mpg, model=model)


def _took(path: Path, stage: str, seconds: float) -> None:
    """Write down what a stage took, the time before a restart included."""
    update_info(path, seconds={**Run(path).info().get("seconds", {}), stage: round(seconds, 1)})
    console.print(f"{stage}: {seconds:.0f} s", style="dim")


def _gathered(folders: Sequence[ReidFolder], config: Config) -> tuple[Sources, list[list[Sample]]]:
    images = [samples for folder in folders for samples in domains(folder.train)]
    return gather_sources(images, config.train.validation_identities, config.seed)


def _synthesized(run: Run, folders: Sequence[ReidFolder], sources: Sources, device: str) -> Sources:
    """Write the synthesized images into the run, and take those that the configuration asks for."""
    config, start = run.config, time.perf_counter()
    if config.data.train_on == "original":
        return sources
    generator = hard_images(run, device)
    new: dict[Path, Path] = {}
    targets = synthesized_folders(run.path / SYNTHESIZED, [folder.path for folder in folders])
    for folder, target in zip(folders, targets, strict=True):
        made = synthesize(
            generator,
            folder.train,
            "train",
            target,
            run.size,
            device=device,
            workers=config.data.workers,
        )
        new |= {sample.path: path for sample, path in zip(folder.train, made, strict=True)}
    _took(run.path, "synthesize", run.info().get("seconds", {}).get("synthesize", 0.0) + time.perf_counter() - start)
    return sources.with_synthesized([new[path] for path in sources.paths], config.data.train_on)


def _report(run: Run, folders: Sequence[ReidFolder], sources: Sources, device: str) -> None:
    """Evaluate on each source's own test images, before and after the training."""
    config = run.config
    torch.manual_seed(config.seed)  # the weights that the training began with
    untrained = build_spnet(config.model, run.size, sources.identities).eval().to(device)
    trained = run.load_model(device)
    results = {}
    for folder in folders:
        if not _own_test(folder):
            continue
        found: dict[str, dict[str, float]] = {}
        for name, model in (("step 0", untrained), ("end", trained)):
            result = evaluate_samples(model, folder.query, folder.gallery, run.size, config.data.workers)
            rank1, queries = float(result.cmc[0]), int(result.valid.sum())
            found[name] = {"rank-1": rank1, "mAP": result.mAP, "queries": queries}
            console.print(
                f"{folder.path.name}, own test, {name}: rank-1 {rank1:.3f}, mAP {result.mAP:.3f} "
                f"({count(queries, 'query', 'queries')})"
            )
        results[str(folder.path)] = found
    weights = {name: sha256_of(run.path / name) for name in (WEIGHTS, GENERATOR) if (run.path / name).is_file()}
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    update_info(run.path, weights=weights, own_test=results, finished=finished, **{EXTENDED: False})


def _counts(samples: Sequence[Sample]) -> str:
    counts = count_samples(samples)
    return (
        f"{count(counts.images, 'image')}, {count(counts.identities, 'identity', 'identities')}, "
        f"{count(counts.cameras, 'camera')}"
    )
