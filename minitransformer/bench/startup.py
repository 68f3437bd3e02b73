"""`minitransformer bench startup`: the seconds until something happens, with and without kept kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from minitransformer.bench import peer
from minitransformer.bench.harness import alternate, publish, spread, start, timed
from minitransformer.bench.report import table
from minitransformer.errors import ConfigError

IMPORT, COLD, WARM = "import minitransformer", "train 1 step, empty cache", "train 1 step, warm cache"
TRAIN = ("-m", "minitransformer", "train", "--max-steps", "1")


def run(*, rounds: int = 3, json_path: str | Path | None = None, plot_path: str | Path | None = None) -> dict[str, Any]:
    """Time new processes: an import, and `train --max-steps 1` with no compiled kernels kept and with all.

    `import torch` stands beside the import. The whole life of each process counts, files in the system's
    cache. Raises `ConfigError` for a count below 1, and if a process fails.
    """
    facts = start("bench startup", plot_path, rounds=rounds)
    with tempfile.TemporaryDirectory() as name:
        folder, numbers = Path(name), count()
        (folder / "work").mkdir()

        def cold(block: int) -> list[float]:
            return _time(folder, f"cache-{next(numbers)}", *TRAIN)

        sides: dict[str, Callable[[int], list[float]]] = {
            IMPORT: lambda block: _time(folder, "warm", "-c", "import minitransformer"),
            COLD: cold,
            WARM: lambda block: _time(folder, "warm", *TRAIN),  # the round that warms up fills it
        }
        if peer.installed():
            sides["import torch"] = lambda block: _time(folder, "warm", "-c", "import torch")
        results = alternate("bench startup", sides, rounds)
    seconds = {side: spread([block[0] for block in blocks[1:]]) for side, blocks in results.items()}
    figures: dict[str, Any] = {"what": "startup", "machine": facts, "rounds": rounds, "unit": "s", "sides": seconds}
    header = ["seconds", "min", "median", "quartile"]
    rows = [[side, *(f"{found[key]:.2f}" for key in ("min", "median", "q3"))] for side, found in seconds.items()]
    return publish(figures, table(header, rows), groups={"startup": seconds}, json_path=json_path, plot_path=plot_path)


def _time(folder: Path, cache: str, *arguments: str) -> list[float]:
    """The seconds of one process whose compiled kernels are kept in that folder."""
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    environment = {**peer.child_environment(), variable: str(folder / cache)}
    command = [sys.executable, *arguments]
    work = partial(subprocess.run, command, env=environment, cwd=folder / "work", check=True, capture_output=True)
    try:
        return timed(work, 1)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        problem = f"{' '.join(command)} ended with status {error.returncode} ({lines[-1]})"
        raise ConfigError("bench startup", problem, "Run it by itself") from error
