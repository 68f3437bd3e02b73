"""What the benchmarks share: blocks in turn, medians and quartiles, and where results go.

On a machine whose speed drifts, sides are only comparable if they take turns: every side works for a
block, then the next one, and this for several rounds. The first round warms up and is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minitransformer.bench import peer
from minitransformer.bench.report import Spread, bars, describe, machine, progress
from minitransformer.checks import check_count
from minitransformer.errors import ConfigError, require
from minitransformer.files import write_json

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

OURS = "minitransformer"
PAUSE = 0.25  # seconds before each block, in which threads that spin after their last work fall asleep
BLOCK_SECONDS = 0.1  # of a block of short calls
PICTURES = (".png", ".svg", ".pdf")


def start(op: str, plot_path: str | Path | None, **counts: int) -> dict[str, Any]:
    """Refuse, before anything is measured, what could not be done; returns the facts of the machine.

    Raises `ConfigError` for a count below 1 or a picture of an unknown kind, `MissingExtraError` for a
    picture without matplotlib.
    """
    for name, value in counts.items():
        check_count(op, name, value, least=1)
    if plot_path is not None:
        if Path(plot_path).suffix not in PICTURES:
            problem = f"the plot would go to {str(plot_path)!r}, expected a name that ends in {', '.join(PICTURES)}"
            raise ConfigError(op, problem, "Change its name")
        require("matplotlib", extra="plot", purpose=f"{op} --plot")
    return machine()


def publish(
    figures: dict[str, Any],
    text: str,
    *,
    groups: Mapping[str, Mapping[str, Spread]],
    json_path: str | Path | None,
    plot_path: str | Path | None,
    compares: bool = True,
) -> dict[str, Any]:
    """Print the machine and `text`, write the figures and the picture where they are wanted; returns the figures.

    A benchmark that `compares` with torch says so where there is none.
    """
    print(describe(figures["machine"]))
    print(text)
    if compares and not peer.installed():
        print(f"PyTorch is not installed, so there is nothing to compare with. {peer.INSTALL}")
    if json_path is not None:
        write_json(Path(json_path), figures)
    if plot_path is not None:
        note = describe(figures["machine"])
        bars(Path(plot_path), f"bench {figures['what']}", figures["unit"], groups, note)
    return figures


def alternate(op: str, sides: Mapping[K, Callable[[int], T]], rounds: int) -> dict[K, list[T]]:
    """What each side returns for the blocks 0 to `rounds`, taken in turns; the first block warms up."""
    results: dict[K, list[T]] = {name: [] for name in sides}
    with progress(rounds + 1, op, "round") as advance:
        for block in range(rounds + 1):
            for name, side in sides.items():
                time.sleep(PAUSE)
                results[name].append(side(block))
            advance()
    return results


def timed(work: Callable[[], object], count: int) -> list[float]:
    """The seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def paced(time_calls: Callable[[int], list[float]]) -> Callable[[int], list[float]]:
    """A side of `alternate` from what times a number of calls: its blocks last about `BLOCK_SECONDS`."""
    count = 1

    def block(index: int) -> list[float]:
        nonlocal count
        if index == 0:
            time_calls(1)  # compiles, and touches the memory
            seconds = time_calls(1)
            count = int(min(max(BLOCK_SECONDS / max(seconds[0], 1e-9), 1), 50))
            return seconds
        return time_calls(count)

    return block


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """The smallest, the quartiles and the median."""
    least, low, median, high = np.percentile(values, (0, 25, 50, 75)).tolist()
    return {"min": least, "q1": low, "median": median, "q3": high}


def milliseconds(blocks: Sequence[Sequence[float]]) -> Spread:
    """Of a call after the warm-up, from the seconds of every call of every block."""
    return spread(1000 * np.concatenate(blocks[1:]))


def ratio(mine: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The median of `mine` over that of `other`, and the quartiles of that over pairs of blocks."""
    whole = np.median(np.concatenate(mine[1:])) / np.median(np.concatenate(other[1:]))
    pairs = [float(np.median(a) / np.median(b)) for a, b in zip(mine[1:], other[1:], strict=True)]
    return {"ratio": float(whole), "ratio_quartiles": np.percentile(pairs, (25, 75)).tolist()}


def fastest(seconds: Mapping[str, Sequence[Sequence[float]]]) -> str | None:
    """The name of the torch with the lowest median; None if there is none."""
    medians = {name: milliseconds(blocks)["median"] for name, blocks in seconds.items() if name.startswith("torch")}
    return min(medians, key=lambda name: medians[name]) if medians else None


def compare(seconds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """The fastest torch as the peer, our time over its, and over that of every torch; empty without torch."""
    best = fastest(seconds)
    if best is None:
        return {}
    ratios = {name: ratio(seconds[OURS], blocks) for name, blocks in seconds.items() if name.startswith("torch")}
    return {"peer": best, **ratios[best], "ratios": ratios}


def sentence(comparison: Mapping[str, Any]) -> str:
    """What `compare` found, in words."""
    low, high = comparison["ratio_quartiles"]
    return (
        f"{OURS} takes {comparison['ratio']:.2f} x the time of {comparison['peer']} "
        f"(half of the rounds between {low:.2f} and {high:.2f})"
    )
