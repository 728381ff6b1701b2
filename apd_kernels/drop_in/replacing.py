"""What takes the place of what in a project that is not ours: found, put in place everywhere, reported, undone.

A project is found by its modules, loaded or on the path, and its functions by the fingerprints of their source. Nothing
is imported to find it. Functions are replaced in every module that holds a copy, also in those that load later; methods
in their class, so that instances that exist already have them too.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apd_kernels.drop_in.fingerprint import combined, definitions
from apd_kernels.drop_in.known import KNOWN

PROJECTS = ("transreid", "torchreid", "fastreid", "openreid")


class DropInError(RuntimeError):
    """Code of a project that is not the code that the adapters were made for, or that is not there."""


@dataclass(frozen=True)
class Replacement:
    """One function or method of a project, and what takes its place."""

    project: str
    switch: str  # of `apply_to_…`: what belongs together
    modules: tuple[str, ...]  # in which it may be, by the project's forks
    name: str  # "function" or "Class.method"
    adapter: Callable[..., Any]
    exactness: str  # how near the results are
    helpers: tuple[str, ...] = ()  # functions beside it that the adapter takes the place of as well
    off: str = ""  # why it is not replaced unless it is named

    @property
    def key(self) -> str:
        return f"{self.project}.{self.name}"


@dataclass
class Row:
    """Of the report."""

    replacement: Replacement
    module: str
    state: str  # "replaced", "waiting", "refused", "off"
    why: str = ""
    calls: int = 0
    seconds: float = 0.0
    original: Callable[..., Any] | None = None
    installed: Callable[..., Any] | None = None
    places: list[tuple[Any, str]] = field(default_factory=list)


_rows: list[Row] = []
_lock = threading.RLock()


def rows() -> list[Row]:
    return list(_rows)


def replacements(project: str) -> tuple[Replacement, ...]:
    module = importlib.import_module(f"apd_kernels.drop_in.{project}")
    found: tuple[Replacement, ...] = module.REPLACEMENTS
    return found


def names(project: str) -> set[str]:
    """Functions, classes, methods and switches that `only` and `without` may name."""
    return {name for one in replacements(project) for name in (one.name, one.name.split(".")[0], one.switch)}


def chosen(project: str, only: Sequence[str] | None, without: Sequence[str] = ()) -> list[Replacement]:
    """Those that are named, by function or switch; else all that are not off."""
    there = names(project)
    for name in (*(only or ()), *without):
        if name not in there:
            listed = ", ".join(sorted(there))
            raise ValueError(f"only: expected a function or switch of {project} ({listed}), got {name}")

    def named(one: Replacement, by: Sequence[str]) -> bool:
        return bool({one.name, one.name.split(".")[0], one.switch} & set(by))

    wanted = [one for one in replacements(project) if (named(one, only) if only is not None else not one.off)]
    return [one for one in wanted if not named(one, without)]


def plan(wanted: Iterable[Replacement], allow_unknown: bool) -> tuple[list[tuple[Replacement, str]], list[str]]:
    """Where each is to be put in place, module by module, and what is in the way."""
    places, problems = [], []
    for one in wanted:
        for module in one.modules:
            for name, path in _located(module):
                problem = _problem(one, path)
                if problem and name != module:
                    continue  # of the same name within another package, such as timm.utils.metrics
                if problem and not allow_unknown:
                    problems.append(f"{name}:{one.name}: {problem}")
                places.append((one, name))
    return places, problems


def put_in_place(places: Iterable[tuple[Replacement, str]]) -> list[Row]:
    """In modules that are loaded now, and in the others as they load."""
    added = []
    with _lock:
        _watch()
        for one, module in places:
            if any(row.replacement.key == one.key and row.module == module and row.state != "refused" for row in _rows):
                continue
            row = Row(one, module, "waiting")
            _rows.append(row)
            added.append(row)
            if module in sys.modules and not _is_loading(sys.modules[module]):
                _replace(row, sys.modules[module])
    return added


def refuse(places: Iterable[tuple[Replacement, str]], problems: list[str]) -> None:
    why = "; ".join(problems)
    _rows.extend(Row(one, module, "refused", why) for one, module in places)


def note_off(project: str, wanted: Iterable[Replacement]) -> None:
    """Rows for what is there and was left as it is."""
    kept = {one.key for one in wanted}
    for one in replacements(project):
        if one.off and one.key not in kept:
            _rows.extend(Row(one, name, "off", one.off) for module in one.modules for name, _ in _located(module))


def undo(some: Iterable[Row] | None = None) -> int:
    """Put the originals back; how many places that were."""
    count = 0
    with _lock:
        for row in list(_rows if some is None else some):
            for owner, name in row.places:
                if vars(owner).get(name) is row.installed:
                    setattr(owner, name, row.original)
                    count += 1
            # Copies that were taken from a replaced module later.
            if row.installed is not None and "." not in row.replacement.name:
                for module, name in _copies(row.installed):
                    setattr(module, name, row.original)
                    count += 1
            if row in _rows:
                _rows.remove(row)
        if not any(row.state in ("waiting", "replaced") for row in _rows):
            _unwatch()
    return count


def copies(row: Row) -> list[str]:
    """Where it is now, as module.name."""
    if row.installed is None:
        return []
    if "." in row.replacement.name:
        return [f"{row.module}.{row.replacement.name}"]
    return [f"{module.__name__}.{name}" for module, name in _copies(row.installed)]


def original_of(adapter: Callable[..., Any]) -> Callable[..., Any] | None:
    """What an adapter stands in for, where it does."""
    return next((row.original for row in _rows if row.replacement.adapter is adapter and row.original), None)


def _located(module: str) -> Iterator[tuple[str, Path]]:
    """Modules of that name, or within another package: loaded ones, else one on the path."""
    found = False
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if (name == module or name.endswith(f".{module}")) and file and file.endswith(".py"):
            found |= name == module
            yield name, Path(file)
    if not found:
        inside = module.replace(".", "/")
        for entry in sys.path:
            for path in (Path(entry or ".") / f"{inside}.py", Path(entry or ".") / inside / "__init__.py"):
                if path.is_file():
                    yield module, path
                    return


def _problem(one: Replacement, path: Path) -> str:
    try:
        there = definitions(path)
    except (OSError, SyntaxError, ValueError) as error:
        return f"{path} cannot be read ({error})"
    missing = [name for name in (one.name, *one.helpers) if name not in there]
    if missing:
        return f"no {', '.join(missing)} in {path}"
    code = combined([there[name] for name in (one.name, *one.helpers)])
    return "" if code in KNOWN.get(one.key, ()) else f"unknown code in {path} (fingerprint {code})"


def _replace(row: Row, module: types.ModuleType) -> None:
    one = row.replacement
    owner: Any = module
    *path, name = one.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    original = None if owner is None else vars(owner).get(name)
    if original is None:
        row.state, row.why = "refused", f"no {one.name} in module {row.module}"
        warnings.warn(f"drop_in: {row.module}: {row.why}", stacklevel=2)
        return
    row.original, row.installed = original, _counted(row, original)
    row.places = [(owner, name)] if path else list(_copies(original))
    for place, attribute in row.places:
        setattr(place, attribute, row.installed)
    row.state = "replaced"
    held = 0 if path else _held_elsewhere(original, {id(vars(place)) for place, _ in row.places})
    if held:
        warnings.warn(
            f"drop_in: {held} partial functions, closures or objects made before keep the original {one.name} of "
            f"{row.module}; apply before they are made",
            stacklevel=2,
        )


def _counted(row: Row, original: Callable[..., Any]) -> Callable[..., Any]:
    adapter = row.replacement.adapter

    @functools.wraps(adapter)
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return adapter(*arguments, **options)
        finally:
            row.calls += 1
            row.seconds += time.perf_counter() - start

    # Under the original's name pickle finds it, where it is in place, and the original elsewhere.
    call.__module__ = getattr(original, "__module__", call.__module__)
    call.__qualname__ = getattr(original, "__qualname__", call.__qualname__)
    return call


def _copies(function: Callable[..., Any]) -> Iterator[tuple[types.ModuleType, str]]:
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType) or module.__name__.startswith("apd_kernels."):
            continue
        for name, value in list(vars(module).items()):
            if value is function:
                yield module, name


def _held_elsewhere(function: Callable[..., Any], known: set[int]) -> int:
    """Partial functions, closures and objects that hold it."""
    count = 0
    for referrer in gc.get_referrers(function):
        if isinstance(referrer, (functools.partial, types.CellType)):
            count += 1
        elif isinstance(referrer, dict) and id(referrer) not in known and "__builtins__" not in referrer:
            count += any(getattr(owner, "__dict__", None) is referrer for owner in gc.get_referrers(referrer))
    return count


def _is_loading(module: types.ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Loader(importlib.abc.Loader):
    """The loader of a module, and the replacements in it before anybody imports from it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        made: types.ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        with _lock:
            for row in [row for row in _rows if row.module == module.__name__ and row.state == "waiting"]:
                _replace(row, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(row.module == name and row.state == "waiting" for row in _rows):
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)
                    return spec
        return None


_finder = _Finder()


def _watch() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _unwatch() -> None:
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
