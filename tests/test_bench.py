"""Benchmarks measure what they say: the step is Trainer's, the peer does the same work, nothing is left behind."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_bench import small_recipe

from minitransformer.bench import Recipe, harness, peer, report, step, time_to_loss
from minitransformer.bench.harness import OURS
from minitransformer.bench.recipe import Ours, Theirs
from minitransformer.errors import ConfigError, MissingExtraError
from minitransformer.threads import Workers, single_threaded_blas
from minitransformer.training import Callback, Trainer
from minitransformer.training.callbacks import Training


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe(tmp_path)


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
    def side(*ms: float) -> list[list[float]]:
        return [[9.0, 9.0], *([t / 1000, t / 1000] for t in ms)]  # the first block warms up

    seconds = {OURS: side(2, 4, 6), "torch (default)": side(9, 9, 9), "torch (passive)": side(1, 4, 12)}
    found = harness.compare({**seconds, "GEMM only": side(0, 0, 0)})
    assert found["peer"] == "torch (passive)"
    assert math.isclose(found["ratio"], 1.0)
    assert found["ratio_quartiles"] == pytest.approx([0.75, 1.5])  # of 0.5, 1, 2
    assert found["ratios"]["torch (default)"]["ratio"] == pytest.approx(4 / 9)
    assert harness.milliseconds(seconds[OURS]) == pytest.approx({"min": 2, "q1": 2.5, "median": 4, "q3": 5.5})
    assert harness.compare({OURS: seconds[OURS]}) == {}


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PAUSE", 0)
    calls: list[tuple[str, int]] = []
    sides = {name: lambda block, name=name: calls.append((name, block)) for name in "ab"}
    assert harness.alternate("bench", sides, 2) == {"a": [None] * 3, "b": [None] * 3}
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 1), (0.02, 5), (1e-6, 50), (0.0, 50)])
def test_blocks_last_about_as_long(seconds: float, count: int) -> None:
    asked: list[int] = []

    def time_calls(count: int) -> list[float]:
        asked.append(count)
        return [seconds] * count

    block = harness.paced(time_calls)
    assert [len(block(index)) for index in range(3)] == [1, count, count]
    assert asked == [1, 1, count, count]  # the very first call, which compiles, is not counted at all


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
    figures = step.run(recipe, rounds=2, steps=2, torch_compile=True, torch_processes=True, json_path=path)
    assert list(figures["sides"]) == [OURS, step.GEMM]
    assert json.loads(path.read_text(encoding="utf-8")) == figures
    assert "ratio" not in figures
    figures = time_to_loss.run(recipe, steps=6)
    assert [point["step"] for point in figures["curves"][OURS]] == [4, 6]
    out = capsys.readouterr().out
    assert out.count('pip install "minitransformer[peers]"') == 2
    assert out.count("minitransformer  ") == 2


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"steps": 0}, {"steps": True}])
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
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The processes started inside; none may outlive the block."""
    started: list[Any] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.environment = kwargs["env"]
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
        peer.process() as process,
    ):
        Theirs(process, recipe)


def test_the_process_finds_its_waiting_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "installed", lambda: True)
    monkeypatch.setenv("KMP_BLOCKTIME", "infinite")  # would decide for both
    with watched(monkeypatch) as started, ExitStack() as stack:
        assert list(peer.of_each_policy(stack)) == ["torch (default)", "torch (passive)"]
    environments = [child.environment for child in started]
    assert [environment.get("OMP_WAIT_POLICY") for environment in environments] == [None, "passive"]
    assert not any("KMP_BLOCKTIME" in environment for environment in environments)


def test_what_goes_wrong_there_is_raised_here() -> None:
    with peer.process() as process, pytest.raises(ConfigError, match="TrainConfig: shards is 0, expected"):
        process.make("memory of our step", recipe={"train": {"shards": 0}}, threads=1)


def test_ctrl_c_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch), pytest.raises(KeyboardInterrupt), peer.process():
        raise KeyboardInterrupt
