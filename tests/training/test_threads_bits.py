"""Same bits at any number of threads, in all that a run leaves: weights, optimizer, metrics, sample.

The width is one at which OpenBLAS, where it is let, rounds differently on one thread and on two (AVX-512 kernels,
float32): without `single_threaded_blas` the tests of its threads fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path

import pytest
from children import ENVIRONMENT, command

from minitransformer.checkpoint import RunFolder
from minitransformer.cli import main

TEXT = "".join(f"{n} sheep in {n * n % 89} fields, and {n % 7} wolves.\n" for n in range(150))
SETTINGS = (
    "--n-layer 1 --n-head 1 --n-embd 134 --block-size 32 --dropout 0.2 --max-steps 5 --batch-size 7 --shards 3 "
    "--grad-accumulation-steps 2 --eval-interval 2 --eval-batches 3 --warmup-steps 1 --progress false"
)
OPTIMIZERS = ("adamw", "adam", "sgd")
Bits = dict[str, bytes]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


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


Trained = Callable[..., Bits]


@pytest.fixture
def trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> Trained:
    """Trains in this process."""

    def train(*what: str | int) -> Bits:
        capsys.readouterr()
        assert copy_context().run(main, arguments(*what)) == 0  # type: ignore[arg-type]
        bits = left_by(folder / "run", capsys.readouterr().out)
        (folder / "run").rename(folder / f"run of {len(list(folder.iterdir()))}")
        return bits

    return train


def child(optimizer: str = "adamw", threads: int = 2, **options: object) -> Bits:
    """Trains in a process of its own."""
    ended = command(*arguments(optimizer, threads), **options)
    assert ended.returncode == 0, ended.stderr
    return left_by(Path("run"), ended.stdout)


_EXPECTED: dict[str, Bits] = {}


@pytest.fixture
def expected(trained: Trained) -> Callable[[str], Bits]:
    """What one thread leaves, trained once for each optimizer."""

    def one_thread(optimizer: str) -> Bits:
        if optimizer not in _EXPECTED:
            _EXPECTED[optimizer] = trained(optimizer, 1)
        return _EXPECTED[optimizer]

    return one_thread


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_threads(optimizer: str, threads: int, trained: Trained, expected: Callable[[str], Bits]) -> None:
    assert trained(optimizer, threads) == expected(optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_seven_threads_of_numba_too(optimizer: str, expected: Callable[[str], Bits]) -> None:
    assert child(optimizer, 7, env=ENVIRONMENT | {"NUMBA_NUM_THREADS": "7"}) == expected(optimizer)


@pytest.mark.parametrize("blas_threads", ["1", "4"])
def test_whatever_blas_is_told(blas_threads: str, expected: Callable[[str], Bits]) -> None:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    assert child(env=ENVIRONMENT | dict.fromkeys(names, blas_threads)) == expected("adamw")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_on_one_core(expected: Callable[[str], Bits]) -> None:
    core = min(os.sched_getaffinity(0))
    assert child(preexec_fn=lambda: os.sched_setaffinity(0, {core})) == expected("adamw")


def test_beside_a_busy_process(trained: Trained, expected: Callable[[str], Bits]) -> None:
    busy = "import numpy as np\na = np.ones((700, 700))\nprint('busy', flush=True)\nwhile True: a @ a"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, env=ENVIRONMENT) as neighbour:
        assert neighbour.stdout is not None
        try:
            assert neighbour.stdout.readline() == b"busy\n"
            assert trained("adamw", 2) == expected("adamw")
        finally:
            neighbour.kill()


@pytest.mark.parametrize("changed", ["--shards 2", "--batch-size 6", "--seed 1"])
def test_what_decides_the_bits(changed: str, trained: Trained, expected: Callable[[str], Bits]) -> None:
    """The limits of the promise; and without them the tests above might compare constants."""
    other = trained("adamw", 1, *changed.split())
    assert other["last/model.safetensors"] != expected("adamw")["last/model.safetensors"]
    assert other["metrics.jsonl"] != expected("adamw")["metrics.jsonl"]
