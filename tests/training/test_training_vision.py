"""A vision transformer in a `Trainer`: it learns, and a run that was stopped is the run that was not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from stopped import Killed, Stop, files
from tiny import train_config

import minitransformer as mt
from minitransformer.data import drawn_digits
from minitransformer.errors import ConfigError


def trainer(*callbacks: Any, seed: int = 0, **settings: Any) -> mt.Trainer:
    """A small model, always the same start, on drawn digits."""
    mt.manual_seed(1)
    config = mt.VisionConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        dropout=0.1,
        num_labels=10,
    )
    data = drawn_digits(300, seed), drawn_digits(60, 9)
    return mt.Trainer(mt.VisionTransformer(config), train_config(**settings), *data, callbacks)


def test_it_learns() -> None:
    result = trainer(max_steps=150, batch_size=32, learning_rate=1e-2, warmup_steps=10, eval_interval=150).train()
    assert result.val_loss is not None
    assert result.val_loss < math.log(10) / 2


@pytest.mark.parametrize("how", ["interrupt", "kill after the log"])
def test_stopped_and_resumed_equals_uninterrupted_byte_for_byte(how: str, tmp_path: Path) -> None:
    trainer(out_dir=tmp_path / "whole").train()
    stopped = trainer(Stop(7, how), out_dir=tmp_path / "stopped", threads=2)
    if how == "interrupt":
        stopped.train()
    else:
        with pytest.raises(Killed):
            stopped.train()
    trainer(out_dir=tmp_path / "stopped", threads=3).train(resume=True)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_other_images_are_refused_on_resume(tmp_path: Path) -> None:
    trainer(Stop(7, "interrupt"), out_dir=tmp_path / "run").train()
    with pytest.raises(ConfigError, match=r"^resume: the data is not that of the run"):
        trainer(seed=1, out_dir=tmp_path / "run").train(resume=True)


def test_of_a_run_the_model_comes_back(tmp_path: Path) -> None:
    trainer(out_dir=tmp_path / "run").train()
    model = mt.from_pretrained(tmp_path / "run")
    assert model(**next(drawn_digits(5).sequential(5))).logits.shape == (5, 10)
