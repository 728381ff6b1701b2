"""What the command line prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from apd.console import console, count, print_facts, print_table
from apd.errors import printable
from apd.retrieval.evaluation import RANKS, Evaluation
from apd.retrieval.features import SPLITS, FeatureSet
from apd.retrieval.ranked_lists import RankedLists
from apd.retrieval.shards import GalleryShards
from apd_kernels import Gallery

if TYPE_CHECKING:
    from apd.experiments.hard_eval import HardTest
    from apd.export import Exported

_TIES = {
    "pessimistic": "pessimistic: a wrong image at the distance of a right one comes first",
    "optimistic": "optimistic: a right image at the distance of a wrong one comes first",
    "expected": "expected: the mean over all orders of the images at one distance",
}
_AP = {
    "rectangular": "rectangular: mean precision at the right images",
    "trapezoidal": "trapezoidal: mean of the precision before and at each right image",
}


def _contents(rows: FeatureSet) -> str:
    parts = [count(len(rows), "image")]
    for values, noun, plural in ((rows.pids, "identity", "identities"), (rows.camids, "camera", "cameras")):
        known = np.empty(0) if values is None else values[values != -1]
        if len(known):
            parts.append(count(len(np.unique(known)), noun, plural))
    return f"{', '.join(parts)}; {printable(rows.path.resolve().name)}, {rows.rows}"


def print_extractor(about: Mapping[str, Any]) -> None:
    """What `apd.retrieval.extraction.Extractor.about` says."""
    height, width = about["image_size"]
    facts = [
        ("model", f"{about['model']}, weights {about['fingerprint'][:12]}"),
        ("images", f"{height} × {width} pixels; flip test {'on' if about['flip_test'] else 'off'}"),
    ]
    if "descriptor" in about:
        smoothing = about.get("label_smoothing")
        facts.append(("descriptor", f"{about['descriptor']}; trained with label smoothing {smoothing or 'off'}"))
    print_facts(*facts)


def print_extracted(rows: FeatureSet, absent: list[str]) -> None:
    facts = [("images", _contents(rows))]
    if rows.split is not None:
        present = [part for part, split in SPLITS.items() if (rows.split == split).any()]
        facts = [(part, _contents(rows.part(part))) for part in present]
    print_facts(*facts, *((part, "left out: not in the data set") for part in absent))
    print_facts(("features", f"{rows.dim} dimensions"))


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
    where = "" if how.exclude_self or how.ignore_cameras else " in another camera"
    removed = "images of the query's identity in its own camera"
    if how.exclude_self or how.ignore_cameras:
        removed = "the query itself" if how.exclude_self else "nothing: cameras are ignored"
    if result.left_out:
        counted += f" (no gallery image of their identity{where})"
    print_facts(
        ("query", _contents(query)),
        ("gallery", _shards(gallery) if isinstance(gallery, GalleryShards) else _contents(gallery)),
        ("queries", counted),
        ("removed", removed),
        ("distance", f"{how.metric}, {query.dim} dimensions"),
        ("AP", _AP[how.ap]),
        ("ties", _TIES[how.ties]),
        ("re-ranking", "off" if how.reranking is None else str(how.reranking)),
    )
    if how.single_shot is not None:
        draws = count(how.single_shot, "draw")
        print_facts(
            ("single shot", f"rank-k: mean of {draws} of one image of each identity, seed {how.seed}; mAP: of all")
        )


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
    print_facts(
        ("indexed", _contents(rows)),
        ("gallery", count(len(gallery), "image")),
        ("distance", f"{gallery.metric}, {gallery.dim} dimensions"),
        ("index", gallery.index),
    )


def print_exported(exported: Exported) -> None:
    about = exported.metadata
    print_facts(
        ("model", f"{about['run']}, weights {about['fingerprint'][:12]}"),
        ("images", f"{about['input']}; {about['height']} × {about['width']}; normalization {about['normalization']}"),
        ("output", about["output"]),
        ("checked", f"at most {exported.difference:.1e} from PyTorch's descriptors (tolerance {about['tolerance']})"),
    )


def print_hard_test(test: HardTest) -> None:
    print_facts(
        ("queries", f"{len(test.rows[0].judge.right):,}"),
        ("content", "mean φ-distance to the original over that of two images of a person from different cameras"),
    )
    console.print()
    print_table(test.table())
    for line in test.conclusions():
        console.print(line, soft_wrap=True)


def print_lists(lists: RankedLists, gallery: Gallery, show: int) -> None:
    query = lists.query
    print_facts(
        ("query", _contents(query)),
        ("gallery", f"{count(len(gallery), 'image')}, {gallery.metric} distance, {gallery.dim} dimensions"),
    )
    if lists.reranking is not None:
        print_facts(("re-ranking", str(lists.reranking)))
    print_ranks(lists, show)


def print_ranks(lists: RankedLists, show: int) -> None:
    """The lists of the first queries, and how many are right at rank 1."""
    query = lists.query
    for i in range(min(show, len(query))):
        pid, camera, name = lists.describe(i)
        name = printable(name)
        console.print()
        console.print(Text.assemble((f"query {i}", "bold"), f"  {_labels(pid, camera)}{name}"), soft_wrap=True)
        console.print(Text(f"{'rank':>6}{'distance':>11}{'id':>8}{'camera':>8}  same  name", "dim"), soft_wrap=True)
        for rank, (_, found, found_camera, found_name, distance) in enumerate(lists.matches(i), 1):
            same = found == pid and found != -1
            labels = "".join(f"{'' if value == -1 else value:>8}" for value in (found, found_camera))
            line = f"{rank:>6}{distance:>11.6f}{labels}  {'yes' if same else '':<4}  {printable(found_name)}"
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
