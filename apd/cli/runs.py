"""The commands for a finished run: ``export``, ``report`` and ``hardtest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, check_file, reported, torch_device

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


@reported
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="File to write or replace, .onnx.")],
    opset: Annotated[int, typer.Option(min=18, help="Version of the ONNX operators.")] = 18,
) -> None:
    """Write a run's network as ONNX: images in [0, 1] to descriptors of length 1, any number at once.

    The normalization of the images is inside. The file is written after ONNX
    Runtime has given the same descriptors as PyTorch.
    """
    check_file(output, "--output", (".onnx",))
    from apd.cli.display import print_exported
    from apd.console import print_written
    from apd.export import export_onnx
    from apd.run import Run

    print_exported(export_onnx(Run(run), output, opset=opset))
    print_written(output)


@reported
def report(
    run: RunArgument,
    target: Annotated[
        list[Path] | None, typer.Option(help="Data set to test on besides the sources' own; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write or replace; default: RUN/report.html.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Write one HTML page on a run: its figures, ranked lists, synthesized images, attention maps, curves, values.

    The page needs no other file, no network and no JavaScript.
    """
    path = output or run / "report.html"
    on = torch_device(device)
    from apd.console import print_written
    from apd.reports.run import write_run_report
    from apd.run import Run

    found = Run(run)
    check_file(path, "--output", (".html",))
    write_run_report(path, found, target or (), on)
    print_written(path)


@reported
def hardtest(
    run: RunArgument,
    judge: Annotated[Path, typer.Option(help="Run of a baseline that is not the run's ψ.")],
    data: Annotated[Path, typer.Option(help="Data set whose query and gallery show people that no training saw.")],
    control: Annotated[
        Path | None, typer.Option(help="Run of a generator trained without L_MP: mpg.weight_mp=0.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and the jitter.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """How far a run's generator makes a baseline fail that it never saw, beside noise, blur and jitter of equal size.

    Query and gallery are both synthesized. The generator's images must stay
    within half of the φ-distance between cameras, and let rank-1 fall 1.5
    times as far as the strongest of the three; otherwise it is missed.
    """
    check_file(json, "--json")
    on = torch_device(device)
    from apd.cli.display import print_hard_test
    from apd.console import print_written
    from apd.data.datasets import read_dataset
    from apd.data.market import check_answers
    from apd.experiments.hard_eval import run_hard_test
    from apd.files import write_json
    from apd.run import Run

    folder = read_dataset(data, ("query", "gallery"))
    check_answers(folder)
    other = None if control is None else Run(control)
    result = run_hard_test(Run(run), Run(judge), folder, control=other, device=on, seed=seed)
    about = {
        "run": str(run),
        "judge": str(judge),
        "data": str(data),
        "control": None if control is None else str(control),
    }
    print_hard_test(result)
    if json is not None:
        write_json(json, {**about, "seed": seed, **result.as_json()})
        print_written(json)
