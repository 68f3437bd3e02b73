"""GPT and its training against the same in PyTorch, in float64: logits, gradients of a step, fifty losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitransformer import manual_seed
from minitransformer.autograd import grad
from minitransformer.bench.torch_twin import Twin
from minitransformer.data import TokenDataset
from minitransformer.errors import ConfigError
from minitransformer.models import GPT, GPTConfig
from minitransformer.threads import Workers
from minitransformer.training import Callback, TrainConfig, Trainer, evaluate
from minitransformer.training.callbacks import Training

pytestmark = pytest.mark.peers

SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)
DEFAULT = GPTConfig(vocab_size=103, block_size=64, n_layer=4, n_head=4, n_embd=128)
STEPS = 50


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's optimizers import its compiler, which sets this variable for good if it is not set."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More gain nothing on arrays this small, and torch's wait for each other at full speed."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def double(config: GPTConfig, seed: int = 0) -> GPT:
    """A float64 model with no weight at its initial 0 or 1, so that no term of the formula vanishes."""
    manual_seed(seed)
    model = GPT(config)
    model.to("float64")
    random = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.02 * random.standard_normal(parameter.shape)
    return model


def text(config: GPTConfig, size: int) -> TokenDataset:
    """Tokens with something to learn: each is near the one before it."""
    walk = np.cumsum(np.random.default_rng(1).integers(-2, 4, size))
    return TokenDataset(walk % config.vocab_size, config.block_size)


@pytest.mark.parametrize("config", [SMALL, DEFAULT], ids=["small", "default"])
def test_logits_loss_and_gradients(config: GPTConfig) -> None:
    import torch

    model = double(config)
    twin = Twin(config, model.state_dict(), TrainConfig())
    batch = text(config, 1000).batch(0, 0, 3)
    batch["targets"][0, 2:5] = -100
    ours = model(**batch)
    loss = twin.loss(batch)
    # -100 belongs to the loss alone; shorter sequences than block_size use the first positions
    for T in (1, config.block_size - 1, config.block_size):
        logits = model(batch["input_ids"][:, :T]).logits.numpy()
        theirs = twin.logits(batch["input_ids"][:, :T]).detach().numpy()
        np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.loss.item(), loss.item(), rtol=0, atol=1e-12)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert list(names) == list(twin.parameters)
    expected = torch.autograd.grad(loss, list(twin.parameters.values()))
    for name, mine, theirs in zip(names, grad(ours.loss, parameters), expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=1e-12, err_msg=name)


class Losses(Callback):
    """Keeps what every step reported."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_step(self, trainer: Training, record: dict[str, Any], timing: dict[str, Any]) -> None:
        self.records.append(record)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SMALL, {"batch_size": 6, "grad_clip": 0.1}),
        (SMALL, {"batch_size": 5, "grad_clip": 0.1, "grad_accumulation_steps": 2}),
        (SMALL, {"batch_size": 5, "grad_clip": 0.0, "schedule": "linear", "betas": (0.8, 0.95), "weight_decay": 0.5}),
        (DEFAULT, {"batch_size": 2}),
    ],
    ids=["clipped", "accumulated", "unclipped", "default"],
)
def test_fifty_losses(config: GPTConfig, options: dict[str, Any]) -> None:
    train = TrainConfig(max_steps=STEPS, warmup_steps=10, learning_rate=3e-3, shards=4, progress=False, **options)
    data, validation = text(config, 5000), text(config, 300)
    model, record = double(config), Losses()
    twin = Twin(config, model.state_dict(), train)
    Trainer(model, train, data, validation, [record]).train()
    ours = [line["loss"] for line in record.records]
    parts = train.grad_accumulation_steps
    theirs = [
        twin([data.batch(train.seed, step * parts + part, train.batch_size) for part in range(parts)], step).item()
        for step in range(STEPS)
    ]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    assert ours[-1] < 0.9 * ours[0]  # it learned, so the steps mattered
    if train.grad_clip:
        assert any(line["grad_norm"] > train.grad_clip for line in record.records)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.data, twin.parameters[name].detach().numpy(), rtol=0, atol=1e-6)
    batches = list(validation.sequential(train.batch_size))
    with Workers(2) as workers:
        mine = evaluate(model, batches, workers)
    np.testing.assert_allclose(mine, twin.evaluate(batches), rtol=0, atol=1e-8)
    np.testing.assert_allclose(mine, record.records[-1]["val_loss"], rtol=0, atol=1e-12)


def test_unequal_numbers_of_targets() -> None:
    """The mean of a step is over all its targets, not over the batches of different weight."""
    train = TrainConfig(grad_accumulation_steps=2, progress=False)
    model = double(SMALL)
    data = text(SMALL, 1000)
    batches = [data.batch(0, step, 3) for step in range(2)]
    batches[1]["targets"][:, 1:] = -100
    twin = Twin(SMALL, model.state_dict(), train)
    both = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    expected = twin.loss(both).item()
    np.testing.assert_allclose(twin(batches, 0).item(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        (GPTConfig(11, 8, 2, 2, 16, positions="rope"), TrainConfig(), "expected GPT-2's choices"),
        (SMALL, TrainConfig(optimizer="sgd"), "expected AdamW"),
        (SMALL, TrainConfig(label_smoothing=0.1), "expected AdamW without l1 or label smoothing"),
    ],
)
def test_refuses_what_it_cannot_repeat(model: GPTConfig, train: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Twin(model, GPT(model).state_dict(), train)
