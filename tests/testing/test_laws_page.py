"""The programs on docs/laws.md that need another framework: each asserts what that framework does."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from children import ENVIRONMENT

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"
PROGRAMS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
FRAMEWORKS = re.compile(r"\b(torch|jax|autograd|mygrad)\b")

# What each of some programs raises, null if nothing; their own prints go elsewhere.
RUN = """
import contextlib, io, json, sys, traceback
raised = []
for program in json.load(sys.stdin):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, {"__name__": "__main__"})
    except BaseException:
        raised.append(traceback.format_exc())
    else:
        raised.append(None)
json.dump(raised, sys.stdout)
"""


def frameworks(program: str) -> frozenset[str]:
    return frozenset(FRAMEWORKS.findall(program))


@cache
def raised(of: frozenset[str]) -> dict[str, str | None]:
    """What the programs of these frameworks raise, in one process: starting torch takes seconds."""
    programs = [program for program in PROGRAMS if frameworks(program) == of]
    argv = [sys.executable, "-W", "ignore", "-c", RUN]
    run = subprocess.run(
        argv, input=json.dumps(programs), env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(programs, json.loads(run.stdout), strict=True))


def test_the_page_has_programs() -> None:
    assert len(PROGRAMS) >= 9
    assert all(frameworks(program) and "assert " in program for program in PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(1, len(PROGRAMS) + 1))
def test_program(request: pytest.FixtureRequest, program: str) -> None:
    """In another process: JAX and torch stay out of this one."""
    missing = {name for name in frameworks(program) if importlib.util.find_spec(name) is None}
    if missing:
        reason = f'{", ".join(missing)} not installed: pip install "minitransformer[peers]"'
        if request.config.getoption("--require-peers"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    error = raised(frameworks(program))[program]
    assert error is None, error
