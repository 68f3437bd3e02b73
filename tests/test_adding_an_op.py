"""docs/adding_an_op.md does what it says: its code is run in order, and prints what the page shows."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_derivations import code, compare, complaints

from minitransformer.autograd import OPS
from minitransformer.testing.calls import CALLS

PAGE = Path(__file__).parents[1] / "docs" / "adding_an_op.md"
FENCE = re.compile(r"^(`{3,})(\w+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def registries() -> Iterator[None]:
    """The op that the page adds goes when its test ends."""
    ops, problems = dict(OPS), dict(CALLS)
    yield
    for registry, before in ((OPS, ops), (CALLS, problems)):
        for name in registry.keys() - before.keys():
            del registry[name]


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of each fence; a fence inside a longer one is part of its text."""
    return [(match[2], match[3]) for match in FENCE.finditer(text)]


def run(page: str) -> dict[str, Any]:
    """The namespace that the page's Python leaves, after holding what it prints against its text blocks."""
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = ""
    found = [block for block in blocks(page) if block[0] in ("python", "text")]
    for (language, block), (following, _) in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "text":
            assert printed == block
            continue
        with redirect_stdout(io.StringIO()) as out:
            exec(block, namespace)
        printed = out.getvalue()
        assert bool(printed) == (following == "text"), f"shows nothing of {printed!r}, or shows what is not printed"
    return namespace


@pytest.mark.usefixtures("registries")
def test_the_page_is_true() -> None:
    page = PAGE.read_text(encoding="utf-8")
    known = set(OPS)
    run(page)
    assert OPS.keys() - known == {"softplus"}
    assert CALLS.keys() == OPS.keys()

    (section,) = (block for language, block in blocks(page) if language == "markdown")
    assert complaints([section], ["softplus"]) == []
    rng = np.random.default_rng(0)
    for _ in range(10):
        compare("softplus", code(section)[0], CALLS["softplus"](rng), rng)


@pytest.mark.parametrize(
    "page",
    [
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nprint(1)\n```\n```python\nx = 1\n```\n",
        "```python\nx = 1\n```\n```text\n1\n```\n",
        "```python\nassert False\n```\n",
    ],
)
def test_an_untrue_page_fails(page: str) -> None:
    run("```python\nx = 1\n```\n```python\nprint(x)\n```\n```text\n1\n```\n")
    with pytest.raises(AssertionError):
        run(page)
