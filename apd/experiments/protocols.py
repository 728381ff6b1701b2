"""The protocols of domain-generalizable Re-ID: what is trained on, what is tested, how, and what others reached.

A protocol is one or several trainings, each with its unseen targets. A target is never looked at in training: a run
keeps its last network, or the best on held-out identities of its *sources*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apd.data.datasets import DATASETS, DataSpec
from apd.data.datasets.registry import DataSet, normal_name
from apd.errors import InputError

SMALL = ("prid", "grid", "viper", "ilids")
_LARGE = ("market1501", "msmt17", "cuhk03")
AVERAGE = "average"


@dataclass(frozen=True)
class Task:
    """A training, and the unseen data sets that it is tested on."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    all_images: bool = False  # train on the sources' query and gallery images too

    @property
    def name(self) -> str:
        """As tables write it, ``M+MS+CS→C3``."""
        targets = "+".join(DATASETS[name].short for name in self.targets)
        return f"{'+'.join(DATASETS[name].short for name in self.sources)}→{targets}"

    @property
    def folder(self) -> str:
        """A name for its run's folder."""
        return f"{'+'.join(self.sources)}-to-{'+'.join(self.targets)}"


@dataclass(frozen=True)
class Figures:
    """What a paper reports: mAP and rank-1 in %, by target; `AVERAGE` is the mean over a protocol's targets."""

    method: str
    by_target: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Protocol:
    """A protocol by name."""

    name: str
    text: str
    tasks: tuple[Task, ...]
    published: tuple[Figures, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(target for task in self.tasks for target in task.targets))

    @property
    def data_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for task in self.tasks for name in (*task.sources, *task.targets)))


def _leave_one_out(names: Sequence[str], always: Sequence[str] = (), *, all_images: bool = False) -> tuple[Task, ...]:
    """Each of the data sets in turn is the target of the others, and of those that are always sources."""
    return tuple(
        Task((*(name for name in names if name != target), *always), (target,), all_images) for target in names
    )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "P1",
            "all images of Market-1501, CUHK02, CUHK03 and CUHK-SYSU; tested on the four small sets, ten splits each",
            (Task(("market1501", "cuhk02", "cuhk03", "cuhk-sysu"), SMALL, all_images=True),),
            (
                Figures("CILP-FGDI", {AVERAGE: (82.2, 75.5)}),
                Figures("ACL", {AVERAGE: (75.2, 66.6)}),
                Figures("META", {AVERAGE: (70.9, 63.8)}),
                Figures("TransReID, rerun by others", {AVERAGE: (69.6, 59.3)}),
            ),
        ),
        Protocol(
            "P2",
            "Market-1501, MSMT17 and CUHK03, one left out as the target; CUHK-SYSU is always a source; training images",
            _leave_one_out(_LARGE, ("cuhk-sysu",)),
            (
                Figures("CILP-FGDI", {"cuhk03": (44.4, 44.6), "msmt17": (31.1, 59.4), "market1501": (79.4, 91.3)}),
                Figures("BAU", {"cuhk03": (42.8, 43.9), "msmt17": (24.3, 50.9), "market1501": (77.1, 90.4)}),
            ),
        ),
        Protocol(
            "P3",
            "P2 with the sources' training and test images",
            _leave_one_out(_LARGE, ("cuhk-sysu",), all_images=True),
        ),
        Protocol(
            "leave-one-out",
            "Market-1501, DukeMTMC-reID, MSMT17 and CUHK03, one left out as the target; training images",
            _leave_one_out(("market1501", "dukemtmc", "msmt17", "cuhk03")),
        ),
    )
}
SINGLE_SOURCE = "single-source"


