"""The mutator makes the mistakes it says, each once, and none where no number depends on it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutations import mutants

PACKAGE = Path(__file__).parents[1] / "minitransformer"


def of(statement: str) -> set[str]:
    return {f"{m.kind}: {m.after}" for m in mutants(statement)}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("y = a + b", {"+ to -: y = a - b", "dropped term: y = a", "dropped term: y = b"}),
        ("y = a - b", {"- to +: y = a + b", "dropped term: y = a", "dropped term: y = -b"}),
        ("y = a * b", {"* to /: y = a / b", "dropped factor: y = a", "dropped factor: y = b"}),
        ("y = a / b", {"/ to *: y = a * b", "dropped factor: y = a"}),
        ("y = a ** b", {"** to *: y = a * b"}),
        ("y = a & b", {"& to |: y = a | b"}),
        ("y += x", {"augmented to plain assignment: y = x", "+ to -: y -= x"}),
        ("y @= x", {"augmented to plain assignment: y = x"}),
        ("y = -x", {"sign: y = x"}),
        ("y = x[1]", {"index or constant by one: y = x[2]"}),
        ("y = 0.5", {"constant doubled: y = 1.0"}),
        ("y = 0.0", {"constant doubled: y = 1.0"}),
        ("y = a < b", {"< to <=: y = a <= b"}),
        ("y = a >= b", {">= to >: y = a > b"}),
        ("y = a is None", {"is to is not: y = a is not None"}),
        ("y = a and b and c", {f"dropped condition: y = {rest}" for rest in ("b and c", "a and c", "a and b")}),
        ("y = x.sum(axis=axis)", {"omitted sum: y = x"}),
        ("y = np.sum(x)", {"omitted sum: y = x"}),
        ("y = sum_to(x, shape)", {"omitted sum: y = x"}),
        ("y = x.T", {"not transposed: y = x"}),
        ("y = x.swapaxes(i, j)", {"axes not swapped: y = x"}),
        ("y = np.moveaxis(x, i, j)", {"swapped axes: y = np.moveaxis(x, j, i)"}),
        ("y = np.einsum('bth,bsh->bts', q, k)", {"swapped axes: y = np.einsum('bth,bsh->tbs', q, k)"}),
        ("dq = f(x)", {"sign of a gradient: dq = -f(x)"}),
        ("if a:\n    f()", {"negated condition: if not a:"}),
        ("if not a:\n    f()", {"negated condition: if a:"}),
        ("y = b if a else c", {"negated condition: y = b if not a else c"}),
        ("y = [x for x in z if a]", {"negated condition: y = [x for x in z if not a]"}),
        ("def f(eps=1):\n    return x", {"index or constant by one: def f(eps=2):"}),
    ],
)
def test_the_mistakes(statement: str, expected: set[str]) -> None:
    assert of(statement) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""1 + 1"""',
        "import numpy",
        "raise ShapeError(f'{a - b}', 1 - 2)",
        "assert a < 1",
        "text = f'{x + 1}' + 'more'",
        "x: Literal[1]",
        "@kernel(1 + 1)\ndef f():\n    pass",
        "def __repr__(self):\n    return 1 + 1",
        "flag = True",
    ],
)
def test_what_no_number_depends_on_is_left_alone(source: str) -> None:
    assert of(source) == set()


def test_constants_of_speed_are_left_alone() -> None:
    assert list(mutants("CHUNK = 8", frozenset({"CHUNK"}))) == []
    assert len(list(mutants("CHUNK = 8"))) == 1


def test_where_a_mistake_stands() -> None:
    (mutant,) = mutants("x = y\n\ndef f(a):\n    def g():\n        return -a\n    return g\n")
    assert (mutant.function, mutant.line, mutant.before, mutant.after) == ("f", 5, "return -a", "return a")
    assert mutant.source == ast.unparse(ast.parse("x = y\ndef f(a):\n    def g():\n        return a\n    return g\n"))


def test_mutants_of_a_file_are_programs_and_all_different() -> None:
    source = (PACKAGE / "ops" / "norm.py").read_text(encoding="utf-8")
    made = [m.source for m in mutants(source)]
    assert len({*made, ast.unparse(ast.parse(source))}) == len(made) + 1 > 20
    for text in made:
        ast.parse(text)
