"""The commands ``train``, ``synthesize`` and ``config show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apd.cli.common import Device, DeviceOption, reported, torch_device
from apd.errors import InputError


@reported
def train(
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values on top of the configuration, as train.lr=0.001."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Source domain; give it once for each: a folder in the layout of Market-1501, a CSV file, or "
            "NAME:PATH ([bold]apd data list[/bold]); NAME+test:PATH trains on its test images too."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Configuration file, or the name of one that [bold]apd config show[/bold] knows."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/ and the name of the configuration.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with an interrupted run, whose folder keeps data and configuration; with train.steps=N also "
            "with a finished one, to N steps in all."
        ),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train an APD model: MPG-Net, the images it synthesizes, SP-Net.

    With perturbation=none the first two are left out, with model.ssd=none as
    well the result is the baseline. Nothing of a target domain is looked at.

    torchrun --nproc-per-node N -m apd.cli train … trains on N GPUs (or, with
    --device cpu, in N processes): to the same result as one, up to rounding,
    but for the batch norms inside a CNN, each of which sees its process's images.
    """
    if resume is not None and (data or config or output):
        raise InputError("--resume RUN stands alone: data and configuration are those of the run")
    if resume is None and not data:
        raise InputError("--data: give the folder of at least one source domain")
    on = torch_device(device)
    from apd.config.files import load_config
    from apd.config.values import advice
    from apd.console import console, print_written
    from apd.run import Run
    from apd.training.distributed import join, leave, on_first
    from apd.training.train import extend_run, nothing_left, start_run, train_run

    join(on)
    if resume is not None:
        run = Run(resume)
        if values:
            run = on_first(lambda: extend_run(run, values))
        elif on_first(lambda: nothing_left(run)):
            console.print(f"{run.path}: finished; --resume with train.steps=N trains on, to N steps", soft_wrap=True)
            leave()
            return
    else:
        chosen = load_config(config, values or ())
        name = Path(config).stem if config is not None else "default"
        path = output or Path("runs") / name
        on_first(lambda: start_run(path, chosen, data or []))
        run = Run(path)
    for line in advice(run.config):
        console.print(f"note: {line}", soft_wrap=True)
    train_run(run, on)
    print_written(run.path)
    leave()


@reported
def synthesize(
    checkpoint: Annotated[Path, typer.Option(help="Run whose generator is taken.")],
    data: Annotated[Path, typer.Option(help="Data set: a folder, or NAME:PATH.")],
    output: Annotated[Path, typer.Option(help="Folder of the new data set; images of the same generator are kept.")],
    part: Annotated[
        list[str] | None, typer.Option(help="train, query or gallery; give it once for each part. Default: train.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Write the hard-matching images that a run's generator makes of a data set.

    Names, and so identities and cameras, stay. The result does not depend on
    which images are made together; an interrupted call goes on where it was.
    """
    parts = part or ["train"]
    unknown = sorted(set(parts) - {"train", "query", "gallery"})
    if unknown:
        raise InputError(f"--part {unknown[0]}: expected train, query or gallery")
    on = torch_device(device)
    from apd.console import print_written
    from apd.data.datasets import read_dataset
    from apd.run import Run
    from apd.training.synthesis import synthesize as write_images
    from apd.training.train import hard_images

    run = Run(checkpoint)
    generator = hard_images(run, on)
    folder = read_dataset(data, parts)
    for name in parts:
        write_images(generator, getattr(folder, name), name, output, run.size, device=on, workers=workers)
    print_written(output)


@reported
def show(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|FILE]", help="cpu, demo, market, paper, small or a YAML file; without it the defaults."
        ),
    ] = None,
) -> None:
    """Every value, its meaning, and where its default comes from: the paper, TransReID, or ours."""
    from apd.cli.config_display import print_config
    from apd.config.files import load_config

    print_config(load_config(name), name)
