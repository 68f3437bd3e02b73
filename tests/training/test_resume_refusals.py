"""What cannot be resumed: other settings, other data or weights, lost or foreign files, numbers not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stopped import GPT, Never, Stop, files, run
from tiny import BLOCK, V, dataset, fresh_gpt, train_config

import minitransformer as mt
from minitransformer.checkpoint import RunFolder
from minitransformer.data.batches import TokenDataset
from minitransformer.errors import CheckpointError, ConfigError, NonFiniteError
from minitransformer.training import Callback

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
    "check_grads_every": (2, "check_grads_every (saved None, now 2)"),
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


@pytest.mark.parametrize("state", [{}, {"optimizer": []}, {"best_val_loss": "1"}, {"bad_evaluations": None}])
def test_the_state_of_another_trainer_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    run(folder, Stop(7, "interrupt"))
    opened = RunFolder.open(folder)
    saved = {path.name: path.read_bytes() for path in opened.load("last").folder.iterdir()}
    whole = json.loads(saved["trainer.json"])
    saved["trainer.json"] = json.dumps({**whole, **state} if state else {}).encode()
    opened.save(7, {name: data for name, data in saved.items() if name != "manifest.json"}, best=False)
    with pytest.raises(CheckpointError, match=r"trainer\.json is not the state of a trainer"):
        run(folder, resume=True)


@pytest.mark.parametrize("name", ["first", "second"])
def test_moments_that_are_not_finite_are_not_saved(tmp_path: Path, name: str) -> None:
    class Spoil(Callback):
        def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
            if record["step"] == 5:
                trainer.optimizer._state[name][3] = np.inf

    with pytest.raises(NonFiniteError, match=rf"^train: the optimizer's {name} is not finite after step 5\. "):
        run(tmp_path / "run", Spoil())
    assert RunFolder.open(tmp_path / "run").load("last").step == 4


def test_a_run_that_starts_over_wants_the_weights_it_was_started_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, Never())
    model = fresh_gpt(**GPT)
    model.wte.weight.data = model.wte.weight.data + np.float32(1)
    with pytest.raises(ConfigError) as caught:
        mt.Trainer(model, train_config(out_dir=folder), dataset(), dataset(1)).train(resume=True)
    assert str(caught.value) == (
        f"resume: {folder} has no checkpoint yet, and the model is not the one it was started with. "
        "Make the model from the same seed, or start another run."
    )


def test_a_run_that_lost_its_pointers_does_not_start_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, Stop(7, "interrupt"))
    (folder / "best.json").rename(tmp_path / "best.json")
    with pytest.raises(CheckpointError, match=r"the best checkpoint is missing, .*best\.json\. Use `cp .*, which is"):
        run(folder, resume=True)
    (folder / "last.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"missing, and there are checkpoints, such as step-00000007"):
        run(folder, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
