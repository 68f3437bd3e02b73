"""The loop: it judges, stops, reports, and leaves the process as it found it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import dataset, fresh_gpt, records, train_config, trained

import minitransformer as mt
from minitransformer.checkpoint import RunFolder
from minitransformer.errors import CheckpointError, NonFiniteError
from minitransformer.training import Callback, TrainResult


class Recorder(Callback):
    """Writes down what is called, under its name."""

    def __init__(self, name: str = "", calls: list[Any] | None = None) -> None:
        self.name, self.calls = name, [] if calls is None else calls

    def on_start(self, trainer: Any, step: int) -> None:
        self.calls.append((self.name, "start", step))

    def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
        self.calls.append((self.name, "step", record["step"]))

    def on_save(self, trainer: Any, step: int) -> None:
        self.calls.append((self.name, "save", step))

    def on_end(self, trainer: Any, result: TrainResult) -> None:
        self.calls.append((self.name, "end", result.reason))


class At(Callback):
    """Does something after one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if record["step"] == self.step:
            self.action(trainer)


# --- judging ---------------------------------------------------------------------------------------------


class Scripted(mt.Trainer):
    """A trainer whose validation losses are given."""

    def __init__(self, losses: list[float], config: mt.TrainConfig, callbacks: Any = ()) -> None:
        super().__init__(fresh_gpt(), config, dataset(), dataset(1), callbacks)
        self.losses = iter(losses)

    def _evaluate(self, workers: Any, step: int) -> float:
        return next(self.losses)


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    calls: list[Any] = []
    config = train_config(out_dir=tmp_path / "run", eval_interval=2, save_interval=100)
    result = Scripted([3.0, 2.0, 2.5, 2.0, 2.1, 2.2], config, [Recorder(calls=calls)]).train()
    assert result.best_val_loss == 2.0
    run = RunFolder.open(tmp_path / "run")
    assert (run.load("best").step, run.load("last").step) == (4, 12)
    assert [step for _, what, step in calls if what == "save"] == [0, 2, 4, 12]
    assert json.loads((run.load("last").folder / "trainer.json").read_text())["best_val_loss"] == 2.0


@pytest.mark.parametrize(
    ("patience", "steps", "reason"), [(1, 4, "early stopping"), (2, 10, "early stopping"), (4, 12, "finished")]
)
def test_training_stops_after_so_many_evaluations_without_a_better_loss(
    patience: int, steps: int, reason: str, tmp_path: Path
) -> None:
    config = train_config(out_dir=tmp_path / "run", eval_interval=2, early_stopping_patience=patience)
    result = Scripted([2.0, 2.1, 1.9, 1.95, 1.95, 1.95][: steps // 2 + 1], config).train()
    assert (result.steps, result.reason, len(records(tmp_path / "run"))) == (steps, reason, steps)
    assert RunFolder.open(tmp_path / "run").load("last").step == steps


# --- numbers that are not finite -------------------------------------------------------------------------


def poison(trainer: mt.Trainer) -> None:
    trainer.model.norm.weight.data = np.full(16, math.nan)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    calls = Recorder()
    with pytest.raises(NonFiniteError) as error:
        trained([At(7, poison), calls], out_dir=tmp_path / "run", judged=False)
    assert str(error.value) == (
        "train: the loss is nan at step 8: layer_norm in norm is given nan that no op made, in weight, parameter "
        "norm.weight (x: float32 (2, 8, 16) from -0.2439 to 0.2844; weight, parameter norm.weight: float32 (16,), "
        "16 nan; bias, parameter norm.bias: float32 (16,) from -0.04433 to 0.03443); rows 0 to 1 of the batch. "
        f"See it with `minitransformer inspect {tmp_path / 'run' / 'bad-op-step-8.npz'}`. The last checkpoint is kept. "
        "Start again with a lower learning rate or a longer warm-up."
    )
    assert calls.calls[-1] == ("", "end", "failed")
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, 8))
    assert RunFolder.open(tmp_path / "run").load("last").step == 5
    assert np.isfinite(mt.from_pretrained(tmp_path / "run").norm.weight.data).all()


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"^train: the parameter norm.weight is not finite after step 5. The last"):
        trained([At(5, poison)], out_dir=tmp_path / "run", judged=False)
    assert RunFolder.open(tmp_path / "run").load("last").step == 0


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    spoil = At(3, lambda trainer: setattr(trainer, "eval_data", Poisoned(trainer.model)))
    with pytest.raises(
        NonFiniteError,
        match=r"^train: the validation loss is nan after step 4: layer_norm in norm is given nan .*; rows 0 to 5 of ",
    ):
        trained([spoil], out_dir=tmp_path / "run", eval_interval=1, save_interval=1)
    assert RunFolder.open(tmp_path / "run").load("last").step == 3


