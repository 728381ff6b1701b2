"""The commands ``extract``, ``evaluate``, ``index`` and ``search``."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apd.cli.common import Device, DeviceOption, check_file, gallery_device, reported, torch_device
from apd.errors import InputError

if TYPE_CHECKING:
    from apd.data.market import ReidFolder
    from apd.extraction import Extractor
    from apd.features import FeatureSet

FILE_HELP = (
    "An [bold].npz[/bold] feature file holds the arrays [bold]features[/bold] (N, D), [bold]pids[/bold] and "
    "[bold]camids[/bold] (N,); optionally [bold]split[/bold] (0 train, 1 query, 2 gallery) and [bold]names[/bold]. "
    "A data set is a folder with [bold]bounding_box_train[/bold], [bold]query[/bold] and "
    "[bold]bounding_box_test[/bold] (the gallery), as Market-1501."
)
PARTS = ("train", "query", "gallery")


class Metric(str, Enum):
    cosine = "cosine"
    euclidean = "euclidean"


class AveragePrecision(str, Enum):
    rectangular = "rectangular"
    trapezoidal = "trapezoidal"


MetricOption = Annotated[
    Metric, typer.Option(help="Distance between features; a run's have length 1, where both rank alike.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images that the network gets at once.")]
FlipTestOption = Annotated[
    bool, typer.Option("--flip-test", help="Describe an image by the mean over it and its mirror image.")
]
CheckpointOption = Annotated[Path | None, typer.Option(help="Folder of a run, with --data.")]


@reported
def extract(
    model: Annotated[
        str,
        typer.Option(
            help="[bold]timm:NAME[/bold]; [bold]package.module:factory[/bold], a function without arguments that "
            "returns a torch.nn.Module, also from the current folder; or the folder of a run."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Data set.")],
    output: Annotated[Path, typer.Option(help="Feature file to write or replace, .npz.")],
    part: Annotated[
        list[str] | None,
        typer.Option(help="train, query or gallery; give it once for each part. Without it, those that are there."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height and width to which images are resized; without it the model's own, 256x128 for a factory's.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|none",
            help="For timm:NAME: a local file of weights, or none for an untrained model (seed 0). Without it, those "
            "that timm names, from its cache or downloaded.",
        ),
    ] = None,
    mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="For a factory: mean of R, G, B in [0, 1] by which images are normalized; ImageNet's."),
    ] = None,
    std: Annotated[tuple[float, float, float] | None, typer.Option(help="And the standard deviation.")] = None,
    batch_size: BatchSizeOption = 64,
    flip_test: FlipTestOption = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Write the features of a data set's images, of any model, to a file."""
    check_file(output, "--output", (".npz",))
    height_width = None if size is None else _size(size)
    parts = part or _present_parts(data)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise InputError(f"--part {unknown[0]}: expected train, query or gallery")
    on = torch_device(device)
    from apd import display
    from apd.data.market import read_market
    from apd.extraction import load_extractor
    from apd.features import save_features

    folder = read_market(data, parts)
    extractor = load_extractor(model, on, size=height_width, weights=weights, mean=mean, std=std, flip_test=flip_test)
    rows = _extracted(extractor, folder, batch_size)
    display.print_extractor(extractor.about())
    display.print_extracted(rows, absent=[] if part else [name for name in PARTS if name not in parts])
    save_features(rows, output, extractor.about())
    display.print_written(output)


