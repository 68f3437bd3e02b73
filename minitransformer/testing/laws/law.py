"""What a law is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from minitransformer.testing.adapters import Attention
from minitransformer.testing.laws.trial import Trial


@dataclass(frozen=True)
class Law:
    """A relation that every attention with the abilities it needs must satisfy.

    `needs` are alternatives, each the names of `adapters.ABILITIES` separated by spaces, "gradient" standing for a
    backward. `check` draws one problem and raises a Violation if the law does not hold for it.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    check: Callable[[Trial], None]

    @property
    def statement(self) -> str:
        """What it says, as a formula."""
        return inspect.cleandoc(self.check.__doc__ or "")

    def lacking(self, attention: Attention) -> str:
        """Why the law does not apply to `attention`; "" if it does."""
        there = attention.supports | ({"gradient"} if attention.pull else set())
        if any(there.issuperset(need.split()) for need in self.needs):
            return ""
        return "needs " + ", or ".join(_and(sorted(set(need.split()) - there)) for need in self.needs)

    def __repr__(self) -> str:
        return f"<{self.name}: {self.title}>"


def law(name: str, title: str, *needs: str) -> Callable[[Callable[[Trial], None]], Law]:
    """Make the decorated check a law."""
    return lambda check: Law(name, title, needs or ("",), check)


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
