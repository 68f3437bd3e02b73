"""Benchmarks measure what they say: the step is Trainer's, the peer does the same work, nothing is left behind."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitransformer.bench import Recipe, peer, report, step, time_to_loss
from minitransformer.bench.recipe import Block, Ours
from minitransformer.errors import ConfigError, MissingExtraError
from minitransformer.threads import Workers, single_threaded_blas
from minitransformer.training import Callback, TrainConfig, Trainer
from minitransformer.training.callbacks import Training


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} has {n * n} in it\n" for n in range(200)), encoding="utf-8")
    train = TrainConfig(batch_size=5, warmup_steps=2, eval_interval=4, seed=3, learning_rate=1e-2, progress=False)
    return Recipe(str(text), n_layer=1, n_head=2, n_embd=16, block_size=8, train=train)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "installed", lambda: False)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, trainer: Training, record: dict[str, Any], timing: dict[str, Any]) -> None:
        self.losses.append(record["loss"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_our_side_is_the_trainer_bit_for_bit(recipe: Recipe, accumulation: int) -> None:
    recipe = replace(recipe, train=replace(recipe.train, max_steps=6, grad_accumulation_steps=accumulation))
    model, train, validation = recipe.build()
    record = Losses()
    Trainer(model, recipe.train, train, validation, [record]).train()
    with single_threaded_blas(), Workers(2) as workers:
        ours = Ours(recipe, workers)
        first, rest = ours.steps(0, 2), ours.steps(2, 4)
    assert first.losses + rest.losses == record.losses
    assert len(first.seconds) == 2
    assert min(first.seconds + rest.seconds) > 0
    for name, array in model.state_dict().items():
        assert array.tobytes() == ours.model.state_dict()[name].tobytes()


def test_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_ratio_and_quartiles() -> None:
    def side(*ms: float) -> list[Block]:
        warm_up = Block([9.0, 9.0], [3.0, 2.5])
        return [warm_up, *(Block([t / 1000, t / 1000], [2.0, 1.0]) for t in ms)]

    results = {step.OURS: side(2, 4, 6), "torch (default)": side(9, 9, 9), "torch (passive)": side(1, 4, 12)}
    found = step._comparison(results)
    assert found["peer"] == "torch (passive)"
    assert math.isclose(found["ratio"], 1.0)
    assert found["ratio_quartiles"] == pytest.approx([0.75, 1.5])  # of 0.5, 1, 2
    summary = step._summary(results[step.OURS])
    assert summary == pytest.approx(
        {"min_ms": 2, "q1_ms": 2.5, "median_ms": 4, "q3_ms": 5.5, "first_loss": 3, "last_loss": 1}
    )


def test_table_is_aligned() -> None:
    lines = report.table(["ms", "a", "median"], [["ours", "10.0", "1"], ["x", "2", "100.25"]]).splitlines()
    assert lines == ["ms       a  median", "ours  10.0       1", "x        2  100.25"]


def test_machine_says_what_computes() -> None:
    facts = report.machine()
    assert set(facts) == {"processor", "cores", "threads", "system", "python", "blas", "numpy", "numba", "torch"}
    assert facts["cores"] >= 1
    assert facts["processor"] in report.describe(facts)
    json.dumps(facts)


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with report.progress(25, "bench", "block") as advance:
        for _ in range(25):
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bench: block 2/25"
    assert lines[-1] == "bench: block 25/25"
    assert len(lines) == 13


@pytest.mark.usefixtures("no_torch")
def test_without_torch(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    figures = step.run(recipe, blocks=2, steps=2, json_path=path)
    assert list(figures["sides"]) == [step.OURS]
    assert json.loads(path.read_text(encoding="utf-8")) == figures
    assert "ratio" not in figures
    figures = time_to_loss.run(recipe, steps=6)
    assert [point["step"] for point in figures["curves"][step.OURS]] == [4, 6]
    out = capsys.readouterr().out
    assert out.count('pip install "minitransformer[peers]"') == 2
    assert out.count("minitransformer  ") == 2


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"steps": 0}, {"steps": True}])
def test_bad_counts(recipe: Recipe, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected an integer from 1"):
        step.run(recipe, **wrong)


@pytest.mark.usefixtures("no_torch")
def test_an_interrupted_training_is_no_figure(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    class Press(time_to_loss._Watch):
        def on_step(self, trainer: Training, record: dict[str, Any], timing: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(time_to_loss, "_Watch", Press)
    with pytest.raises(KeyboardInterrupt):
        time_to_loss.run(recipe, steps=6)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes started inside; none may outlive the block."""
    started: list[subprocess.Popen[str]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield started
    assert started
    assert all(process.returncode is not None for process in started)


def test_a_peer_that_does_not_come_up(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no torch today')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        watched(monkeypatch),
        pytest.raises(MissingExtraError, match="the PyTorch process ended with status"),
        peer.peer(recipe, "default"),
    ):
        pass


@pytest.mark.peers
def test_step_beside_torch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with watched(monkeypatch) as started:
        figures = step.run(recipe, blocks=2, steps=4)
    assert len(started) == 2
    sides = figures["sides"]
    assert list(sides) == [step.OURS, "torch (default)", "torch (passive)"]
    for side in sides.values():  # the same work: twelve steps lead to the same loss, lower than the first
        assert side["first_loss"] == pytest.approx(sides[step.OURS]["first_loss"], abs=1e-5)
        assert side["last_loss"] == pytest.approx(sides[step.OURS]["last_loss"], abs=1e-4)
        assert side["last_loss"] < side["first_loss"]
    assert figures["ratio"] == sides[step.OURS]["median_ms"] / sides[figures["peer"]]["median_ms"]
    assert f"x the time of {figures['peer']}" in capsys.readouterr().out


@pytest.mark.peers
def test_time_to_loss_beside_torch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peer, "POLICIES", ("passive",))
    monkeypatch.setattr(time_to_loss, "CHUNK", 3)
    path = tmp_path / "loss.json"
    with watched(monkeypatch):
        figures = time_to_loss.run(recipe, steps=10, json_path=path)
    ours, theirs = figures["curves"].values()
    assert [point["step"] for point in ours] == [point["step"] for point in theirs] == [4, 8, 10]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["val_loss"] == pytest.approx(other["val_loss"], abs=1e-4)
    assert abs(figures["loss_difference"]) < 1e-4
    assert ours[-1]["val_loss"] < ours[0]["val_loss"]
    assert json.loads(path.read_text(encoding="utf-8")) == figures


@pytest.mark.peers
def test_ctrl_c_ends_the_peer(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch), pytest.raises(KeyboardInterrupt), peer.peer(recipe, "passive"):
        raise KeyboardInterrupt
