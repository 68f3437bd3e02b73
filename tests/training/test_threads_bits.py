"""Same bits at any number of threads, in all that a run leaves: weights, optimizer, metrics, sample.

The width is one at which OpenBLAS, where it is let, rounds differently on one thread and on two (AVX-512 kernels,
float32): without `single_threaded_blas` the tests of its threads fail.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from contextvars import copy_context
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from children import ENVIRONMENT

from minitransformer.checkpoint import RunFolder
from minitransformer.cli import main, verbs

TEXT = "".join(f"{n} sheep in {n * n % 89} fields, and {n % 7} wolves.\n" for n in range(150))
SETTINGS = (
    "--n-layer 1 --n-head 1 --n-embd 134 --block-size 32 --dropout 0.2 --max-steps 5 --batch-size 7 --shards 3 "
    "--grad-accumulation-steps 2 --eval-interval 2 --eval-batches 3 --warmup-steps 1 --progress false"
)
OPTIMIZERS = ("adamw", "adam", "sgd")
Bits = dict[str, bytes]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")


def arguments(optimizer: str, threads: int, *more: str) -> list[str]:
    fixed = ["train", "--data", "text.txt", "--out-dir", "run", *SETTINGS.split()]
    return [*fixed, "--optimizer", optimizer, "--threads", str(threads), *more]


def left_by(run: Path, printed: str) -> Bits:
    found = {"sample": printed.encode(), "metrics.jsonl": (run / "metrics.jsonl").read_bytes()}
    for which in ("last", "best"):
        for path in RunFolder.open(run).load(which).folder.iterdir():
            found[f"{which}/{path.name}"] = path.read_bytes()
    assert {"last/model.safetensors", "last/optimizer.safetensors", "best/trainer.json"} <= set(found)
    return found


def train(optimizer: str, threads: int, *more: str) -> Bits:
    """What a training in this process leaves, in a folder that is gone afterwards."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setitem(verbs._SAMPLE, "max_new_tokens", 40)  # more than a block
        assert copy_context().run(main, arguments(optimizer, threads, *more)) == 0
    bits = left_by(Path("run"), printed.getvalue())
    shutil.rmtree("run")
    return bits


CHILD = """
import pickle, sys, test_threads_bits as here
pickle.dump({name: here.train(name, int(sys.argv[1])) for name in sys.argv[2:]}, sys.stdout.buffer)
"""


def child(threads: int = 2, optimizers: Sequence[str] = ("adamw",), **options: Any) -> dict[str, Bits]:
    """What trainings in a process of their own leave, by optimizer."""
    command = [sys.executable, "-c", CHILD, str(threads), *optimizers]
    ended = subprocess.run(command, **{"env": ENVIRONMENT, "stdout": subprocess.PIPE, "check": True} | options)
    left: dict[str, Bits] = pickle.loads(ended.stdout)
    return left


@cache
def expected(optimizer: str) -> Bits:
    """What one thread leaves."""
    return train(optimizer, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads(optimizer: str, threads: int) -> None:
    assert train(optimizer, threads) == expected(optimizer)


def test_seven_threads_of_numba_too() -> None:
    left = child(7, OPTIMIZERS, env=ENVIRONMENT | {"NUMBA_NUM_THREADS": "7"})
    assert left == {optimizer: expected(optimizer) for optimizer in OPTIMIZERS}


@pytest.mark.parametrize("blas_threads", ["1", "4"])
def test_whatever_blas_is_told(blas_threads: str) -> None:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    assert child(env=ENVIRONMENT | dict.fromkeys(names, blas_threads)) == {"adamw": expected("adamw")}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_on_one_core() -> None:
    core = min(os.sched_getaffinity(0))
    assert child(preexec_fn=lambda: os.sched_setaffinity(0, {core})) == {"adamw": expected("adamw")}


def test_beside_a_busy_process() -> None:
    busy = "import numpy as np\na = np.ones((700, 700))\nprint('busy', flush=True)\nwhile True: a @ a"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, env=ENVIRONMENT) as neighbour:
        assert neighbour.stdout is not None
        try:
            assert neighbour.stdout.readline() == b"busy\n"
            assert train("adamw", 2) == expected("adamw")
        finally:
            neighbour.kill()


@pytest.mark.parametrize("changed", ["--shards 2", "--batch-size 6", "--seed 1"])
def test_what_decides_the_bits(changed: str) -> None:
    """The limits of the promise; and without them the tests above might compare constants."""
    other = train("adamw", 1, *changed.split())
    assert other["last/model.safetensors"] != expected("adamw")["last/model.safetensors"]
    assert other["metrics.jsonl"] != expected("adamw")["metrics.jsonl"]
