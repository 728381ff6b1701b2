"""The demonstration: drawn domains, a baseline and APD trained on three of them, both tested on a fourth."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from apd.config.files import load_config
from apd.console import console, print_table, print_written
from apd.data.market import FOLDERS, ReidFolder, read_market
from apd.demo.pedestrians import SOURCES, UNSEEN, Domain, write_domain
from apd.demo.report import (
    CAVEAT,
    TRAININGS,
    Demo,
    Tested,
    domains_table,
    figures,
    headline,
    result_table,
    times_table,
    verdicts,
    write_demo_report,
)
from apd.errors import InputError
from apd.files import write_json
from apd.retrieval.comparison import ColourHistogram, chance, retrieve
from apd.retrieval.extraction import Extractor, extract_folder, load_extractor
from apd.retrieval.ranked_lists import RankedLists
from apd.retrieval.search import describe_queries, extractor_of, index_features, note_run, search_features
from apd.run import CONFIG, Run
from apd.training.train import start_run, train_run
from apd_kernels import Gallery

DATA, GALLERY, REPORT, FIGURES = "data", "gallery", "report.html", "demo.json"
FOLDERS_OF = {name: name.lower() for name in TRAININGS}
_MADE_BY = {"made_by": "apd demo"}  # in demo.json; a folder with it may be replaced
_LISTED = 10  # gallery images in a ranked list


class Stages:
    """Prints each stage, and its time as it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        console.print(name, style="bold")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        console.print(f"{name}: {self.seconds[name]:.0f} s", style="bold green")
        console.print()


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
    """Draw domains, train every network of TRAININGS on the sources, test all on every domain, search, and report.

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
    stage = Stages()
    folders = {domain.name: output / DATA / domain.name for domain in (*sources, unseen)}
    training = [folders[domain.name] for domain in sources]
    values = [f"seed={seed}", *overrides]
    with stage("draw the domains"):
        (output / DATA).mkdir()
        for domain in (*sources, unseen):
            write_domain(
                folders[domain.name],
                domain,
                seed,
                train_identities=0 if domain is unseen else train_identities,
                test_identities=test_identities,
                frames=frames,
            )
    runs: dict[str, Run] = {}
    for name, differing in TRAININGS.items():
        with stage(f"train {name}"):
            trunk = [f"mpg.trunk_weights={runs['baseline'].path.absolute()}"] if runs else []
            config = load_config("demo", [*differing, *trunk, *values])
            runs[name] = start_run(output / FOLDERS_OF[name], config, training)
            train_run(runs[name], device)
    apd = runs["APD"]
    with stage("test on every domain"):
        extractors = {
            "colours": _colours(False, apd.size, device),
            "normalized colours": _colours(True, apd.size, device),
            **{name: load_extractor(str(run.path), device) for name, run in runs.items()},
        }
        tested = {
            name: _test(read_market(folder, ("query", "gallery")), extractors) for name, folder in folders.items()
        }
    with stage("index and search the unseen domain"):
        folder = tested[unseen.name].folder
        _index(extractors["APD"], folder, output / GALLERY)
        lists = _search([sample.path for sample in folder.query], output / GALLERY, device)
    demo = Demo(seed, device, training, unseen.name, runs, tested, lists, stage.seconds)
    commands = _commands(output, demo)
    with stage("write the report"):
        write_demo_report(output / REPORT, demo, commands)
    write_json(output / FIGURES, _MADE_BY | figures(demo))
    _print(demo)
    print_written(output / REPORT, output / FIGURES)
    console.print()
    console.print("How to go on:")
    for line in commands:
        console.print(f"  {line}", soft_wrap=True)
    return demo


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
        for name in (REPORT, DATA, *FOLDERS_OF.values(), GALLERY):
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / FIGURES, _MADE_BY)


def _is_demo(output: Path) -> bool:
    try:
        content = json.loads((output / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.items() >= _MADE_BY.items()


def _colours(normalized: bool, size: tuple[int, int], device: str) -> Extractor:
    return Extractor(ColourHistogram(normalized), size, "colours", "", device)


def _test(folder: ReidFolder, extractors: Mapping[str, Extractor]) -> Tested:
    parts = {}
    for name, extractor in extractors.items():
        rows = extract_folder(extractor, folder)
        parts[name] = rows.part("query"), rows.part("gallery")
    return Tested(folder, chance(*parts["APD"]), {name: retrieve(*part) for name, part in parts.items()})


def _index(extractor: Extractor, folder: ReidFolder, path: Path) -> None:
    """As ``apd index --checkpoint`` does."""
    rows = extract_folder(extractor, folder).part("gallery")
    gallery = index_features(rows, "cosine", device="cpu")
    note_run(gallery, extractor, folder.path)
    gallery.save(path)


def _search(images: Sequence[Path], path: Path, device: str) -> RankedLists:
    """As ``apd search --query … --exclude-same-camera`` does."""
    gallery = Gallery.load(path, device="cpu")
    queries = describe_queries(extractor_of(gallery, path, device), images, None, None)
    return search_features(queries, gallery, _LISTED, exclude_same_camera=True)


def _commands(output: Path, demo: Demo) -> list[str]:
    """With which a newcomer goes on; they can be typed as they are in the folder where the demonstration was called."""
    data = output / DATA / demo.unseen
    query = data / FOLDERS["query"] / Path(demo.lists.query.names[0]).name
    gallery, picture = output / GALLERY, output / "ranked.png"
    commands = (
        ("apd", "search", "--gallery", gallery, "--query", query, "--exclude-same-camera", "--picture", picture),
        ("apd", "evaluate", "--checkpoint", output / FOLDERS_OF["APD"], "--data", data),
        ("apd", "config", "show", output / FOLDERS_OF["APD"] / CONFIG),
        ("tensorboard", "--logdir", output),
    )
    return [shlex.join([_program(name), *map(str, arguments)]) for name, *arguments in commands]


def _program(name: str) -> str:
    """A program of this environment: its name where the shell finds it, otherwise its path."""
    own, here = Path(sys.executable).with_name(name), Path.cwd()
    found = shutil.which(name)
    if not own.exists() or (found is not None and Path(found).resolve() == own.resolve()):
        return name
    return str(own.relative_to(here) if own.is_relative_to(here) else own)


def _print(demo: Demo) -> None:
    console.print(f"{demo.unseen}, unseen: {demo.on_unseen().size()}; seed {demo.seed}", soft_wrap=True)
    print_table(result_table(demo))
    print_table(domains_table(demo))
    for line in (headline(demo), *verdicts(demo), CAVEAT):
        console.print(line, soft_wrap=True)
    console.print()
    print_table(times_table(demo))
