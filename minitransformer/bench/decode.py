"""`minitransformer bench decode`: tokens a second from the cache, beside a twin in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.bench import peer
from minitransformer.bench.harness import OURS, alternate, compare, paced, publish, sentence, spread, start, timed
from minitransformer.bench.recipe import RECIPE, Recipe, on_its_device
from minitransformer.bench.report import table
from minitransformer.errors import ConfigError
from minitransformer.models import GPT
from minitransformer.threads import get_num_threads

GAIN = 2.0  # deviation of what a linear layer returns, for inputs of deviation 1


def model_of(recipe: Recipe) -> GPT:
    """The recipe's model, untrained, its layers with a `GAIN`.

    As `GPT` makes them they weigh so little that the last token is repeated, whatever the layers do: both
    sides would agree, right or wrong.
    """
    model, _, _ = recipe.build()
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            std = GAIN / np.sqrt(parameter.shape[1])
            parameter.data = (std / parameter.data.std() * parameter.data).astype(np.float32)
    return model


def run(
    recipe: Recipe = RECIPE,
    *,
    rounds: int = 10,
    batch_size: int = 1,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time greedy generation of `batch_size` rows with the recipe's model, print a table, return the figures.

    An eighth of the context is the prompt, the rest is generated. The peer is a twin with a cache allocated
    once, in torch's inference mode, with one thread and with all, under both waiting policies of OpenMP. The
    model is not trained: its tokens cost the same. Raises `ConfigError` for a count below 1, for a context too
    short to generate in, and if the two sides do not generate the same tokens.
    """
    facts = start("bench decode", plot_path, rounds=rounds, batch_size=batch_size)
    if recipe.block_size < 2:
        raise ConfigError("bench decode", "the context is 1, expected at least 2 tokens", "Raise block_size")
    recipe = on_its_device("bench decode", recipe)
    model, data = model_of(recipe), recipe.build()[1]
    model.to(recipe.train.device)
    prompt = data.batch(recipe.train.seed, 0, batch_size)["input_ids"][:, : max(recipe.block_size // 8, 1)]
    new = recipe.block_size - prompt.shape[1]

    def generate() -> np.ndarray:
        return model.generate(prompt, max_new_tokens=new)

    with ExitStack() as stack:
        sides: dict[str, Callable[[int], list[float]]] = {OURS: paced(partial(timed, generate))}
        for name, torch in peer.of_each_policy(stack).items():
            torch.make("decode", recipe=recipe.to_dict(), prompt=prompt.tolist(), max_new_tokens=new)
            if torch.call("tokens") != generate().tolist():
                problem = f"{OURS} and {name} generate different tokens from the same weights"
                raise ConfigError("bench decode", problem, "Try another --seed: two tokens may be equally likely")
            for threads in sorted({1, get_num_threads()}):
                # One thread does not wait, so there is no policy.
                title = "torch (1 thread)" if threads == 1 else f"{name[:-1]}, {threads} threads)"
                sides.setdefault(title, paced(partial(_ask, torch, threads)))
        seconds = alternate("bench decode", sides, rounds)
    rates = {name: spread(batch_size * new / np.concatenate(blocks[1:])) for name, blocks in seconds.items()}
    figures: dict[str, Any] = {
        "what": "decode",
        "machine": facts,
        "recipe": recipe.to_dict(),
        "rounds": rounds,
        "batch_size": batch_size,
        "prompt_tokens": prompt.shape[1],
        "new_tokens": new,
        "unit": "tokens/s",
        "sides": rates,
        **compare(seconds),
    }
    header = [f"tokens/s, {batch_size} x {new}", "quartile", "median", "quartile"]
    rows = [[name, *(f"{rate[key]:.0f}" for key in ("q1", "median", "q3"))] for name, rate in rates.items()]
    text = table(header, rows)
    if "peer" in figures:
        text += f"\n{sentence(figures)}"
    return publish(figures, text, groups={"decode": rates}, json_path=json_path, plot_path=plot_path)


def _ask(torch: peer.Peer, threads: int, count: int) -> list[float]:
    seconds: list[float] = torch.call("time", threads=threads, count=count)
    return seconds
