"""What `check_laws` found: a verdict a law, as a table, with the smallest counterexample of each that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitransformer.testing.laws.law import Law
from minitransformer.testing.laws.problem import Problem
from minitransformer.testing.layouts import array_text

_LONGEST = 2000  # characters of one printed array


@dataclass(frozen=True)
class Verdict:
    """What became of one law.

    `status` is "held", "failed" or "not applicable", `sense` "bits" or "rounding", `reason` says why it failed or does
    not apply. `calls` are those of the smallest counterexample: problems, and whether gradients were taken.
    """

    law: Law
    status: str
    sense: str
    examples: int = 0
    compared: int = 0
    reason: str = ""
    calls: tuple[tuple[Problem, bool], ...] = ()

    @property
    def code(self) -> str:
        """The counterexample as a program: the calls whose results contradict the law, on `attention`."""
        if not self.calls:
            return ""
        names: dict[tuple[Any, ...], str] = {}
        lines = ["import numpy as np"]
        calls = []
        for problem, differentiated in self.calls:
            arrays = [("dout", problem.dout)] if differentiated else []
            arrays += [("q", problem.q), ("k", problem.k), ("v", problem.v)]
            given = [_named(name, array, names, lines) for name, array in arrays]
            for option, value in problem.options.items():
                text = _named(option, value, names, lines) if isinstance(value, np.ndarray) else _text(value)
                given.append(f"{option}={text}")
            calls.append(f"attention{'.gradients' if differentiated else ''}({', '.join(given)})")
        return "\n".join([*lines, *calls])


class LawReport:
    """The verdicts, in the order of the laws. True if nothing failed and at least one law applied."""

    def __init__(self, name: str, verdicts: Sequence[Verdict]) -> None:
        self.name = name
        self.verdicts = tuple(verdicts)

    @property
    def held(self) -> list[str]:
        return self._of("held")

    @property
    def failed(self) -> list[str]:
        return self._of("failed")

    @property
    def not_applicable(self) -> list[str]:
        return self._of("not applicable")

    def _of(self, status: str) -> list[str]:
        return [v.law.name for v in self.verdicts if v.status == status]

    def __getitem__(self, name: str) -> Verdict:
        """The verdict on the law of this name."""
        return {v.law.name: v for v in self.verdicts}[name]

    def __bool__(self) -> bool:
        return bool(self.held) and not self.failed

    def __str__(self) -> str:
        counts = f"{len(self.held)} held, {len(self.failed)} failed, {len(self.not_applicable)} not applicable"
        lines = [f"laws of attention, {self.name}: {counts}", ""]
        for v in self.verdicts:
            status = "FAILED" if v.status == "failed" else v.status
            effort = f"{v.examples} examples, {v.compared} numbers, {v.sense}" if v.examples else v.reason
            lines.append(f"  {v.law.name:4} {status:15} {v.law.title} ({effort})")
        for v in self.verdicts:
            if v.status == "failed":
                statement = v.law.statement.partition("\n")[0]
                lines += ["", f"{v.law.name} {v.law.title}: {v.reason}", f"  {statement}"]
                lines += [f"    {line}" for line in v.code.splitlines()]
        return "\n".join(lines)

    __repr__ = __str__


def _named(name: str, array: np.ndarray, names: dict[tuple[Any, ...], str], lines: list[str]) -> str:
    """The name of an array, after writing down its numbers if they are new."""
    key = (name, array.shape, array.dtype, array.tobytes())
    if key not in names:
        number = sum(known == name for known, *_ in names) + 1
        names[key] = name if number == 1 else f"{name}{number}"
        lines.append(f"{names[key]} = {_text(array)}")
    return names[key]


def _text(value: Any) -> str:
    """Python that makes the value."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if not isinstance(value, np.ndarray):
        return repr(value)
    text = array_text(value)
    if len(text) > _LONGEST:
        return f"...  # {value.dtype} {value.shape}: too long to print, see `calls` of the verdict"
    return text
