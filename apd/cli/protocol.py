"""The commands ``protocol run`` and ``protocol list``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, reported, torch_device


@reported
def run(
    name: Annotated[str, typer.Argument(metavar="PROTOCOL", help="P1, P2, P3, leave-one-out or single-source.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values on top of the configuration, as train.lr=0.001."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a folder for each data set, named as in [bold]apd data list[/bold] or as it is "
            "distributed."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="NAME:PATH of a data set elsewhere, or of another variant; may be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the protocol; default: runs/ and its name.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration file, or the name of one that [bold]apd config show[/bold] knows."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Of single-source: the data set to train on.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Of single-source: a data set to test on. Of the others: only these of their targets."),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train on a protocol's sources, test on its unseen targets, and write the table.

    Small targets are tested in ten splits, whose lists are written too. The same
    call again goes on where it was interrupted. No target has a say in training.
    """
    on = torch_device(device)
    from apd.config.files import load_config
    from apd.console import console, print_written
    from apd.data.datasets import DataSpec
    from apd.experiments.protocol_runs import as_markdown, run_protocol
    from apd.experiments.protocols import locate, protocol_named
    from apd.files import only_writer
    from apd.interrupt import going_on

    protocol = protocol_named(name, source, target or ())
    where = locate(protocol.data_sets, data_root, [DataSpec.parse(one) for one in data or ()])
    folder = output or Path("runs") / (protocol.tasks[0].folder if source is not None else protocol.name)
    chosen = load_config(config, values or ())
    with only_writer(folder), going_on("the same command"):
        results = run_protocol(protocol, where, chosen, folder, on)
    for line in as_markdown(protocol, where, results).splitlines():
        console.print(line, soft_wrap=True)
    print_written(folder / "table.md", folder / "table.json")


@reported
def known() -> None:
    """The protocols: sources, targets, and the figures that are published for them."""
    from apd.console import console
    from apd.experiments.protocols import PROTOCOLS, SINGLE_SOURCE

    for protocol in PROTOCOLS.values():
        console.print(f"[bold]{protocol.name:<15}[/bold]{protocol.text}", soft_wrap=True, markup=True)
        for task in protocol.tasks:
            console.print(f"{'':<15}{task.name}", soft_wrap=True)
        for figures in protocol.published:
            cells = (f"{target} {mAP} / {rank1}" for target, (mAP, rank1) in figures.by_target.items())
            text = f"published, mAP / rank-1: {figures.method}: {', '.join(cells)}"
            console.print(f"{'':<15}[dim]{text}[/dim]", soft_wrap=True, markup=True)
    console.print(
        f"[bold]{SINGLE_SOURCE:<15}[/bold]--source A --target B: the training images of one data set", markup=True
    )
