"""Turn a result file into tables: ``python -m benchmarks.report RESULTS [--into FILE.md]``.

RESULTS is the JSON file of the suites, or the JSON lines of `benchmarks.gpu` (``runs/gpu/results.jsonl``, whose tables
are those of docs/gpu.md). With ``--into`` the table replaces what stands between the two marker comments of that file,
so a figure in the documentation is always one that was measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ON_DEVICE = {
    "event_ms": ' "events": milliseconds between CUDA events, from a cold L2 cache;',
    "graph_ms": ' "graph": the same of a replay of the call as a CUDA graph;',
}


def table(results: dict[str, Any]) -> str:
    """Markdown: one row an operation and size, one column a candidate; median and interquartile range of wall time."""
    machine = results["machine_info"]
    rows: dict[str, dict[str, Any]] = {}
    for entry in results["benchmarks"]:
        rows.setdefault(entry["group"], {})[entry["extra_info"]["candidate"]] = entry
    named = ["ours", "kept", "eager", "compile"]
    others = sorted({name for entries in rows.values() for name in entries} - {*named, "floor"})
    present = {name for entries in rows.values() for name in entries}
    candidates = [name for name in (*named, *others, "floor") if name in present]
    recorded = {name for entry in results["benchmarks"] for name in entry["extra_info"]}
    on_device = "".join(meaning for name, meaning in ON_DEVICE.items() if name in recorded)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton") if name in machine)
    lines = [
        f"{machine['device']}; {versions}; {results['datetime'][:10]}. Milliseconds of wall time: median ± half the "
        f"interquartile range; in brackets, how many times as long as ours;{on_device} then the peak of memory that a "
        "call takes. "
        '"kept": ours, with rows that were prepared once; "floor": the product or the copy alone, in PyTorch.',
        "",
        f"| operation | {' | '.join(candidates)} |",
        f"|---|{'---|' * len(candidates)}",
    ]
    for title, entries in rows.items():
        ours = entries["ours"]["stats"]["median"]
        lines.append(f"| {title} | {' | '.join(_cell(entries.get(name), ours) for name in candidates)} |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any] | None, ours: float) -> str:
    if entry is None:
        return "–"
    stats, extra = entry["stats"], entry["extra_info"]
    text = f"{stats['median'] * 1e3:.3g} ± {stats['iqr'] * 500:.2g}"
    if extra["candidate"] != "ours":
        text += f" ({stats['median'] / ours:.1f}×)"
    if "event_ms" in extra:
        text += f"; events {extra['event_ms']:.3g}"
    if "graph_ms" in extra:
        text += f"; graph {extra['graph_ms']:.3g}"
    if "peak_mb" in extra:
        text += f"; {extra['peak_mb']:.0f} MB"
    return text


def insert(file: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two markers of a file."""
    document = file.read_text()
    head, first, rest = document.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise SystemExit(f"{file}: expected the markers {begin} and {end}")
    file.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", type=Path, help="RESULTS.json of pytest-benchmark, or results.jsonl of benchmarks.gpu"
    )
    parser.add_argument("--into", type=Path, help="file whose marked section the table replaces")
    arguments = parser.parse_args()
    begin, end = BEGIN, END
    if arguments.results.suffix == ".jsonl":
        from benchmarks.gpu import report as gpu_report

        begin, end = gpu_report.BEGIN, gpu_report.END
        try:
            text = gpu_report.tables(arguments.results, toy=arguments.into is None)  # a rehearsal documents nothing
        except ValueError as error:
            raise SystemExit(str(error)) from error
    else:
        text = table(json.loads(arguments.results.read_text()))
    if arguments.into is None:
        print(text)
        return
    insert(arguments.into, text, begin, end)


if __name__ == "__main__":
    main()
