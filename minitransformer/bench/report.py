"""What benchmarks say and keep: the machine, a table, progress."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.threads import available_cores, get_num_threads


def machine() -> dict[str, Any]:
    """Processor, cores, system, and the versions of everything that computes; torch is None if not installed."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "threads": get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "blas": f"{blas['name']} {blas['version']}",
        **{name: _version(name) for name in ("numpy", "numba", "torch")},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe(facts: dict[str, Any]) -> str:
    """One line of what `machine` found."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "numpy", "numba", "torch") if facts[name])
    return f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; {versions}; BLAS {facts['blas']}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


@contextmanager
def progress(total: int, title: str, unit: str) -> Iterator[Callable[[], object]]:
    """Call what it gives after each of `total` pieces: a bar on a terminal, about ten plain lines elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=title, unit=unit, file=sys.stderr, dynamic_ncols=True) as bar:
            yield bar.update
        return
    pieces = count(1)

    def advance() -> None:
        done = next(pieces)
        if done % max(1, total // 10) == 0 or done == total:
            print(f"{title}: {unit} {done}/{total}", file=sys.stderr, flush=True)

    yield advance
