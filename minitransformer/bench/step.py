"""`minitransformer bench step`: the time of one training step, beside the same step in PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from minitransformer.bench import peer
from minitransformer.bench.gemm import StepProducts
from minitransformer.bench.harness import (
    OURS,
    alternate,
    compare,
    milliseconds,
    publish,
    ratio,
    sentence,
    start,
    timed,
)
from minitransformer.bench.recipe import RECIPE, Block, Ours, Recipe, Theirs, on_its_device
from minitransformer.bench.report import table
from minitransformer.errors import ConfigError
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas

GEMM = "GEMM only"
TWO = "torch (2 processes)"


def run(
    recipe: Recipe = RECIPE,
    *,
    rounds: int = 20,
    steps: int = 10,
    torch_compile: bool = False,
    torch_processes: bool = False,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time `rounds` blocks of `steps` steps of each side in turn, print a table, return the figures.

    The sides are this package, for a GPT the matrix products of its linear layers alone, and PyTorch under both
    waiting policies of OpenMP: eager, with `torch_compile` also through `torch.compile`, with
    `torch_processes` also as two processes of one thread and half the batch each (one thread does not wait,
    so there is no policy). The fastest torch is the peer. All train on the same batches from the same
    weights, on as many threads as `set_num_threads` allows; a first block warms up. A side that cannot be
    set up here is named below the table, with the reason. Without torch only our own figures appear.

    Raises `ConfigError` for a count below 1, and for `torch_processes` with a batch of one row. Both `torch_compile`
    and `torch_processes` are for GPTs on a CPU; other models are beside PyTorch's own encoder and decoder modules.
    """
    facts = start("bench step", plot_path, rounds=rounds, steps=steps)
    recipe = on_its_device("bench step", recipe)
    if (recipe.model != "gpt" or recipe.train.device != "cpu") and (torch_compile or torch_processes):
        problem = f"got {recipe.model!r} on {recipe.train.device!r}, expected 'gpt' on 'cpu' for these sides"
        raise ConfigError("bench step", problem, "Leave out --torch-compile and --torch-processes")
    if torch_processes and recipe.train.batch_size < 2:
        raise ConfigError("bench step", "two processes cannot share a batch of 1 row", "Raise --batch-size")
    failed: dict[str, str] = {}
    with single_threaded_blas(), Workers(get_num_threads()) as workers, ExitStack() as stack:
        ours = Ours(recipe, workers)
        takers: dict[str, Callable[[int, int], Block]] = {OURS: ours.steps}
        if recipe.model == "gpt" and recipe.train.device == "cpu":
            products = StepProducts(ours.model.config, recipe, workers)
            takers[GEMM] = lambda first, count: Block(timed(products, count), [])
        takers |= _torches(recipe, stack, failed, torch_compile, torch_processes)
        sides = {name: partial(_block, take, steps) for name, take in takers.items()}
        results = alternate("bench step", sides, rounds)
    seconds = {name: [block.seconds for block in blocks] for name, blocks in results.items()}
    figures: dict[str, Any] = {
        "what": "step",
        "machine": facts,
        "recipe": recipe.to_dict(),
        "rounds": rounds,
        "steps": steps,
        "unit": "ms",
        "sides": {name: {**milliseconds(seconds[name]), **_losses(blocks)} for name, blocks in results.items()},
        "failed": failed,
        **({"gemm": ratio(seconds[OURS], seconds[GEMM])} if GEMM in seconds else {}),
        **compare(seconds),
    }
    groups = {"step": figures["sides"]}
    return publish(figures, _text(figures), groups=groups, json_path=json_path, plot_path=plot_path)


def _block(take: Callable[[int, int], Block], steps: int, block: int) -> Block:
    return take(block * steps, steps)


class Halves:
    """Two processes that share every step."""

    def __init__(self, recipe: Recipe, stack: ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self._peers = [stack.enter_context(peer.process()) for _ in range(2)]
        for rank, half in enumerate(self._peers):
            rendezvous = str(Path(folder) / "rendezvous")
            half.send("make", job="half", recipe=recipe.to_dict(), rank=rank, rendezvous=rendezvous)
        for half in self._peers:
            half.receive()

    def steps(self, first: int, count: int) -> Block:
        for half in self._peers:
            half.send("steps", first=first, count=count)
        blocks = [Block(*half.receive()) for half in self._peers]
        seconds, losses = (list(zip(*parts, strict=True)) for parts in zip(*blocks, strict=True))
        return Block([max(both) for both in seconds], [sum(both) for both in losses])


def _torches(
    recipe: Recipe, stack: ExitStack, failed: dict[str, str], compiled: bool, processes: bool
) -> dict[str, Callable[[int, int], Block]]:
    """How each torch takes its steps; what cannot be set up is noted in `failed`."""
    sides: dict[str, Callable[[int, int], Block]] = {}
    for name, eager in peer.of_each_policy(stack).items():
        sides[name] = Theirs(eager, recipe).steps
    if compiled:
        for name, other in peer.of_each_policy(stack).items():
            name = name.replace("torch", "torch.compile")
            try:
                sides[name] = Theirs(other, recipe, compiled=True).steps
            except ConfigError as error:
                failed[name] = str(error)
    if processes and peer.installed():
        try:
            sides[TWO] = Halves(recipe, stack).steps
        except ConfigError as error:
            failed[TWO] = str(error)
    return sides


def _losses(blocks: list[Block]) -> dict[str, float]:
    """The losses of the first and the last step; none of what has no loss."""
    return {"first_loss": blocks[0].losses[0], "last_loss": blocks[-1].losses[-1]} if blocks[0].losses else {}


def _text(figures: dict[str, Any]) -> str:
    header = ["ms per step", "min", "quartile", "median", "quartile", "first loss", "last loss", "ours over it"]
    over = {**figures.get("ratios", {}), **({GEMM: figures["gemm"]} if "gemm" in figures else {})}
    rows = [
        [
            name,
            *(f"{side[key]:.1f}" for key in ("min", "q1", "median", "q3")),
            *(f"{side[key]:.4f}" if key in side else "" for key in ("first_loss", "last_loss")),
            f"{over[name]['ratio']:.2f}" if name in over else "",
        ]
        for name, side in figures["sides"].items()
    ]
    lines = [table(header, rows), *(f"{name} is left out. {why}" for name, why in figures["failed"].items())]
    return "\n".join([*lines, sentence(figures)] if "peer" in figures else lines)
