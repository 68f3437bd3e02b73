"""How many bugs of the zoo a test catches."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from minitransformer.checks import check_function, shown
from minitransformer.errors import ConfigError, GradientError
from minitransformer.testing.bugs.bug import get, install
from minitransformer.testing.bugs.bug import names as all_names


@dataclass(frozen=True)
class MutationScore:
    """`outcomes` says for each bug what the test raised, in one line, or None: it passed, and the bug survived."""

    outcomes: dict[str, str | None]

    @property
    def caught(self) -> list[str]:
        return [name for name, outcome in self.outcomes.items() if outcome is not None]

    @property
    def survived(self) -> list[str]:
        return [name for name, outcome in self.outcomes.items() if outcome is None]

    @property
    def score(self) -> float:
        """The part that was caught, from 0 to 1."""
        return len(self.caught) / len(self.outcomes)

    def __str__(self) -> str:
        width = max(map(len, self.outcomes))
        lines = [
            f"{name:{width}}  {'SURVIVED' if outcome is None else f'caught    {outcome}'}"
            for name, outcome in self.outcomes.items()
        ]
        total = f"{len(self.caught)} of {len(self.outcomes)} bugs caught ({self.score:.0%})"
        return "\n".join([*lines, total])


def mutation_score(test_function: Callable[[], Any], names: Iterable[str] | None = None) -> MutationScore:
    """Run `test_function()` with each bug of the zoo (or of `names`) installed: whatever it raises catches the bug.

    The function takes no arguments and returns nothing; Hypothesis' `@given` may have made it so, and then the
    first failing example is enough. It must pass without a bug, before and after all others: `GradientError` if it
    does not. A test that skips catches nothing. Raises `ConfigError` for what is no such function, for unknown
    names, and for no names at all.
    """
    check_function("mutation_score", "test_function", test_function, "without arguments")
    wanted = [get(name).name for name in (all_names() if names is None else names)]
    if not wanted:
        raise ConfigError("mutation_score", "there are no bugs to install", "Leave names out for all of them")
    run = _stopping_at_the_first_failure(test_function)
    _must_pass(run, "without a bug")
    outcomes = {}
    for name in wanted:
        with install(name):
            outcomes[name] = _outcome(run)
    _must_pass(run, "without a bug, after it was run with some: it keeps state between its runs")
    return MutationScore(outcomes)


class _Failed(BaseException):
    """Carries what a test raised past Hypothesis, which would otherwise shrink the example."""


class _Watch:
    """Context manager that takes in whatever a test may raise, and lets pass what stops a program."""

    error: BaseException | None = None

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            return False
        self.error = error.__cause__ if isinstance(error, _Failed) else error
        return True


def _stopping_at_the_first_failure(test_function: Any) -> Callable[[], Any]:
    """`test_function`; if it is Hypothesis', without the search for a smaller example, which may take minutes."""
    handle = getattr(test_function, "hypothesis", None)
    if handle is None:
        return test_function

    def run() -> Any:
        inner = handle.inner_test

        def first(*args: Any, **kwargs: Any) -> Any:
            with _Watch() as watch:
                return inner(*args, **kwargs)
            assert watch.error is not None
            if type(watch.error).__module__.startswith("hypothesis."):  # an example that it rejects
                raise watch.error
            raise _Failed from watch.error

        handle.inner_test = first
        try:
            return test_function()
        finally:
            handle.inner_test = inner

    return run


def _outcome(run: Callable[[], Any]) -> str | None:
    """What `run` raised, in one line; None if it passed or skipped."""
    with _Watch() as watch:
        run()
    error = watch.error
    if error is None or isinstance(error, unittest.SkipTest) or type(error).__name__ == "Skipped":
        return None
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:100].rstrip(": ")


def _must_pass(run: Callable[[], Any], when: str) -> None:
    result = None
    with _Watch() as watch:
        result = run()
    if watch.error is not None:
        raise GradientError("mutation_score", f"the test does not pass {when}", "Make it pass first") from watch.error
    if result is not None:
        problem = f"the test returned {shown(result)}, expected nothing"
        raise ConfigError("mutation_score", problem, "Use assert: a bool is no check, and a coroutine does not run")
