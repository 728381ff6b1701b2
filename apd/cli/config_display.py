"""What ``apd config show`` prints."""

from __future__ import annotations

import textwrap
from pathlib import Path

from rich.console import Console
from rich.text import Text

from apd.config.values import SECTIONS, SETTINGS, Config, Setting, advice, shown, value_of

_VALUE_WIDTH = 12  # of most values; a longer one moves its own line only
_KEY_WIDTH = max(map(len, SETTINGS)) + 1


def print_config(config: Config, name: Path | str | None = None) -> None:
    """Print every value with its meaning and where its default comes from.

    One line for each in a pipe; on a terminal its meaning is folded beside it.

    Args:
        config: the values.
        name: the file or shipped configuration that they are from; None for the defaults.
    """
    console = Console(highlight=False)
    width = console.width if console.is_terminal else None
    changed = sum(value_of(config, key) != setting.default for key, setting in SETTINGS.items())
    title = "defaults" if name is None else f"{name}: {changed} of {len(SETTINGS)} values differ from the defaults"
    console.print(Text(title + ", in bold" * bool(changed)), soft_wrap=True)
    section = None
    for key, setting in SETTINGS.items():
        if section != (section := key.partition(".")[0] if "." in key else ""):
            described = getattr(config, section) if section in SECTIONS else config
            console.print()
            console.print(Text(f"{section}  {described.__doc__}".strip(), "dim"), soft_wrap=width is None)
        for line in _lines(setting, value_of(config, key), width):
            console.print(line, soft_wrap=True)
    for note in advice(config):
        console.print()
        console.print(Text.assemble(("note: ", "bold"), note), soft_wrap=width is None)


def _lines(setting: Setting, value: object, width: int | None) -> list[Text]:
    changed = value != setting.default
    head = f"{setting.key:<{_KEY_WIDTH}} "
    written = f"{shown(value):<{_VALUE_WIDTH}}"
    indent = len(head) + _VALUE_WIDTH + 2
    first, *others = _folded(_meaning(setting, changed), head + written, indent, width)
    line = Text.assemble(head, (written, "bold" if changed else ""), first)
    return [line, *(Text(other) for other in others)]


def _meaning(setting: Setting, changed: bool) -> str:
    choices = ""
    if not all(choice in setting.help for choice in setting.choices):
        choices = f"; one of {', '.join(setting.choices)}"
    default = f"default {shown(setting.default)}, " * changed
    return f"{setting.help}{choices} ({default}{setting.source})"


def _folded(meaning: str, before: str, indent: int, width: int | None) -> list[str]:
    """The meaning in lines for a terminal; the first goes behind `before`, the others are indented."""
    if width is None:
        return [f"  {meaning}"]
    # Narrower than 24 columns nothing can be read; the terminal then folds as it likes.
    lines = textwrap.wrap(
        meaning,
        max(width - 1, indent + 24),
        initial_indent="." * (len(before) + 2),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return ["  " + lines[0][len(before) + 2 :], *lines[1:]]
