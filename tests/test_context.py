"""`context.Setting`: a value inside a block or a function, and the old one after it, whatever happens."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest

from minitransformer.context import Setting

LEVEL: ContextVar[int] = ContextVar("level", default=0)


def test_inside_and_after() -> None:
    with Setting(LEVEL, 1) as one:
        assert (one, LEVEL.get()) == (1, 1)
        with Setting(LEVEL, 2):
            assert LEVEL.get() == 2
        assert LEVEL.get() == 1
    assert LEVEL.get() == 0


def test_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Setting(LEVEL, 1):
        raise ZeroDivisionError
    assert LEVEL.get() == 0


def test_as_a_decorator_of_a_function_that_calls_itself() -> None:
    seen = []

    @Setting(LEVEL, 3)
    def descend(depth: int) -> None:
        seen.append(LEVEL.get())
        if depth:
            with Setting(LEVEL, 10 + depth):
                descend(depth - 1)

    descend(3)
    assert (seen, LEVEL.get()) == ([3, 3, 3, 3], 0)


def test_other_threads_do_not_see_it() -> None:
    seen = []
    with Setting(LEVEL, 1):
        thread = threading.Thread(target=lambda: seen.append(LEVEL.get()))
        thread.start()
        thread.join()
    assert seen == [0]
