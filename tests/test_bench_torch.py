"""Benchmarks beside torch, at their smallest size: both sides do the same work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_bench import CASES, make_quick, measured, small_recipe

from minitransformer.bench import (
    attention,
    decode,
    gemm,
    memory,
    peer,
    step,
    time_to_loss,
)
from minitransformer.bench.harness import OURS
from minitransformer.bench.recipe import Recipe, Theirs
from minitransformer.errors import ConfigError, GradientError
from minitransformer.threads import get_num_threads, set_num_threads

TORCH = "torch (passive)"


OF_EACH_POLICY = peer.of_each_policy

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def process() -> Iterator[peer.Peer]:
    """One process for all tests here: starting torch takes seconds."""
    with peer.process("passive") as process:
        yield process


@pytest.fixture(autouse=True)
def beside_torch(process: peer.Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.setattr(peer, "installed", lambda: True)
    monkeypatch.setattr(peer, "of_each_policy", lambda stack: {TORCH: process})


@pytest.fixture
def small(tmp_path: Path) -> Recipe:
    return small_recipe(tmp_path)


@pytest.mark.parametrize("model", ["transformer", "bert"])
def test_steps_of_other_models_beside_torchs_modules(model: str, small: Recipe) -> None:
    figures = step.run(replace(small, model=model, n_layer=2), rounds=2, steps=4)
    ours, theirs = (figures["sides"][name] for name in (OURS, TORCH))
    assert list(figures["sides"]) == [OURS, TORCH] and "gemm" not in figures
    for name in ("first_loss", "last_loss"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert ours["last_loss"] < ours["first_loss"]


@pytest.mark.parametrize("option", ["torch_compile", "torch_processes"])
def test_other_models_have_no_other_peers(option: str, small: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"^bench step: got 'bert' on 'cpu', expected 'gpt' on 'cpu' for these"):
        step.run(replace(small, model="bert"), **{option: True})


def test_step_beside_torch(small: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """The work of all sides is the same: some steps lead to the same loss, lower than the first."""
    figures = step.run(small, rounds=2, steps=4, torch_processes=True)
    sides, two = figures["sides"], step.TWO
    assert list(sides) == [OURS, step.GEMM, "torch (passive)", two]
    assert figures["failed"] == {}
    for name in (OURS, "torch (passive)", two):
        side = sides[name]
        assert side["first_loss"] == pytest.approx(sides[OURS]["first_loss"], abs=1e-5)
        assert side["last_loss"] == pytest.approx(sides[OURS]["last_loss"], abs=1e-4)
        assert side["last_loss"] < side["first_loss"]
    assert figures["ratio"] == pytest.approx(sides[OURS]["median"] / sides[figures["peer"]]["median"])
    assert figures["gemm"]["ratio"] == pytest.approx(sides[OURS]["median"] / sides[step.GEMM]["median"])
    assert f"x the time of {figures['peer']}" in capsys.readouterr().out


def test_time_to_loss_beside_torch(
    small: Recipe, process: peer.Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peer, "POLICIES", ("passive",))
    monkeypatch.setattr(peer, "process", lambda policy: nullcontext(process))
    monkeypatch.setattr(time_to_loss, "CHUNK", 3)
    path = tmp_path / "loss.json"
    figures = time_to_loss.run(small, steps=10, json_path=path)
    ours, theirs = figures["curves"].values()
    assert [point["step"] for point in ours] == [point["step"] for point in theirs] == [4, 8, 10]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["val_loss"] == pytest.approx(other["val_loss"], abs=1e-4)
    assert abs(figures["loss_difference"]) < 1e-4
    assert ours[-1]["val_loss"] < ours[0]["val_loss"]
    assert json.loads(path.read_text(encoding="utf-8")) == figures


def test_attention_beside_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(attention.run, tmp_path, rounds=2, cases=CASES)
    for found in figures["cases"].values():
        for of_pass in found.values():
            sides = of_pass["sides"]
            assert list(sides) == [OURS, TORCH]
            assert of_pass["peer"] == TORCH
            assert of_pass["ratio"] == pytest.approx(sides[OURS]["ms"]["median"] / sides[TORCH]["ms"]["median"])
    assert TORCH in capsys.readouterr().out


def test_attention_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = attention.Ours.both

    def wrong(self: attention.Ours) -> dict[str, np.ndarray]:
        results = both(self)
        results["dk"][0, 0, 0, 0] += 0.01
        return results

    monkeypatch.setattr(attention.Ours, "both", wrong)
    with pytest.raises(
        GradientError, match=r"dk of B2 T5 H2 D4 causal differs from torch's by 0\.01, expected 0\.0001"
    ):
        attention.run(rounds=1, cases=CASES)


def test_gemm_beside_torch(small: Recipe, tmp_path: Path) -> None:
    figures = measured(gemm.run, tmp_path, small, rounds=1)
    assert all(list(sides) == [gemm.ONE, gemm.SHARDED, TORCH] for sides in figures["gflops"].values())


def test_decode_beside_torch(small: Recipe, tmp_path: Path) -> None:
    before = get_num_threads()
    set_num_threads(2)
    try:
        figures = measured(decode.run, tmp_path, replace(small, n_layer=2, block_size=20), rounds=1, batch_size=2)
    finally:
        set_num_threads(before)
    assert list(figures["sides"]) == [OURS, "torch (1 thread)", "torch (passive, 2 threads)"]
    assert figures["peer"] in figures["sides"]


def test_decoders_that_disagree(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "GAIN", 0.5)  # on our side alone
    with pytest.raises(ConfigError, match="generate different tokens from the same weights"):
        decode.run(replace(small, block_size=20), rounds=1)


def test_memory_beside_torch(
    small: Recipe, process: peer.Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peer, "process", lambda: nullcontext(process))
    figures = measured(memory.run, tmp_path, recipes=[small], lengths=())
    (sides,) = figures["steps"].values()
    assert list(sides) == [OURS, "torch"]
    assert figures["exponent"] is None


def test_what_cannot_be_set_up_is_named(
    small: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def theirs(process: peer.Peer, recipe: Recipe, *, compiled: bool = False) -> Theirs:
        if compiled:
            raise ConfigError("torch.compile", "cannot compile the loss here (no compiler)", "Get one")
        return Theirs(process, recipe)

    monkeypatch.setattr(step, "Theirs", theirs)
    figures = step.run(small, rounds=1, steps=1, torch_compile=True)
    text = "torch.compile: cannot compile the loss here (no compiler). Get one."
    assert figures["failed"] == {"torch.compile (passive)": text}
    assert f"torch.compile (passive) is left out. {text}" in capsys.readouterr().out


@pytest.mark.thorough
def test_compiled_step(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "of_each_policy", OF_EACH_POLICY)  # one process would be one training
    monkeypatch.setattr(peer, "POLICIES", ("passive",))
    figures = step.run(small, rounds=1, steps=3, torch_compile=True)
    assert figures["failed"] == {}
    losses = {side["last_loss"] for side in figures["sides"].values() if "last_loss" in side}
    assert max(losses) - min(losses) < 1e-4
