"""docs/promises.md names a test for every promise, each of them exists, and no long form is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "promises.md"
NAME = re.compile(r"`([\w/]+\.py)::(\w+)`")


class Row(NamedTuple):
    """A promise, and the (file, test) that hold it in the suite and in their long form."""

    promise: str
    held_by: list[tuple[str, str]]
    long_form: list[tuple[str, str]]


def rows(page: str) -> list[Row]:
    """The rows of all tables."""
    found = []
    for line in page.splitlines():
        if line.startswith("|") and not line.startswith(("| promise |", "|---")):
            promise, held_by, long_form = (cell.strip() for cell in line.strip("|").split("|"))
            found.append(Row(promise, NAME.findall(held_by), NAME.findall(long_form)))
            assert NAME.sub("", held_by + long_form).strip() == "", line  # nothing but names
    return found


def existing() -> dict[tuple[str, str], bool]:
    """(file, test) of all tests there are -> whether it has a long form."""
    return {
        (path.relative_to(TESTS).as_posix(), node.name): any("thorough" in ast.unparse(d) for d in node.decorator_list)
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def complaints(page: str, tests: dict[tuple[str, str], bool]) -> list[str]:
    found = []
    for promise, held_by, long_form in rows(page):
        if not held_by:
            found.append(f"no test for: {promise}")
        found += [f"there is no tests/{'::'.join(name)}" for name in held_by + long_form if name not in tests]
        found += [f"tests/{'::'.join(name)} has no long form" for name in long_form if not tests.get(name, True)]
    named = {name for row in rows(page) for name in row.long_form}
    return found + [
        f"long form not named: {'::'.join(name)}" for name, long in tests.items() if long and name not in named
    ]


def test_every_row_names_tests_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(rows(page)) >= 25
    assert complaints(page, existing()) == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("| Flat. | `a.py::test_a` | |", ""),
        ("| Flat. | `a.py::test_a` `b/c.py::test_b` | `b/c.py::test_b` |", ""),
        ("| Flat. | | |", "no test for: Flat."),
        ("| Flat. | `a.py::test_x` | |", "there is no tests/a.py::test_x"),
        ("| Flat. | `a.py::test_a` | `a.py::test_a` |", "tests/a.py::test_a has no long form"),
    ],
)
def test_the_checker_complains(row: str, complaint: str) -> None:
    tests = {("a.py", "test_a"): False, ("b/c.py", "test_b"): "test_b" in row}
    assert complaints(f"| promise | held by | long form |\n|---|---|---|\n{row}", tests) == (
        [complaint] if complaint else []
    )


def test_a_long_form_is_not_left_out() -> None:
    assert complaints("", {("a.py", "test_a"): True}) == ["long form not named: a.py::test_a"]
