"""Models in folders: what is saved is what comes back, bit for bit, and nothing else is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import OPTIONS, SHAPE, dataset, fresh_gpt, gpt, options, token_ids, train_config

import minitransformer as mt
from minitransformer.checkpoint import RunFolder, pack_arrays, unpack_arrays
from minitransformer.errors import AllocationError, CheckpointError, ConfigError, ShapeError
from minitransformer.files import json_bytes
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
    """Save it anew with a config that no model has: as another version or another program might."""
    arrays, metadata = unpack_arrays(folder / "model.safetensors")
    config = {**metadata["config"], **fields}
    (folder / "model.safetensors").write_bytes(pack_arrays(arrays, {"config": config}))
    (folder / "config.json").write_bytes(json_bytes("the config", config, indent=2))


def test_an_unknown_field_gives_the_nearest_name(saved: Path) -> None:
    change(saved, n_heads=2)
    with pytest.raises(ConfigError, match=r"^GPTConfig: has no field 'n_heads'. Did you mean 'n_head'\?$"):
        mt.from_pretrained(saved)


@pytest.mark.parametrize("name", ["cls", "self", "args", "", "n layer", "__class__"])
def test_no_field_has_a_meaning_of_its_own(saved: Path, name: str) -> None:
    change(saved, **{name: 1})
    with pytest.raises(ConfigError, match=f"^GPTConfig: has no field '{name}'"):
        mt.from_pretrained(saved)


WHOLE = ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_inner", "window"]
WRONG = ["1", 1.0, True, [], {}, "", 0, -1, 2**31, 10**90]


@pytest.mark.parametrize("name", [*WHOLE, *("bias", "tie_weights", "dropout", "positions", "norm", "ffn", "attention")])
def test_a_field_of_the_wrong_kind_is_refused_by_name(saved: Path, name: str) -> None:
    values = WRONG if name in WHOLE else [*WRONG[3:5], "no", 2**31, -0.5]
    for value in [*values, *([None] if name in WHOLE[:5] else [])]:
        change(saved, **{name: value})
        with pytest.raises(ConfigError, match=rf"^GPTConfig: (the )?{name} ") as caught:
            mt.from_pretrained(saved)
        assert repr(value) in str(caught.value)


def test_sizes_end_where_no_model_is() -> None:
    with pytest.raises(ConfigError) as caught:
        mt.GPTConfig(n_layer=10_001)
    assert str(caught.value) == "GPTConfig: n_layer is 10001, expected at most 10000. Pass a smaller number."
    assert mt.GPTConfig(n_layer=10_000, n_embd=2**31 - 1, n_head=1, vocab_size=2**31 - 1).n_layer == 10_000


@given(options())
def test_parameters_are_counted_without_making_them(chosen: dict[str, Any]) -> None:
    model = mt.GPT(mt.GPTConfig(**{**SHAPE, **chosen}))
    assert model.config.num_parameters == model.num_parameters()


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    with pytest.raises(AllocationError, match=r"^GPT: \d[\d,]+ parameters need \d[\d,]+\.\d GB, there are "):
        mt.GPT(mt.GPTConfig(n_layer=10_000, n_embd=2**31 - 1, n_head=1))
    change(saved, block_size=2**31 - 1)
    with pytest.raises(AllocationError, match=r"^GPT: "):
        mt.from_pretrained(saved)
    config = mt.GPTConfig(**{**SHAPE, "positions": "sinusoidal"})
    needed = 4 * config.num_parameters + 8 * config.block_size * config.n_embd
    for there in (needed, None):
        monkeypatch.setattr("minitransformer.models.base.total_memory", lambda there=there: there)
        mt.GPT(config)
    monkeypatch.setattr("minitransformer.models.base.total_memory", lambda: needed - 1)
    with pytest.raises(AllocationError) as caught:
        mt.GPT(config)
    assert str(caught.value) == (
        f"GPT: {config.num_parameters:,} parameters need 0.0 GB, there are 0.0 GB. "
        "Make vocab_size, block_size, n_layer or n_embd smaller."
    )


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


def test_a_config_that_is_not_that_of_the_weights_is_refused(saved: Path) -> None:
    """Of one head more, the weights have the same shapes, and mean another model."""
    text = (saved / "config.json").read_text()
    for changed, difference in {
        text.replace('"n_head": 2', '"n_head": 4'): "n_head is 4 and was 2",
        text.replace("\n", "\n "): "it was reformatted",
    }.items():
        (saved / "config.json").write_text(changed)
        with pytest.raises(CheckpointError) as caught:
            mt.from_pretrained(saved)
        assert str(caught.value) == (
            f"from_pretrained: {saved / 'config.json'} is not the config that the weights were saved with: "
            f"{difference}. Restore it from a copy, or save the model again."
        )


def test_weights_that_do_not_say_their_config_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(pack_arrays(gpt().state_dict(), {}))
    with pytest.raises(CheckpointError, match="does not say which model its weights are of, expected the config in"):
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
