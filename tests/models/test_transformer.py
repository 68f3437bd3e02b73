"""The encoder-decoder: what may change nothing, what the loss is, how it generates, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stopped import Stop
from tiny import records, train_config

import minitransformer as mt
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError
from minitransformer.nn import DecoderCache

V, S, T = 11, 6, 7
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 8,
    "num_heads": 2,
    "dff": 12,
    "input_seq_len": S,
    "output_seq_len": T,
    "dropout_rate": 0.0,
}


def transformer(dtype: str = "float64", seed: int = 0, **changes: Any) -> mt.Transformer:
    """In eval mode, with weights large enough for every part to matter."""
    model = mt.Transformer(**{**SHAPE, **changes})
    model.to(dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = rng.normal(0 if parameter.ndim == 2 else 0.7, 0.4, parameter.shape)
    model.eval()
    return model


def ids(B: int, length: int, seed: int = 0) -> np.ndarray:
    """Real tokens, none of them padding."""
    return np.random.default_rng([seed, B, length]).integers(1, V, (B, length))


configs = st.fixed_dictionaries({
    "num_heads": st.sampled_from([1, 2, 4]),
    "dff": st.integers(1, 9),
    "num_encoder_layers": st.integers(1, 2),
    "num_decoder_layers": st.integers(1, 2),
    "tie_embeddings": st.booleans(),
    "seed": st.integers(0, 99),
})  # fmt: skip


def test_the_published_signature() -> None:
    model = mt.Transformer(V, 8, 2, 12, S, T, 0.1)
    assert {name: getattr(model.config, name) for name in SHAPE} == {**SHAPE, "dropout_rate": 0.1}
    out = model(ids(2, S), ids(2, T))
    assert out.logits.shape == (2, T, V) and out.loss is None


@given(config=configs, source=st.integers(1, S), target=st.integers(1, T), more=st.integers(1, 3))
def test_padding_changes_nothing(config: dict[str, Any], source: int, target: int, more: int) -> None:
    model = transformer(input_seq_len=S + 3, output_seq_len=T + 3, **config)
    src, tgt = ids(2, source), ids(2, target)
    plain = model(src, tgt).logits.numpy()
    zeros = np.zeros((2, more), int)
    by_id = model(np.concatenate([src, zeros], axis=1), tgt).logits.numpy()
    np.testing.assert_allclose(by_id, plain, rtol=0, atol=1e-10)
    mask = np.concatenate([np.ones_like(src), zeros], axis=1)
    by_mask = model(np.concatenate([src, ids(2, more)], axis=1), tgt, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(by_mask, plain, rtol=0, atol=1e-10)
    left = np.concatenate([zeros, np.ones_like(tgt)], axis=1)
    shifted = model(src, np.concatenate([ids(2, more), tgt], axis=1), decoder_attention_mask=left).logits.numpy()
    np.testing.assert_allclose(shifted[:, more:], plain, rtol=0, atol=1e-10)


@given(config=configs, at=st.integers(0, T - 1))
def test_the_decoder_does_not_see_the_future(config: dict[str, Any], at: int) -> None:
    model, src, tgt = transformer(**config), ids(1, S), ids(1, T)
    changed = tgt.copy()
    changed[:, at] = (changed[:, at] + 1) % V
    before, after = (model(src, x).logits.numpy() for x in (tgt, changed))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert not np.array_equal(before[:, at], after[:, at])


@given(config=configs, pieces=st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda p: sum(p) <= T))
def test_cached_in_pieces_is_the_whole(config: dict[str, Any], pieces: list[int]) -> None:
    model, src = transformer(**config), ids(2, S)
    src[0, 3:] = 0
    tgt = ids(2, sum(pieces))
    whole = model(src, tgt).logits.numpy()
    memory, mask = model._encode(src, None)
    cache, at, parts = model.make_cache(2), 0, []
    for n in pieces:
        out = model.decode(memory, mask, tgt[:, at : at + n], None, None, 0.0, cache)
        parts.append(out.logits.numpy())
        at += n
    assert cache.length == sum(pieces)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-10)


@given(config=configs, beams=st.sampled_from([1, 2, 3]), n=st.integers(0, T - 1), eos=st.sampled_from([None, 1]))
def test_generation_with_and_without_a_cache(config: dict[str, Any], beams: int, n: int, eos: int | None) -> None:
    model, src = transformer(**config), ids(3, S)
    src[1, 2:] = 0
    options: dict[str, Any] = {"max_new_tokens": n, "num_beams": beams, "eos_token_id": eos}
    found = model.generate(src, **options)
    np.testing.assert_array_equal(found, model.generate(src, use_cache=False, **options))
    assert (found[:, 0] == 0).all() and found.shape[0] == 3 and found.shape[1] <= 1 + n
    for row, source in zip(found, src, strict=True):
        alone = model.generate(source[None], **options)[0]
        np.testing.assert_array_equal(row[: len(alone)], alone)
    if beams == 1 and n:  # greedy: each token is the likeliest after those before it
        best = model(src, found[:, :-1]).logits.numpy().argmax(-1)
        ended = np.cumsum(found[:, 1:] == 1, axis=1) - (found[:, 1:] == 1) > 0 if eos else np.zeros_like(best, bool)
        np.testing.assert_array_equal(found[:, 1:][~ended], best[~ended])


def test_a_prompt_for_the_target() -> None:
    model, src = transformer(), ids(2, S)
    plain = model.generate(src, max_new_tokens=4)
    again = model.generate(src, decoder_input_ids=plain[:, :3], max_new_tokens=2)
    np.testing.assert_array_equal(plain, again)
    padded = np.concatenate([[[5], [6]], plain[:, :3]], axis=1)
    mask = [[0, 1, 1, 1]] * 2
    found = model.generate(src, decoder_input_ids=padded, decoder_attention_mask=mask, max_new_tokens=2)
    np.testing.assert_array_equal(found[:, 1:], plain)


def test_labels_are_what_follows_the_decoder_inputs() -> None:
    model, src, labels = transformer(), ids(2, S), ids(2, T)
    labels[0, 5:] = 0
    labels[1, 3] = -100
    out = model(src, labels=labels)
    inputs = np.concatenate([np.zeros((2, 1), int), np.where(labels == -100, 0, labels)[:, :-1]], axis=1)
    np.testing.assert_array_equal(out.logits.numpy(), model(src, inputs).logits.numpy())
    logits = out.logits.numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = (labels != 0) & (labels != -100)
    expected = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0][counted].mean()
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    assert model.num_targets(input_ids=src, labels=labels) == counted.sum()
    assert model(src, inputs, labels=labels).loss.item() == out.loss.item()
    smooth = model(src, labels=labels, label_smoothing=0.1).loss.item()
    spread = -(log_p.mean(-1))[counted].mean()
    assert smooth == pytest.approx(0.9 * expected + 0.1 * spread, rel=1e-12)


@given(config=configs)
def test_gradients_of_the_loss(config: dict[str, Any]) -> None:
    """Along a drawn direction of all parameters, by complex step."""
    model, src, labels = transformer(**config), ids(2, 3), ids(2, 4)
    src[1, 1:] = 0
    model(src, labels=labels).loss.backward()
    rng = np.random.default_rng(config["seed"])
    slope, stepped = 0.0, {}
    for name, parameter in model.named_parameters():
        direction = rng.standard_normal(parameter.shape)
        slope += float((parameter.grad * direction).sum())
        stepped[name] = parameter.numpy() + 1e-30j * direction
    model.to("complex128")
    model.load_state_dict(stepped)
    assert slope == pytest.approx(model(src, labels=labels).loss.numpy().imag / 1e-30, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_loaded(tie: bool, tmp_path: Path) -> None:
    model = transformer(tie_embeddings=tie, dropout_rate=0.2, num_encoder_layers=1, pad_id=3)
    model.save_pretrained(tmp_path)
    again = mt.from_pretrained(tmp_path)
    assert isinstance(again, mt.Transformer) and again.config == model.config
    src, tgt = ids(2, S), ids(2, T)
    np.testing.assert_array_equal(again(src, tgt).logits.numpy(), model(src, tgt).logits.numpy())
    assert ("decoder.embedding.weight" in model.state_dict()) is not tie


class Reversed:
    """Sources of two to S tokens and their reversals."""

    def __init__(self) -> None:
        self.source = {"made by": "tests"}

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, step])
        src, labels = np.zeros((batch_size, S), int), np.zeros((batch_size, S + 1), int)
        for row in range(batch_size):
            tokens = rng.integers(2, V, rng.integers(2, S + 1))
            src[row, : len(tokens)] = tokens
            labels[row, : len(tokens) + 1] = [*tokens[::-1], 1]
        return {"input_ids": src, "labels": labels}


def test_trains_in_shards_and_resumes(tmp_path: Path) -> None:
    def trainer(folder: str, callbacks: tuple[Stop, ...] = ()) -> mt.Trainer:
        mt.manual_seed(3)
        model = mt.Transformer(V, 16, 2, 32, S, S + 1, 0.1)
        config = train_config(out_dir=str(tmp_path / folder), max_steps=40, schedule="noam", warmup_steps=10)
        return mt.Trainer(model, config, Reversed(), callbacks=callbacks)

    trainer("whole").train()
    losses = [line["loss"] for line in records(tmp_path / "whole")]
    assert losses[-1] < 0.9 * losses[0]
    trainer("stopped", callbacks=(Stop(20, "interrupt"),)).train()
    trainer("stopped").train(resume=True)
    whole, resumed = (mt.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "stopped"))
    assert all(whole[name].tobytes() == resumed[name].tobytes() for name in whole)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda m: m(ids(1, S + 1), ids(1, 2)), RangeError, "input_ids hold 7 tokens, expected at most input_seq_len 6"),
    (lambda m: m(ids(1, 2), ids(1, T + 1)), RangeError, "decoder_input_ids hold 8 tokens, expected at most output_seq"),
    (lambda m: m([[1, 2], [0, 0]], ids(2, 2)), RangeError, "row 1 of input_ids holds only padding, expected at least"),
    (lambda m: m(np.zeros((1, 0), int), ids(1, 2)), ShapeError, "input_ids hold no tokens"),
    (lambda m: m(ids(1, 2)), DTypeError, "got no decoder_input_ids. Pass them, or labels"),
    (lambda m: m(ids(2, 2), ids(3, 2)), ShapeError, "decoder_input_ids have 3 rows, expected 2, one for each row of"),
    (lambda m: m(ids(1, 2), ids(1, 3), labels=ids(1, 2)), ShapeError, r"labels have shape \(1, 2\), expected \(1, 3\)"),
    (lambda m: m(ids(1, 2), labels=[[1, V]]), RangeError, f"the label at position .* is {V}"),
    (lambda m: m([[V]], ids(1, 2)), RangeError, f"the id at position .* is {V}"),
    (lambda m: m(ids(1, 2), [[1, 2]], labels=[[1, 2]]), ConfigError, "labels are the decoder_input_ids themselves"),
    (lambda m: m(ids(1, 2), ids(1, 2), attention_mask=[[1, 2]]), ShapeError, "attention_mask has shape"),
    (lambda m: m(ids(1, 2) * 1.0, ids(1, 2)), DTypeError, "input_ids have dtype float64, expected integers"),
    (lambda m: m(ids(2, 2), labels=ids(1, 2)), ShapeError, "labels have 1 rows, expected 2, one for each row of"),
    (lambda m: m(ids(1, 2), labels=ids(1, T + 1)), RangeError, "labels hold 8 tokens, expected at most output_seq"),
    (lambda m: m.generate(ids(1, 2), max_new_tokens=np.int64(T)), RangeError, "1 tokens and max_new_tokens 7 are too"),
    (lambda m: m.generate(ids(1, 2), max_new_tokens=T), RangeError, "1 tokens and max_new_tokens 7 are too many"),
    (lambda m: m.generate(ids(1, 2), decoder_input_ids=ids(2, 1), max_new_tokens=1), ShapeError, "have 2 rows"),
    (lambda m: m.num_targets(input_ids=ids(1, 2)), ConfigError, "the batch has no labels"),
    (lambda m: transformer(num_heads=3), ConfigError, "d_model 8 is not divisible by num_heads 3"),
    (lambda m: transformer(pad_id=V), ConfigError, f"pad_id is {V}, expected less than vocab_size {V}"),
    (lambda m: transformer(dff=0), ConfigError, "dff is 0, expected a positive integer"),
    (lambda m: transformer(dropout_rate=1.0), ConfigError, "dropout rate is 1.0"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(transformer())


def test_what_was_refused_changed_nothing() -> None:
    model = transformer().train()
    with pytest.raises(RangeError):
        model.generate([[V]], max_new_tokens=2)
    assert model.training
    cache = model.make_cache(1)
    assert isinstance(cache, DecoderCache) and cache.length == 0
