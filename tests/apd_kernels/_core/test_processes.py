"""Processes that are started: nothing of the folder in which that happens is run in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from apd_kernels._core.processes import python


def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "colorsys.py").write_text("print('run')")
    code = "import colorsys; print(*sys.argv[1:])"

    def printed(command: list[str]) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert printed([sys.executable, "-c", f"import sys; {code}", "a", "b"]) == "run\na b\n"
    assert printed(python(code, "a", "b")) == "a b\n"


def test_no_other_process_of_python_is_started() -> None:
    """`python` is the one place that starts Python; the demonstration looks for programs beside it."""
    files = [file for package in ("apd", "apd_kernels") for file in (ROOT / package).rglob("*.py")]
    using = {file.name for file in files if "sys.executable" in file.read_text(encoding="utf-8")}
    assert using == {"processes.py", "demonstration.py"}