@reported
def evaluate(
    features: Annotated[
        Path | None, typer.Option(help="Feature file with a split array: its queries are searched in its gallery.")
    ] = None,
    query: Annotated[Path | None, typer.Option(help="Feature file of the queries, with --gallery.")] = None,
    gallery: Annotated[Path | None, typer.Option(help="Feature file of the gallery, with --query.")] = None,
    checkpoint: CheckpointOption = None,
    data: Annotated[Path | None, typer.Option(help="Data set whose query and gallery the run is evaluated on.")] = None,
    metric: MetricOption = Metric.cosine,
    ap: Annotated[
        AveragePrecision,
        typer.Option(
            help="Average precision: rectangular is the usual one; trapezoidal that of the first Market-1501 code."
        ),
    ] = AveragePrecision.rectangular,
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
    given = [option is not None for option in (features, query, gallery, checkpoint, data)]
    if given not in ([1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]):
        raise InputError("give either --features, or --query and --gallery, or --checkpoint and --data")
    if flip_test and checkpoint is None:
        raise InputError("--flip-test: is for --checkpoint; features are taken as they are")
    check_file(json, "--json")
    on = torch_device(device)
    from apd import display
    from apd.data.market import read_market
    from apd.evaluation import evaluate as evaluation_of
    from apd.features import load_features
    from apd.files import write_json

    about = {}
    if features is not None:
        whole = load_features(features)
        if whole.split is None:
            raise InputError(f"{features}: no array 'split'; without one, give two files as --query and --gallery")
        queries, images = whole.part("query"), whole.part("gallery")
    elif checkpoint is not None and data is not None:
        folder = read_market(data, ("query", "gallery"))
        extractor = _run_extractor(checkpoint, on, flip_test)
        whole = _extracted(extractor, folder, batch_size)
        queries, images = whole.part("query"), whole.part("gallery")
        about = {"data": str(data), **extractor.about(), "re_ranking": False}
        display.print_extractor(about)
    else:
        assert query is not None
        assert gallery is not None
        queries, images = load_features(query).part("query"), load_features(gallery).part("gallery")
    result = evaluation_of(queries, images, metric=metric.value, ap=ap.value, device=on)
    display.print_evaluation(result, queries, images)
    if json is not None:
        write_json(json, result.as_json() | about)
        display.print_written(json)


@reported
def index(
    output: Annotated[Path, typer.Option(help="Folder to write; a gallery that is already there is replaced.")],
    features: Annotated[
        Path | None,
        typer.Option(help="Feature file; its gallery rows (split 2) are indexed, or all rows without a split."),
    ] = None,
    checkpoint: CheckpointOption = None,
    data: Annotated[Path | None, typer.Option(help="Data set whose gallery is described by the run.")] = None,
    metric: MetricOption = Metric.cosine,
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
    on = torch_device(device)
    from apd import display
    from apd.data.market import read_market
    from apd.features import load_features
    from apd.retrieval import index_features, note_run
    from apd_kernels import Gallery

    Gallery.check_destination(output)
    if features is not None:
        rows = load_features(features).part("gallery")
        gallery = index_features(rows, metric.value, device="cpu")
    else:
        assert checkpoint is not None
        assert data is not None
        folder = read_market(data, ("gallery",))
        extractor = _run_extractor(checkpoint, on, flip_test)
        rows = _extracted(extractor, folder, batch_size).part("gallery")
        gallery = index_features(rows, metric.value, device="cpu")
        note_run(gallery, extractor, data)
        display.print_extractor(extractor.about())
    gallery.save(output)
    display.print_indexed(gallery, rows)
    display.print_written(output)


@reported
def search(
    gallery: Annotated[Path, typer.Option(help="Gallery folder written by [bold]apd index[/bold].")],
    query: Annotated[
        list[Path] | None, typer.Option(help="Image to search, in a gallery made with a run; may be repeated.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Feature file; its query rows (split 1) are searched, or all rows without a split."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Images listed for each query.")] = 10,
    picture: Annotated[
        Path | None, typer.Option(help="With --query: also draw the lists; a name that ends in .png or .jpg.")
    ] = None,
    id: Annotated[
        int | None, typer.Option(min=1, help="Identity of --query; without it, as a Market-1501 file name says.")
    ] = None,
    camera: Annotated[
        int | None, typer.Option(min=1, help="Camera of --query; without it, as a Market-1501 file name says.")
    ] = None,
    exclude_same_camera: Annotated[
        bool,
        typer.Option(
            "--exclude-same-camera",
            help="Leave out images of the query's identity in its own camera, as the evaluation does.",
        ),
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Number of queries whose lists are printed.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Also write all lists to this .json or .csv file.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="With --query: where the gallery's run is now, if it has moved.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --picture: where the gallery's data set is now, if it has moved.")
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """The nearest gallery images of each query: of an image, or of each row of a feature file."""
    if (features is None) == (not query):
        raise InputError("give either --query IMAGE or --features")
    of_images = {"--picture": picture, "--id": id, "--camera": camera, "--checkpoint": checkpoint, "--data": data}
    for option, value in of_images.items():
        if features is not None and value is not None:
            raise InputError(f"{option}: is for --query IMAGE, not for --features")
    check_file(output, "--output", (".json", ".csv"))
    check_file(picture, "--picture", (".png", ".jpg", ".jpeg"))
    from apd import display
    from apd.features import load_features
    from apd.ranked_picture import write_ranked_picture
    from apd.retrieval import data_of, describe_queries, extractor_of, search_features, write_lists
    from apd_kernels import Gallery

    images = Gallery.load(gallery, device=gallery_device(device))
    if features is not None:
        queries = load_features(features).part("query")
    else:
        assert query is not None
        extractor = extractor_of(images, gallery, torch_device(device), checkpoint)
        folder = None if picture is None else data_of(images, gallery, data)
        queries = describe_queries(extractor, query, id, camera)
        if exclude_same_camera and (queries.identities() == -1).any() | (queries.cameras() == -1).any():
            raise InputError("--exclude-same-camera: the query's identity or camera is not known; --id and --camera")
        display.print_extractor(extractor.about())
    lists = search_features(queries, images, k, exclude_same_camera=exclude_same_camera)
    display.print_lists(lists, images, show)
    if output is not None:
        write_lists(lists, output)
        display.print_written(output)
    if picture is not None:
        assert folder is not None
        write_ranked_picture(lists, folder, picture)
        display.print_written(picture)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise InputError(f"--size {text}: expected height x width in pixels, such as 256x128")
    return int(match[1]), int(match[2])


def _present_parts(data: Path) -> list[str]:
    """All parts if none is there: whoever reads them says what is missing."""
    from apd.data.market import FOLDERS

    return [part for part in PARTS if (data / FOLDERS[part]).is_dir()] or list(PARTS)


def _run_extractor(run: Path, device: str, flip_test: bool) -> Extractor:
    from apd.extraction import load_extractor

    if not run.is_dir():
        raise InputError(f"--checkpoint {run}: expected the folder of a run; there is no such folder")
    return load_extractor(str(run), device, flip_test=flip_test)


def _extracted(extractor: Extractor, folder: ReidFolder, batch_size: int) -> FeatureSet:
    """With a progress bar."""
    from apd import display
    from apd.extraction import extract_folder

    total = sum(len(getattr(folder, part)) for part in PARTS)
    with display.progress("images", total) as advance:
        return extract_folder(extractor, folder, batch_size=batch_size, advance=advance)
