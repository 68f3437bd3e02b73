"""BERTs in folders, encoders that move from one model to another, and training: resumed, and fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stopped import Killed, Stop, files
from tiny import gpt, train_config
from tiny_bert import HEADS, KINDS, LONGEST, SHAPE, V, bert, options, outputs, tokens

import minitransformer as mt
from minitransformer.data import ArrayDataset, MaskedTokens
from minitransformer.errors import CheckpointError, ConfigError, DTypeError

any_kind = pytest.mark.parametrize("kind", KINDS)
any_head = pytest.mark.parametrize("kind", HEADS)
MASK = V - 1


@any_kind
@given(chosen=options(), dtype=st.sampled_from(["float32", "float64"]), seed=st.integers(0, 2**32))
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kind: str, chosen: dict[str, Any], dtype: str, seed: int
) -> None:
    folder, model = tmp_path_factory.mktemp("model"), bert(kind, dtype, seed, **chosen)
    model.save_pretrained(folder)
    again = mt.from_pretrained(folder)
    assert (type(again), again.config, again.training) == (KINDS[kind], model.config, False)
    assert again.files() == model.files()
    batch = tokens(2, 5, seed, chosen["type_vocab_size"])
    for a, b in zip(outputs(again(**batch)), outputs(model(**batch)), strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_config_of_numpy_numbers_is_saved(tmp_path: Path) -> None:
    changes = {"pad_token_id": np.int32(3), "hidden_dropout_prob": np.float64(0.1), "layer_norm_eps": np.float32(0.5)}
    config = mt.BERTConfig(**{name: np.int64(size) for name, size in SHAPE.items()}, **changes)
    mt.BERT(config).save_pretrained(tmp_path)
    assert mt.from_pretrained(tmp_path).config == config
    assert config == mt.BERTConfig(**SHAPE, pad_token_id=3, hidden_dropout_prob=0.1, layer_norm_eps=0.5)


def arrays(module: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in module.state_dict().items()}


@any_head
@pytest.mark.parametrize("source", KINDS)
def test_an_encoder_moves_to_another_head(kind: str, source: str) -> None:
    pretrained = bert(source, hidden_act="silu")
    before = arrays(pretrained)
    model = HEADS[kind].from_encoder(pretrained, num_labels=5, hidden_dropout_prob=0.25)
    assert arrays(model.encoder) == arrays(pretrained.encoder)
    if kind == "classes" and source in ("plain", "classes"):
        assert arrays(model.pooler) == arrays(pretrained.pooler)
    assert (model.config.num_labels, model.config.hidden_act, model.config.hidden_dropout_prob) == (5, "silu", 0.25)
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    assert model.training
    for parameter in model.parameters():  # memory of its own
        parameter.data = np.zeros_like(parameter.data)
    assert arrays(pretrained) == before


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(DTypeError) as error:
        mt.BERTForMaskedLM.from_encoder(gpt())
    assert str(error.value) == (
        "BERTForMaskedLM.from_encoder: source is a GPT, expected a BERT model. "
        "Pass what mt.from_pretrained(folder) gives for one."
    )
    for name, fix in (("hidden_act", "Known: "), ("num_label", "Did you mean 'num_labels'?")):
        with pytest.raises(ConfigError) as refused:
            mt.BERTForSequenceClassification.from_encoder(bert(), **{name: 3})
        start = f"BERTForSequenceClassification.from_encoder: cannot change {name}, expected one of ('hidden_dropout_"
        assert str(refused.value).startswith(start)
        assert fix in str(refused.value)


def test_an_unknown_model_gives_the_nearest_name(tmp_path: Path) -> None:
    mt.GPT(gpt().config).save_pretrained(tmp_path)
    model = bert("masked")
    model.__class__ = type("BERTForMaskedLN", (mt.BERTForMaskedLM,), {})
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"unknown model_type 'BERTForMaskedLN'. Did you mean 'BERTForMaskedLM'"):
        mt.from_pretrained(tmp_path)


# --- training ---------------------------------------------------------------------------------------------


def rows() -> np.ndarray:
    """Rows of one token each, all of them below MASK: a gap is filled from any other place."""
    return np.repeat(np.arange(10 * MASK)[:, None] % MASK, LONGEST, axis=1)


def gaps() -> MaskedTokens:
    return MaskedTokens(ArrayDataset(input_ids=rows()), vocab_size=V, mask_token_id=MASK)


def fresh(kind: type[Any], **changes: Any) -> Any:
    mt.manual_seed(1)
    return kind(mt.BERTConfig(**{**SHAPE, "hidden_size": 16, "intermediate_size": 32, **changes}))


def test_gaps_are_learned_and_make_a_classifier(tmp_path: Path) -> None:
    config = train_config(out_dir=tmp_path / "run", max_steps=200, batch_size=16, eval_interval=200, save_interval=200)
    result = mt.Trainer(fresh(mt.BERTForMaskedLM, hidden_dropout_prob=0.0), config, gaps(), gaps()).train()
    assert result.val_loss is not None
    assert result.val_loss < 1 < np.log(MASK)  # of guessing
    model = mt.BERTForSequenceClassification.from_encoder(mt.from_pretrained(tmp_path / "run"), num_labels=2)
    odd = rows()[:, 0] % 2
    data = ArrayDataset(input_ids=rows(), labels=odd, attention_mask=np.ones_like(rows()))
    mt.Trainer(model, train_config(max_steps=30, batch_size=16, eval_interval=30), data, data).train()
    model.eval()
    assert np.mean(model(rows()).logits.numpy().argmax(axis=1) == odd) > 0.9  # 0.5 by guessing


@pytest.mark.parametrize("how", ["interrupt", "kill after the log", "kill after the checkpoint"])
def test_stopped_and_resumed_equals_uninterrupted_byte_for_byte(how: str, tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: Any, resume: bool = False, threads: int = 1) -> None:
        config = train_config(out_dir=folder, threads=threads)
        model = fresh(mt.BERTForMaskedLM, hidden_dropout_prob=0.2)
        try:
            mt.Trainer(model, config, gaps(), gaps(), callbacks).train(resume)
        except Killed:
            return

    run(tmp_path / "whole")
    run(tmp_path / "run", Stop(7, how))
    run(tmp_path / "run", resume=True, threads=2)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@any_head
def test_shards_of_few_targets_weigh_as_their_targets(kind: str) -> None:
    """The gradient of a step is that of the loss of the whole batch, however it is cut."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (6, LONGEST))
    wanted = {"labels": np.where(rng.random(ids.shape) < 0.3, ids, -100)}
    if kind != "masked":
        names = {"classes": ["labels"], "answers": ["start_positions", "end_positions"]}[kind]
        wanted = {name: np.array([1, -100, -100, 2, 0, 1]) for name in names}
    steps = []
    for shards in (1, 4):
        model = fresh(HEADS[kind], hidden_dropout_prob=0.0)
        model.to("float64")
        config = train_config(max_steps=3, shards=shards, learning_rate=0.1, optimizer="sgd", min_learning_rate=0.0)
        mt.Trainer(model, config, ArrayDataset(input_ids=ids, **wanted)).train()
        steps.append(model)
    for a, b in zip(*(model.parameters() for model in steps), strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-10, atol=1e-12)
