"""Resuming: a run that was stopped and resumed is, byte for byte, the run that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BLOCK, V, dataset, fresh_gpt, train_config

import minitransformer as mt
from minitransformer.checkpoint import RunFolder
from minitransformer.data.batches import TokenDataset
from minitransformer.errors import CheckpointError, ConfigError
from minitransformer.training import Callback, TrainResult

GPT = {"dropout": 0.2}


class Killed(BaseException):
    """Stands for whatever ends a process in the middle."""


class Stop(Callback):
    """Ends the run at a step: by Ctrl-C, or as a kill would, after the log line or after the checkpoint."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if record["step"] == self.step:
            if self.how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.how == "kill after the log":
                raise Killed

    def on_save(self, trainer: Any, step: int) -> None:
        if self.how == "kill after the checkpoint" and step >= self.step:
            raise Killed


def run(
    folder: Path, *callbacks: Callback, resume: bool = False, gpt: dict[str, Any] = GPT, **changes: Any
) -> TrainResult | None:
    """Train in `folder`; None if it was killed."""
    trainer = mt.Trainer(fresh_gpt(**gpt), train_config(out_dir=folder, **changes), dataset(), dataset(1), callbacks)
    try:
        return trainer.train(resume)
    except Killed:
        return None


def files(folder: Path) -> dict[str, bytes]:
    """What must be equal: all of the last and the best checkpoint, and the log of metrics."""
    opened = RunFolder.open(folder)
    found = {"metrics.jsonl": (folder / "metrics.jsonl").read_bytes()}
    for which in ("last", "best"):
        for path in opened.load(which).folder.iterdir():
            found[f"{which}/{path.name}"] = path.read_bytes()
    assert {"last/model.safetensors", "last/optimizer.safetensors", "best/trainer.json"} <= set(found)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return files(folder)


HOW = st.sampled_from(["interrupt", "kill after the log", "kill after the checkpoint"])


@settings(max_examples=12)
@given(
    stops=st.lists(st.tuples(st.integers(1, 11), HOW), min_size=1, max_size=3),
    threads=st.lists(st.integers(1, 3), min_size=4, max_size=4),
)
def test_stopped_and_resumed_equals_uninterrupted_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory,
    uninterrupted: dict[str, bytes],
    stops: list[tuple[int, str]],
    threads: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    for nth, (step, how) in enumerate(stops):
        run(folder, Stop(step, how), resume=nth > 0, threads=threads[nth])
    result = run(folder, resume=True, threads=threads[3])
    assert result is not None
    assert (result.steps, result.reason) == (12, "finished")
    assert files(folder) == uninterrupted
    assert [step.name for step in (folder / "checkpoints").iterdir()] == ["step-00000012"]


VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "sgd without momentum": {"optimizer": "sgd", "betas": (0.0, 0.9)},
    "accumulation": {"grad_accumulation_steps": 2, "batch_size": 3},
    "objective": {"l1": 1e-3, "label_smoothing": 0.1, "grad_clip": 0.1},
    "linear": {"schedule": "linear"},
    "noam": {"schedule": "noam", "seed": 5},
    "shards": {"shards": 4, "batch_size": 5},
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("how", ["interrupt", "kill after the log", "kill after the checkpoint"])
def test_every_number_of_threads_resumes(
    how: str, threads: int, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    run(tmp_path / "run", Stop(7, how), threads=threads)
    run(tmp_path / "run", resume=True, threads=threads)
    assert files(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_optimizer_and_schedule_resumes(changes: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "whole", **changes)
    run(tmp_path / "stopped", Stop(6, "kill after the log"), **changes)
    run(tmp_path / "stopped", resume=True, **changes)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_float64_resumes_in_float64_and_not_in_float32(tmp_path: Path) -> None:
    def double(folder: Path, *callbacks: Callback) -> mt.Trainer:
        model = fresh_gpt()
        model.to("float64")
        return mt.Trainer(model, train_config(out_dir=folder), dataset(), dataset(1), callbacks)

    double(tmp_path / "whole").train()
    double(tmp_path / "run", Stop(5, "interrupt")).train()
    with pytest.raises(ConfigError, match=r"^resume: the run was saved in float64, the model is float32"):
        run(tmp_path / "run", resume=True, gpt={})
    double(tmp_path / "run").train(resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_the_start_of_the_resumed_model_does_not_matter(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    run(tmp_path / "run", Stop(7, "interrupt"))
    mt.manual_seed(99)
    model = mt.GPT(fresh_gpt(**GPT).config)
    for parameter in model.parameters():
        parameter.data = np.full(parameter.shape, 7, np.float32)
    mt.Trainer(model, train_config(out_dir=tmp_path / "run"), dataset(), dataset(1)).train(resume=True)
    assert files(tmp_path / "run") == uninterrupted


def test_more_steps_go_on_where_the_shorter_run_ended(tmp_path: Path) -> None:
    constant = {"schedule": "constant", "eval_interval": 6}
    run(tmp_path / "whole", max_steps=12, **constant)
    run(tmp_path / "short", max_steps=6, **constant)
    result = run(tmp_path / "short", resume=True, max_steps=12, **constant)
    assert result is not None
    assert result.steps == 12
    assert files(tmp_path / "short") == files(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = run(tmp_path / "run", resume=True)
    assert first is not None
    assert result is not None
    assert (result.steps, result.reason, result.best_val_loss) == (12, "finished", first.best_val_loss)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_fewer_steps_than_are_done_do_nothing(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = files(tmp_path / "run")
    result = run(tmp_path / "run", resume=True, max_steps=4)
    assert result is not None
    assert result.steps == 12
    assert files(tmp_path / "run") == before


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    early = {"learning_rate": 0.0, "min_learning_rate": 0.0, "early_stopping_patience": 1}
    first = run(tmp_path / "run", **early)
    assert first is not None
    assert (first.steps, first.reason) == (8, "early stopping")
    again = run(tmp_path / "run", resume=True, **early)
    assert again is not None
    assert (again.steps, again.reason) == (8, "early stopping")


def test_patience_is_counted_across_a_resume(tmp_path: Path) -> None:
    early = {"learning_rate": 0.0, "min_learning_rate": 0.0, "early_stopping_patience": 2}
    run(tmp_path / "run", Stop(8, "interrupt"), **early)
    result = run(tmp_path / "run", resume=True, **early)
    assert result is not None
    assert (result.steps, result.reason) == (12, "early stopping")


def test_a_kill_before_the_first_step_leaves_something_to_resume(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    run(tmp_path / "run", Stop(0, "kill after the checkpoint"))
    run(tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted


def test_callbacks_start_at_the_step_they_resume_from(tmp_path: Path) -> None:
    class Start(Callback):
        def on_start(self, trainer: Any, step: int) -> None:
            steps.append(step)

    steps: list[int] = []
    run(tmp_path / "run", Start(), Stop(7, "kill after the log"))
    run(tmp_path / "run", Start(), resume=True)
    assert steps == [0, 5]


# --- refusals --------------------------------------------------------------------------------------------

CHANGED: dict[str, tuple[Any, str]] = {
    "batch_size": (4, "batch_size (saved 6, now 4)"),
    "learning_rate": (0.02, "learning_rate (saved 0.01, now 0.02)"),
    "min_learning_rate": (0.0, "min_learning_rate (saved 0.001, now 0.0)"),
    "warmup_steps": (3, "warmup_steps (saved 2, now 3)"),
    "schedule": ("linear", "schedule (saved 'cosine', now 'linear')"),
    "optimizer": ("sgd", "optimizer (saved 'adamw', now 'sgd')"),
    "betas": ((0.8, 0.99), "betas (saved [0.9, 0.99], now [0.8, 0.99])"),
    "weight_decay": (0.0, "weight_decay (saved 0.1, now 0.0)"),
    "l1": (0.1, "l1 (saved 0.0, now 0.1)"),
    "grad_clip": (2.0, "grad_clip (saved 1.0, now 2.0)"),
    "grad_accumulation_steps": (2, "grad_accumulation_steps (saved 1, now 2)"),
    "label_smoothing": (0.1, "label_smoothing (saved 0.0, now 0.1)"),
    "eval_interval": (3, "eval_interval (saved 4, now 3)"),
    "eval_batches": (3, "eval_batches (saved 2, now 3)"),
    "early_stopping_patience": (3, "early_stopping_patience (saved None, now 3)"),
    "seed": (1, "seed (saved 0, now 1)"),
    "shards": (2, "shards (saved 3, now 2)"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, Stop(7, "interrupt"))
    return folder


@pytest.mark.parametrize(("name", "value", "message"), [(n, *v) for n, v in CHANGED.items()], ids=CHANGED)
def test_a_changed_setting_is_refused_by_name(stopped: Path, name: str, value: Any, message: str) -> None:
    before = files(stopped)
    with pytest.raises(ConfigError) as error:
        run(stopped, resume=True, **{name: value})
    assert str(error.value) == (f"resume: the settings are not those of the run: {message}. Resume with the same ones.")
    assert files(stopped) == before


def test_every_setting_is_either_fixed_or_free() -> None:
    free = {"out_dir", "max_steps", "threads", "progress", "save_interval", "device"}
    assert set(mt.TrainConfig.__dataclass_fields__) == free | set(CHANGED)


def test_several_changed_settings_are_all_named(stopped: Path) -> None:
    with pytest.raises(ConfigError, match=r"run: l1 \(saved 0.0, now 0.1\), seed \(saved 0, now 2\). Resume"):
        run(stopped, resume=True, seed=2, l1=0.1)


def test_another_model_is_refused(stopped: Path) -> None:
    with pytest.raises(ConfigError, match=r"^resume: the model is not that of the run: saved .*'dropout': 0.2"):
        run(stopped, resume=True, gpt={"dropout": 0.1})


def test_other_data_are_refused(stopped: Path) -> None:
    trainer = mt.Trainer(fresh_gpt(**GPT), train_config(out_dir=stopped), dataset(5), dataset(1))
    with pytest.raises(ConfigError, match=r"^resume: the data is not that of the run: saved .*'seed': 0.*'seed': 5"):
        trainer.train(resume=True)


def test_a_source_with_tuples_is_recognised(tmp_path: Path) -> None:
    data = TokenDataset(np.arange(100) % V, BLOCK, source={"parts": (1, 2)})
    for resume in (False, True):
        mt.Trainer(fresh_gpt(), train_config(out_dir=tmp_path / "run"), data).train(resume)


def test_where_no_run_is_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no training run, looked for"):
        run(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(
        ConfigError, match=r"^resume: the config has no out_dir, expected the folder of a run. Set out_"
    ):
        mt.Trainer(fresh_gpt(), train_config(), dataset()).train(resume=True)


def test_a_damaged_checkpoint_is_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path / "run", Stop(7, "interrupt"))
    path = RunFolder.open(tmp_path / "run").load("last").folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors is damaged"):
        run(tmp_path / "run", resume=True)
