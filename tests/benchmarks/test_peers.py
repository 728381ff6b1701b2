"""The parts of `make peers` that need no other project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers import END, START, Case, Counts, counted, difference, measured, written


def test_difference_is_relative_to_the_largest_value_of_each_part() -> None:
    theirs = {"cmc": np.array([0.5, 1.0]), "losses": (torch.tensor(4.0), [1.0, 2.0]), "none": None}
    ours = {"cmc": np.array([0.5, 0.9]), "losses": (torch.tensor(4.0), [1.0, 2.0]), "none": None}
    assert difference(theirs, theirs) == 0
    assert difference(theirs, ours) == pytest.approx(0.1)
    ours["losses"] = (torch.tensor(5.0), [1.0, 2.0])
    assert difference(theirs, ours) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="shorter"):
        difference((1.0, torch.ones(2)), (torch.ones(2),))


def test_both_sides_are_run_in_turns() -> None:
    runs: list[str] = []

    def run(name: str) -> float:
        runs.append(name)
        return 1.0

    apart, ratio = measured(Case("project", "what", lambda: run("theirs"), lambda: run("ours"), 3))
    assert apart == 0
    assert ratio > 0
    assert runs == ["theirs", "ours"] * 4


def test_tests_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = "<testcase name='a'/><testcase name='b'><failure/></testcase><testcase name='c'><error/></testcase>"
    report.write_text(
        f"<testsuites><testsuite>{cases}<testcase name='d'><skipped/></testcase></testsuite></testsuites>"
    )
    found = counted(report)
    assert found == Counts(1, ["b", "c"], 1)
    assert str(found) == "1 passed, 2 failed (b, c), 1 not applicable"


def test_the_table_stands_between_its_markers() -> None:
    page = f"above\n{START}\nold\n{END}\nbelow"
    found = written(page, ["| new |"])
    assert found == f"above\n{START}\n\n| new |\n\n{END}\nbelow"
    assert written(found, ["| new |"]) == found
    for broken in ("", START, f"{END}{START}", f"{page}{page}"):
        with pytest.raises(ValueError, match="once each"):
            written(broken, [])
