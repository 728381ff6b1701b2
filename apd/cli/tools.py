"""The commands ``demo`` and ``env``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, reported, torch_device


@reported
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder to make; an earlier demonstration that is there is replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the people drawn and of both trainings.")] = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Draw people, train a baseline and APD on three domains, test both on a fourth; minutes on two CPU cores.

    Writes report.html, which opens from disk, and a gallery to search.
    Nothing is downloaded.
    """
    on = torch_device(device)
    from apd.demo.demonstration import run_demo
    from apd.files import only_writer

    with only_writer(output):
        run_demo(output, seed=seed, device=on)


@reported
def env() -> None:
    """Versions, devices and backend choice: the text to paste into a bug report."""
    from apd.environment import describe_environment

    lines = describe_environment()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")
