"""What the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from apd.evaluation import RANKS, Evaluation
from apd.features import SPLITS, FeatureSet
from apd.ranked_lists import RankedLists
from apd.report import Table as ReportTable
from apd.shards import GalleryShards
from apd_kernels import Gallery

if TYPE_CHECKING:
    from apd.export import Exported
    from apd.hard_testing import HardTest

console = Console(highlight=False)
_WIDEST = 1000  # characters of a table
_TIES = {
    "pessimistic": "pessimistic: a wrong image at the distance of a right one comes first",
    "optimistic": "optimistic: a right image at the distance of a wrong one comes first",
    "expected": "expected: the mean over all orders of the images at one distance",
}
_AP = {
    "rectangular": "rectangular: mean precision at the right images",
    "trapezoidal": "trapezoidal: mean of the precision before and at each right image",
}


def count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _contents(rows: FeatureSet) -> str:
    parts = [count(len(rows), "image")]
    for values, noun, plural in ((rows.pids, "identity", "identities"), (rows.camids, "camera", "cameras")):
        known = np.empty(0) if values is None else values[values != -1]
        if len(known):
            parts.append(count(len(np.unique(known)), noun, plural))
    return f"{', '.join(parts)}; {rows.path.resolve().name}, {rows.rows}"


def _facts(*facts: tuple[str, str]) -> None:
    """Aligned lines, never folded: a pipe must get each fact in one piece."""
    for name, value in facts:
        console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal's error stream, and the function that moves it on; nothing in a file."""
    errors = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def print_extractor(about: Mapping[str, Any]) -> None:
    """What `apd.extraction.Extractor.about` says."""
    height, width = about["image_size"]
    facts = [
        ("model", f"{about['model']}, weights {about['fingerprint'][:12]}"),
        ("images", f"{height} × {width} pixels; flip test {'on' if about['flip_test'] else 'off'}"),
    ]
    if "descriptor" in about:
        smoothing = about.get("label_smoothing")
        facts.append(("descriptor", f"{about['descriptor']}; trained with label smoothing {smoothing or 'off'}"))
    _facts(*facts)


def print_extracted(rows: FeatureSet, absent: list[str]) -> None:
    assert rows.split is not None
    present = [part for part, split in SPLITS.items() if (rows.split == split).any()]
    facts = [(part, _contents(rows.part(part))) for part in present]
    _facts(*facts, *((part, "left out: not in the data set") for part in absent))
    _facts(("features", f"{rows.dim} dimensions"))


def print_evaluation(result: Evaluation, query: FeatureSet, gallery: FeatureSet | GalleryShards) -> None:
    """How it was evaluated, and the figures."""
    print_conventions(result, query, gallery)
    print_figures({"": result})


def print_conventions(result: Evaluation, query: FeatureSet, gallery: FeatureSet | GalleryShards) -> None:
    """Model, data, and what code bases disagree on."""
    if query.about:
        print_extractor(query.about)
    how = result.conventions
    counted = f"{result.num_valid_queries:,} counted, {result.left_out:,} left out"
    where = "" if how.exclude_self else " in another camera"
    if result.left_out:
        counted += f" (no gallery image of their identity{where})"
    _facts(
        ("query", _contents(query)),
        ("gallery", _shards(gallery) if isinstance(gallery, GalleryShards) else _contents(gallery)),
        ("queries", counted),
        ("removed", "the query itself" if how.exclude_self else "images of the query's identity in its own camera"),
        ("distance", f"{how.metric}, {query.dim} dimensions"),
        ("AP", _AP[how.ap]),
        ("ties", _TIES[how.ties]),
        ("re-ranking", "off" if how.reranking is None else str(how.reranking)),
    )
    if how.single_shot is not None:
        draws = count(how.single_shot, "draw")
        _facts(("single shot", f"rank-k: mean of {draws} of one image of each identity, seed {how.seed}; mAP: of all"))


def print_figures(results: Mapping[str, Evaluation]) -> None:
    """A line of figures for each result, after its name."""
    named = any(results)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (*([""] if named else []), *(f"rank-{k}" for k in RANKS), "mAP", "mINP"):
        table.add_column(name)
    for name, result in results.items():
        figures = [f"{value:.6f}" for value in (*(result.cmc[k] for k in RANKS), result.mAP, result.mINP)]
        table.add_row(*([name] if named else []), *figures, style="bold")
    console.print()
    console.print(table)


