"""The commands that look at a run: ``hardtest``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, check_file, reported, torch_device

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


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
    from apd.data.market import read_market
    from apd.display import print_hard_test, print_written
    from apd.files import write_json
    from apd.hard_testing import run_hard_test
    from apd.run import Run

    folder = read_market(data, ("query", "gallery"))
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
