"""The command ``extract``, and what the commands on features share: options, and where features come from."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apd.cli.common import Device, DeviceOption, check_file, reported, torch_device
from apd.errors import InputError

if TYPE_CHECKING:
    from apd.data.market import ReidFolder
    from apd.retrieval.evaluation import Reranking
    from apd.retrieval.extraction import Extractor
    from apd.retrieval.features import FeatureSet

FILE_HELP = (
    "An [bold].npz[/bold] feature file holds the arrays [bold]features[/bold] (N, D), [bold]pids[/bold] and "
    "[bold]camids[/bold] (N,); optionally [bold]split[/bold] (0 train, 1 query, 2 gallery) and [bold]names[/bold]. "
    "A data set is a folder with [bold]bounding_box_train[/bold], [bold]query[/bold] and "
    "[bold]bounding_box_test[/bold] (the gallery), as Market-1501; or [bold]NAME:PATH[/bold], one of [bold]apd data "
    "list[/bold] as it is distributed."
)
PARTS = ("train", "query", "gallery")


class Metric(str, Enum):
    cosine = "cosine"
    euclidean = "euclidean"


class Variant(str, Enum):
    torchreid = "torchreid"
    transreid = "transreid"


MetricOption = Annotated[
    Metric | None,
    typer.Option(
        help="Distance between features; a run's have length 1, where both rank alike.", show_default="cosine"
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images that the network gets at once.")]
FlipTestOption = Annotated[
    bool, typer.Option("--flip-test", help="Describe an image by the mean over it and its mirror image.")
]
CheckpointOption = Annotated[Path | None, typer.Option(help="Folder of a run, with --data.")]
RerankOption = Annotated[
    Variant | None,
    typer.Option(
        help="Re-rank by k-reciprocal neighbours (Zhong et al., 2017): torchreid, as also fast-reid and others do it; "
        "transreid, as TransReID, CLIP-ReID and strong-baseline do, of euclidean distances. Memory grows with the "
        "number of images, not with its square."
    ),
]
K1Option = Annotated[
    int | None,
    typer.Option(
        min=1, show_default="20", help="Re-ranking: neighbours that must be mutual (TransReID's own test: 50)."
    ),
]
K2Option = Annotated[
    int | None,
    typer.Option(
        min=1, show_default="6", help="Re-ranking: neighbours to average over; 1 for none (TransReID's own test: 15)."
    ),
]
LambdaOption = Annotated[
    float | None,
    typer.Option("--lambda", min=0, max=1, show_default="0.3", help="Re-ranking: share of the distance itself."),
]


@reported
def extract(
    model: Annotated[
        str,
        typer.Option(
            help="[bold]timm:NAME[/bold]; [bold]package.module:factory[/bold], a function without arguments that "
            "returns a torch.nn.Module, also from the current folder; or the folder of a run."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Data set; or a folder of images, or a CSV file of paths, which needs no identities.")
    ],
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
            "that timm names, from its cache or downloaded. For a factory: a file that is loaded into its network.",
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
    from apd import console as terminal
    from apd.cli import display
    from apd.data.datasets import DataSpec, read_dataset
    from apd.data.datasets.registry import PICTURES
    from apd.retrieval.extraction import load_extractor
    from apd.retrieval.features import save_features

    folder = read_dataset(data, parts, unlabelled=True)
    extractor = load_extractor(model, on, size=height_width, weights=weights, mean=mean, std=std, flip_test=flip_test)
    rows = extracted(extractor, folder, batch_size)
    if not part and DataSpec.parse(data).dataset is PICTURES:
        rows = replace(rows, split=None)  # to ask, or to be searched
    display.print_extractor(extractor.about())
    absent = [] if part or rows.split is None else [name for name in PARTS if name not in parts]
    display.print_extracted(rows, absent)
    save_features(rows, output)
    terminal.print_written(output)


def reranking_of(
    variant: Variant | None, metric: str, k1: int | None, k2: int | None, share: float | None
) -> Reranking | None:
    """What the options say; those not given have the field's usual values.

    Raises:
        InputError: options of a re-ranking without one, or the variant is not defined on this distance.
    """
    options = {"k1": k1, "k2": k2, "lambda_value": share}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if variant is None:
        if given:
            option = next(iter(given)).removesuffix("_value")
            raise InputError(f"--{option}: is for --rerank")
        return None
    if variant is Variant.transreid and metric != Metric.euclidean.value:
        raise InputError(f"--rerank transreid: is defined on Euclidean distances; got the metric {metric}")
    from apd.retrieval.evaluation import Reranking

    return Reranking(variant.value, **given)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise InputError(f"--size {text}: expected height x width in pixels, such as 256x128")
    return int(match[1]), int(match[2])


def _present_parts(data: Path) -> list[str]:
    """All parts if none is there: whoever reads them says what is missing."""
    from apd.data.datasets import present_parts

    return present_parts(data, unlabelled=True)


def run_extractor(run: Path, device: str, flip_test: bool) -> Extractor:
    from apd.retrieval.extraction import load_extractor

    if not run.is_dir():
        raise InputError(f"--checkpoint {run}: expected the folder of a run; there is no such folder")
    return load_extractor(str(run), device, flip_test=flip_test)


def extracted(extractor: Extractor, folder: ReidFolder, batch_size: int) -> FeatureSet:
    """With a progress bar."""
    from apd import console as terminal
    from apd.retrieval.extraction import extract_folder

    total = sum(len(getattr(folder, part)) for part in PARTS)
    with terminal.progress("images", total) as advance:
        return extract_folder(extractor, folder, batch_size=batch_size, advance=advance)
