"""Marks that torch.compile reads off a function.

`torch.compiler` has decorators that set them, but calling those imports torch._dynamo: 1.4 s that a user who never
compiles should not pay when importing this package. Tests hold the marks against the installed PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """A compiled graph keeps what the function returned while it was traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(reason: str) -> Callable[[F], F]:
    """The function runs uncompiled; a graph without breaks is refused with the reason."""

    def mark(function: F) -> F:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark
