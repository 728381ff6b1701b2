"""The commands ``data check`` and ``data list``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apd.cli.common import reported
from apd.errors import InputError

if TYPE_CHECKING:
    from apd.data.datasets.check import Report

PARTS = ("train", "query", "gallery")


@reported
def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder or CSV file of a data set, or NAME:PATH.")],
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="What it should be, one of [bold]apd data list[/bold]."),
    ] = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Also decode every image, and look for copies in two parts or of two people."),
    ] = False,
) -> None:
    """Count the images, identities and cameras of a data set, and say what is wrong with it.

    Compared with what its authors publish, where the data set is named, or has a
    layout of its own. The exit code is 0 where all is well, otherwise 2.
    """
    from apd import console as terminal
    from apd.data.datasets import DataSpec
    from apd.data.datasets.check import check_dataset, check_images

    spec = DataSpec.parse(data if name is None else f"{name}:{data}")
    if name is not None and spec.name is None:
        raise InputError(f"--as {name}: expected a name of apd data list")
    report = check_dataset(spec)
    findings = report.findings
    if images:
        total = sum(part.counts.images for part in report.parts.values())
        with terminal.progress("images", total) as advance:
            findings = findings + check_images(report.folder, advance)
    _print_report(report)
    for finding in findings:
        terminal.console.print(finding, style="yellow", soft_wrap=True)
    if findings:
        raise typer.Exit(2)
    looked = "every image was read" if images else "no image was opened: --images does"
    terminal.console.print(f"nothing wrong; {looked}", soft_wrap=True)


@reported
def known() -> None:
    """The data sets known by name: their layouts, variants, and what their authors count."""
    from apd.console import console
    from apd.data.datasets import DATASETS

    for dataset in DATASETS.values():
        variants = f"; variants {', '.join(dataset.variants)}" if dataset.variants else ""
        console.print(f"[bold]{dataset.name:<12}[/bold]{dataset.title}{variants}", soft_wrap=True, markup=True)
        holds = " or ".join(" and ".join(layout) for layout in dataset.layouts)
        sizes = [(part, size) for part in PARTS if (size := dataset.counts(part, next(iter(dataset.variants), None)))]
        published = ", ".join(f"{part} {size.images:,} of {size.identities:,}" for part, size in sizes)
        for title, text in (("holds", holds), ("published", published and f"images of identities: {published}")):
            if text:
                console.print(f"{'':<12}[dim]{title:<10}[/dim]{text}", soft_wrap=True, markup=True)
    console.print(
        "NAME:PATH or NAME/VARIANT:PATH; as a source NAME+test:PATH trains on query and gallery too.", soft_wrap=True
    )


def _print_report(report: Report) -> None:
    from rich import box
    from rich.table import Table

    from apd.console import console

    junk = f", {report.folder.junk:,} junk left out" if report.folder.junk else ""
    console.print(f"{report.dataset.title}: {report.folder.path}{junk}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("part", "images", "identities", "cameras", "distractors"):
        table.add_column(column)
    for part, found in report.parts.items():
        cameras = f"{found.counts.cameras:,}" if report.dataset.cameras_known else "not known"
        table.add_row(
            part, f"{found.counts.images:,}", f"{found.counts.identities:,}", cameras, f"{found.distractors:,}"
        )
    console.print(table)
    if report.unanswered is not None:
        queries = len(report.folder.query)
        console.print(f"queries without an answer from another camera: {report.unanswered:,} of {queries:,}")
