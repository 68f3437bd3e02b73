"""Each benchmark at its smallest size: the figures are all there and finite, and both sides do the same work."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_bench import CASES, make_quick, measured, small_recipe

from minitransformer.bench import (
    attention,
    decode,
    efficiency,
    gemm,
    memory,
    scaling,
    startup,
    torch_sides,
)
from minitransformer.bench.harness import OURS
from minitransformer.bench.recipe import Recipe
from minitransformer.errors import ConfigError
from minitransformer.models import GPTConfig
from minitransformer.threads import Workers, get_num_threads, set_num_threads

SPREAD = {"min", "q1", "median", "q3"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture
def small(tmp_path: Path) -> Recipe:
    return small_recipe(tmp_path)


@pytest.mark.parametrize("backend", ["reference", None])
def test_attention(tmp_path: Path, backend: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"rounds": 2, "cases": CASES, **({"backend": backend} if backend else {})}
    figures = measured(attention.run, tmp_path, **options)
    assert backend in (figures["backend"], None)
    assert list(figures["cases"]) == ["B2 T5 H2 D4 causal", "B2 T8 H1 D4 key mask"]
    for found in figures["cases"].values():
        assert set(found) == set(attention.PASSES)
        for passes, factor in attention.PASSES.items():
            side = found[passes]["sides"][OURS]
            assert set(side["ms"]) == set(side["gflops"]) == SPREAD
            assert side["percent_of_gemm"] == pytest.approx(
                100 * side["gflops"]["median"] / found[passes]["machine_gflops"]["median"]
            )
            case = CASES[list(figures["cases"].values()).index(found)]
            assert side["gflops"]["q3"] * side["ms"]["q1"] == pytest.approx(case.flops * factor / 1e6, rel=0.5)
    out = capsys.readouterr().out
    assert f"{OURS} is served by {figures['backend']!r}" in out
    assert "B2 T8 H1 D4 key mask, forward and backward" in out


def test_work_of_attention() -> None:
    assert attention.Case(2, 3, 5, 7, causal=False).flops == 4 * 2 * 5 * 3 * 3 * 7
    assert attention.Case(2, 3, 5, 7).flops == 2 * 2 * 5 * 3 * 3 * 7
    mask = attention.Case(5, 8, 1, 2, causal=False).mask()
    assert mask is not None
    assert mask.sum(axis=-1).ravel().tolist() == [8, 6, 4, 2, 8]


@pytest.mark.parametrize("backend", ["gpu", "", "cpuu"])
def test_unknown_backend(backend: str) -> None:
    with pytest.raises(ConfigError, match=f"^use_backend: '{backend}' is no implementation of any kernel"):
        attention.run(rounds=1, backend=backend, cases=CASES)


def test_efficiency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(efficiency.run, tmp_path, rounds=2, lengths=(40, 80))
    assert set(figures["kinds"]) == set(efficiency.KINDS)
    for of in figures["kinds"].values():
        assert [set(of["ms"][T]) for T in ("40", "80")] == [SPREAD] * 2
        ratio = of["ms"]["80"]["median"] / of["ms"]["40"]["median"]
        assert of["growth"] == pytest.approx(ratio / 2)
        assert 2 ** of["exponent"] == pytest.approx(ratio)
        assert of["bytes"]["40"] > 3 * 40 * efficiency.WIDTH * 4  # the gradients at least
    out = capsys.readouterr().out
    assert "strided by sqrt(T)" in out and "exponents and growth from T = 40 on" in out


def test_slopes_are_exponents() -> None:
    assert efficiency.slope((1, 2, 4), (3, 12, 48)) == pytest.approx(2)
    assert efficiency.slope((8,), (3,)) == 1


def test_gemm(small: Recipe, tmp_path: Path) -> None:
    figures = measured(gemm.run, tmp_path, small, rounds=2)
    names = [f"{layer} {kind}" for layer in ("qkv", "out", "up", "down", "head") for kind in gemm.PRODUCTS]
    assert list(figures["gflops"]) == [*names, "square"]
    assert figures["rows"] == {"shard": 24, "batch": 40}  # 3 and 2 of 5 rows of 8 tokens
    for sides in figures["gflops"].values():
        assert list(sides) == [gemm.ONE, gemm.SHARDED]
        assert all(set(side) == SPREAD and side["min"] > 0 for side in sides.values())


def test_products_are_those_of_a_linear_layer() -> None:
    weight = gemm.drawn(3, 4)
    product = gemm.Products(5, weight)
    for kind in gemm.PRODUCTS:
        getattr(product, kind)()
    x, dy = gemm.drawn(5, 4), gemm.drawn(5, 3)
    np.testing.assert_allclose(product._y, x @ weight.T, rtol=1e-5)
    np.testing.assert_allclose(product._dx, dy @ weight, rtol=1e-5)
    np.testing.assert_allclose(product._dweight, dy.T @ x, rtol=1e-5)


@pytest.mark.parametrize(("shards", "accumulation"), [(2, 1), (7, 3)])
def test_the_products_of_a_step_are_all_there(
    small: Recipe, shards: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 N for every parameter of a matrix, token for token: forward, dx and dweight."""
    work: list[int] = []

    class Counting(gemm.Products):
        def count(self) -> None:
            work.append(2 * len(self._x) * self._weight.size)

        forward = dx = dweight = count

    monkeypatch.setattr(gemm, "Products", Counting)
    config = GPTConfig(vocab_size=30, block_size=8, n_layer=3, n_head=2, n_embd=16)
    train = replace(small.train, shards=shards, grad_accumulation_steps=accumulation)
    with Workers(2) as workers:
        gemm.StepProducts(config, replace(small, train=train), workers)()
    matrices = 3 * 12 * 16**2 + 30 * 16
    assert sum(work) == 6 * matrices * 5 * 8 * accumulation


