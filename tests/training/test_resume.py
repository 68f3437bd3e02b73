"""Resuming: a run that was stopped and resumed is, byte for byte, the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stopped import GPT, Never, Stop, files, run
from tiny import dataset, fresh_gpt, train_config

import minitransformer as mt
from minitransformer.errors import ConfigError
from minitransformer.training import Callback


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
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
    uninterrupted: dict[str, str],
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
def test_every_number_of_threads_resumes(how: str, threads: int, tmp_path: Path, uninterrupted: dict[str, str]) -> None:
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


def test_the_start_of_the_resumed_model_does_not_matter(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
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


def test_a_kill_before_the_first_step_leaves_something_to_resume(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    run(tmp_path / "run", Stop(0, "kill after the checkpoint"))
    run(tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    folder = tmp_path / "run"
    for resume in (False, True):
        assert run(folder, Never(), resume=resume) is None
        assert {path.name for path in folder.iterdir()} == {"run.json"}
    run(folder, Stop(7, "kill after the log"), resume=True)
    run(folder, resume=True)
    assert files(folder) == uninterrupted


def test_callbacks_start_at_the_step_they_resume_from(tmp_path: Path) -> None:
    class Start(Callback):
        def on_start(self, trainer: Any, step: int) -> None:
            steps.append(step)

    steps: list[int] = []
    run(tmp_path / "run", Start(), Stop(7, "kill after the log"))
    run(tmp_path / "run", Start(), resume=True)
    assert steps == [0, 5]
