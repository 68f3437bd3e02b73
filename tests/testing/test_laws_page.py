"""The programs on docs/laws.md that need another framework: each asserts what that framework does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from children import ENVIRONMENT

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"
PROGRAMS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
FRAMEWORKS = re.compile(r"\b(torch|jax|autograd|mygrad)\b")


def test_the_page_has_programs() -> None:
    assert len(PROGRAMS) >= 9
    assert all(FRAMEWORKS.search(program) and "assert " in program for program in PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(1, len(PROGRAMS) + 1))
def test_program(request: pytest.FixtureRequest, program: str) -> None:
    """In a process of its own: JAX and torch stay out of this one."""
    missing = {name for name in FRAMEWORKS.findall(program) if importlib.util.find_spec(name) is None}
    if missing:
        reason = f'{", ".join(missing)} not installed: pip install "minitransformer[peers]"'
        if request.config.getoption("--require-peers"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    argv = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr
