"""`minitransformer bench scaling`: what more threads bring to a training step, alone and beside a busy process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from minitransformer.bench.harness import alternate, milliseconds, publish, ratio, start
from minitransformer.bench.recipe import RECIPE, Ours, Recipe
from minitransformer.bench.report import table
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas

ALONE, BUSY = "alone", "beside a busy process"


def run(
    recipe: Recipe = RECIPE,
    *,
    rounds: int = 10,
    steps: int = 10,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time blocks of `steps` training steps with 1 thread, with 2, 4, ... and with all, print a table.

    Each alone and beside a process that does nothing but use a core. The number of shards is the recipe's,
    and more threads than shards have nothing to do. Raises `ConfigError` for a count below 1.
    """
    facts = start("bench scaling", plot_path, rounds=rounds, steps=steps)
    most = get_num_threads()
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power < most} | {most})
    with single_threaded_blas(), ExitStack() as stack:
        sides: dict[tuple[int, str], Callable[[int], list[float]]] = {}
        for threads in counts:
            ours = Ours(recipe, stack.enter_context(Workers(threads)))
            for load in (ALONE, BUSY):
                sides[threads, load] = partial(_block, ours, steps, load)
        seconds = alternate("bench scaling", sides, rounds)
    measured = {
        load: {
            str(threads): {
                **milliseconds(seconds[threads, load]),
                "speedup": 1 / ratio(seconds[threads, load], seconds[1, load])["ratio"],
            }
            for threads in counts
        }
        for load in (ALONE, BUSY)
    }
    figures: dict[str, Any] = {
        "what": "scaling",
        "machine": facts,
        "recipe": recipe.to_dict(),
        "rounds": rounds,
        "steps": steps,
        "unit": "ms",
        "threads": measured,
    }
    header = ["ms per step", "quartile", "median", "quartile", "times one thread"]
    quartiles = ("q1", "median", "q3")
    rows = [
        [f"{count} threads, {load}", *(f"{side[key]:.1f}" for key in quartiles), f"{side['speedup']:.2f}"]
        for load, of_load in measured.items()
        for count, side in of_load.items()
    ]
    groups = {load: {f"{n} threads": side for n, side in of_load.items()} for load, of_load in measured.items()}
    text = table(header, rows)
    return publish(figures, text, groups=groups, json_path=json_path, plot_path=plot_path, compares=False)


def _block(ours: Ours, steps: int, load: str, block: int) -> list[float]:
    with busy_process() if load == BUSY else nullcontext():
        return ours.steps(block * steps, steps).seconds


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that uses one core, up and running."""
    program = "print(flush=True)\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield
    finally:
        child.kill()
        child.communicate()
