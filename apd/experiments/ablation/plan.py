"""The file of an ablation: YAML with the base configuration, the rows, their seeds and controls, and the targets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from apd.config.files import load_config, read_mapping, shipped_ablations
from apd.config.values import Config, described
from apd.errors import InputError
from apd.retrieval.targets import RULES, Rule

# Rows, targets and brackets give names to folders and files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_KEYS = ("title", "note", "config", "values", "seeds", "rows", "compare", "targets", "brackets")


@dataclass(frozen=True)
class Row:
    """A row of the table: the base configuration with some values changed."""

    name: str
    title: str
    seeds: tuple[int, ...]
    values: tuple[str, ...] = ()  # KEY=VALUE, on top of the base
    times: float = 1  # its training takes so many times the steps of the base
    trunk: str | None = None  # the row whose run of the same seed is the network of ψ and φ
    generator: str | None = None  # the row whose stage 1 of the same seed is taken over


@dataclass(frozen=True)
class Bracket:
    """Something untrained or foreign that is tested as the rows are, to place them: a model, or feature files."""

    name: str
    title: str
    model: str | None = None  # as `apd extract --model`
    size: tuple[int, int] | None = None
    flip_test: bool = False
    features: str | None = None  # name of the feature files; {target} stands for the target


@dataclass(frozen=True)
class Plan:
    """What an ablation file says, checked."""

    path: Path
    title: str
    note: str | None  # how the table is to be read
    base: str  # configuration file or name
    values: tuple[str, ...]  # KEY=VALUE of all rows, on top of it
    rows: Mapping[str, Row]
    controls: Mapping[str, tuple[str, ...]]  # of a row: it is compared with the better of them
    targets: Mapping[str, Rule]
    brackets: Mapping[str, Bracket]

    def config(self, row: Row, seed: int, runs: Path) -> Config:
        """The whole configuration of a run.

        Args:
            row: one of `rows`.
            seed: one of its seeds.
            runs: folder of all runs, in which the row's trunk lies.

        Raises:
            InputError: a value is refused, or contradicts what the row says; the message names the row.
        """
        try:
            config = load_config(self.base, [*self.values, *row.values, f"seed={seed}"])
        except InputError as error:
            raise InputError(f"{self.path}: rows.{row.name}: {error}") from error
        if row.times != 1:
            config = replace(config, train=_longer(config.train, row.times))
        if row.trunk is not None:
            if config.mpg.trunk != "self" or config.mpg.trunk_weights is not None:
                raise InputError(
                    f"{self.path}: rows.{row.name}.trunk: expected mpg.trunk self without mpg.trunk_weights, got "
                    f"mpg.trunk {config.mpg.trunk}, mpg.trunk_weights {config.mpg.trunk_weights}"
                )
            config = replace(
                config, mpg=replace(config.mpg, trunk_weights=str((runs / row.trunk / str(seed)).absolute()))
            )
        return config


def _longer(train: Any, times: float) -> Any:
    if train.steps is not None:
        return replace(train, steps=round(train.steps * times))
    return replace(train, epochs=train.epochs * times)


def load_plan(file: Path | str) -> Plan:
    """Read and check an ablation file; every configuration of it is made once.

    Args:
        file: a YAML file, or the name of one that comes with the package (`apd.config.files.shipped_ablations`).

    Raises:
        InputError: it is missing or damaged, a key is unknown, or a value is wrong; the message names it.
    """
    shipped = shipped_ablations()
    path = shipped[str(file)] if str(file) in shipped and not Path(file).is_file() else Path(file)
    if not path.exists():
        raise InputError(f"{file}: no such file, and the ablations shipped are {', '.join(shipped)}")
    content = read_mapping(path)
    try:
        plan = _plan(path, content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for row in plan.rows.values():
        plan.config(row, row.seeds[0], Path())
    return plan


def _plan(path: Path, content: Mapping[str, Any]) -> Plan:
    _only(content, _KEYS, "")
    for key in ("config", "seeds", "rows", "targets"):
        if key not in content:
            raise InputError(f"{key}: is missing")
    seeds = _seeds(content["seeds"], "seeds")
    rows = {name: _row(name, value, seeds) for name, value in _section(content, "rows").items()}
    for row in rows.values():
        _check_sources(row, rows)
    controls = {}
    for name, value in _section(content, "compare").items():
        names = tuple(value if isinstance(value, list) else [value])
        for wanted in (name, *names):
            if wanted not in rows:
                raise InputError(f"compare.{name}: expected names of rows ({', '.join(rows)}), got {described(wanted)}")
        controls[name] = names
    return Plan(
        path=path,
        title=_text(content.get("title", path.stem), "title"),
        note=None if content.get("note") is None else _text(content["note"], "note"),
        base=_base(path, _text(content["config"], "config")),
        values=_values(content.get("values", []), "values"),
        rows=rows,
        controls=controls,
        targets={name: _rule(name, value) for name, value in _section(content, "targets").items()},
        brackets={name: _bracket(name, value) for name, value in _section(content, "brackets").items()},
    )


def _base(path: Path, config: str) -> str:
    """A file beside the ablation file, or the name of a shipped configuration."""
    beside = path.parent / config
    return str(beside) if beside.is_file() else config


def _row(name: str, value: Any, seeds: tuple[int, ...]) -> Row:
    where = f"rows.{name}"
    if isinstance(value, list):
        value = {"values": value}
    given = _options(Row, value, where)
    times = given.get("times", 1)
    if type(times) not in (int, float) or not 0 < times < math.inf:
        raise InputError(f"{where}.times: expected a number more than 0, got {described(times)}")
    given["values"] = _values(given.get("values", []), f"{where}.values")
    given["seeds"] = _seeds(given["seeds"], f"{where}.seeds") if "seeds" in given else seeds
    return Row(**{"title": name, **given, "name": name})


def _check_sources(row: Row, rows: Mapping[str, Row]) -> None:
    """A row that takes something over needs a row above it, with all of its seeds."""
    above = list(rows)[: list(rows).index(row.name)]
    for what in ("trunk", "generator"):
        source = getattr(row, what)
        if source is None:
            continue
        if source not in above:
            raise InputError(f"rows.{row.name}.{what}: expected a row above it, got {described(source)}")
        if missing := sorted(set(row.seeds) - set(rows[source].seeds)):
            raise InputError(f"rows.{row.name}.{what}: {source} has no seed {missing[0]}")


def _rule(name: str, value: Any) -> Rule:
    where = f"targets.{name}"
    given = _options(Rule, value, where)
    if given.get("rule") not in RULES:
        raise InputError(f"{where}.rule: expected one of {', '.join(RULES)}, got {described(given.get('rule'))}")
    for key, least in (("identities", 1), ("repeats", 1), ("seed", 0)):
        if key in given and (type(given[key]) is not int or given[key] < least):
            raise InputError(f"{where}.{key}: expected an integer of at least {least}, got {described(given[key])}")
    if ("identities" in given) != (given["rule"] == "two_cameras"):
        raise InputError(f"{where}.identities: is needed for two_cameras, and for no other rule")
    if given["rule"] == "own" and given.keys() & {"repeats", "seed"}:
        raise InputError(f"{where}: the rule own draws nothing: no repeats, no seed")
    return Rule(**given)


def _bracket(name: str, value: Any) -> Bracket:
    where = f"brackets.{name}"
    given = _options(Bracket, value, where)
    if ("model" in given) == ("features" in given):
        raise InputError(f"{where}: expected either model or features")
    if "features" in given and given.keys() & {"size", "flip_test"}:
        raise InputError(f"{where}: size and flip_test are for a model")
    for key in ("title", "model", "features"):
        if key in given:
            _text(given[key], f"{where}.{key}")
    if type(given.get("flip_test", False)) is not bool:
        raise InputError(f"{where}.flip_test: expected true or false, got {described(given['flip_test'])}")
    if "size" in given:
        size = given["size"]
        if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise InputError(f"{where}.size: expected [height, width] in pixels, got {described(size)}")
        given["size"] = tuple(size)
    return Bracket(**{"title": name, **given, "name": name})


def _options(made: type[Any], value: Any, where: str) -> dict[str, Any]:
    """The keys of a row, target or bracket, which are the fields of its class."""
    if not _NAME.fullmatch(where.partition(".")[2]):
        raise InputError(f"{where}: expected a name of letters, digits and _ . + -; put any other text into title")
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a section with keys of its own, got {described(value)}")
    _only(value, [one.name for one in fields(made) if one.name != "name"], f"{where}.")
    return dict(value)


def _only(content: Mapping[str, Any], known: Any, prefix: str) -> None:
    for key in content:
        if key not in known:
            raise InputError(f"{prefix}{key}: unknown; expected {', '.join(known)}")


def _section(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict) or (not value and key in ("rows", "targets")):
        raise InputError(f"{key}: expected a section with keys of its own, got {described(content.get(key))}")
    return {str(name): inner for name, inner in value.items()}


def _values(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: expected a list of texts KEY=VALUE, got {described(value)}")
    if any(text.partition("=")[0].strip() == "seed" for text in value):
        raise InputError(f"{where}: seed: belongs into seeds")
    return tuple(value)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(seed) is int and seed >= 0 for seed in numbers) or len(set(numbers)) < len(numbers):
        found = (
            value if all(type(seed) is int for seed in numbers) else described(value)
        )  # not a list of lists of lists
        raise InputError(f"{where}: expected a list of different integers of at least 0, got {found}")
    return tuple(numbers)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: expected text, got {described(value)}")
    return value
