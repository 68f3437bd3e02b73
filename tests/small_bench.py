"""The smallest recipe to measure, and what holds for the figures of every benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minitransformer.bench import attention, gemm, harness, peer
from minitransformer.bench.recipe import Recipe
from minitransformer.training import TrainConfig

CASES = (attention.Case(2, 5, 2, 4), attention.Case(2, 8, 1, 4, causal=False))


def small_recipe(folder: Path) -> Recipe:
    """A model of one layer, on a text in `folder`."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {n} has {n * n} in it\n" for n in range(200)), encoding="utf-8")
    train = TrainConfig(batch_size=5, warmup_steps=2, eval_interval=4, seed=3, learning_rate=1e-2, progress=False)
    return Recipe(str(text), n_layer=1, n_head=2, n_embd=16, block_size=8, train=train)


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch unless a test asks for it, no pauses, blocks of a call or two."""
    monkeypatch.setattr(peer, "installed", lambda: False)
    monkeypatch.setattr(harness, "PAUSE", 0)
    monkeypatch.setattr(harness, "BLOCK_SECONDS", 1e-4)
    monkeypatch.setattr(gemm, "FLOPS_OF_A_BLOCK", 1)
    monkeypatch.setattr(gemm, "SQUARE", 16)


def numbers(figures: Any) -> Iterator[float]:
    """All numbers in there, however deep."""
    if isinstance(figures, dict | list):
        for part in figures.values() if isinstance(figures, dict) else figures:
            yield from numbers(part)
    elif isinstance(figures, int | float):
        yield figures


def measured(run: Callable[..., dict[str, Any]], folder: Path, *args: Any, **options: Any) -> dict[str, Any]:
    """The figures of `run`, after the checks that every benchmark must stand."""
    path = folder / "figures.json"
    figures = run(*args, **options, json_path=path)
    assert json.loads(path.read_text(encoding="utf-8")) == figures
    assert {"what", "machine", "unit"} <= figures.keys()
    assert all(math.isfinite(number) for number in numbers(figures))
    return figures
