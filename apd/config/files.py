"""Configuration files: YAML with the sections of `apd.config.values.Config`, and ``key=value`` given on top of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from apd.config.values import SECTIONS, SETTINGS, Config, Setting, check, described
from apd.errors import InputError
from apd.files import write_text

# Scalars as in YAML 1.2: `no` is text, 1e-3 a number and 1:30 not one; a number may still be written 20_000.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_ABLATION = "ablation"  # begins the names of files that are no configuration, but an ablation


class _Loader(yaml.SafeLoader):
    """Like SafeLoader, with the scalars above; a key given twice is an error instead of its last value."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as yaml declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that any YAML reader, of 1.1 or of 1.2, would take for something else."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {name: path for name, path in _shipped().items() if not name.startswith(_ABLATION)}


def shipped_ablations() -> dict[str, Path]:
    """The ablations that come with the package, by name; see `apd.experiments.ablation.plan`."""
    return {name: path for name, path in _shipped().items() if name.startswith(_ABLATION)}


def _shipped() -> dict[str, Path]:
    """A clone's ``configs/``, packed as ``apd/configs/``."""
    package = Path(__file__).parents[1]
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(file: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration; what it does not say stays at its default.

    Args:
        file: a YAML file, the name of a shipped configuration (see `shipped_configs`), or None for the defaults.
        overrides: texts ``key=value`` with the section in the key, ``train.lr=1e-3``; the last of a key counts.

    Raises:
        InputError: the file is missing or not such a file, a key is unknown, or `apd.config.values.check` refuses a
            value.
    """
    path = None if file is None else _find(file)
    values = {} if path is None else dict(_read(path))
    source = dict.fromkeys(values, f"{path}: ")
    for text in overrides:
        key, value = _override(text)
        values[key], source[key] = value, ""
    config = _made(values)
    try:
        check(config)
    except InputError as error:
        key = str(error).partition(":")[0]
        raise InputError(f"{source.get(key, '')}{error}") from None
    return config


def save_config(config: Config, path: Path) -> None:
    """Write every value of a configuration to a YAML file, from which `load_config` makes an equal one."""
    text = yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    write_text(path, text)


def _find(file: Path | str) -> Path:
    path = Path(file)
    shipped = shipped_configs()
    if str(file) in shipped and not path.is_file():
        return shipped[str(file)]
    if not path.exists():
        names = ", ".join(shipped)
        near = f"; did you mean {_either(found)}?" if (found := get_close_matches(str(file), shipped, 1)) else ""
        raise InputError(f"{file}: no such file, and the configurations shipped are {names}{near}")
    return path


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    for name, value in read_mapping(path).items():
        if name in SECTIONS:
            if value is not None and not isinstance(value, dict):  # None: all of its keys are commented out
                raise InputError(f"{path}: {name}: expected a section with keys of its own, got {described(value)}")
            for key, inner in (value or {}).items():
                yield _known(f"{name}.{key}", f"{path}: "), inner
        elif name in SETTINGS and "." in name:
            section, _, key = name.partition(".")
            raise InputError(f"{path}: {name}: expected {key} inside of the section {section}")
        else:
            yield _known(str(name), f"{path}: "), value


def read_mapping(path: Path) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Raises:
        InputError: it is missing, or not such a file, or gives a key twice.
    """
    try:
        content = yaml.load(path.read_bytes(), _Loader)  # a SafeLoader: makes plain values only
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: expected a file, found a folder") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read it") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"{path}: {line}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else described(content)
        raise InputError(f"{path}: expected keys with values, such as 'seed: 0', got {found}")
    return content


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise InputError(f"{text}: expected key=value, for example train.lr=1e-3")
    if key in SECTIONS:
        raise InputError(f"{key}: is a section; expected {key}.KEY=value")
    return _known(key), _scalar(value, text=SETTINGS[key].type is str)


def _scalar(value: str, *, text: bool) -> Any:
    """A value from the command line, which YAML would read as a scalar; names of files are taken as they are."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    loader = _Loader("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, value, (True, False)), value)
    try:
        found = loader.construct_object(node)
    except ValueError:  # more digits than Python reads
        return value
    return value if text and found is not None else found


def _known(key: str, source: str = "") -> str:
    if key in SETTINGS:
        return key
    near = _nearest(key)
    hint = f"did you mean {_either(near)}?" if near else "`apd config show` lists every key"
    raise InputError(f"{source}{key}: unknown; {hint}")


def _nearest(key: str) -> list[str]:
    """The key without capitals; else keys of the same name in another section; else the likeliest misspelling."""
    key = key.lower()
    if key in SETTINGS:
        return [key]
    section, _, name = key.rpartition(".")

    def named(name: str) -> list[str]:
        return [known for known in SETTINGS if known.rpartition(".")[2] == name]

    if same := named(name):
        likely = get_close_matches(key, same, 1, cutoff=0.8) if section else []
        return likely or same
    if not section and (sections := get_close_matches(key, SECTIONS, 1, cutoff=0.75)):
        return sections
    if section in SECTIONS:
        own = {known.partition(".")[2]: known for known in SETTINGS if known.startswith(f"{section}.")}
        if close := get_close_matches(name, own, 1):
            return [own[close[0]]]
    names = sorted({known.rpartition(".")[2] for known in SETTINGS})
    return [known for close in get_close_matches(name, names, 1) for known in named(close)]


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _made(values: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {"": {}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = _converted(SETTINGS[key], value)
    config = Config(**sections.pop(""))
    return replace(config, **{name: replace(getattr(config, name), **inner) for name, inner in sections.items()})


def _converted(setting: Setting, value: Any) -> Any:
    """`none` where there may be nothing, and whole numbers where any number may be; the rest is left to `check`."""
    if setting.optional and isinstance(value, str) and value.lower() == "none":
        return None
    if setting.type is float and type(value) is int:
        return float(value) if abs(value) < 2**1023 else math.inf
    return value
