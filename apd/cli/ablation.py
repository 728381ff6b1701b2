"""The command ``ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, check_file, reported, torch_device


@reported
def ablate(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Ablation file, or the name of one that comes along: ablation-cpu.")
    ],
    data: Annotated[
        list[Path], typer.Option(help="Folder of a source domain in the layout of Market-1501; give it once for each.")
    ],
    target: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="Data set of a target of the file, never trained on; give it once for each. "
            "Without NAME= the folder has its name.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the ablation; what is finished in it is taken.")],
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at the same time; they share the threads.")] = 1,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Only test what is finished, and make the table.")
    ] = False,
    features: Annotated[
        Path | None, typer.Option(help="Folder of the feature files that brackets of the file name.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="Markdown file whose section between <!-- FILE: begin --> and <!-- FILE: end --> is replaced."
        ),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train the rows of an ablation with several seeds, test them on unseen targets, and make the table.

    Every run is a folder OUTPUT/runs/ROW/SEED as [bold]apd train[/bold] makes
    it: a finished one is taken, an interrupted one goes on, one with another
    configuration is an error. Called again, the command goes on where it was.

    Writes OUTPUT/results.jsonl, a line for every run, the lists of all splits,
    and results.md: mean ± sd over seeds, differences to the controls paired
    by seed, with their errors.
    """
    on = torch_device(device)
    from apd.console import console, print_table, print_written
    from apd.errors import InputError
    from apd.experiments.ablation.execute import TABLE, Ablation
    from apd.experiments.ablation.plan import load_plan
    from apd.experiments.ablation.tables import around, insert, markdown, tables
    from apd.files import write_text

    plan = load_plan(file)
    if into is not None:
        check_file(into, "--into")
        around(into, plan.path.stem)  # before the work, not after it
    folders: dict[str, Path] = {}
    for text in target:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.name
        if name in folders:
            raise InputError(f"--target {name}: given twice, {folders[name]} and {path}")
        folders[name] = path
    output.mkdir(parents=True, exist_ok=True)
    ablation = Ablation(plan, data=data, targets=folders, output=output, device=on, features=features)
    failed = ablation.execute(jobs, train=not no_train)
    console.print()
    for title, table in tables(ablation).items():
        console.print(title, style="bold", soft_wrap=True)
        print_table(table)
    text = markdown(ablation)
    write_text(output / TABLE, text + "\n")
    print_written(output / TABLE)
    if into is not None:
        insert(into, plan.path.stem, text)
        print_written(into)
    for name, message in failed.items():
        typer.secho(f"Error: {name}: {message}", fg="red", err=True)
    if failed:
        raise typer.Exit(1)
