"""Models in folders: what is saved is what comes back, bit for bit, and nothing else is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import OPTIONS, SHAPE, dataset, fresh_gpt, gpt, options, token_ids, train_config

import minitransformer as mt
from minitransformer.checkpoint import RunFolder, pack_arrays
from minitransformer.errors import CheckpointError, ConfigError, ShapeError
from minitransformer.models import pretrained_folder

every_option = pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)


def check_round_trip(model: mt.GPT, folder: Path) -> None:
    model.save_pretrained(folder)
    again = mt.from_pretrained(folder)
    assert type(again) is mt.GPT
    assert again.config == model.config
    assert not again.training
    assert {n: (a.dtype, a.tobytes()) for n, a in again.state_dict().items()} == {
        n: (a.dtype, a.tobytes()) for n, a in model.state_dict().items()
    }
    ids = token_ids(2, 5)
    assert again(ids).logits.data.tobytes() == model(ids).logits.data.tobytes()


@every_option
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_model_comes_back_bit_for_bit(chosen: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    check_round_trip(gpt(dtype, **chosen), tmp_path / "new" / "model")


@given(chosen=options(), dtype=st.sampled_from(["float32", "float64"]), seed=st.integers(0, 2**32))
def test_combined_options_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any], dtype: str, seed: int
) -> None:
    check_round_trip(gpt(dtype, seed, **chosen), tmp_path_factory.mktemp("model"))


def test_saving_again_replaces_and_gives_the_same_bytes(tmp_path: Path) -> None:
    gpt(seed=1).save_pretrained(tmp_path)
    other = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):
        gpt(seed=2).save_pretrained(tmp_path)
        mine = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert set(mine) == {"config.json", "model.safetensors"}
    assert mine["config.json"] == other["config.json"]
    assert mine["model.safetensors"] != other["model.safetensors"]
    assert mine == gpt(seed=2).files()


def test_a_config_of_numpy_numbers_is_saved(tmp_path: Path) -> None:
    shape = {name: np.int64(size) for name, size in SHAPE.items()}
    mt.GPT(mt.GPTConfig(**shape, dropout=np.float64(0.1))).save_pretrained(tmp_path)
    assert mt.from_pretrained(tmp_path).config == mt.GPTConfig(**SHAPE, dropout=0.1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    gpt().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_an_unknown_field_gives_the_nearest_name(saved: Path) -> None:
    change(saved, n_heads=2)
    with pytest.raises(ConfigError, match=r"^GPTConfig: has no field 'n_heads'. Did you mean 'n_head'\?$"):
        mt.from_pretrained(saved)


def test_a_field_of_the_wrong_kind_is_refused(saved: Path) -> None:
    change(saved, n_layer="1")
    with pytest.raises(ConfigError, match=r"^GPTConfig: n_layer is '1', expected a positive integer"):
        mt.from_pretrained(saved)


def test_an_unknown_model_gives_the_nearest_name(saved: Path) -> None:
    change(saved, model_type="GTP")
    with pytest.raises(CheckpointError, match=r"unknown model_type 'GTP'. Did you mean 'GPT'\?$"):
        mt.from_pretrained(saved)


def test_weights_of_another_config_are_refused(saved: Path) -> None:
    change(saved, n_embd=8)
    with pytest.raises(ShapeError, match=r"wte.weight has shape \(20, 16\), expected \(20, 8\)"):
        mt.from_pretrained(saved)
    change(saved, n_embd=16, tie_weights=False)
    with pytest.raises(CheckpointError, match=r"the names do not match, missing head.weight, unexpected none"):
        mt.from_pretrained(saved)


def test_weights_of_mixed_or_integer_dtype_are_refused(saved: Path) -> None:
    for arrays in ({"a": np.zeros(1), "b": np.zeros(1, np.float32)}, {"a": np.zeros(1, np.int64)}, {}):
        (saved / "model.safetensors").write_bytes(pack_arrays(arrays, {}))
        with pytest.raises(CheckpointError, match="expected all float32 or all float64"):
            mt.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_named(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=name):
        mt.from_pretrained(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        mt.from_pretrained(saved)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model, looked for config.json. Pass the folder of a"):
        mt.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder .*nothing\. Check the path"):
        mt.from_pretrained(tmp_path / "nothing")


def test_a_file_in_the_way_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file"):
        gpt().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_of_a_run_the_best_checkpoint_is_taken_else_the_last(tmp_path: Path) -> None:
    for name, eval_data in (("judged", dataset(1)), ("not judged", None)):
        config = train_config(out_dir=tmp_path / name, max_steps=4, eval_interval=2)
        model = fresh_gpt()
        mt.Trainer(model, config, dataset(), eval_data).train()
        which = "last" if eval_data is None else "best"
        folder = RunFolder.open(tmp_path / name).load(which).folder
        assert pretrained_folder(tmp_path / name) == folder
        assert mt.from_pretrained(tmp_path / name).state_dict().keys() == model.state_dict().keys()
        assert mt.from_pretrained(tmp_path / name).files()["model.safetensors"] == (
            (folder / "model.safetensors").read_bytes()
        )
