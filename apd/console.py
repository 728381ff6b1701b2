"""The terminal: what is said there, and how tables, facts and progress look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from apd.errors import printable

if TYPE_CHECKING:
    from apd.reports.page import Table


class _Terminal(Console):
    """Shows what would control a terminal, such as a file's name may have, escaped; a string is always one line."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment("\n".join(map(printable, segment.text.split("\n"))), segment.style)


console = _Terminal(highlight=False, markup=False)  # a folder's name may look like markup
_WIDEST = 1000  # characters of a table


def count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def print_facts(*facts: tuple[str, str]) -> None:
    """Aligned lines, never folded: a pipe must get each fact in one piece."""
    for name, value in facts:
        console.print(Text.assemble((f"{name:<12}", "dim"), printable(value)), soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal's error stream, and the function that moves it on; nothing in a file."""
    errors = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def print_table(table: Table) -> None:
    """A table of a report on the terminal."""
    shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for i, heading in enumerate(table.head):
        shown.add_column(heading, justify="right" if i and table.numbers else "left")
    for i, row in enumerate(table.rows):
        shown.add_row(*map(printable, row), style="bold" if i == table.strong else None)
    # Never folded, however narrow the terminal: a pipe must get each row in one line.
    shown.width = Measurement.get(console, console.options.update(max_width=_WIDEST), shown).maximum
    console.print(shown, crop=False)
    console.print()


def print_written(*paths: Path) -> None:
    for path in paths:
        console.print(Text(f"wrote {printable(str(path))}"), soft_wrap=True)
