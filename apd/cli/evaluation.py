"""The commands ``evaluate`` and ``rerank``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apd.cli.common import Device, DeviceOption, check_file, reported, torch_device
from apd.cli.features import (
    BatchSizeOption,
    CheckpointOption,
    FlipTestOption,
    K1Option,
    K2Option,
    LambdaOption,
    Metric,
    MetricOption,
    RerankOption,
    Variant,
    extracted,
    reranking_of,
    run_extractor,
)
from apd.errors import InputError

if TYPE_CHECKING:
    from apd.retrieval.evaluation import Conventions, Evaluation
    from apd.retrieval.features import FeatureSet
    from apd.retrieval.shards import GalleryShards


class AveragePrecision(str, Enum):
    rectangular = "rectangular"
    trapezoidal = "trapezoidal"


class Ties(str, Enum):
    pessimistic = "pessimistic"
    optimistic = "optimistic"
    expected = "expected"


FeaturesOption = Annotated[
    Path | None, typer.Option(help="Feature file with a split array: its queries are searched in its gallery.")
]
QueryOption = Annotated[
    Path | None,
    typer.Option(help="Feature file of the queries, with --gallery; or with --checkpoint a folder of their images."),
]
IgnoreCamerasOption = Annotated[
    bool,
    typer.Option(
        "--ignore-cameras",
        help="Keep the images of a query's own camera: for data without cameras, or with one, whose gallery does "
        "not hold the query itself. Names of images need not say a camera then (0002_001.jpg).",
    ),
]
DataOption = Annotated[Path | None, typer.Option(help="Data set whose query and gallery the run is evaluated on.")]
ApOption = Annotated[
    AveragePrecision,
    typer.Option(
        help="Average precision: rectangular, the usual one; trapezoidal, that of the first Market-1501 code."
    ),
]
TiesOption = Annotated[
    Ties,
    typer.Option(
        help="Of a right and a wrong image at the same distance the wrong one counts as nearer, or the right one, or "
        "the mean over all orders is taken."
    ),
]

# Pairs of options of which one does without what the other needs.
_PIECES = "a gallery in pieces"
_APART = {
    ("--distances", "--metric"): "the distances are there already",
    ("--distances", "--rerank"): "re-ranking needs the distances among the gallery images as well: give features",
    ("--distances", "--single-shot"): "galleries are drawn from features",
    ("--distances", "--checkpoint"): "rows and columns are labelled by --features, or by --query and --gallery",
    ("--distances", _PIECES): "the columns are labelled by one feature file",
    ("--rerank", "--single-shot"): "the figures of re-ranked lists are those of the whole gallery",
    ("--rerank", "--exclude-self"): "each query would be two of its own neighbours",
    ("--rerank", _PIECES): "re-ranking compares the gallery images with each other: give one feature file",
    ("--single-shot", _PIECES): "galleries are drawn from all images: give one feature file",
    ("--exclude-self", _PIECES): "give one feature file",
    ("--exclude-self", "--ignore-cameras"): "it ignores cameras already",
}


@reported
def evaluate(
    features: FeaturesOption = None,
    query: QueryOption = None,
    gallery: Annotated[
        list[Path] | None,
        typer.Option(
            help="Feature file of the gallery, with --query. For a gallery in pieces, which need not fit the memory, "
            "give it several times, or a folder of them. Beside .npz a piece may be an .npy file of features (N, D), "
            "with the labels NAME.pids.npy and NAME.camids.npy."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    data: DataOption = None,
    distances: Annotated[
        Path | None,
        typer.Option(
            help="Distances that are there already: an .npy file, queries by gallery images, smaller is nearer. "
            "Identities and cameras are those of --features, or of --query and --gallery."
        ),
    ] = None,
    metric: MetricOption = None,
    ap: ApOption = AveragePrecision.rectangular,
    ties: TiesOption = Ties.pessimistic,
    rerank: RerankOption = None,
    k1: K1Option = None,
    k2: K2Option = None,
    share: LambdaOption = None,
    single_shot: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="DRAWS",
            help="Rank-k as in CUHK03's first protocol: the mean over so many draws (torchreid: 10) of one gallery "
            "image of each identity. mAP and mINP are of all images.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0", help="Of the draws of --single-shot.")] = None,
    exclude_self: Annotated[
        bool,
        typer.Option(
            "--exclude-self",
            help="Leave out nothing but the query's own image, found by its name: for images of one camera, searched "
            "among themselves. A feature file without split is then both, query and gallery.",
        ),
    ] = False,
    ignore_cameras: IgnoreCamerasOption = False,
    flip_test: FlipTestOption = False,
    batch_size: BatchSizeOption = 64,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Rank-1, rank-5, rank-10, mAP and mINP of a run on a data set, or of a feature file.

    Left out of a query's ranking: gallery images of its identity in its own
    camera, and those of identity -1 (junk). A query with no right answer left
    is not counted.
    """
    sources = Sources(
        features, query, gallery, checkpoint, data, flip_test, batch_size, not (ignore_cameras or exclude_self)
    )
    given = {
        "--distances": distances,
        "--metric": metric,
        "--rerank": rerank,
        "--single-shot": single_shot,
        "--checkpoint": checkpoint,
        "--exclude-self": exclude_self,
        "--ignore-cameras": ignore_cameras,
        _PIECES: sources.in_pieces,
    }
    for (one, other), reason in _APART.items():
        if given[one] and given[other]:
            raise InputError(f"{one} with {other}: {reason}")
    if seed is not None and single_shot is None:
        raise InputError("--seed: is for --single-shot")
    chosen = (metric or Metric.cosine).value
    reranking = reranking_of(rerank, chosen, k1, k2, share)
    check_file(json, "--json")
    on = torch_device(device)
    from apd import console as terminal
    from apd.cli import display
    from apd.files import write_json
    from apd.retrieval.evaluation import Conventions, evaluate_distances, warn_of_distractors
    from apd.retrieval.evaluation import evaluate as evaluation_of

    conventions = Conventions(
        metric=chosen if distances is None else f"as in {distances}",
        ap=ap.value,
        ties=ties.value,
        reranking=reranking,
        single_shot=single_shot,
        seed=seed or 0,
        exclude_self=exclude_self,
        ignore_cameras=ignore_cameras,
    )
    images: FeatureSet | GalleryShards
    if sources.in_pieces:
        queries, images, result = _evaluated_pieces(sources, conventions, on)
    else:
        queries, images = sources.read(on, among_themselves=exclude_self)
        if distances is None:
            result = evaluation_of(queries, images, conventions, device=on)
        else:
            result = evaluate_distances(distances, queries, images, conventions)
    warn_of_distractors(queries)
    display.print_evaluation(result, queries, images)
    if note := sources.note():
        terminal.console.print(f"note: {note}", soft_wrap=True)
    if json is not None:
        write_json(json, result.as_json() | sources.about(queries))
        terminal.print_written(json)


