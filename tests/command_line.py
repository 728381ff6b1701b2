"""Calling ``apd`` in tests."""

from __future__ import annotations

from typer.testing import CliRunner

from apd.cli import app


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints; it must end with the exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def error(*arguments: object, code: int = 2) -> str:
    """The one line that a failing command prints."""
    lines = run(*arguments, code=code).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    return lines[0]
