"""Training lowers the loss, logs what it did, and gives the bits of its seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import dataset, fresh_gpt, records, train_config, trained

import minitransformer as mt
from minitransformer.checkpoint import RunFolder


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "noam", "warmup_stable_decay"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_every_optimizer_lowers_the_loss_on_every_schedule(optimizer: str, schedule: str, tmp_path: Path) -> None:
    _, result = trained(
        out_dir=tmp_path / "run",
        optimizer=optimizer,
        schedule=schedule,
        learning_rate=0.3 if optimizer == "sgd" else 0.02,
        max_steps=25,
        weight_decay=0.01,
    )
    lines = records(tmp_path / "run")
    assert math.log(20) - 0.1 < lines[0]["loss"] < math.log(20) + 0.1
    assert result.loss < lines[0]["loss"] - 0.4
    assert result.val_loss < lines[0]["loss"] - 0.4


@pytest.mark.parametrize("extra", [{"l1": 1e-4}, {"label_smoothing": 0.1}, {"grad_accumulation_steps": 2}])
def test_other_terms_of_the_objective_train_too(extra: dict[str, Any]) -> None:
    _, plain = trained(max_steps=20)
    _, result = trained(max_steps=20, **extra)
    assert result.val_loss < math.log(20) - 0.3
    assert result.val_loss != plain.val_loss


def test_l1_makes_weights_smaller() -> None:
    plain, _ = trained(weight_decay=0.0)
    sparse, _ = trained(weight_decay=0.0, l1=0.01)
    weights = [sum(abs(p.data).sum() for p in t.model.parameters() if p.ndim == 2) for t in (plain, sparse)]
    assert weights[1] < weights[0]


def test_a_module_trains_at_its_configured_rate_and_logs_what_it_did(tmp_path: Path) -> None:
    trainer, result = trained(out_dir=tmp_path / "run", eval_interval=5)
    lines, schedule = records(tmp_path / "run"), trainer.config.learning_rate_schedule()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["lr"] for line in lines] == [schedule(step) for step in range(12)]
    assert [line["step"] for line in lines if "val_loss" in line] == [5, 10, 12]
    assert (result.steps, result.reason) == (12, "finished")
    assert (result.loss, result.val_loss) == (lines[-1]["loss"], lines[-1]["val_loss"])
    assert result.best_val_loss == min(line["val_loss"] for line in lines if "val_loss" in line)
    timings = records(tmp_path / "run", "timings.jsonl")
    assert [line["step"] for line in timings] == list(range(1, 13))
    for line in timings:
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(6 * 8)


def test_without_evaluation_data_nothing_is_judged(tmp_path: Path) -> None:
    _, result = trained(judged=False, out_dir=tmp_path / "run")
    assert (result.val_loss, result.best_val_loss) == (None, None)
    assert not (tmp_path / "run" / "best.json").exists()


def test_no_steps_are_a_run_with_a_first_checkpoint(tmp_path: Path) -> None:
    _, result = trained(out_dir=tmp_path / "run", max_steps=0)
    assert (result.steps, result.reason, result.val_loss) == (0, "finished", None)
    assert math.isnan(result.loss)
    assert RunFolder.open(tmp_path / "run").load("last").step == 0


def test_the_bits_are_those_of_the_seed_not_of_the_threads(tmp_path: Path) -> None:
    def bits(name: str, **settings: Any) -> tuple[bytes, ...]:
        trainer = mt.Trainer(
            fresh_gpt(dropout=0.2), train_config(out_dir=tmp_path / name, **settings), dataset(), dataset(1)
        )
        trainer.train()
        files = RunFolder.open(tmp_path / name).load("last").folder
        return (
            (files / "model.safetensors").read_bytes(),
            (files / "optimizer.safetensors").read_bytes(),
            (tmp_path / name / "metrics.jsonl").read_bytes(),
        )

    one = bits("1", threads=1)
    assert bits("2", threads=2) == bits("3", threads=3) == one
    assert bits("other seed", seed=1)[0] != one[0]


def test_other_shards_differ_by_rounding_only() -> None:
    def weights(shards: int) -> np.ndarray:
        model = fresh_gpt(dropout=0.2)
        model.to("float64")
        trainer = mt.Trainer(model, train_config(shards=shards, optimizer="sgd"), dataset())
        trainer.train()
        return trainer.optimizer.flat.data

    expected = weights(1)
    for shards in (2, 4, 5):
        np.testing.assert_allclose(weights(shards), expected, rtol=1e-9, atol=1e-12)


def test_every_accumulated_batch_of_every_step_is_read_once() -> None:
    class Counted:
        def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
            asked.append((seed, step, batch_size))
            return dataset().batch(seed, step, batch_size)

    asked: list[tuple[int, int, int]] = []
    config = train_config(max_steps=3, grad_accumulation_steps=2, seed=7)
    mt.Trainer(fresh_gpt(), config, Counted()).train()  # type: ignore[arg-type]
    assert asked == [(7, number, 6) for number in range(6)]
