"""The commands ``index`` and ``search``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apd.cli.common import Device, DeviceOption, check_file, gallery_device, reported, torch_device
from apd.cli.features import (
    BatchSizeOption,
    CheckpointOption,
    FlipTestOption,
    K1Option,
    K2Option,
    LambdaOption,
    MetricOption,
    RerankOption,
    extracted,
    reranking_of,
    run_extractor,
)
from apd.errors import InputError

if TYPE_CHECKING:
    from apd_kernels import Gallery


class Engine(str, Enum):
    faiss = "faiss"
    fused = "fused"


@reported
def index(
    output: Annotated[
        Path, typer.Option(help="Folder to write; a gallery that is already there is replaced, without --append.")
    ],
    features: Annotated[
        Path | None,
        typer.Option(help="Feature file; its gallery rows (split 2) are indexed, or all rows without a split."),
    ] = None,
    checkpoint: CheckpointOption = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data set whose gallery is described by the run; or a folder of images, or a CSV of paths."),
    ] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add to the gallery that is there: of the same model, dimension and metric."),
    ] = False,
    metric: MetricOption = None,
    factory: Annotated[
        str | None,
        typer.Option(
            "--index",
            metavar="FACTORY",
            show_default="Flat",
            help="FAISS index by its factory string. Flat is exact; IVF1024,Flat, HNSW32, PQ32 or others are faster on "
            "many images and may miss some. One that must be trained is trained with the images indexed first.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="Further array of the feature file, a value a row, to keep for [bold]apd search --where[/bold]; may "
            "be repeated. With --append the gallery's own are taken."
        ),
    ] = None,
    flip_test: FlipTestOption = False,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = Device.auto,
) -> None:
    """Build a searchable gallery: of images with a run, or from a feature file.

    A gallery made with a run knows it, and can be searched with images.
    """
    if [option is not None for option in (features, checkpoint, data)] not in ([1, 0, 0], [0, 1, 1]):
        raise InputError("give either --features, or --checkpoint and --data")
    if flip_test and checkpoint is None:
        raise InputError("--flip-test: is for --checkpoint; features are taken as they are")
    if column and (features is None or append):
        raise InputError("--column: is for --features, in a new gallery")
    if reserved := {"id", "camera", "name"} & set(column or ()):
        raise InputError(f"--column {min(reserved)}: every gallery has its own")
    on = torch_device(device)
    from apd import console as terminal
    from apd.cli import display
    from apd.data.datasets import read_dataset
    from apd.files import only_writer
    from apd.retrieval.features import load_features
    from apd.retrieval.search import append_features, index_features, note_run
    from apd_kernels import Gallery

    Gallery.check_destination(output)
    if append and not output.exists():
        raise InputError(f"{output}: no such folder")
    with only_writer(output):  # from the load to the save: rows that another process adds meanwhile would be lost
        present = _gallery_to_append(output, metric and metric.value, factory) if append else None
        extractor = None
        if features is not None:
            columns = (column or ()) if present is None else [name for name in present.metadata if name != "name"]
            rows = load_features(features, columns).part("gallery")
        else:
            assert checkpoint is not None
            assert data is not None
            folder = read_dataset(data, ("gallery",), unlabelled=True)
            data = folder.path  # what the images' names are relative to
            extractor = run_extractor(checkpoint, on, flip_test)
            rows = extracted(extractor, folder, batch_size).part("gallery")
        if present is not None:
            gallery = present
            append_features(gallery, output, rows, data)
        else:
            gallery = index_features(rows, metric.value if metric else "cosine", index=factory or "Flat", device="cpu")
            if extractor is not None and data is not None:
                note_run(gallery, extractor, data)
        gallery.save(output)
    if rows.about:
        display.print_extractor(rows.about)
    display.print_indexed(gallery, rows)
    terminal.print_written(output)


@reported
def search(
    gallery: Annotated[Path, typer.Option(help="Gallery folder written by [bold]apd index[/bold].")],
    query: Annotated[
        list[Path] | None,
        typer.Option(help="Image to search, or folder of such, in a gallery made with a run; may be repeated."),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Feature file; its query rows (split 1) are searched, or all rows without a split."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Images listed for each query.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Search only images with this id, camera, name, or value of another column of the gallery; may be "
            "repeated: any value of one key, and all keys.",
        ),
    ] = None,
    max_distance: Annotated[float | None, typer.Option(help="List no image that is farther.")] = None,
    exclude_same_camera: Annotated[
        bool,
        typer.Option(
            "--exclude-same-camera",
            help="Leave out images of the query's identity in its own camera, as the evaluation does.",
        ),
    ] = False,
    rerank: RerankOption = None,
    k1: K1Option = None,
    k2: K2Option = None,
    share: LambdaOption = None,
    engine: Annotated[
        Engine,
        typer.Option(help="faiss, or fused: the kernel of apd_kernels, for a gallery with the index Flat."),
    ] = Engine.faiss,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=N",
            help="Of an index that is not Flat, for this search: nprobe, max_codes, efSearch or k_factor; more finds "
            "more, and takes longer. May be repeated.",
        ),
    ] = None,
    show: Annotated[
        int,
        typer.Option(min=0, help="Queries whose lists are printed, and with --features drawn by --picture, --report."),
    ] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Also write all lists to this .json, .csv or .npz (arrays) file.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw the lists; a name that ends in .png or .jpg.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write the lists, with their pictures, as one .html file.")
    ] = None,
    id: Annotated[
        int | None, typer.Option(min=1, help="Identity of --query; without it, as a Market-1501 file name says.")
    ] = None,
    camera: Annotated[
        int | None, typer.Option(min=1, help="Camera of --query; without it, as a Market-1501 file name says.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --query: where the gallery's run is now, if it has moved.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="With --picture or --report: the folder of the gallery's images, if it has moved, or the gallery was "
            "made from a feature file."
        ),
    ] = None,
    query_data: Annotated[
        Path | None,
        typer.Option(help="The same of the images of --features.", show_default="the gallery's folder"),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """The nearest gallery images of each query: of an image, or of each row of a feature file."""
    if (features is None) == (not query):
        raise InputError("give either --query IMAGE or --features")
    of_images = {"--id": id, "--camera": camera, "--checkpoint": checkpoint}
    of_pictures = {"--data": data, "--query-data": query_data}
    of_distances = {"--max-distance": max_distance, "--parameter": parameter or None}
    drawn = picture is not None or report is not None
    _refuse(features is not None, of_images, "is for --query IMAGE, not for --features")
    _refuse(features is None, {"--query-data": query_data}, "is for --features, not for --query IMAGE")
    _refuse(not drawn, of_pictures, "is for --picture and --report")
    _refuse(rerank is not None, of_distances, "is for distances of features, not for re-ranked ones by --rerank")
    if drawn and not show and (features is not None or any(path.is_dir() for path in query or ())):
        raise InputError("--show 0: leaves no list for --picture or --report to draw")
    parameters = _parameters(parameter or ())
    check_file(output, "--output", (".json", ".csv", ".npz"))
    check_file(picture, "--picture", (".png", ".jpg", ".jpeg"))
    check_file(report, "--report", (".html",))
    on = torch_device(device)
    from apd import console as terminal
    from apd.cli import display
    from apd.reports.picture import write_ranked_picture
    from apd.reports.search import write_search_report
    from apd.retrieval.evaluation import LABELS
    from apd.retrieval.features import load_features
    from apd.retrieval.ranked_lists import write_lists
    from apd.retrieval.search import (
        check_fits,
        data_of,
        describe_queries,
        extractor_of,
        query_images,
        rows_where,
        search_features,
        search_reranked,
    )

    asking = query_images(query or ())
    images = _loaded(gallery, engine, device)
    reranking = reranking_of(rerank, images.metric, k1, k2, share)
    rows = rows_where(images, where or ())
    folder = data_of(images, gallery, data) if drawn else None
    if features is not None:
        queries = load_features(features).part("query")
        check_fits(queries, images, gallery)
    else:
        extractor = extractor_of(images, gallery, on, checkpoint)
        queries = describe_queries(extractor, asking, id, camera)
        if exclude_same_camera and LABELS.removes_nothing(queries.identities(), queries.cameras()).any():
            raise InputError("--exclude-same-camera: the query's identity or camera is not known; --id and --camera")
    if reranking is not None:
        lists = search_reranked(
            queries, images, k, reranking, exclude_same_camera=exclude_same_camera, where=rows, device=on
        )
    else:
        lists = search_features(
            queries,
            images,
            k,
            exclude_same_camera=exclude_same_camera,
            where=rows,
            max_distance=max_distance,
            parameters=parameters,
        )
    if queries.about:
        display.print_extractor(queries.about)
    display.print_lists(lists, images, show)
    if output is not None:
        write_lists(lists, output)
        terminal.print_written(output)
    if folder is None:
        return
    if query:
        shown = lists if len(asking) == len(query) else lists.first(show)  # of a folder as of a feature file
    else:
        shown = lists.first(show).located(query_data or folder)
    if picture is not None:
        write_ranked_picture(shown, folder, picture)
        terminal.print_written(picture)
    if report is not None:
        facts = {
            "gallery": f"{gallery.resolve().name}, {terminal.count(len(images), 'image')}, index {images.index}",
            "searched": ", ".join(where or ()) or "all images",
            "same camera": "left out where the identity is the same" if exclude_same_camera else "listed",
            "largest distance": "any" if max_distance is None else f"{max_distance:g}",
        }
        write_search_report(shown, len(queries), folder, report, facts)
        terminal.print_written(report)


def _refuse(where: bool, options: Mapping[str, object], reason: str) -> None:
    """InputError for the first of these options that is given."""
    for option, value in options.items():
        if where and value is not None:
            raise InputError(f"{option}: {reason}")


def _gallery_to_append(path: Path, metric: str | None, factory: str | None) -> Gallery:
    """The gallery that is there; InputError where the options say that it should be another one."""
    from apd_kernels import Gallery

    gallery = Gallery.load(path, device="cpu")
    for option, asked, there in (("--metric", metric, gallery.metric), ("--index", factory, gallery.index)):
        if asked is not None and asked != there:
            raise InputError(f"{option} {asked}: the gallery {path} has {there}; --append cannot change that")
    return gallery


def _loaded(path: Path, engine: Engine, device: Device) -> Gallery:
    from apd_kernels import Gallery, GalleryError

    fused = engine is Engine.fused
    try:
        return Gallery.load(path, engine=engine.value, device=torch_device(device) if fused else gallery_device(device))
    except GalleryError:
        raise
    except ValueError as error:
        raise InputError(f"--engine {engine.value}: {path}: {error}") from error


def _parameters(given: Sequence[str]) -> dict[str, int]:
    parameters = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value.isdecimal() and int(value)):
            raise InputError(f"--parameter {text}: expected KEY=N, such as nprobe=16")
        parameters[name] = int(value)
    return parameters
