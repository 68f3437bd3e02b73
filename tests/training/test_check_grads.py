"""The gradient of a live training, checked now and then: it is right, says so when it is not, and changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.autograd import OPS
from minitransformer.checkpoint import RunFolder
from minitransformer.errors import ConfigError, GradientError, NonFiniteError
from minitransformer.gradients import gradient_error
from tests.tiny import OPTIONS, dataset, fresh_gpt, gpt, records, token_ids, train_config, trained


def weights(run: Path) -> bytes:
    return (RunFolder.open(run).load("last").folder / "model.safetensors").read_bytes()


def test_the_error_is_logged_at_every_nth_step_and_nothing_else_changes(tmp_path: Path) -> None:
    trained(out_dir=tmp_path / "checked", check_grads_every=5)
    trained(out_dir=tmp_path / "plain")
    checked = records(tmp_path / "checked")
    assert [record["step"] for record in checked if "grad_error" in record] == [1, 6, 11]
    assert all(0 < record.pop("grad_error", 1e-9) < 1e-6 for record in checked)
    assert checked == records(tmp_path / "plain")
    assert weights(tmp_path / "checked") == weights(tmp_path / "plain")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float64", 1e-14)])
def test_every_kind_of_model_is_right_at_its_own_precision(option: str, dtype: str, limit: float) -> None:
    model = gpt(dtype, **OPTIONS[option])
    model.train()
    ids = token_ids(2, 6)

    def compute() -> mt.Tensor:
        from minitransformer import random

        with random.scope(3, 4):
            return model(ids, targets=ids).loss

    assert gradient_error(compute, model.parameters()) < limit


def test_a_wrong_backward_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = OPS["gpt_block"].backward

    def wrong(dout: np.ndarray, saved: object) -> tuple[np.ndarray, ...]:
        dx, *others = right(dout, saved)
        return dx, *(g * np.float32(1.01) for g in others)

    monkeypatch.setattr(OPS["gpt_block"], "backward", wrong)
    trained(out_dir=tmp_path / "run", check_grads_every=1, max_steps=2)
    assert all(record["grad_error"] > 1e-5 for record in records(tmp_path / "run"))


def test_parameters_and_their_gradients_stay() -> None:
    model = fresh_gpt()
    arrays = [p.data for p in model.parameters()]
    ids = token_ids(2, 6)
    model(ids, targets=ids).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    gradient_error(lambda: model(ids, targets=ids).loss, model.parameters(), directions=1)
    assert all(p.data is array for p, array in zip(model.parameters(), arrays, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_numbers_that_are_not_finite_are_the_steps_own_to_report(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"makes|is given"):
        trained(
            optimizer="sgd",
            learning_rate=1e30,
            warmup_steps=0,
            grad_clip=0,
            check_grads_every=1,
            out_dir=tmp_path / "run",
        )
    x = mt.Parameter(np.array([0.0]))
    with pytest.raises(GradientError, match=r"^gradient_error: the loss or its gradient is not finite\. See diagnose"):
        gradient_error(lambda: x.log().sum(), [x])


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_intervals_that_make_no_sense(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"check_grads_every is .*, expected a whole number of at least 1"):
        train_config(check_grads_every=value)


def test_a_trainer_of_another_loss_can_be_checked_too() -> None:
    losses = mt.Trainer(fresh_gpt(), train_config(check_grads_every=4, label_smoothing=0.2), dataset()).train()
    assert losses.reason == "finished"
