"""The command line ``apd``.

Libraries are imported by the commands that use them, so that ``apd --help`` answers at once.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from apd.errors import InputError

app = typer.Typer(
    help="Person re-identification: evaluate features, build and search galleries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

FILE_HELP = (
    "An [bold].npz[/bold] feature file holds the arrays [bold]features[/bold] (N, D), [bold]pids[/bold] and "
    "[bold]camids[/bold] (N,); optionally [bold]split[/bold] (0 train, 1 query, 2 gallery) and [bold]names[/bold]."
)


class Metric(str, Enum):
    cosine = "cosine"
    euclidean = "euclidean"


class AveragePrecision(str, Enum):
    rectangular = "rectangular"
    trapezoidal = "trapezoidal"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


MetricOption = Annotated[Metric, typer.Option(help="Distance between features.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")]


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that the user can act on become one line: exit code 2 for wrong input, 1 for a failure on the way."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the command
                stream.reconfigure(errors="replace")
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # `apd search … | head`; typer handles it
            raise
        except (ImportError, OSError, ValueError) as error:
            code = _exit_code(error)
            if code is None:
                raise
            typer.secho(f"Error: {_message(error)}", fg="red", err=True)
            raise typer.Exit(code) from None

    return run


def _exit_code(error: Exception) -> int | None:
    """None for an error that is none of the user's making and deserves its traceback."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, (ImportError, OSError)):
        return 1
    from apd_kernels import GalleryError

    return 2 if isinstance(error, GalleryError) else None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())  # one line


def _torch_device(device: Device) -> str:
    import torch

    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.cuda and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    return device.value


def _gallery_device(device: Device) -> str | None:
    if device is Device.cuda:
        import faiss

        if not faiss.get_num_gpus():
            raise InputError("--device cuda: FAISS finds no GPU here")
    return None if device is Device.auto else device.value


def _check_writable(path: Path | None, option: str) -> None:
    """Before the work, not after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")


def _check_file(path: Path | None, option: str) -> None:
    """The name of a file that can be written, not of a folder."""
    _check_writable(path, option)
    if path is not None and path.is_dir():
        raise InputError(f"{option} {path}: expected a file name, got a folder")


@app.command(epilog=FILE_HELP)
@_reported
def evaluate(
    features: Annotated[
        Path | None, typer.Option(help="Feature file with a split array: its queries are searched in its gallery.")
    ] = None,
    query: Annotated[Path | None, typer.Option(help="Feature file of the queries, with --gallery.")] = None,
    gallery: Annotated[Path | None, typer.Option(help="Feature file of the gallery, with --query.")] = None,
    metric: MetricOption = Metric.cosine,
    ap: Annotated[
        AveragePrecision,
        typer.Option(
            help="Average precision: rectangular is the usual one; trapezoidal that of the first Market-1501 code."
        ),
    ] = AveragePrecision.rectangular,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Rank-1, rank-5, rank-10, mAP and mINP of a feature file.

    Left out of a query's ranking: gallery images of its identity in its own
    camera, and those of identity -1 (junk). A query with no right answer left
    is not counted.
    """
    if [option is not None for option in (features, query, gallery)] not in ([True, False, False], [False, True, True]):
        raise InputError("give either --features, or --query and --gallery")
    _check_file(json, "--json")
    on = _torch_device(device)
    from apd import display
    from apd.evaluation import evaluate as evaluation_of
    from apd.features import load_features
    from apd.files import write_json

    if features is not None:
        whole = load_features(features)
        if whole.split is None:
            raise InputError(f"{features}: no array 'split'; without one, give two files as --query and --gallery")
        queries, images = whole.part("query"), whole.part("gallery")
    else:
        assert query is not None
        assert gallery is not None
        queries, images = load_features(query).part("query"), load_features(gallery).part("gallery")
    result = evaluation_of(queries, images, metric=metric.value, ap=ap.value, device=on)
    display.print_evaluation(result, queries, images)
    if json is not None:
        write_json(json, result.as_json())
        display.print_written(json)


@app.command(epilog=FILE_HELP)
@_reported
def index(
    features: Annotated[
        Path, typer.Option(help="Feature file; its gallery rows (split 2) are indexed, or all rows without a split.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; a gallery that is already there is replaced.")],
    metric: MetricOption = Metric.cosine,
) -> None:
    """Build a searchable gallery from a feature file."""
    from apd import display
    from apd.features import load_features
    from apd.retrieval import index_features

    rows = load_features(features).part("gallery")
    gallery = index_features(rows, metric.value, device="cpu")
    gallery.save(output)
    display.print_indexed(gallery, rows)
    display.print_written(output)


@app.command(epilog=FILE_HELP)
@_reported
def search(
    gallery: Annotated[Path, typer.Option(help="Gallery folder written by [bold]apd index[/bold].")],
    features: Annotated[
        Path, typer.Option(help="Feature file; its query rows (split 1) are searched, or all rows without a split.")
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Images listed for each query.")] = 10,
    exclude_same_camera: Annotated[
        bool,
        typer.Option(
            "--exclude-same-camera",
            help="Leave out images of the query's identity in its own camera, as the evaluation does.",
        ),
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Number of queries whose lists are printed.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Also write all lists to this .json or .csv file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """The nearest gallery images of each query."""
    if output is not None and output.suffix not in (".json", ".csv"):
        raise InputError(f"--output {output}: expected a name that ends in .json or .csv")
    _check_writable(output, "--output")
    from apd import display
    from apd.features import load_features
    from apd.retrieval import search_features, write_lists
    from apd_kernels import Gallery

    images = Gallery.load(gallery, device=_gallery_device(device))
    queries = load_features(features).part("query")
    lists = search_features(queries, images, k, exclude_same_camera=exclude_same_camera)
    display.print_lists(lists, images, show)
    if output is not None:
        write_lists(lists, output)
        display.print_written(output)


@app.command()
@_reported
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results; files of the same names are replaced.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generated features.")] = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Evaluation, gallery search and metric perturbation on generated features, in less than a minute.

    Three domains are generated, each with its own identities, cameras and
    difficulty. Nothing is downloaded.
    """
    on = _torch_device(device)
    from apd.demo import run_demo

    run_demo(output, seed=seed, device=on)


@app.command()
@_reported
def env() -> None:
    """Versions, devices and backend choice: the text to paste into a bug report."""
    from apd.environment import describe_environment

    lines = describe_environment()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    app()
