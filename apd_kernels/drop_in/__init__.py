"""Operations of this library in the place of those of other projects, without an edit: see docs/drop-in.md.

    python -m apd_kernels.drop_in train.py --config_file …

or one line before the project is imported::

    import apd_kernels.drop_in as drop_in; drop_in.apply()

or the adapters alone, without replacing anything: ``from apd_kernels.drop_in.torchreid import TripletLoss``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from apd_kernels.drop_in import workers
from apd_kernels.drop_in.checking import Agreement, check
from apd_kernels.drop_in.replacing import (
    PROJECTS,
    DropInError,
    Replacement,
    Row,
    chosen,
    names,
    note_off,
    plan,
    put_in_place,
    refuse,
)
from apd_kernels.drop_in.replacing import rows as _rows
from apd_kernels.drop_in.replacing import undo as _undo
from apd_kernels.drop_in.reporting import Report

__all__ = [
    "PROJECTS",
    "Agreement",
    "Applied",
    "DropInError",
    "Replacement",
    "Report",
    "apply",
    "apply_to_fastreid",
    "apply_to_openreid",
    "apply_to_torchreid",
    "apply_to_transreid",
    "check",
    "report",
    "undo",
]

_calls: list[dict[str, Any]] = []


class Applied:
    """What one call of `apply` put in place; as a context it is undone at the end."""

    def __init__(self, rows: list[Row], call: dict[str, Any]) -> None:
        self._rows, self._call = rows, call

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Applied({', '.join(sorted({row.replacement.key for row in self._rows}))})"

    def undo(self) -> int:
        """Put the originals back; how many places that were."""
        if self._call in _calls:
            _calls.remove(self._call)
            workers.carry_over(_calls)
        return _undo(self._rows)


def apply(
    project: str | None = None,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    allow_unknown: bool = False,
) -> Applied:
    """Put this library's operations in the place of a project's, in modules that are loaded and in those that will be.

    All of what is chosen, or nothing: code that is not known, or a name that is missing in a module that is there, is
    refused. Processes that are spawned afterwards do the same.

    Args:
        project: ``"transreid"`` (also CLIP-ReID, reid-strong-baseline), ``"torchreid"``, ``"fastreid"`` or
            ``"openreid"`` (cluster-contrast, BAU, SpCL). None: all that are loaded or on the path, and what is refused
            is a warning.
        only: functions (``"evaluate_rank"``), classes (``"TripletLoss"``) or switches (``"triplet"``, ``"evaluator"``,
            ``"rerank"``, …) to replace; all but what is off by default when None.
        without: likewise, to leave as they are.
        allow_unknown: replace also where the source is not known to mean the same.

    Returns:
        `Applied`, to be undone or used in a ``with``.

    Raises:
        DropInError: no module of the project found; code that is not known, with the names. Nothing has changed then.
        ValueError: a name that the project does not have.
    """
    if project is not None and project not in PROJECTS:
        raise ValueError(f"project: expected {' or '.join(map(repr, PROJECTS))}, got {project!r}")
    call = {"project": project, "only": only, "without": list(without), "allow_unknown": allow_unknown}
    added: list[Row] = []
    for name in PROJECTS if project is None else (project,):
        known = names(name)
        if project is None and only is not None and not known & set(only):
            continue
        selected = only if only is None or project is not None else [part for part in only if part in known]
        left = without if project is not None else [part for part in without if part in known]
        wanted = chosen(name, selected, left)
        places, problems = plan(wanted, allow_unknown)
        if not places:
            if project is not None:
                modules = sorted({module for one in wanted for module in one.modules})
                raise DropInError(f"{project}: none of its modules is loaded or on the path: {', '.join(modules)}")
            continue
        if problems:
            message = f"{name}: nothing replaced; " + "; ".join(problems)
            if project is not None:
                raise DropInError(message)
            warnings.warn(f"drop_in: {message}", stacklevel=2)
            refuse(places, problems)
            continue
        added += put_in_place(places)
        note_off(name, wanted)
    _calls.append(call)
    workers.carry_over(_calls)
    return Applied(added, call)


def _switched(project: str, switches: dict[str, bool], allow_unknown: bool) -> Applied:
    return apply(project, only=[name for name, on in switches.items() if on], allow_unknown=allow_unknown)


def apply_to_transreid(
    *,
    triplet: bool = True,
    contrastive: bool = False,
    distances: bool = True,
    evaluator: bool = True,
    rerank: bool = True,
    allow_unknown: bool = False,
) -> Applied:
    """`apply` to TransReID, CLIP-ReID or reid-strong-baseline, one switch for what belongs together; `contrastive` is
    CLIP-ReID's loss of texts and images, which is slower on a CPU."""
    switches = {
        "triplet": triplet, "contrastive": contrastive, "distances": distances, "evaluator": evaluator, "rerank": rerank
    }  # fmt: skip
    return _switched("transreid", switches, allow_unknown)


def apply_to_torchreid(
    *,
    triplet: bool = True,
    distances: bool = True,
    evaluator: bool = True,
    rerank: bool = True,
    allow_unknown: bool = False,
) -> Applied:
    """`apply` to torchreid, one switch for what belongs together."""
    switches = {"triplet": triplet, "distances": distances, "evaluator": evaluator, "rerank": rerank}
    return _switched("torchreid", switches, allow_unknown)


def apply_to_fastreid(
    *,
    triplet: bool = True,
    pairwise: bool = True,
    distances: bool = True,
    evaluator: bool = True,
    rerank: bool = True,
    allow_unknown: bool = False,
) -> Applied:
    """`apply` to fast-reid, one switch for what belongs together; ``pairwise`` are circle loss and CosFace."""
    switches = {
        "triplet": triplet, "pairwise": pairwise, "distances": distances, "evaluator": evaluator, "rerank": rerank
    }  # fmt: skip
    return _switched("fastreid", switches, allow_unknown)


def apply_to_openreid(
    *,
    triplet: bool = True,
    memory: bool = True,
    evaluator: bool = True,
    rerank: bool = True,
    jaccard: bool = True,
    allow_unknown: bool = False,
) -> Applied:
    """`apply` to cluster-contrast, BAU or SpCL, one switch for what belongs together."""
    switches = {
        "triplet": triplet, "memory": memory, "evaluator": evaluator, "rerank": rerank, "jaccard": jaccard
    }  # fmt: skip
    return _switched("openreid", switches, allow_unknown)


def undo() -> int:
    """Put all originals back, in every module that holds a copy; how many places that were."""
    _calls.clear()
    workers.carry_over(_calls)
    return _undo()


def report() -> Report:
    """What was replaced where, what was refused and why, and how often each was called; ``print(report())``."""
    return Report(_rows(), sys.argv[0] if sys.argv else "")
