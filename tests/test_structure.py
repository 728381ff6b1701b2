"""One way through the packages: no circle between modules, and nothing below an operation knows it."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter

import pytest
from places import ROOT

PACKAGES = ("apd", "apd_kernels")
# Outside of `_core`, and read by kernels and their PyTorch counterparts all the same: none of them is an operation.
SHARED = {"apd_kernels.evaluation.retrieval_metrics", "apd_kernels.evaluation.rows"}


@cache
def imports() -> dict[str, set[str]]:
    """The modules that each module imports when it runs, inside of functions included."""
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            files[name] = path
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        types = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        skipped = {inner for node in types for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if node in skipped:
                continue
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {module if module in files else str(node.module) for module in whole}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] &= files.keys()
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package: str) -> None:
    graph = {name: {n for n in names if n != name} for name, names in imports().items()}
    TopologicalSorter({name: names for name, names in graph.items() if name.startswith(package)}).prepare()


def test_kernels_and_references_know_no_operation() -> None:
    rooms = ("apd_kernels.kernels", "apd_kernels.reference")
    allowed = (*rooms, "apd_kernels._core")
    wrong = {
        (name, target)
        for name, targets in imports().items()
        if name.startswith(rooms)
        for target in targets
        if not target.startswith(allowed) and target not in SHARED
    }
    assert not wrong


def test_core_knows_only_itself() -> None:
    wrong = {
        (name, target)
        for name, targets in imports().items()
        if name.startswith("apd_kernels._core")
        for target in targets
        if not target.startswith("apd_kernels._core")
    }
    assert not wrong


def test_a_training_does_not_load_the_reporter() -> None:
    """Everything that `apd.training.train` needs, however far away."""
    reached, todo = set(), ["apd.training.train"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports()[name]
    assert not {name for name in reached if name.startswith(("apd.reports", "apd.cli", "apd.demo", "apd.experiments"))}
