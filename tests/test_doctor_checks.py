"""The self-test of `minitransformer doctor`: every check can fail, and then says what is wrong and what to do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextvars import copy_context
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer import doctor, random
from minitransformer.cli import main
from minitransformer.doctor import checks
from minitransformer.doctor.kernels import CALLS
from minitransformer.kernels import FAMILIES
from minitransformer.kernels.attention import cpu as attention
from minitransformer.kernels.optimizer import cpu


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave the checks of these names; the others are not what the test is about."""
    every = checks.all_checks()

    def leave(*names: str) -> None:
        monkeypatch.setattr(checks, "all_checks", lambda: {name: every[name] for name in names})

    return leave


def cli(*argv: str) -> int:
    return copy_context().run(main, ("doctor", *argv))


def wrong_philox(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(random, "_WEYL", (1, 2))
    return "Philox gives other numbers"


def wrong_mask(monkeypatch: pytest.MonkeyPatch) -> str:
    words = random.uniform_words
    monkeypatch.setattr(random, "uniform_words", lambda shape, key: words(shape, key._replace(step=key.step + 1)))
    return "a dropout mask is"


def wrong_product(monkeypatch: pytest.MonkeyPatch) -> str:
    class Wrong(np.ndarray):
        def __matmul__(self, other: Any) -> Any:
            out = np.matmul(np.asarray(self), np.asarray(other))
            if out.dtype.kind == "f":
                out[3, 4] += 1
            return out

    fake = SimpleNamespace(**{name: getattr(np, name) for name in ("float32", "float64", "count_nonzero", "dtype")})
    fake.asfortranarray = lambda x: np.asfortranarray(x).view(Wrong)
    rng = np.random.default_rng(0)
    integers = SimpleNamespace(integers=lambda *a: rng.integers(*a).view(Wrong))
    fake.random = SimpleNamespace(default_rng=lambda _: integers)
    monkeypatch.setattr(checks, "np", fake)
    return "1 of 24897 elements of a float32 product are wrong on all threads"


def wrong_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    backward = attention.backward

    def wrong(*args: Any) -> Any:
        found = backward(*args)
        return found._replace(dk=found.dk * 1.001)

    monkeypatch.setattr(attention, "backward", wrong)
    return "the gradient of the key is"


def imprecise_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    forward = attention.forward

    def imprecise(q: np.ndarray, *args: Any) -> Any:
        out, lse = forward(q, *args)
        return (out.astype(np.float16).astype(q.dtype) if q.dtype == np.float32 else out), lse

    monkeypatch.setattr(attention, "forward", imprecise)
    return "the output in float32 is"


def nan_kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "squared_norm", lambda x: np.nan)
    return "squared_norm in float32 is inf roundings away from the reference"


def scaled(family: str, name: str) -> Callable[[pytest.MonkeyPatch], str]:
    """One array that a compiled kernel returns or writes to is wrong by a part in a thousand."""

    def break_it(monkeypatch: pytest.MonkeyPatch) -> str:
        module = import_module(f"minitransformer.kernels.{family}.cpu")
        right = getattr(module, name)

        def wrong(first: np.ndarray, *more: Any) -> Any:
            out = right(first, *more)
            array = first if out is None else out[0] if isinstance(out, tuple) else out
            array *= 1.001
            return out

        monkeypatch.setattr(module, name, wrong)
        return f"{name} in float32 is"

    break_it.__name__ = f"{family}_{name}"
    return break_it


def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    step = cpu.adamw_step
    monkeypatch.setattr(cpu, "adamw_step", lambda *a, **k: step(*a, **{**k, "lr": k["lr"] * 1.01}))
    return "adamw_step in float32 is"


def training_by_threads(monkeypatch: pytest.MonkeyPatch) -> str:
    class Trainer(checks.Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            if self.config.threads == 2:
                next(iter(self.model.parameters())).data[0, 0] += 1e-6
            return result

    monkeypatch.setattr(checks, "Trainer", Trainer)
    return "one thread and two give different weights"


def training_in_vain(monkeypatch: pytest.MonkeyPatch) -> str:
    config = checks.TrainConfig
    monkeypatch.setattr(checks, "TrainConfig", lambda **k: config(**{**k, "max_steps": 1}))
    return "the loss after 20 steps is"


def damage_unnoticed(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(mt.checkpoint, "check_file", lambda *_: None)
    return "a flipped bit goes unnoticed"


def disk_full(monkeypatch: pytest.MonkeyPatch) -> str:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    return "does not take files (No space left on device)"


def library_missing(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    return "ModuleNotFoundError: import of safetensors.numpy halted"


BREAKS = [
    ("random numbers", wrong_philox),
    ("random numbers", wrong_mask),
    ("BLAS", wrong_product),
    ("attention", wrong_attention),
    ("attention", imprecise_attention),
    ("attention kernels, cpu", scaled("attention", "forward")),
    ("attention kernels, cpu", scaled("attention", "backward")),
    ("decode kernels, cpu", scaled("decode", "next_logits")),
    ("linear_attention kernels, cpu", scaled("linear_attention", "forward")),
    ("linear_attention kernels, cpu", scaled("linear_attention", "backward")),
    ("optimizer kernels, cpu", nan_kernel),
    ("optimizer kernels, cpu", wrong_kernel),
    ("pointwise kernels, cpu", scaled("pointwise", "gelu_tanh_bias_backward")),
    ("rowwise kernels, cpu", scaled("rowwise", "layer_norm_forward")),
    ("training", training_by_threads),
    ("training", training_in_vain),
    ("checkpoint", damage_unnoticed),
    ("checkpoint", library_missing),
    ("working folder", disk_full),
]


def test_every_check_is_broken_below() -> None:
    assert list(dict.fromkeys(name for name, _ in BREAKS)) == list(checks.all_checks())


@pytest.mark.parametrize(("name", "break_it"), BREAKS)
def test_what_is_broken_is_named(
    name: str,
    break_it: Callable[[pytest.MonkeyPatch], str],
    only: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    only(name)
    problem = break_it(monkeypatch)
    assert cli() == 1
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("self-test") + 1
    assert re.fullmatch(rf"  FAILED +{name} +\d+\.\d\d s", lines[start])
    assert problem in " ".join(line.strip() for line in lines[start + 1 : -1])
    assert re.match(rf"1 of 1 checks failed\. {name}: [A-Z]", lines[-1])


def test_every_function_of_every_fast_kernel_is_checked() -> None:
    for family, names in FAMILIES.items():
        if len(names) > 1:
            fast, plain = (import_module(f"minitransformer.kernels.{family}.{n}") for n in (names[0], "reference"))
            own = {
                name
                for name, value in vars(plain).items()
                if callable(value) and not name.startswith("_") and value.__module__ == plain.__name__
                if not isinstance(value, type) and getattr(fast, name) is not value
            }
            called = {call.function for call in CALLS[family]}
            assert own and own <= called
            assert all(hasattr(fast, name) for name in called)


def test_the_last_line_says_what_to_do_about_the_first_failure() -> None:
    results = [checks.Result("a", True, 0.1, None, None), checks.Result("b", False, 0.1, "wrong", "Mend it")]
    assert doctor.verdict(results) == "1 of 2 checks failed. b: Mend it"