class Poisoned:
    """Evaluation data that spoils the model before it is read."""

    def __init__(self, model: mt.GPT) -> None:
        self.model = model

    def sequential(self, batch_size: int) -> Any:
        self.model.norm.weight.data = np.full(16, math.nan)
        return dataset(1).sequential(batch_size)


def test_a_rate_far_too_high_ends_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="Start again with a lower learning rate or a longer warm-up"):
        trained(optimizer="sgd", learning_rate=1e30, warmup_steps=0, grad_clip=0, out_dir=tmp_path / "run")
    assert all(np.isfinite(p.data).all() for p in mt.from_pretrained(tmp_path / "run").parameters())


# --- callbacks and progress ------------------------------------------------------------------------------


def test_callbacks_are_called_in_their_order(tmp_path: Path) -> None:
    calls: list[Any] = []
    trained([Recorder("a", calls), Recorder("b", calls)], out_dir=tmp_path / "run", max_steps=3, save_interval=2)
    events = [("start", 0), ("save", 0), ("step", 1), ("step", 2), ("save", 2), ("step", 3), ("save", 3)]
    assert calls == [(name, *event) for event in [*events, ("end", "finished")] for name in "ab"]


def test_what_was_saved_can_be_loaded_when_told(tmp_path: Path) -> None:
    class Reader(Callback):
        def on_save(self, trainer: Any, step: int) -> None:
            loaded.append(RunFolder.open(tmp_path / "run").load("last").step)
            assert step == 0 or len(records(tmp_path / "run")) == step

    loaded: list[int] = []
    trained([Reader()], out_dir=tmp_path / "run", judged=False)
    assert loaded == [0, 5, 10, 12]


def test_an_error_in_a_callback_ends_the_run_as_failed(tmp_path: Path) -> None:
    def fail(trainer: Any) -> None:
        raise OSError("no more paper")

    before = signal.getsignal(signal.SIGINT)
    recorder = Recorder()
    with pytest.raises(OSError, match="paper"):
        trained([At(3, fail), recorder], out_dir=tmp_path / "run")
    assert recorder.calls[-1] == ("", "end", "failed")
    assert signal.getsignal(signal.SIGINT) is before


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


NUMBERS = r"loss \d\.\d{4}(, val loss \d\.\d{4})?, lr \d\.\d\de-0\d, grad norm \d(\.\d+)?, [\d,]+ tokens/s"


def test_progress_is_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    trained(progress=True, max_steps=60, eval_interval=25)
    lines = stream.getvalue().splitlines()
    assert all(re.fullmatch(rf"step \d+/60: {NUMBERS}, \d+:\d\d left", line) for line in lines), lines
    steps = [int(re.match(r"step (\d+)", line)[1]) for line in lines]  # type: ignore[index]
    assert steps == sorted({*range(3, 61, 3), 25, 50, 60})
    assert [step for step, line in zip(steps, lines, strict=True) if "val loss" in line] == [25, 50, 60]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    trained(progress=True)
    last = stream.getvalue().split("\r")[-1]
    assert re.match(
        r"100%\|.{4}\| 12/12 00:00, loss \d\.\d{3} val \d\.\d{3} lr \d\.\de-0\d norm \d+\.\d [\d.]+k tok/s", last
    )
    assert len(last.strip()) <= 80
    assert last.endswith("\n")  # closed


def test_quiet_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    trained()
    assert capfd.readouterr() == ("", "")


# --- folders and interrupts ------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(out_dir=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"already holds a run. Use `minitransformer resume {run}`"):
        trained(out_dir=run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def interrupt(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_finishes_the_step_saves_and_returns(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    recorder = Recorder()
    _, result = trained([At(7, interrupt), recorder], out_dir=tmp_path / "run")
    assert (result.steps, result.reason) == (7, "interrupted")
    assert RunFolder.open(tmp_path / "run").load("last").step == 7
    assert len(records(tmp_path / "run")) == 7
    assert recorder.calls[-1] == ("", "end", "interrupted")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_at_the_last_step_is_a_finished_run() -> None:
    _, result = trained([At(12, interrupt)])
    assert (result.steps, result.reason) == (12, "finished")


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        trained([At(7, interrupt), At(7, interrupt), recorder], out_dir=tmp_path / "run")
    assert recorder.calls[-1] == ("", "end", "failed")
    assert RunFolder.open(tmp_path / "run").load("last").step == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_than_the_main_one_installs_no_handler() -> None:
    handlers: list[Any] = []
    results: list[TrainResult] = []

    def train() -> None:
        results.append(trained([At(3, lambda t: handlers.append(signal.getsignal(signal.SIGINT)))])[1])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert handlers == [before]
    assert results[0].reason == "finished"


def test_training_leaves_no_gradients_and_no_threads() -> None:
    before = threading.active_count()
    trainer, _ = trained(threads=3)
    assert threading.active_count() == before
    assert all(p.grad is None for p in trainer.model.parameters())
