"""The self-test: about ten seconds that touch every part of the engine, each check by itself.

A check returns, or raises `CheckFailed` with what is wrong and what to do about it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitransformer import random, threads
from minitransformer.checkpoint import RunFolder, pack_arrays, unpack_arrays
from minitransformer.data import TokenDataset
from minitransformer.doctor.kernels import agrees
from minitransformer.doctor.results import REINSTALL, CheckFailed, expect
from minitransformer.errors import CheckpointError, MiniTransformerError
from minitransformer.files import sync_folder, write_and_sync
from minitransformer.kernels import FAMILIES, host_implementations
from minitransformer.models import GPT, GPTConfig
from minitransformer.ops.attention import attention_backward, attention_forward, make_problem
from minitransformer.training import TrainConfig, Trainer


class Result(NamedTuple):
    """`problem` and `fix` are None for a check that passed."""

    name: str
    passed: bool
    seconds: float
    problem: str | None
    fix: str | None


def run(name: str, check: Callable[[], None]) -> Result:
    """Whether `check` holds, and how long that took to find out."""
    start = time.perf_counter()
    problem = fix = None
    try:
        check()
    except MiniTransformerError as error:
        problem, fix = error.problem, error.fix
    except (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError) as error:
        problem, fix = f"{type(error).__name__}: {error}", REINSTALL
    return Result(name, problem is None, time.perf_counter() - start, problem, fix)


# Four rows of sixteen, of seed 1, step 2, site 3, from row 4; the first element is the highest bit.
MASK = [0x2F23, 0xF6BF, 0x4F2B, 0xB7EE]

# --- numbers and libraries -------------------------------------------------------------------------------


def random_numbers() -> None:
    """The vectors published with Random123, and the dropout mask that every version of this package draws."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        words = random.philox(tuple(np.array([counter], np.uint64) for _ in range(4)), (key, key))
        expect(tuple(int(word[0]) for word in words) == expected, "random", "Philox gives other numbers", REINSTALL)
    mask = random.keep_mask((4, 16), 0.25, random.DrawKey(seed=1, step=2, site=3, first_row=4))
    drawn = [int("".join(map(str, row)), 2) for row in mask.astype(int).tolist()]
    expect(drawn == MASK, "random", f"a dropout mask is {drawn}, expected {MASK}", REINSTALL)


def blas() -> None:
    """Products of small integers, which float32 and float64 hold exactly, on one thread and on all."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (193, 257)), rng.integers(-8, 9, (257, 129))
    exact = a @ b  # integers: not by BLAS

    def check(how: str) -> None:
        for dtype in (np.float32, np.float64):
            for x, y in ((a, b), (np.asfortranarray(a), b), (a, np.asfortranarray(b))):
                wrong = np.count_nonzero(x.astype(dtype) @ y.astype(dtype) != exact)
                problem = f"{wrong} of {exact.size} elements of a {np.dtype(dtype)} product are wrong on {how}"
                expect(not wrong, "BLAS", problem, "Install another build of NumPy: its BLAS does not fit this machine")

    check("all threads")
    with threads.single_threaded_blas():
        check("one thread")


def attention() -> None:
    """Causal attention with grouped heads: float32 against float64, and the backward by complex step."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(2, heads, 33, 16)) for heads in (4, 2, 2, 4))

    def both(dtype: Any) -> tuple[np.ndarray, ...]:
        arrays = [x.astype(dtype) for x in (q, k, v)]
        problem = make_problem("attention", *arrays, is_causal=True, enable_gqa=True)
        (out, lse), saved = attention_forward(*arrays, problem=problem)
        return (out, *(g for g in attention_backward((dout.astype(dtype), np.zeros_like(lse)), saved) if g is not None))

    exact = both(np.float64)
    for name, single, double in zip(("output", "dquery", "dkey", "dvalue"), both(np.float32), exact, strict=True):
        error = float(np.max(np.abs(single - double)) / np.max(np.abs(double)))
        wrong = f"the {name} in float32 is {error:.1e} away from float64, expected below 1e-5"
        expect(error < 1e-5, "attention", wrong, REINSTALL)  # false for NaN too

    step = 1e-20
    problem = make_problem("attention", q, k, v, is_causal=True, enable_gqa=True)
    for name, position, gradient in zip(("query", "key", "value"), range(3), exact[1:], strict=True):
        inputs = [q, k, v]
        direction = rng.normal(size=inputs[position].shape)
        inputs[position] = inputs[position] + 1j * step * direction
        (out, _), _ = attention_forward(*inputs, problem=problem)
        expected, got = float(np.sum(dout * out.imag)) / step, float(np.sum(gradient * direction))
        wrong = f"the gradient of the {name} is {got:.12g} along a direction, the complex step gives {expected:.12g}"
        expect(abs(got - expected) <= 1e-10 * (1 + abs(expected)), "attention", wrong, REINSTALL)


