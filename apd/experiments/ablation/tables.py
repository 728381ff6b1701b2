"""The table of an ablation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apd.errors import InputError
from apd.experiments.ablation.execute import Ablation, queries_path
from apd.experiments.ablation.plan import Row
from apd.experiments.ablation.results import Comparison, compare, summary
from apd.files import write_text
from apd.reports.page import Table
from apd.retrieval.targets import FIGURES, Queries, load_queries

_COMPARED = {"rank-1": "right", "mAP": "ap"}  # figure: what it is the mean of
READING = (
    "Rank-k and mAP in %, means over the splits of a target; ± is the standard deviation over seeds. Differences are "
    "paired by seed and in points of %; a row with several controls is compared with the one that stands best in that "
    "figure. 95%: the interval over seeds (Student's t); test error: the standard error from which people are in the "
    "test. Not resolved: below two standard errors of both together. Minutes: wall time of a run, on average."
)


def tables(ablation: Ablation) -> dict[str, Table]:
    """By title, as far as there are results: one table for every target, and one of the differences."""
    found = _Found(ablation)
    made = {f"{name}: {target.rule.describe()}": _figures(found, name) for name, target in ablation.targets.items()}
    differences = list(_differences(found))
    if differences:
        head = ("row", "against", "target", "figure", "seeds", "difference", "95%", "test error", "verdict")
        made["differences"] = Table(head, differences, numbers=False)
    return made


class _Found:
    """The results of an ablation by row and seed."""

    def __init__(self, ablation: Ablation) -> None:
        self.ablation = ablation
        self.plan = ablation.plan
        latest = ablation.results.latest
        self.runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in self.plan.rows}
        for job in ablation.jobs.values():
            if (line := ablation.current(job)) is not None:
                self.runs[job.row.name][job.seed] = line
        self.brackets = {name: latest[name, None] for name in self.plan.brackets if (name, None) in latest}
        self._queries: dict[str, dict[int, dict[str, Queries]]] = {}

    def values(self, row: str, target: str, figure: str) -> list[float]:
        return [line["tests"][target][figure] for line in self.runs[row].values()]

    def queries(self, row: str, target: str) -> dict[int, Queries]:
        if row not in self._queries:
            files = {seed: queries_path(self.ablation.output, row, seed) for seed in self.runs[row]}
            self._queries[row] = {seed: load_queries(file, list(self.plan.targets)) for seed, file in files.items()}
        return {seed: one[target] for seed, one in self._queries[row].items()}


def _figures(found: _Found, target: str) -> Table:
    rows = []
    for name, lines in found.runs.items():
        row = found.plan.rows[name]
        cells = [_spread(found.values(name, target, figure)) if lines else "–" for figure in FIGURES]
        steps = next((f"{line['steps']:,}" for line in lines.values()), "–")
        rows.append(
            (row.title, f"{len(lines)} of {len(row.seeds)}", steps, *cells, _minutes(list(lines.values()), row))
        )
    for name, line in found.brackets.items():
        cells = [f"{100 * line['tests'][target][figure]:.1f}" for figure in FIGURES]
        rows.append((found.plan.brackets[name].title, "–", "–", *cells, "–"))
    chance = found.ablation.targets[target].chance()._asdict()
    cells = [f"{100 * chance[name]:.1f}" if (name := figure.replace("-", "")) in chance else "–" for figure in FIGURES]
    rows.append(("chance", "–", "–", *cells, "–"))
    return Table(("row", "seeds", "steps", *FIGURES, "minutes"), rows)


def _spread(values: Sequence[float]) -> str:
    found = summary([100 * value for value in values])
    return f"{found.mean:.1f}" + ("" if found.sd is None else f" ± {found.sd:.1f}")


def _minutes(lines: Sequence[Mapping[str, Any]], row: Row) -> str:
    """Of a run, on average; what was taken over from another row is not counted, but named."""
    if not lines:
        return "–"
    minutes = f"{summary([sum(line['seconds'].values()) / 60 for line in lines]).mean:.1f}"
    taken = [f"{what} of {source}" for what, source in (("trunk", row.trunk), ("generator", row.generator)) if source]
    return f"{minutes} + {', '.join(taken)}" if taken else minutes


def _differences(found: _Found) -> Iterator[tuple[str, ...]]:
    for name, controls in found.plan.controls.items():
        for target in found.plan.targets:
            for figure, part in _COMPARED.items():
                ours = found.queries(name, target)
                compared = [(compare(ours, found.queries(control, target), part), control) for control in controls]
                paired = [(result, control) for result, control in compared if result is not None]
                if not paired:
                    continue
                # Each by the seeds that both have: one that was trained with easier seeds is no better control.
                result, control = min(paired, key=lambda one: one[0].difference)
                titles = (found.plan.rows[row].title for row in (name, control))
                yield (*titles, target, figure, *_compared(result))


def _compared(result: Comparison) -> tuple[str, ...]:
    interval = result.interval
    return (
        str(result.seeds),
        f"{100 * result.difference:+.1f}",
        "–" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]",
        f"{100 * result.test_error:.1f}",
        result.verdict,
    )


def markdown(ablation: Ablation) -> str:
    """The whole result as Markdown."""
    plan = ablation.plan
    tested = sum(ablation.current(job) is not None for job in ablation.jobs.values())
    label = f" **{plan.note[0].upper() + plan.note[1:]}.**" if plan.note else ""
    lines = [f"{plan.title}: {tested} of {len(ablation.jobs)} runs.{label} {READING}"]
    for title, table in tables(ablation).items():
        lines += ["", f"**{title}**", ""]
        rows = (table.head, ["---"] * len(table.head), *table.rows)
        lines += ["| " + " | ".join(map(_cell, cells)) + " |" for cells in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A title may hold what ends a cell or a row of a table."""
    return " ".join(text.replace("|", "\\|").split())


def insert(file: Path, name: str, text: str) -> None:
    """Replace what stands in a document between the two marker comments of an ablation, in one step.

    Raises:
        InputError: the document has no such markers.
    """
    head, tail = around(file, name)
    write_text(file, f"{head}\n{text}\n{tail}")


def around(file: Path, name: str) -> tuple[str, str]:
    """What stands in a document before and after the section of an ablation, with the markers.

    Raises:
        InputError: the document is missing or has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if not file.is_file():
        raise InputError(f"--into {file}: no such file")
    head, first, rest = file.read_text(encoding="utf-8").partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise InputError(f"--into {file}: expected the markers {begin} and {end}")
    return head + begin, end + tail
