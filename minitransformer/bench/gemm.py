"""`minitransformer bench gemm`: how fast this machine multiplies matrices, at the sizes of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitransformer.bench import peer
from minitransformer.bench.harness import OURS, alternate, publish, spread, start, timed
from minitransformer.bench.recipe import RECIPE, Recipe
from minitransformer.bench.report import table
from minitransformer.models import GPTConfig
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas
from minitransformer.training.step import cut

ONE, SHARDED = f"{OURS}, 1 thread", f"{OURS}, sharded"
SQUARE = 1024  # size of the matrices whose product tells what a core can do
FLOPS_OF_A_BLOCK = 2e9  # of each product in each block
PRODUCTS = ("forward", "dx", "dweight")

Rates = dict[str, list[float]]  # GFLOP/s of every call, by product


class Layer(NamedTuple):
    """A linear layer: x (N, width_in) -> (N, width_out)."""

    name: str
    width_in: int
    width_out: int


def layers_of(config: GPTConfig) -> list[Layer]:
    """The linear layers that a token passes, in order: those of one block, and the output matrix."""
    C, F = config.n_embd, config.inner_width
    return [
        Layer("qkv", C, 3 * C),
        Layer("out", C, C),
        Layer("up", C, F),
        Layer("down", F, C),
        Layer("head", C, config.vocab_size),
    ]


def rows_of_shards(recipe: Recipe) -> list[int]:
    """The tokens in each shard of one batch."""
    batch = {"ids": np.empty((recipe.train.batch_size, recipe.block_size), np.bool_)}
    return [rows["ids"].size for _, rows in cut(batch, recipe.train.shards)]


class Products:
    """The three matrix products of one linear layer at N rows, in NumPy, into arrays made once; float32."""

    def __init__(self, rows: int, weight: np.ndarray) -> None:
        width_out, width_in = weight.shape
        self._weight, self._x, self._dy = weight, drawn(rows, width_in), drawn(rows, width_out)
        self._y, self._dx, self._dweight = np.empty_like(self._dy), np.empty_like(self._x), np.empty_like(weight)

    def forward(self) -> None:
        np.matmul(self._x, self._weight.T, out=self._y)  # (N, out)

    def dx(self) -> None:
        np.matmul(self._dy, self._weight, out=self._dx)  # (N, in)

    def dweight(self) -> None:
        np.matmul(self._dy.T, self._x, out=self._dweight)  # (out, in)


def drawn(*shape: int) -> np.ndarray:
    """Normal float32 numbers, always the same."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def run_all(workers: Workers, tasks: Iterable[Callable[[], object]]) -> None:
    """Until the last has ended; what they return is dropped."""
    for _ in workers.run(tasks):
        pass


def gflops(flops: float, work: Callable[[], object]) -> list[float]:
    """The rate of each of as many calls of `work`, of `flops` each, as make a block."""
    count = int(min(max(FLOPS_OF_A_BLOCK / flops, 1), 100))
    return [flops / seconds / 1e9 for seconds in timed(work, count)]


class StepProducts:
    """Every matrix product of the linear layers of one training step, sharded as the step is, and nothing else."""

    def __init__(self, config: GPTConfig, recipe: Recipe, workers: Workers) -> None:
        *block, head = layers_of(config)
        weights = [drawn(layer.width_out, layer.width_in) for layer in [*block * config.n_layer, head]]
        shards = rows_of_shards(recipe) * recipe.train.grad_accumulation_steps
        self._shards = [[Products(rows, weight) for weight in weights] for rows in shards]
        self._workers = workers

    def __call__(self) -> None:
        run_all(self._workers, [partial(self._run, shard) for shard in self._shards])

    @staticmethod
    def _run(layers: Sequence[Products]) -> None:
        for layer in layers:
            layer.forward()
        for layer in reversed(layers):
            layer.dx()
            layer.dweight()


class NumpyProducts:
    """Each product of each layer on every worker at once, with arrays of its own; one BLAS thread each."""

    def __init__(self, layers: Sequence[Layer], rows: int, workers: Workers) -> None:
        weights = {layer.name: drawn(layer.width_out, layer.width_in) for layer in layers}
        self._products = {
            name: [Products(rows, weight) for _ in range(workers.num_threads)] for name, weight in weights.items()
        }
        self._flops = {name: 2 * rows * weight.size * workers.num_threads for name, weight in weights.items()}
        self._workers = workers

    def rates(self) -> Rates:
        rates = {}
        for name, products in self._products.items():
            for kind in PRODUCTS:
                tasks = [getattr(product, kind) for product in products]
                rates[f"{name} {kind}"] = gflops(self._flops[name], partial(run_all, self._workers, tasks))
        return rates


class Square:
    """One product of square matrices on every worker at once: the machine's own rate.

    Hold `single_threaded_blas()` around it.
    """

    def __init__(self, workers: Workers) -> None:
        self._flops = 2 * SQUARE**3 * workers.num_threads
        self._tasks = [Products(SQUARE, drawn(SQUARE, SQUARE)).forward for _ in range(workers.num_threads)]
        self._workers = workers

    def rates(self) -> list[float]:
        """GFLOP/s of some calls."""
        return gflops(self._flops, partial(run_all, self._workers, self._tasks))


def run(
    recipe: Recipe = RECIPE,
    *,
    rounds: int = 10,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time the three products of every linear layer of the recipe, print a table of GFLOP/s, return the figures.

    NumPy with one thread at the size of a shard, NumPy with one such product on every thread at once, and
    torch on all threads at the size of the whole batch, under both waiting policies; in turns. The last
    line is a square product of 1024. Raises `ConfigError` for a count below 1.
    """
    facts = start("bench gemm", plot_path, rounds=rounds)
    config, threads = recipe.build()[0].config, get_num_threads()
    layers, shard = layers_of(config), max(rows_of_shards(recipe))
    whole = recipe.train.batch_size * recipe.block_size
    with single_threaded_blas(), Workers(threads) as workers, ExitStack() as stack:
        alone, square = NumpyProducts(layers, shard, Workers(1)), Square(Workers(1))
        together, squares = NumpyProducts(layers, shard, workers), Square(workers)
        sides: dict[str, Callable[[int], Rates]] = {
            ONE: lambda block: {**alone.rates(), "square": square.rates()},
            SHARDED: lambda block: {**together.rates(), "square": squares.rates()},
        }
        for name, torch in peer.of_each_policy(stack).items():
            torch.make("gemm", layers=layers, rows=whole, square=SQUARE, threads=threads)
            sides[name] = partial(_ask, torch)
        results = alternate("bench gemm", sides, rounds)
    rates = {
        product: {name: spread(np.concatenate([b[product] for b in blocks[1:]])) for name, blocks in results.items()}
        for product in results[ONE][0]
    }
    figures: dict[str, Any] = {
        "what": "gemm",
        "machine": facts,
        "recipe": recipe.to_dict(),
        "rounds": rounds,
        "unit": "GFLOP/s",
        "rows": {"shard": shard, "batch": whole},
        "gflops": rates,
    }
    header = [f"GFLOP/s, {shard} rows a shard", *rates["square"]]
    rows = [[name, *(f"{side['median']:.1f}" for side in sides.values())] for name, sides in rates.items()]
    return publish(figures, table(header, rows), groups=rates, json_path=json_path, plot_path=plot_path)


def _ask(torch: peer.Peer, block: int) -> Rates:
    answer: Rates = torch.call("rates")
    return answer
