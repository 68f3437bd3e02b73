"""`minitransformer bench step`: the time of one training step, beside the same step in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.bench import peer
from minitransformer.bench.recipe import RECIPE, Block, Ours, Recipe, Side
from minitransformer.bench.report import describe, machine, progress, table
from minitransformer.checks import check_count
from minitransformer.files import write_json
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas

OURS = "minitransformer"
PAUSE = 0.25  # seconds before each block, in which threads that spin after their last work fall asleep


def run(
    recipe: Recipe = RECIPE,
    *,
    blocks: int = 20,
    steps: int = 10,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time `blocks` blocks of `steps` steps of each side in turn, print a table, return the figures.

    The sides are this package and PyTorch under both waiting policies of OpenMP; the faster of those is
    the peer. All train on the same batches from the same weights, on as many threads as
    `set_num_threads` allows; a first block warms up. Without torch only our own figures appear.
    `json_path` gets the figures as JSON.
    """
    check_count("bench step", "blocks", blocks, least=1)
    check_count("bench step", "steps", steps, least=1)
    facts = machine()
    results = _measure(recipe, blocks, steps)
    figures: dict[str, Any] = {
        "what": "step",
        "machine": facts,
        "recipe": recipe.to_dict(),
        "blocks": blocks,
        "steps": steps,
        "sides": {name: _summary(side) for name, side in results.items()},
        **_comparison(results),
    }
    print(describe(facts))
    print(_table(figures["sides"]))
    if "peer" in figures:
        low, high = figures["ratio_quartiles"]
        print(
            f"{OURS} takes {figures['ratio']:.2f} x the time of {figures['peer']} "
            f"(half of the blocks between {low:.2f} and {high:.2f})"
        )
    else:
        print(f"PyTorch is not installed, so there is nothing to compare with. {peer.INSTALL}")
    if json_path is not None:
        write_json(Path(json_path), figures)
    return figures


def _measure(recipe: Recipe, blocks: int, steps: int) -> dict[str, list[Block]]:
    """The blocks of every side, the warm-up first."""
    policies = peer.POLICIES if peer.installed() else ()
    with single_threaded_blas(), Workers(get_num_threads()) as workers, ExitStack() as stack:
        sides: dict[str, Side] = {OURS: Ours(recipe, workers)}
        for policy in policies:
            sides[f"torch ({policy})"] = stack.enter_context(peer.peer(recipe, policy))
        results: dict[str, list[Block]] = {name: [] for name in sides}
        with progress(blocks + 1, "bench step", "block") as advance:
            for block in range(blocks + 1):
                for name, side in sides.items():
                    time.sleep(PAUSE)
                    results[name].append(side.steps(block * steps, steps))
                advance()
    return results


def _summary(blocks: Sequence[Block]) -> dict[str, float]:
    """Milliseconds of a step after the warm-up, and the losses of the first and the last step."""
    ms = 1000 * np.concatenate([block.seconds for block in blocks[1:]])
    low, q1, median, q3 = np.percentile(ms, (0, 25, 50, 75)).tolist()
    losses = {"first_loss": blocks[0].losses[0], "last_loss": blocks[-1].losses[-1]}
    return {"min_ms": low, "q1_ms": q1, "median_ms": median, "q3_ms": q3, **losses}


def _comparison(results: dict[str, list[Block]]) -> dict[str, Any]:
    """Which torch is the peer, our median over its, and the quartiles of that over pairs of blocks."""
    medians = {name: _summary(blocks)["median_ms"] for name, blocks in results.items()}
    ours = medians.pop(OURS)
    if not medians:
        return {}
    best = min(medians, key=lambda name: medians[name])
    pairs = zip(results[OURS][1:], results[best][1:], strict=True)
    ratios = [np.median(mine.seconds) / np.median(theirs.seconds) for mine, theirs in pairs]
    return {
        "peer": best,
        "ratio": ours / medians[best],
        "ratio_quartiles": np.percentile(ratios, (25, 75)).tolist(),
    }


def _table(sides: dict[str, dict[str, float]]) -> str:
    header = ["ms per step", "min", "quartile", "median", "quartile", "first loss", "last loss"]
    rows = [
        [name]
        + [f"{side[key]:.1f}" for key in ("min_ms", "q1_ms", "median_ms", "q3_ms")]
        + [f"{side[key]:.4f}" for key in ("first_loss", "last_loss")]
        for name, side in sides.items()
    ]
    return table(header, rows)