def test_decode(small: Recipe, tmp_path: Path) -> None:
    figures = measured(decode.run, tmp_path, small, rounds=2, batch_size=3)
    assert (figures["prompt_tokens"], figures["new_tokens"], figures["batch_size"]) == (1, 7, 3)
    assert list(figures["sides"]) == [OURS]
    assert set(figures["sides"][OURS]) == SPREAD


def test_what_is_decoded_depends_on_the_layers(small: Recipe) -> None:
    tokens = decode.model_of(replace(small, block_size=20)).generate(np.zeros((1, 2), np.int64), max_new_tokens=18)
    assert len(np.unique(tokens)) > 4


def test_scaling(small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = get_num_threads()
    set_num_threads(3)
    try:
        figures = measured(scaling.run, tmp_path, small, rounds=1, steps=1)
    finally:
        set_num_threads(before)
    assert list(figures["threads"]) == [scaling.ALONE, scaling.BUSY]
    for sides in figures["threads"].values():
        assert list(sides) == ["1", "2", "3"]
        assert sides["1"]["speedup"] == 1
        assert sides["3"]["speedup"] == pytest.approx(sides["1"]["median"] / sides["3"]["median"])
    out = capsys.readouterr().out
    assert f"3 threads, {scaling.BUSY}" in out
    assert "PyTorch" not in out  # there is nothing to compare with


def test_the_busy_process_is_busy_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt), scaling.busy_process():
        assert started[0].poll() is None
        raise KeyboardInterrupt
    assert started[0].returncode is not None


def test_memory(small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(memory.run, tmp_path, recipes=[small], lengths=(8, 64))
    (sides,) = figures["steps"].values()
    assert list(sides) == [OURS]
    assert 0 < sides[OURS]["before"] <= sides[OURS]["peak"]
    assert list(figures["attention"]) == ["T8", "T64"]
    assert figures["attention"]["T64"]["arrays"] == 64 * 2 * 4 * (64 * 4 + 1)
    assert "takes memory as T^" in capsys.readouterr().out


def test_peaks_are_seen() -> None:
    """An array that lives for a moment counts, what was there before does not."""
    found = memory.peak_of(lambda: np.ones(40_000_000))  # 320 MB
    again = memory.peak_of(lambda: None)
    assert found["peak"] - found["before"] > 250_000_000  # some of it may be memory that was freed before
    assert again["peak"] - again["before"] < 20_000_000


def test_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small program in the place of `train`: what it is given is asked for, not how long it takes."""
    seen = tmp_path / "seen"
    seen.touch()
    program = (
        "import os, pathlib, sys\n"
        "cache = pathlib.Path(os.environ['XDG_CACHE_HOME'])\n"
        f"print(cache.name, cache.exists(), file=open({str(seen)!r}, 'a'))\n"
        "cache.mkdir(exist_ok=True)"
    )
    monkeypatch.setattr(startup, "TRAIN", ("-c", program))
    figures = measured(startup.run, tmp_path, rounds=1)
    assert list(figures["sides"]) == [startup.IMPORT, startup.COLD, startup.WARM]
    lines = seen.read_text(encoding="utf-8").splitlines()
    assert lines == ["cache-0 False", "warm False", "cache-1 False", "warm True"]


def test_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "TRAIN", ("-c", "raise SystemExit('not today')"))
    with pytest.raises(ConfigError, match=r"ended with status 1 \(not today\). Run it by itself."):
        startup.run(rounds=1)


def test_a_compiler_that_fails(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncompiled:
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

        def loss(self, batch: Any) -> Any:
            raise RuntimeError("No working C++ compiler found.\nSet CXX.")

    monkeypatch.setattr(torch_sides, "torch_with", lambda threads: None)
    monkeypatch.setattr(torch_sides, "Twin", Uncompiled)
    with pytest.raises(ConfigError) as caught:
        torch_sides.Train(small.to_dict(), 1, compiled=True)
    assert str(caught.value) == (
        "torch.compile: cannot compile the loss here (No working C++ compiler found). "
        "It needs a C++ compiler; leave out --torch-compile to do without."
    )
