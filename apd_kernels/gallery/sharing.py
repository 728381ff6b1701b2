"""Any number of readers, or one writer: what lets threads share a gallery."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Sharing:
    """A lock that readers share; a waiting writer goes before readers that come after it.

    Readers who waited for a writer go before the next one: neither side can keep the other out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._readers = self._waiting = 0
        self._writing = False
        self._writes = 0  # that have ended
        self._late = self._due = 0  # readers who wait: for a writer to come, and for nobody but their own waking up

    def __reduce__(self) -> tuple[type[Sharing], tuple[()]]:
        return Sharing, ()  # a copy of a gallery is nobody's yet

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            if self._writing or self._waiting:
                self._wait_for_a_write()
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    def _wait_for_a_write(self) -> None:
        before = self._writes
        self._late += 1
        try:
            self._changed.wait_for(lambda: not self._writing and (self._writes > before or not self._waiting))
        finally:
            if self._writes > before:
                self._due -= 1
            else:
                self._late -= 1
            self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._writing or self._readers or self._due))
                self._writing = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._writes += 1
                self._due, self._late = self._late, 0
                self._changed.notify_all()


def reads(method: _Method) -> _Method:
    """A method of an object with `_sharing` that changes nothing."""

    @functools.wraps(method)
    def shared(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._sharing.reading():
            return method(self, *args, **kwargs)

    return shared  # type: ignore[return-value]


def writes(method: _Method) -> _Method:
    """A method of an object with `_sharing` that changes it."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._sharing.writing():
            return method(self, *args, **kwargs)

    return alone  # type: ignore[return-value]