def protocol_named(name: str, source: str | None = None, targets: Sequence[str] = ()) -> Protocol:
    """A protocol.

    Args:
        name: P1, P2, P3, leave-one-out, in any case; or single-source, A → B.
        source: A; only of single-source, and required there.
        targets: B; the others take them as a choice among their own targets, and leave the trainings of others out.

    Raises:
        InputError: there is no such protocol or target.
    """
    known = {**{protocol.lower(): protocol for protocol in PROTOCOLS}, SINGLE_SOURCE: SINGLE_SOURCE}
    if name.lower() not in known:
        raise InputError(f"{name}: no such protocol; expected {', '.join([*PROTOCOLS, SINGLE_SOURCE])}")
    if known[name.lower()] == SINGLE_SOURCE:
        return _single_source(source, targets)
    if source is not None:
        raise InputError(f"--source {source}: is for single-source; the sources of {name} are its own")
    protocol = PROTOCOLS[known[name.lower()]]
    if not targets:
        return protocol
    for target in targets:
        if target not in protocol.targets:
            raise InputError(f"--target {target}: expected of {protocol.name}: {', '.join(protocol.targets)}")
    tasks = (
        Task(task.sources, tuple(target for target in task.targets if target in targets), task.all_images)
        for task in protocol.tasks
    )
    published = protocol.published
    if set(targets) != set(protocol.targets):  # an average over other targets is no figure to compare with
        own = ((f.method, {name: pair for name, pair in f.by_target.items() if name in targets}) for f in published)
        published = tuple(Figures(method, by_target) for method, by_target in own if by_target)
    return Protocol(protocol.name, protocol.text, tuple(task for task in tasks if task.targets), published)


def _single_source(source: str | None, targets: Sequence[str]) -> Protocol:
    if source is None or not targets:
        raise InputError("single-source: expected --source A and at least one --target B")
    for option, names in (("--source", (source,)), ("--target", targets)):
        for name in names:
            if name not in DATASETS or name in ("market", "csv"):
                raise InputError(f"{option} {name}: expected a data set of `apd data list`")
            if option == "--target" and "query" not in DATASETS[name].parts:
                raise InputError(f"--target {name}: {DATASETS[name].title} has no test images")
    if source in targets:
        raise InputError(f"--target {source}: is the source; a target is unseen")
    if "train" not in DATASETS[source].parts:
        raise InputError(f"--source {source}: {DATASETS[source].title} has no training images")
    text = f"the training images of {DATASETS[source].title}"
    return Protocol(SINGLE_SOURCE, text, (Task((source,), tuple(dict.fromkeys(targets))),))


def locate(names: Sequence[str], root: Path | None, given: Sequence[DataSpec] = ()) -> dict[str, DataSpec]:
    """Where the data sets of a protocol are.

    Args:
        names: of the data sets.
        root: a folder with a folder for each, named as the data set or as it is distributed.
        given: data sets elsewhere, or of another variant, by name.

    Raises:
        InputError: a data set is not there; the message names all that are missing.
    """
    for spec in given:
        if spec.name not in names:
            raise InputError(f"--data {spec}: expected NAME:PATH with a name of {', '.join(names)}")
        if spec.all_images:
            raise InputError(f"--data {spec}: which images are trained on, the protocol says")
    if root is not None and not root.is_dir():
        raise InputError(f"--data-root {root}: no such folder")
    found = {spec.name: spec for spec in given if spec.name is not None}
    folders = [] if root is None else sorted(path for path in root.iterdir() if path.is_dir())
    for name in names:
        if name not in found and (path := _folder_of(DATASETS[name], folders)) is not None:
            found[name] = DataSpec(path, name)
    missing = [name for name in names if name not in found]
    if missing:
        lacking = "; ".join(f"{name} ({' or '.join((name, *DATASETS[name].aliases))})" for name in missing)
        where = "--data-root: not given, and" if root is None else f"--data-root {root}:"
        raise InputError(f"{where} no folder of {lacking}; --data NAME:PATH says where one is")
    return {name: found[name].resolved().settled() for name in names}


def _folder_of(dataset: DataSet, folders: Sequence[Path]) -> Path | None:
    usual = {normal_name(name) for name in (dataset.name, *dataset.aliases)}
    return next((path for path in folders if normal_name(path.name) in usual), None)
