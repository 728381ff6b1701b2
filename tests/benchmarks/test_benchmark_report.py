"""The table of the benchmark suites, from made-up results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


def entry(group: str, candidate: str, milliseconds: float, **extra: float | str) -> dict[str, Any]:
    stats = {"median": milliseconds / 1e3, "iqr": milliseconds / 1e4}
    return {"group": group, "stats": stats, "extra_info": {"candidate": candidate, **extra}}


def results(*benchmarks: dict[str, Any]) -> dict[str, Any]:
    machine = {"device": "A card", "torch": "2.11.0", "triton": "3.6.0"}
    return {"machine_info": machine, "datetime": "2026-11-25T12:00:00", "benchmarks": list(benchmarks)}


def test_table_by_hand() -> None:
    """Candidates in a fixed order, peers by name, the floor last; ratios to ours; a dash where one did not run."""
    heading, _, names, _, *rows = report.table(
        results(
            entry("first", "floor", 1.0),
            entry("first", "ours", 2.0, peak_mb=12.3),
            entry("first", "peer", 6.0),
            entry("second", "eager", 5.0),
            entry("second", "ours", 4.0),
        )
    ).splitlines()
    assert heading.startswith("A card; torch 2.11.0, triton 3.6.0; 2026-11-25. ")
    assert names == "| operation | ours | eager | peer | floor |"
    assert rows == [
        "| first | 2 ± 0.1; 12 MB | – | 6 ± 0.3 (3.0×) | 1 ± 0.05 (0.5×) |",
        "| second | 4 ± 0.2 | 5 ± 0.25 (1.2×) | – | – |",
    ]
    assert "events" not in heading
    assert "graph" not in heading


def test_times_on_the_device() -> None:
    """Beside the wall time where they were recorded, and then explained; a work that is not captured has no replay."""
    heading, *_, row = report.table(
        results(
            entry("one", "ours", 2.0, event_ms=0.5, graph_ms=0.25, peak_mb=3.0),
            entry("one", "eager", 4.0, event_ms=1.0, no_graph="called a synchronizing CUDA operation", peak_mb=3.0),
        )
    ).splitlines()
    assert row == "| one | 2 ± 0.1; events 0.5; graph 0.25; 3 MB | 4 ± 0.2 (2.0×); events 1; 3 MB |"
    assert heading.index('"events"') < heading.index('"graph"') < heading.index("peak of memory")


def test_replaces_the_marked_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, document = tmp_path / "results.json", tmp_path / "document.md"
    measured.write_text(json.dumps(results(entry("one", "ours", 2.0))))
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", str(measured), "--into", str(document)])
    report.main()
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nA card;")
    assert text.endswith(f"| one | 2 ± 0.1 |\n{report.END}\nafter\n")
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="expected the markers"):
        report.main()
