"""What benchmarks say and keep: the machine, a table, progress, bars."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.errors import require
from minitransformer.files import write_bytes
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


Spread = dict[str, float]  # min, q1, median, q3


def bars(path: Path, title: str, unit: str, groups: Mapping[str, Mapping[str, Spread]], note: str) -> None:
    """A picture of `groups`: one cluster of horizontal bars each, a bar for each side, quartiles as whiskers.

    The ending of `path` names the format. Raises `MissingExtraError` without matplotlib.
    """
    figure_module: Any = require("matplotlib.figure", extra="plot", purpose="--plot")
    sides = list(dict.fromkeys(side for group in groups.values() for side in group))
    rows = sum(map(len, groups.values()))
    figure = figure_module.Figure(figsize=(9, 1.8 + 0.3 * rows + 0.25 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    position, ticks, named = 0.0, [], set()
    for group in groups.values():
        ticks.append(position + (len(group) - 1) / 2)
        for side, spread in group.items():
            low, median, high = spread["q1"], spread["median"], spread["q3"]
            label = "" if side in named else side
            named.add(side)
            axes.barh(position, median, color=f"C{sides.index(side) % 10}", label=label)
            whiskers = [[max(median - low, 0)], [max(high - median, 0)]]
            axes.errorbar(median, position, xerr=whiskers, color="black", linewidth=1, capsize=2)
            axes.annotate(f" {median:.3g}", (max(median, high), position), va="center", fontsize=8)
            position += 1
        position += 0.6
    axes.set_yticks(ticks, list(groups))
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    _save(figure, path, note)


def curves(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float]]], label: str, note: str) -> None:
    """A picture of `panels` side by side, one curve a side over the integers of `label`, all axes logarithmic.

    So a power is a straight line, and its exponent the slope. Raises `MissingExtraError` without matplotlib.
    """
    figure_module: Any = require("matplotlib.figure", extra="plot", purpose="--plot")
    figure = figure_module.Figure(figsize=(5 * len(panels), 5), layout="constrained")
    for n, (title, sides) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), n)
        for side, points in sides.items():
            axes.loglog([*points], [*points.values()], marker="o", label=side if n == 1 else "")
        places = list(next(iter(sides.values())))
        axes.set_xticks(places, [f"{place:,}" for place in places], minor=False)
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    _save(figure, path, note)


def _save(figure: Any, path: Path, note: str) -> None:
    """Write the figure, with a note below it, in the format that the name says."""
    figure.supxlabel(note, fontsize=6)
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=150)
    write_bytes(path, picture.getvalue())