@reported
def rerank(
    output: Annotated[
        Path,
        typer.Option(help="File for the re-ranked lists: .json, .csv, or .npz with arrays (queries, k)."),
    ],
    features: FeaturesOption = None,
    query: QueryOption = None,
    gallery: Annotated[Path | None, typer.Option(help="Feature file of the gallery, with --query.")] = None,
    checkpoint: CheckpointOption = None,
    data: DataOption = None,
    variant: Annotated[
        Variant,
        typer.Option(
            help="torchreid, as also fast-reid and others do it; transreid, as TransReID, CLIP-ReID and "
            "strong-baseline do, of euclidean distances."
        ),
    ] = Variant.torchreid,
    k1: K1Option = None,
    k2: K2Option = None,
    share: LambdaOption = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Images listed for each query.")] = 100,
    exclude_same_camera: Annotated[
        bool,
        typer.Option(
            "--exclude-same-camera",
            help="Do not list images of the query's identity in its own camera; they take part in the re-ranking.",
        ),
    ] = False,
    ignore_cameras: IgnoreCamerasOption = False,
    metric: MetricOption = None,
    ap: ApOption = AveragePrecision.rectangular,
    ties: TiesOption = Ties.pessimistic,
    flip_test: FlipTestOption = False,
    batch_size: BatchSizeOption = 64,
    json: Annotated[Path | None, typer.Option(help="Also write the figures, before and after, to this file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Re-rank by k-reciprocal neighbours: lists to a file, and the figures before and after.

    The figures need identities and cameras, and a query with an answer; the
    lists do not.
    """
    sources = Sources(
        features,
        query,
        [gallery] if gallery else None,
        checkpoint,
        data,
        flip_test,
        batch_size,
        not ignore_cameras,
        figures=json is not None,
    )
    chosen = (metric or Metric.cosine).value
    reranking = reranking_of(variant, chosen, k1, k2, share)
    assert reranking is not None
    check_file(output, "--output", (".json", ".csv", ".npz"))
    check_file(json, "--json")
    on = torch_device(device)
    from apd import console as terminal
    from apd.cli import display
    from apd.files import write_json
    from apd.retrieval.evaluation import Conventions, evaluate_reranked, warn_of_distractors, why_no_figures
    from apd.retrieval.evaluation import evaluate as evaluation_of
    from apd.retrieval.evaluation import rerank as reranked_of
    from apd.retrieval.ranked_lists import write_lists
    from apd.retrieval.search import rank_reranked

    queries, images = sources.read(on)
    lacking = why_no_figures(queries, images, cameras=not ignore_cameras)
    if json is not None and lacking is not None:
        raise InputError(f"--json: is for figures, which need the arrays 'pids' and 'camids': {lacking}")
    reranked = reranked_of(queries, images, chosen, reranking, device=on)
    lists = rank_reranked(reranked, queries, images, k, chosen, reranking, exclude_same_camera=exclude_same_camera)
    write_lists(lists, output)
    if lacking is not None:
        terminal.console.print(f"note: no figures: {lacking}", soft_wrap=True)
    else:
        warn_of_distractors(queries)
        before = Conventions(metric=chosen, ap=ap.value, ties=ties.value, ignore_cameras=ignore_cameras)
        after = replace(before, reranking=reranking)
        results = {
            "before": evaluation_of(queries, images, before, device=on),
            "after": evaluate_reranked(reranked, queries, images, after, device=on),
        }
        display.print_conventions(results["after"], queries, images)
        display.print_figures(results)
        if json is not None:
            write_json(json, {name: result.as_json() | sources.about(queries) for name, result in results.items()})
            terminal.print_written(json)
    terminal.print_written(output)


@dataclass(frozen=True)
class Sources:
    """Where the options say that queries and gallery come from."""

    features: Path | None
    query: Path | None
    gallery: list[Path] | None
    checkpoint: Path | None
    data: Path | None
    flip_test: bool
    batch_size: int
    cameras: bool  # whether they are looked at
    figures: bool = True  # whether they must be possible

    def __post_init__(self) -> None:
        given = [bool(source) for source in (self.features, self.query, self.gallery, self.checkpoint, self.data)]
        if given not in ([1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0]):
            raise InputError(
                "give either --features, or --query and --gallery, or --checkpoint and --data, or --checkpoint with "
                "--query and --gallery"
            )
        if self.query is not None and self.query.is_dir() and self.checkpoint is None:
            raise InputError(f"--query {self.query}: a folder of images is described by a run: --checkpoint RUN")
        if self.flip_test and self.checkpoint is None:
            raise InputError("--flip-test: is for --checkpoint; features are taken as they are")

    @property
    def in_pieces(self) -> bool:
        """Whether the gallery is more than one feature file."""
        files = self.gallery or []
        if self.checkpoint is not None:
            return False
        return len(files) > 1 or any(file.is_dir() or file.suffix == ".npy" for file in files)

    def read(self, device: str, among_themselves: bool = False) -> tuple[FeatureSet, FeatureSet]:
        """Queries and gallery; with `among_themselves` all rows of a file without split are both."""
        from apd.retrieval.features import load_features

        if self.checkpoint is not None:
            return self._described(device)
        if self.query is not None:
            assert self.gallery is not None
            return load_features(self.query).part("query"), load_features(self.gallery[0]).part("gallery")
        assert self.features is not None
        whole = load_features(self.features)
        if whole.split is None and not among_themselves:
            raise InputError(f"{self.features}: no array 'split'; without one, give two files as --query and --gallery")
        return whole.part("query"), whole.part("gallery")

    def _described(self, device: str) -> tuple[FeatureSet, FeatureSet]:
        """By the run, once it is clear that there is something to evaluate."""
        from apd.data.datasets import read_dataset
        from apd.data.market import NO_ANSWERS, UNKNOWN, labels, unanswered

        assert self.checkpoint is not None
        if self.data is not None:
            folders = [read_dataset(self.data, ("query", "gallery"), cameras=self.cameras)]
        else:
            assert self.query is not None
            assert self.gallery is not None
            if len(self.gallery) > 1:
                raise InputError("--gallery: with --checkpoint one folder is expected")
            asked = (("query", self.query), ("gallery", self.gallery[0]))
            folders = [read_dataset(path, (part,), cameras=self.cameras) for part, path in asked]
        query, gallery = folders[0].query, folders[-1].gallery
        if self.figures and unanswered(labels(query), labels(gallery), cameras=self.cameras) == len(query):
            why = NO_ANSWERS if self.cameras else "no query has an image of its identity in the gallery"
            if all(sample.pid == UNKNOWN for sample in query):
                why = (
                    "the names of the queries do not say who is on them"
                    + self.cameras * "; --ignore-cameras takes 0002_1.jpg"
                )
            raise InputError(f"{folders[0].path}: {why}")
        extractor = run_extractor(self.checkpoint, device, self.flip_test)
        rows = [extracted(extractor, folder, self.batch_size) for folder in folders]
        return rows[0].part("query"), rows[-1].part("gallery")

    def note(self) -> str | None:
        """What must be known of a data set's test."""
        from apd.data.datasets import ten_split_note

        return None if self.data is None else ten_split_note(self.data)

    def about(self, queries: FeatureSet) -> dict[str, Any]:
        """For a JSON file: how the features were made, as far as it is known."""
        return {"descriptor": None, **queries.about, **({} if self.data is None else {"data": str(self.data)})}


def _evaluated_pieces(
    sources: Sources, conventions: Conventions, device: str
) -> tuple[FeatureSet, GalleryShards, Evaluation]:
    """With a progress bar; every image counts twice."""
    from apd import console as terminal
    from apd.retrieval.evaluation import evaluate_shards
    from apd.retrieval.features import load_features
    from apd.retrieval.shards import open_shards

    assert sources.query is not None
    assert sources.gallery is not None
    queries = load_features(sources.query).part("query")
    gallery = open_shards(sources.gallery, queries)
    with terminal.progress("gallery images, twice", 2 * len(gallery)) as advance:
        return queries, gallery, evaluate_shards(queries, gallery, conventions, device=device, advance=advance)
