"""`minitransformer bench memory`: the most memory that a training takes, and how that of attention grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.bench import attention, peer, recipe
from minitransformer.bench.harness import OURS, publish, start
from minitransformer.bench.recipe import RECIPE, Recipe
from minitransformer.bench.report import Spread, progress, table
from minitransformer.errors import ConfigError
from minitransformer.threads import Workers, get_num_threads, set_num_threads, single_threaded_blas

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20
PAGE = 4096
STEPS = 3


def _recipe(n_layer: int, n_head: int, n_embd: int, block_size: int, batch_size: int) -> Recipe:
    train = replace(RECIPE.train, batch_size=batch_size)
    return Recipe(RECIPE.corpus, n_layer, n_head, n_embd, block_size, train)


RECIPES = (_recipe(4, 4, 128, 64, 12), _recipe(6, 6, 384, 256, 16), _recipe(4, 4, 128, 1024, 2))
LENGTHS = (1024, 2048, 4096, 8192)


def resident(name: str) -> int:
    """Bytes of the field `name` of /proc/self/status: VmRSS is the memory held now, VmHWM its peak."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("bench memory", f"{STATUS} has no field {name}", "Run it on Linux")


def peak_of(work: Callable[[], object]) -> dict[str, int]:
    """Bytes that the process holds before `work`, and the most that it holds until its end."""
    before = resident("VmRSS")
    FORGET.write_text("5", encoding="utf-8")  # makes the peak what is held now
    work()
    return {"before": before, "peak": resident("VmHWM")}


class OurStep:
    """The memory of a training, in a process of its own."""

    def __init__(self, recipe: dict[str, Any], threads: int) -> None:
        self._recipe, self._threads = Recipe.from_dict(recipe), threads

    def peak(self, steps: int) -> dict[str, int]:
        def train() -> None:
            with single_threaded_blas(), Workers(self._threads) as workers:
                recipe.Ours(self._recipe, workers).steps(0, steps)

        return peak_of(train)


class OurAttention:
    """The memory of one forward and backward pass of causal attention, in a process of its own."""

    def __init__(self, case: Sequence[Any], threads: int) -> None:
        set_num_threads(threads)
        self._case = attention.Case(*case)

    def peak(self) -> dict[str, int]:
        """Also `arrays`: the bytes of what is returned, which has to be somewhere."""
        attention.Ours(self._case._replace(T=1)).both()  # loads and compiles
        ours = attention.Ours(self._case)
        found = peak_of(ours.both)
        heads = self._case.B * self._case.H * self._case.T
        return {**found, "arrays": 4 * heads * (4 * self._case.D + 1)}  # out, lse, dq, dk, dv


def run(
    *,
    recipes: Sequence[Recipe] = RECIPES,
    lengths: Sequence[int] = LENGTHS,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure peak resident memory, print tables, return the figures. Every figure is that of a fresh process.

    Three steps of each recipe, ours and torch's: the whole process, and what the training added to the
    libraries. Then our attention forward and backward at every length, one row of 2 heads of width 64: what it
    takes beside its arrays, and the exponent of the length with which that grows. Linux only.
    """
    if not (STATUS.exists() and FORGET.exists()):
        problem = f"this system does not tell the peak of a process, expected {STATUS} and {FORGET}"
        raise ConfigError("bench memory", problem, "Run it on Linux")
    facts = start("bench memory", plot_path)
    jobs = {OURS: "memory of our step", **({"torch": "memory of torch's step"} if peer.installed() else {})}
    threads = get_num_threads()
    steps: dict[str, dict[str, Any]] = {}
    growth: dict[str, Any] = {}
    with progress(len(recipes) * len(jobs) + len(lengths), "bench memory", "process") as advance:
        for case in recipes:
            name = f"{case.n_layer}L/{case.n_head}H/{case.n_embd} T{case.block_size} B{case.train.batch_size}"
            steps[name] = {}
            for side, job in jobs.items():
                with peer.process() as process:
                    process.make(job, recipe=case.to_dict(), threads=threads)
                    steps[name][side] = process.call("peak", steps=STEPS)
                advance()
        for length in lengths:
            with peer.process() as process:
                process.make("memory of our attention", case=attention.Case(1, length, 2, 64), threads=threads)
                found = process.call("peak")
            growth[f"T{length}"] = {**found, "extra": found["peak"] - found["before"] - found["arrays"]}
            advance()
    # Below a page there is nothing to measure, and no logarithm.
    extra = [max(found["extra"], PAGE) for found in growth.values()]
    exponent = float(np.polyfit(np.log(lengths), np.log(extra), 1)[0]) if len(lengths) > 1 else None
    figures: dict[str, Any] = {
        "what": "memory",
        "machine": facts,
        "unit": "MiB",
        "recipes": [case.to_dict() for case in recipes],
        "steps": steps,
        "attention": growth,
        "exponent": exponent,
    }
    groups = {name: {side: _whole(found["peak"]) for side, found in sides.items()} for name, sides in steps.items()}
    groups.update({f"attention {name}": {OURS: _whole(found["extra"])} for name, found in growth.items()})
    return publish(figures, _text(figures), groups=groups, json_path=json_path, plot_path=plot_path)


def _whole(size: int) -> Spread:
    return dict.fromkeys(("min", "q1", "median", "q3"), size / MIB)


def _text(figures: dict[str, Any]) -> str:
    rows = [
        [f"{name}, {side}", f"{found['peak'] / MIB:.0f}", f"{(found['peak'] - found['before']) / MIB:.0f}"]
        for name, sides in figures["steps"].items()
        for side, found in sides.items()
    ]
    grown = [
        [name, f"{found['arrays'] / MIB:.1f}", f"{found['extra'] / MIB:.1f}"]
        for name, found in figures["attention"].items()
    ]
    lines = [
        table([f"MiB, {STEPS} training steps", "process", "training"], rows),
        table(["MiB, attention", "its arrays", "beside them"], grown),
    ]
    if figures["exponent"] is not None:
        lines.append(f"beside its arrays, attention takes memory as T^{figures['exponent']:.2f}")
    return "\n".join(lines)
