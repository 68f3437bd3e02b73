"""`minitransformer bench time-to-loss`: a whole training beside the same training in PyTorch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitransformer.bench import peer
from minitransformer.bench.harness import OURS
from minitransformer.bench.recipe import RECIPE, Ours, Recipe, Theirs
from minitransformer.bench.report import describe, machine, progress, table
from minitransformer.checks import check_count
from minitransformer.files import write_json
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas
from minitransformer.training import Callback, Trainer, TrainResult
from minitransformer.training.callbacks import Training

WARM_UP = 3  # steps, on weights that are thrown away
CHUNK = 50  # steps between two signs of life from the other process

Curve = list[dict[str, float]]  # at each evaluation: step, seconds since the start, val_loss


def run(
    recipe: Recipe = RECIPE,
    *,
    steps: int = 1000,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Train `recipe` for `steps` steps by `Trainer` and in PyTorch, print a table, return the figures.

    Same initial weights, batches and validation windows. Seconds are those of the clock, evaluations
    included, start-up and compiling excluded. PyTorch trains once under each waiting policy of OpenMP,
    and the faster one is the peer. Without torch only our own figures appear. `json_path` gets the
    figures as JSON. Raises `KeyboardInterrupt` if our training was interrupted.
    """
    check_count("bench time-to-loss", "steps", steps, least=1)
    recipe = replace(recipe, train=replace(recipe.train, max_steps=steps, out_dir=None, threads=None))
    facts = machine()
    curves = {OURS: _train_ours(recipe)}
    for policy in peer.POLICIES if peer.installed() else ():
        curves[f"torch ({policy})"] = _train_twin(recipe, policy)
    figures: dict[str, Any] = {"what": "time-to-loss", "machine": facts, "recipe": recipe.to_dict(), "curves": curves}
    print(describe(facts))
    rows = [[name, f"{curve[-1]['seconds']:.1f}", f"{curve[-1]['val_loss']:.4f}"] for name, curve in curves.items()]
    print(table([f"{steps} steps", "seconds", "validation loss"], rows))
    ours = curves[OURS][-1]
    if peers := {name: curve[-1] for name, curve in curves.items() if name != OURS}:
        best = min(peers, key=lambda name: peers[name]["seconds"])
        figures["peer"] = best
        figures["ratio"] = ours["seconds"] / peers[best]["seconds"]
        figures["loss_difference"] = ours["val_loss"] - peers[best]["val_loss"]
        print(
            f"{OURS} takes {figures['ratio']:.2f} x the time of {best}, "
            f"and ends {figures['loss_difference']:+.4f} from its validation loss"
        )
    else:
        print(f"PyTorch is not installed, so there is nothing to compare with. {peer.INSTALL}")
    if json_path is not None:
        write_json(Path(json_path), figures)
    return figures


class _Watch(Callback):
    """Notes when each evaluation was reached."""

    def __init__(self) -> None:
        self.curve: Curve = []

    def on_start(self, trainer: Training, step: int) -> None:
        self._started = time.perf_counter()

    def on_step(self, trainer: Training, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if "val_loss" in record:
            seconds = time.perf_counter() - self._started
            self.curve.append({"step": record["step"], "seconds": seconds, "val_loss": record["val_loss"]})

    def on_end(self, trainer: Training, result: TrainResult) -> None:
        if result.reason == "interrupted":  # a whole comparison or none
            raise KeyboardInterrupt


def _train_ours(recipe: Recipe) -> Curve:
    with single_threaded_blas(), Workers(get_num_threads()) as workers:
        Ours(recipe, workers).steps(0, WARM_UP)
    model, train, validation = recipe.build()
    watch = _Watch()
    Trainer(model, recipe.train, train, validation, [watch]).train()
    return watch.curve


def _train_twin(recipe: Recipe, policy: str) -> Curve:
    steps, interval = recipe.train.max_steps, recipe.train.eval_interval
    stops = sorted({*range(interval, steps, interval), steps})
    curve: Curve = []
    with (
        peer.process(policy) as process,
        progress(steps // CHUNK + bool(steps % CHUNK), f"torch ({policy})", "chunk") as advance,
    ):
        Theirs(process, recipe).steps(0, WARM_UP)
        twin = Theirs(process, recipe)
        started, done = time.perf_counter(), 0
        for stop in stops:
            while done < stop:
                count = min(CHUNK - done % CHUNK, stop - done)
                twin.steps(done, count)
                done += count
                if done % CHUNK == 0 or done == steps:
                    advance()
            loss = twin.evaluate()
            curve.append({"step": stop, "seconds": time.perf_counter() - started, "val_loss": loss})
    return curve
