"""Processes that this one starts."""

from __future__ import annotations

import sys

# Python looks for modules in the current folder first, where anybody's torch.py may lie. Its own switch against that
# (-P) came with 3.11.
_SAFE = "import sys; sys.path[:] = [place for place in sys.path if place]\n"


def python(code: str, *arguments: str) -> list[str]:
    """The command that runs some code in this Python, where nothing is imported from the current folder.

    Args:
        code: Python.
        arguments: its ``sys.argv[1:]``.
    """
    return [sys.executable, "-c", _SAFE + code, *arguments]
