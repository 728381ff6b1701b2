"""The commands ``demo`` and ``env``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, reported, torch_device


@reported
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
    on = torch_device(device)
    from apd.demo import run_demo

    run_demo(output, seed=seed, device=on)


@reported
def env() -> None:
    """Versions, devices and backend choice: the text to paste into a bug report."""
    from apd.environment import describe_environment

    lines = describe_environment()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")
