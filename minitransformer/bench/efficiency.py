"""`minitransformer bench efficiency`: how time and memory of each kind of attention grow with the length.

Times are those that the processor spends on all threads: growth is what counts here, and other processes, which
disturb a long call more than a short one, would bend it.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.autograd import OPS
from minitransformer.bench.harness import alternate, milliseconds, paced, publish, start
from minitransformer.bench.report import curves, describe, table
from minitransformer.kernels.attention.problem import Sparse
from minitransformer.memory import keep_freed_memory
from minitransformer.ops.attention import make_problem

LENGTHS = (1024, 2048, 4096, 8192)
FROM = 2048  # shorter sequences are left out of the exponents: what every call costs once would count
HEADS, WIDTH, WINDOW, SINKS = 4, 32, 256, 4
MIB = 2**20

# Options of attention at a length T, and key heads.
KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "full": (lambda T: {}, HEADS),
    "grouped, 2 key heads": (lambda T: {}, 2),
    "multi-query, 1 key head": (lambda T: {}, 1),
    "window 256": (lambda T: {"window_size": (WINDOW - 1, 0)}, HEADS),
    "window 256 and 4 first": (lambda T: {"sparse": Sparse(range(SINKS), left=WINDOW - 1)}, HEADS),
    "strided by sqrt(T)": (lambda T: {"sparse": strided(round(math.sqrt(T)))}, HEADS),
    "linear": (lambda T: {}, HEADS),
}


def strided(stride: int) -> Sparse:
    return Sparse(range(stride - 1, 2**48, stride), block=stride)


def passes(kind: str, T: int) -> Callable[[], object]:
    """Forward and backward of causal self-attention (1, 4, T, 32), float32, on arrays."""
    options, key_heads = KINDS[kind]
    rng, heads = np.random.default_rng(0), (HEADS, key_heads, key_heads, HEADS)
    q, k, v, dout = (rng.standard_normal((1, count, T, WIDTH), np.float32) for count in heads)
    if kind == "linear":
        linear = OPS["linear_attention"]
        return lambda: linear.backward(dout, linear.forward(q, k, v, is_causal=True)[1])
    problem = make_problem("bench efficiency", q, k, v, is_causal=True, enable_gqa=True, **options(T))
    attention, dlse = OPS["attention"], np.zeros(q.shape[:3], np.float32)
    return lambda: attention.backward((dout, dlse), attention.forward(q, k, v, problem=problem)[1])


def worked(work: Callable[[], object], count: int) -> list[float]:
    """The seconds of processor time of each of `count` calls."""
    seconds = []
    for _ in range(count):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return seconds


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` has allocated at one time."""
    work()  # compiles
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(
    *,
    rounds: int = 5,
    lengths: Sequence[int] = LENGTHS,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time every kind at every length in turns, print a table, return the figures.

    `exponent` is the slope of log time over log T from T = 2,048 on: 1 is linear growth, 2 that of full attention.
    `growth` is the time at the longest T over that at the first of those, relative to their lengths. Memory is what
    forward and backward allocate, gradients included, as tracemalloc sees it. Raises `ConfigError` for a count below 1.
    """
    facts = start("bench efficiency", plot_path, rounds=rounds)
    keep_freed_memory()  # as a training does: page faults of large arrays would count as growth
    works = {(kind, T): passes(kind, T) for kind in KINDS for T in lengths}
    memory = {place: peak(work) for place, work in works.items()}
    seconds = alternate("bench efficiency", {at: paced(partial(worked, work)) for at, work in works.items()}, rounds)
    long = [T for T in lengths if T >= FROM] or [*lengths]
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        times = {T: milliseconds(seconds[kind, T]) for T in lengths}
        medians = [times[T]["median"] for T in long]
        kinds[kind] = {
            "ms": {str(T): times[T] for T in lengths},
            "bytes": {str(T): memory[kind, T] for T in lengths},
            "exponent": slope(long, medians),
            "growth": medians[-1] / medians[0] / (long[-1] / long[0]),
            "memory_exponent": slope(long, [memory[kind, T] for T in long]),
        }
    figures: dict[str, Any] = {
        "what": "efficiency",
        "machine": facts,
        "rounds": rounds,
        "unit": "ms",
        "from": long[0],
        "kinds": kinds,
    }
    publish(figures, _text(figures, lengths), groups={}, json_path=json_path, plot_path=None, compares=False)
    if plot_path is not None:
        panels = {
            "ms of processor": {k: {T: of["ms"][str(T)]["median"] for T in lengths} for k, of in kinds.items()},
            "MiB allocated": {k: {T: of["bytes"][str(T)] / MIB for T in lengths} for k, of in kinds.items()},
        }
        curves(Path(plot_path), panels, "T", describe(facts))
    return figures


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent p of values that grow as T^p."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0]) if len(lengths) > 1 else 1.0


def _text(figures: dict[str, Any], lengths: Sequence[int]) -> str:
    names = [f"T{T}" for T in lengths]
    timed_rows, memory_rows = [], []
    for kind, of in figures["kinds"].items():
        times = (f"{of['ms'][str(T)]['median']:.2f}" for T in lengths)
        sizes = (f"{of['bytes'][str(T)] / MIB:.1f}" for T in lengths)
        timed_rows.append([kind, *times, f"{of['exponent']:.2f}", f"{of['growth']:.2f}"])
        memory_rows.append([kind, *sizes, f"{of['memory_exponent']:.2f}"])
    return "\n".join(
        [
            table(["ms of processor", *names, "exponent", "over linear"], timed_rows),
            table(["MiB allocated", *names, "exponent"], memory_rows),
            f"exponents and growth from T = {figures['from']} on",
        ]
    )
