"""A bug: the wrong function, where it goes, and what a learner and a test suite need to know of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from minitransformer.errors import ConfigError, nearest


class Patch(NamedTuple):
    """`wrong(right, ...)` in the place of `right(...)`, which is the attribute of an op, class or module."""

    owner: Any
    attribute: str
    wrong: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Bug:
    """One mistake. `caught_by` are the tests of this project that must fail with it, as pytest names them."""

    name: str
    story: str
    exercise: str
    solution: str
    caught_by: tuple[str, ...]
    patches: tuple[Patch, ...]


BUGS: dict[str, Bug] = {}  # filled by `bug`


def bug(
    owner: Any,
    attribute: str,
    *also: Patch,
    story: str,
    exercise: str,
    solution: str,
    caught_by: Sequence[str],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put the decorated wrong function, which belongs in `owner.attribute`, into the zoo under its own name."""

    def put(wrong: Callable[..., Any]) -> Callable[..., Any]:
        name = wrong.__name__
        patches = (Patch(owner, attribute, wrong), *also)
        BUGS[name] = Bug(name, story, exercise, solution, tuple(caught_by), patches)
        return wrong

    return put


def names() -> list[str]:
    """The names of all bugs, in the order of the zoo."""
    return list(BUGS)


def get(name: str) -> Bug:
    """The bug `name`; `ConfigError` with the nearest name if there is none."""
    if not isinstance(name, str) or name not in BUGS:
        raise ConfigError("bugs", f"there is no bug {name!r}", nearest(str(name), BUGS))
    return BUGS[name]


def install(name: str) -> AbstractContextManager[Bug]:
    """Context manager: the bug `name` is in the package while inside, in all threads of this process.

    Bugs may be nested and overlap in any order; whatever happens inside, each is taken out at its end.
    Raises `ConfigError` for a name that the zoo does not have.
    """
    return _inside(get(name))


_lock = threading.Lock()
_installed: list[Bug] = []
_right: dict[tuple[int, str], tuple[Any, Any]] = {}  # (id of the owner, attribute) -> owner, what belongs there


@contextmanager
def _inside(one: Bug) -> Iterator[Bug]:
    with _lock:
        _installed.append(one)
        _put_in()
    try:
        yield one
    finally:
        with _lock:
            del _installed[-1 - _installed[::-1].index(one)]
            _put_in()


def _put_in() -> None:
    """Everything as it belongs, then every installed bug, the later around the earlier."""
    for (_, attribute), (owner, right) in _right.items():
        setattr(owner, attribute, right)
    _right.clear()
    for one in _installed:
        for owner, attribute, wrong in one.patches:
            right = getattr(owner, attribute)
            _right.setdefault((id(owner), attribute), (owner, right))
            setattr(owner, attribute, _around(right, wrong))


def _around(right: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function, so that it becomes a method where one belongs."""

    @functools.wraps(right)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrong(right, *args, **kwargs)

    return call
