"""Whose code a function is, told by the shape of its source.

Layout, comments, docstrings and annotations are left out, so that reformatted copies are the same code. Names, numbers
and the order of statements are not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = ("ctx", "type_comment", "kind", "annotation", "returns", "type_params", "type_ignores")


def definitions(path: Path) -> dict[str, str]:
    """The fingerprint of every function of a file by its name, of every method as Class.method.

    Raises:
        OSError, SyntaxError, UnicodeDecodeError, ValueError: a file that is no Python source.
    """
    return dict(_named(ast.parse(path.read_bytes())))


def combined(fingerprints: list[str]) -> str:
    """Of a function and the helpers beside it."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()[:16]


def _named(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, _of(node)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{inner.name}", _of(inner)


def _of(node: ast.AST) -> str:
    return hashlib.sha256(_shape(node).encode()).hexdigest()[:16]


def _shape(node: object) -> str:
    """As `ast.dump`, but the same in every version of Python: nothing that is empty."""
    if isinstance(node, list):
        return f"[{','.join(map(_shape, _without_docstring(node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name not in _LEFT_OUT and value is not None and value != []:
            parts.append(f"{name}={_shape(value)}")
    return f"({' '.join(parts)})"


def _without_docstring(nodes: list[object]) -> list[object]:
    """Without expressions that are only a string, wherever they stand."""
    return [
        node
        for node in nodes
        if not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
    ]