def _shards(gallery: GalleryShards) -> str:
    sizes = [count(len(gallery), "image"), count(gallery.identities, "identity", "identities")]
    return f"{', '.join([*sizes, count(gallery.cameras, 'camera')])}; {count(len(gallery.paths), 'file')}"


def print_indexed(gallery: Gallery, rows: FeatureSet) -> None:
    _facts(
        ("indexed", _contents(rows)),
        ("gallery", count(len(gallery), "image")),
        ("distance", f"{gallery.metric}, {gallery.dim} dimensions"),
        ("index", gallery.index),
    )


def print_exported(exported: Exported) -> None:
    about = exported.metadata
    _facts(
        ("model", f"{about['run']}, weights {about['fingerprint'][:12]}"),
        ("images", f"{about['input']}; {about['height']} × {about['width']}; normalization {about['normalization']}"),
        ("output", about["output"]),
        ("checked", f"at most {exported.difference:.1e} from PyTorch's descriptors (tolerance {about['tolerance']})"),
    )


def print_hard_test(test: HardTest) -> None:
    _facts(
        ("queries", f"{len(test.rows[0].judge.right):,}"),
        ("content", "mean φ-distance to the original over that of two images of a person from different cameras"),
    )
    console.print()
    print_table(test.table())
    for line in test.conclusions():
        console.print(line, soft_wrap=True)


def print_lists(lists: RankedLists, gallery: Gallery, show: int) -> None:
    query = lists.query
    _facts(
        ("query", _contents(query)),
        ("gallery", f"{count(len(gallery), 'image')}, {gallery.metric} distance, {gallery.dim} dimensions"),
    )
    if lists.reranking is not None:
        _facts(("re-ranking", str(lists.reranking)))
    print_ranks(lists, show)


def print_ranks(lists: RankedLists, show: int) -> None:
    """The lists of the first queries, and how many are right at rank 1."""
    query = lists.query
    for i in range(min(show, len(query))):
        pid, camera, name = lists.describe(i)
        console.print()
        console.print(Text.assemble((f"query {i}", "bold"), f"  {_labels(pid, camera)}{name}"), soft_wrap=True)
        console.print(Text(f"{'rank':>6}{'distance':>11}{'id':>8}{'camera':>8}  same  name", "dim"), soft_wrap=True)
        for rank, (_, found, found_camera, found_name, distance) in enumerate(lists.matches(i), 1):
            same = found == pid and found != -1
            labels = "".join(f"{'' if value == -1 else value:>8}" for value in (found, found_camera))
            line = f"{rank:>6}{distance:>11.6f}{labels}  {'yes' if same else '':<4}  {found_name}"
            console.print(Text(line, "green" if same else ""), soft_wrap=True)
    console.print()
    if query.pids is not None and (query.pids != -1).any():
        right = (lists.found.ids[:, 0].numpy() == query.pids) & (query.pids != -1)
        of = count(int((query.pids != -1).sum()), "query", "queries")
        console.print(f"{int(right.sum()):,} of {of}: an image of the same identity at rank 1")
    if show < len(query):
        more = "--show prints more, --output writes all of them"
        console.print(f"lists of {min(show, len(query)):,} of {count(len(query), 'query', 'queries')} shown; {more}")


def _labels(pid: int | None, camera: int | None) -> str:
    return "".join(f"{name} {value}  " for name, value in (("id", pid), ("camera", camera)) if value not in (None, -1))


def print_table(table: ReportTable) -> None:
    """A table of a report on the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i, heading in enumerate(table.head):
        shown.add_column(heading, justify="right" if i and table.numbers else "left")
    for i, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if i == table.strong else None)
    # Never folded, however narrow the terminal: a pipe must get each row in one line.
    shown.width = Measurement.get(console, console.options.update(max_width=_WIDEST), shown).maximum
    console.print(shown, crop=False)
    console.print()


def print_written(*paths: Path) -> None:
    for path in paths:
        console.print(Text(f"wrote {path}"), soft_wrap=True)