# --- training and files ----------------------------------------------------------------------------------


def training() -> None:
    """A tiny GPT learns, with the same bits on one thread and on two."""
    tokens = np.arange(400) * 3 % 13
    weights, losses = [], []
    for count in (1, 2):
        model = GPT(GPTConfig(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
        rng = np.random.default_rng(0)
        for parameter in model.parameters():
            parameter.data = rng.normal(0, 0.2, parameter.shape).astype(np.float32)
        config = TrainConfig(max_steps=20, batch_size=8, learning_rate=0.02, shards=4, threads=count, progress=False)
        result = Trainer(model, config, TokenDataset(tokens, 8), TokenDataset(tokens, 8)).train()
        weights.append(b"".join(p.data.tobytes() for p in model.parameters()))
        losses.append(result.val_loss)
    expect(weights[0] == weights[1], "training", "one thread and two give different weights", REINSTALL)
    problem = f"the loss after 20 steps is {losses[0]}, expected below 2"
    expect(losses[0] is not None and losses[0] < 2, "training", problem, REINSTALL)


def checkpoint() -> None:
    """Saved and loaded, a checkpoint is the same; with one bit flipped, it is refused."""
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="minitransformer-doctor-") as folder:
        run_folder = RunFolder.create(Path(folder) / "run", {"made by": "doctor"})
        run_folder.save(1, {"model.safetensors": pack_arrays({"x": array}, {})}, best=True)
        file = RunFolder.open(run_folder.path).load("last").folder / "model.safetensors"
        arrays, _ = unpack_arrays(file)
        same = arrays["x"].tobytes() == array.tobytes()
        expect(same, "checkpoint", "a loaded array is not the one saved", REINSTALL)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        try:
            run_folder.load("last")
        except CheckpointError:
            return
        raise CheckFailed("checkpoint", "a flipped bit goes unnoticed", REINSTALL)


def working_folder() -> None:
    """Files here can be synced to the disk and renamed over others, which runs saved here need."""
    fix = "Work in another folder, on a local disk with free space, that you may write to"
    try:
        with tempfile.TemporaryDirectory(prefix=".minitransformer-doctor-", dir=Path.cwd()) as name:
            folder = Path(name)
            write_and_sync(folder / "old", b"old")
            write_and_sync(folder / "new", b"new" * 1000)
            os.replace(folder / "new", folder / "old")  # noqa: PTH105 (the very call)
            sync_folder(folder)
            same = (folder / "old").read_bytes() == b"new" * 1000
    except OSError as error:
        raise CheckFailed("working folder", f"{Path.cwd()} does not take files ({error.strerror})", fix) from error
    expect(same, "working folder", f"a file renamed in {Path.cwd()} has another content", fix)


def all_checks() -> dict[str, Callable[[], None]]:
    """Every check by the name it has in the report."""
    kernels = {
        f"{family} kernels, {name}": partial(agrees, family, name)
        for family in FAMILIES
        for name in host_implementations(family)
        if name != "reference"
    }
    return {
        "random numbers": random_numbers,
        "BLAS": blas,
        "attention": attention,
        **kernels,
        "training": training,
        "checkpoint": checkpoint,
        "working folder": working_folder,
    }
