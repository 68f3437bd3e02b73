"""A long run needs no more memory at its end than after its first steps."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from children import python
from tiny import dataset, fresh_gpt, train_config

import minitransformer as mt
from minitransformer.training import Callback

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Pages of this process that are in memory."""
    return int(STATM.read_text(encoding="ascii").split()[1])


class Watch(Callback):
    """Measures after every `interval` steps."""

    def __init__(self, measure: Callable[[], int], interval: int) -> None:
        self.measure, self.interval = measure, interval
        self.seen: list[int] = []

    def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if record["step"] % self.interval == 0:
            self.seen.append(self.measure())


def train(
    steps: int, folder: Path, measure: Callable[[], int], *, interval: int, evaluations: int, shards: int
) -> list[int]:
    """Train a tiny GPT with dropout on two threads, evaluate and save now and then; what was measured."""
    watch = Watch(measure, interval)
    pause = steps // evaluations
    shape = {"batch_size": 4, "shards": shards, "threads": 2}
    config = train_config(
        max_steps=steps, eval_interval=pause, save_interval=pause, warmup_steps=100, out_dir=folder / "run", **shape
    )
    mt.Trainer(fresh_gpt(dropout=0.1), config, dataset(), dataset(1), [watch]).train()
    return watch.seen


def test_nothing_piles_up_in_1000_steps(tmp_path: Path) -> None:
    """Fewer than one more block of memory a step: a graph, an array or a record kept is several each step.

    Not none: caches inside Python and NumPy fill up, ever more slowly.
    """

    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    seen = train(1000, tmp_path, blocks, interval=100, evaluations=5, shards=1)
    assert len(seen) == 10
    assert seen[-1] - seen[4] < 500


@pytest.mark.thorough
@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc, which is Linux's")
def test_20000_steps_in_flat_memory(tmp_path: Path) -> None:
    """Medians over 1,000 steps: what is resident moves up and down with what the allocator returns."""
    program = f"""
import json, pathlib, test_flat_memory as here
seen = here.train(20_000, pathlib.Path({str(tmp_path)!r}), here.resident, interval=10, evaluations=10, shards=2)
print(json.dumps(seen))
"""
    seen = json.loads(python(program))
    windows = [int(median(seen[first : first + 100])) for first in range(0, 2000, 100)]
    print(f"pages resident, medians of 1,000 steps each: {windows}")
    assert len(seen) == 2000
    assert windows[-1] < 1.02 * windows[1]
