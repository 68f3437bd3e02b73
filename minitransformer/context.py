"""Settings that hold inside a `with` block, in this thread and task alone."""

from __future__ import annotations

from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Setting(ContextDecorator, Generic[T]):
    """Context manager and decorator: `variable` is `value` inside.

    A class, because one of `contextlib.contextmanager` takes several times as long, and a gradient check enters dozens.
    """

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable, self._value = variable, value

    def _recreate_cm(self) -> Setting[T]:
        return Setting(self._variable, self._value)

    def __enter__(self) -> T:
        self._token: Token[T] = self._variable.set(self._value)
        return self._value

    def __exit__(self, *exc_info: Any) -> None:
        self._variable.reset(self._token)
