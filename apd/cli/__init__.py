"""The command line ``apd``.

Libraries are imported by the commands that use them, so that ``apd --help`` answers at once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from apd.cli import protocol as protocols
from apd.cli.ablation import ablate
from apd.cli.data import check, known
from apd.cli.evaluation import evaluate, rerank
from apd.cli.features import FILE_HELP, extract
from apd.cli.retrieval import index, search
from apd.cli.runs import export, hardtest, report
from apd.cli.tools import demo, env
from apd.cli.training import show, synthesize, train
from apd.openmp import let_waiting_threads_sleep


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("apd-kernels"))
        raise typer.Exit


def _before_a_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    let_waiting_threads_sleep()  # before a command imports PyTorch


app = typer.Typer(
    callback=_before_a_command,
    help="Person re-identification: train APD models, extract and evaluate features, build and search galleries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (train, synthesize, ablate):
    app.command()(command)
for command in (extract, evaluate, rerank, index, search):
    app.command(epilog=FILE_HELP)(command)
for command in (export, report, hardtest, demo, env):
    app.command()(command)
config = typer.Typer(help="Configurations of a training.", no_args_is_help=True)
config.command()(show)
app.add_typer(config, name="config")
data = typer.Typer(help="Data sets: those known by name, and what is in a folder.", no_args_is_help=True)
data.command()(check)
data.command("list")(known)
app.add_typer(data, name="data")
protocol = typer.Typer(help="Protocols of domain-generalizable Re-ID.", no_args_is_help=True)
protocol.command()(protocols.run)
protocol.command("list")(protocols.known)
app.add_typer(protocol, name="protocol")
