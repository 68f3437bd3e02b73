"""Child processes of the tests: the package, and the modules of the tests, as this process has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "training"))),
    "PYTHONIOENCODING": "utf-8",
    "COLUMNS": "200",
}


def python(program: str, **environment: str) -> str:
    """What a Python program prints; `subprocess.CalledProcessError` if it fails."""
    argv = [sys.executable, "-c", program]
    return subprocess.run(
        argv, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, encoding="utf-8", check=True
    ).stdout


def command(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`minitransformer ...`, with its status and what it printed; `options` are those of `subprocess.Popen`."""
    (ended,) = commands(argv, **options)
    return ended


def commands(*argvs: Sequence[str], **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Several at the same time, none of which may wait for another."""
    defaults: dict[str, Any] = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL, "encoding": "utf-8"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ExitStack() as stack:
        started = []
        for argv in argvs:
            command = [sys.executable, "-m", "minitransformer", *argv]
            started.append(stack.enter_context(subprocess.Popen(command, **(defaults | streams | options))))
            stack.callback(started[-1].kill)  # one that hangs does not outlive the test
        said = [process.communicate(timeout=120) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(started, said, strict=True)]
