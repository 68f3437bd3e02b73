"""Child processes of the tests: the package, and the modules of the tests, as this process has them."""

from __future__ import annotations

import os
import subprocess
import sys
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
    """`minitransformer ...`, with its status and what it printed; `options` are those of `subprocess.run`."""
    defaults: dict[str, Any] = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL, "encoding": "utf-8", "check": False}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run([sys.executable, "-m", "minitransformer", *argv], **(defaults | streams | options))
