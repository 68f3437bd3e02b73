"""Training on a device, here the simulated one: the numbers of the CPU, nothing read before it must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.data import TokenDataset
from minitransformer.errors import ConfigError, DeviceError, NonFiniteError
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.models import GPT, GPTConfig
from minitransformer.threads import Workers
from minitransformer.training import TrainConfig, Trainer
from minitransformer.training.step import StepResult, TrainStep, make_optimizer

CONFIG = GPTConfig(5, 4, 1, 1, 4, attention="linear")
TRAIN = TrainConfig(
    max_steps=3,
    batch_size=2,
    shards=1,
    schedule="constant",
    warmup_steps=0,
    eval_interval=3,
    eval_batches=1,
    progress=False,
    grad_clip=0.5,
)


def data() -> TokenDataset:
    return TokenDataset(np.random.default_rng(1).integers(0, 5, 40), 4)


def model() -> GPT:
    mt.manual_seed(3)
    return GPT(CONFIG)


def train(device: str, out_dir: Path | None = None, resume: bool = False, **changed: Any) -> tuple[GPT, Any, list[Any]]:
    """The model after training, the result, and the records of all steps."""
    records: list[Any] = []

    class Keep:
        def on_start(self, trainer: Any, step: int) -> None: ...
        def on_step(self, trainer: Any, record: Any, timing: Any) -> None:
            records.append(record)

        def on_save(self, trainer: Any, step: int) -> None: ...
        def on_end(self, trainer: Any, result: Any) -> None: ...

    config = replace(TRAIN, device=device, out_dir=None if out_dir is None else str(out_dir), **changed)
    trained = model()
    result = Trainer(trained, config, data(), data(), callbacks=[Keep()]).train(resume=resume)
    return trained, result, records


def test_a_training_on_the_device_is_that_on_the_cpu_to_rounding() -> None:
    (ours, _, on_gpu), (theirs, _, on_cpu) = train("simulator"), train("cpu")
    assert {p.device for p in ours.parameters()} == {"simulator"}
    assert [list(r) for r in on_gpu] == [list(r) for r in on_cpu] and [r["step"] for r in on_gpu] == [1, 2, 3]
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, array in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], array, atol=2e-5)


def test_losses_are_read_some_at_a_time_and_logged_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitransformer.training.trainer._READ_EVERY", 2)
    read: list[int] = []
    original = TrainStep.read

    def record(self: TrainStep, results: Any, last_step: int) -> Any:
        read.append(len(results))
        return original(self, results, last_step)

    monkeypatch.setattr(TrainStep, "read", record)
    _, _, records = train("simulator", max_steps=5, eval_interval=5)
    assert read == [2, 2, 1] and [r["step"] for r in records] == [1, 2, 3, 4, 5]


def test_batches_are_accumulated_as_on_the_cpu() -> None:
    (_, _, on_gpu), (_, _, on_cpu) = (
        train(device, grad_accumulation_steps=2, max_steps=1, eval_interval=1) for device in ("simulator", "cpu")
    )
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-4)


def test_a_norm_that_is_not_finite_is_named_too() -> None:
    config = replace(TRAIN, device="simulator")
    mine = model()
    mine.to("simulator")
    with Workers(1) as workers:
        step = TrainStep(mine, make_optimizer(mine, config), config, workers)
    good, bad = (StepResult(gpu(np.float32(1)), gpu(np.float64(norm)), 3) for norm in (1e39, np.inf))
    assert step.read([good], 1) == [StepResult(1.0, 1e39, 3)]  # beyond float32, and finite
    with pytest.raises(NonFiniteError, match=r"the norm of the gradient is inf at step 7\."):
        step.read([good, bad], 7)


def gpu(number: Any) -> SimulatedArray:
    return SimulatedArray(np.asarray(number))


def test_a_step_reads_nothing_from_the_device() -> None:
    config = replace(TRAIN, device="simulator")
    mine = model()
    mine.to("simulator")
    with Workers(1) as workers:
        step = TrainStep(mine, make_optimizer(mine, config), config, workers)
        before = SimulatedArray.synchronisations
        results = [step([data().batch(0, index, 2)], index) for index in range(2)]
        assert SimulatedArray.synchronisations == before
        first, second = step.read(results, 2)
        assert SimulatedArray.synchronisations == before + 1
    assert np.isfinite([first.loss, first.grad_norm, second.loss]).all() and first.targets == 8


def test_a_loss_that_is_not_finite_is_named_with_its_step_when_it_is_read() -> None:
    config = replace(TRAIN, device="simulator")
    mine = model()
    mine.wte.weight.data = np.full((5, 4), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 1\. .*resume on the CPU, which names the op"):
        Trainer(mine, config, data()).train()


def test_a_run_moves_between_devices(tmp_path: Path) -> None:
    train("simulator", tmp_path / "run", max_steps=2, eval_interval=2)
    resumed, result, _ = train("cpu", tmp_path / "run", resume=True, max_steps=3, eval_interval=2)
    whole, _, _ = train("cpu", max_steps=3, eval_interval=2)
    assert result.steps == 3
    for name, array in whole.state_dict().items():
        np.testing.assert_allclose(resumed.state_dict()[name], array, atol=2e-5)
    again, result, _ = train("simulator", tmp_path / "run", resume=True, max_steps=4, eval_interval=2)
    assert result.steps == 4 and again.wte.weight.device == "simulator"


def test_a_model_that_is_elsewhere_is_not_moved_unasked() -> None:
    elsewhere = model()
    elsewhere.to("simulator")
    problem = r"Trainer: the model is on 'simulator', the config says 'cpu'\. Say device="
    with pytest.raises(DeviceError, match=problem):
        Trainer(elsewhere, TRAIN, data())


def test_gradients_are_checked_on_the_cpu_alone() -> None:
    with pytest.raises(ConfigError, match="check_grads_every takes complex steps, which are for the CPU"):
        Trainer(model(), replace(TRAIN, device="simulator", check_grads_every=1), data())


def test_generation_is_that_of_the_cpu() -> None:
    on_cpu, on_gpu = model(), model()
    on_gpu.to("simulator")
    ids = np.array([[1, 4], [2, 0]])
    expected = on_cpu.generate(ids, max_new_tokens=2)
    assert np.array_equal(on_gpu.generate(ids, max_new_tokens=2), expected)
    assert np.array_equal(on_gpu.generate(ids, max_new_tokens=2, use_cache=False), expected)
