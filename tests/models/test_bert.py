"""BERT and its heads: what padding, rows and order may change, losses and their gradients, how weights start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import HEADS, KINDS, LONGEST, SHAPE, V, bert, options, outputs, targets, tokens

import minitransformer as mt
from minitransformer import random
from minitransformer.gradients import gradient_error

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = st.integers(0, 2**32)
LENGTHS = st.integers(1, LONGEST)
any_kind = pytest.mark.parametrize("kind", KINDS)
any_head = pytest.mark.parametrize("kind", HEADS)


def of_tokens(array: np.ndarray, T: int) -> np.ndarray:
    """The first T tokens where there are tokens: pooled rows and classes have two axes."""
    return array[:, :T] if array.ndim == 3 else array


@any_kind
@given(chosen=options(), B=st.integers(1, 3), T=LENGTHS, seed=SEEDS, data=st.data())
def test_padding_changes_no_real_position(
    kind: str, chosen: dict[str, Any], B: int, T: int, seed: int, data: st.DataObject
) -> None:
    model = bert(kind, seed=seed, **chosen)
    more = data.draw(st.integers(0, LONGEST - T), label="padding")
    padded = tokens(B, T + more, seed, chosen["type_vocab_size"])
    alone = {name: array[:, :T] for name, array in padded.items()}
    mask = np.repeat([[1] * T + [0] * more], B, axis=0)
    for a, b in zip(outputs(model(**padded, attention_mask=mask)), outputs(model(**alone)), strict=True):
        np.testing.assert_allclose(of_tokens(a, T), b, **TIGHT)


@any_kind
@given(chosen=options(), seed=SEEDS, lengths=st.lists(LENGTHS, min_size=1, max_size=4))
def test_rows_do_not_disturb_each_other(kind: str, chosen: dict[str, Any], seed: int, lengths: list[int]) -> None:
    model = bert(kind, seed=seed, **chosen)
    batch = tokens(len(lengths), LONGEST, seed, chosen["type_vocab_size"])
    together = outputs(model(**batch, attention_mask=np.arange(LONGEST) < np.array(lengths)[:, None]))
    for row, T in enumerate(lengths):
        alone = outputs(model(**{name: array[row : row + 1, :T] for name, array in batch.items()}))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(of_tokens(a[row : row + 1], T), b, **TIGHT)


@any_head
@given(chosen=options(), B=st.integers(1, 4), T=LENGTHS, seed=SEEDS)
def test_permuting_rows_permutes_outputs_and_keeps_the_loss(
    kind: str, chosen: dict[str, Any], B: int, T: int, seed: int
) -> None:
    model = bert(kind, seed=seed, **chosen)
    batch = {**tokens(B, T, seed, chosen["type_vocab_size"]), **targets(kind, B, T, seed, chosen["num_labels"])}
    order = np.random.default_rng(seed).permutation(B)
    out, turned = model(**batch), model(**{name: array[order] for name, array in batch.items()})
    np.testing.assert_allclose(turned.loss.item(), out.loss.item(), **TIGHT)
    for a, b in zip(outputs(turned), outputs(out), strict=True):
        np.testing.assert_allclose(a, b[order], **TIGHT)


def test_every_token_sees_every_other_and_where_it_stands() -> None:
    model, batch = bert(), tokens(1, 6)
    states = model(**batch).hidden_states[-1].numpy()
    for name, size in (("input_ids", V), ("token_type_ids", 2)):
        for t in (0, 3, 5):
            changed = {key: array.copy() for key, array in batch.items()}
            changed[name][0, t] = (changed[name][0, t] + 1) % size
            other = model(**changed).hidden_states[-1].numpy()
            assert abs(other - states).max(axis=-1).min() > 1e-9, (name, t)
    turned = {name: array[:, ::-1] for name, array in batch.items()}
    assert abs(model(**turned).hidden_states[-1].numpy()[:, ::-1] - states).max() > 1e-3


def test_without_types_all_tokens_are_of_the_first_and_without_a_mask_all_are_real() -> None:
    model, ids = bert(), tokens(2, 5)["input_ids"]
    ids[0, 3:] = model.config.pad_token_id  # masks nothing by itself
    given_in_full = model(ids, np.ones((2, 5), bool), np.zeros((2, 5), int))
    for a, b in zip(outputs(model(ids)), outputs(given_in_full), strict=True):
        np.testing.assert_allclose(a, b, **TIGHT)


def test_a_row_of_padding_alone_is_finite_and_disturbs_no_other() -> None:
    for kind in HEADS:
        model, batch = bert(kind), {**tokens(2, 4), **targets(kind, 2, 4)}
        mask = np.array([[0] * 4, [1] * 4])
        out = model(**batch, attention_mask=mask)
        for a, b in zip(outputs(out), outputs(model(**batch)), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a[1], b[1], **TIGHT)
        assert all(np.isfinite(g).all() for g in mt.grad(out.loss, model.parameters()))


@any_kind
def test_a_batch_of_no_rows_has_outputs_of_no_rows(kind: str) -> None:
    assert all(len(array) == 0 for array in outputs(bert(kind)(np.zeros((0, 3), int))))


def test_states_are_the_embeddings_and_what_each_layer_makes_of_them() -> None:
    model, batch = bert(num_hidden_layers=3), tokens(2, 5)
    out = model(**batch)
    assert [t.shape for t in out.hidden_states] == [(2, 5, 8)] * 4
    assert out.pooler_output.shape == (2, 8)
    for layer, before, after in zip(model.encoder.layers, out.hidden_states, out.hidden_states[1:], strict=False):
        np.testing.assert_array_equal(layer(before).numpy(), after.numpy())


# --- losses and gradients ---------------------------------------------------------------------------------


def nll(logits: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[wanted] of those that are not -100."""
    rows = logits.reshape(-1, logits.shape[-1])[wanted.ravel() != -100]
    picked = rows[np.arange(len(rows)), wanted[wanted != -100]]
    return np.log(np.exp(rows).sum(-1)) - picked


@any_head
@given(B=st.integers(1, 3), T=LENGTHS, seed=SEEDS)
def test_the_loss_is_the_mean_over_targets_that_are_not_ignored(kind: str, B: int, T: int, seed: int) -> None:
    model, batch, wanted = bert(kind, seed=seed), tokens(B, T, seed), targets(kind, B, T, seed)
    out = model(**batch, **wanted)
    assert out.logits.shape == {"masked": (B, T, V), "classes": (B, 3), "answers": (B, T, 2)}[kind]
    logits = out.logits.numpy()
    per_target = [logits[..., 0], logits[..., 1]] if kind == "answers" else [logits]
    losses = np.concatenate([nll(a, b) for a, b in zip(per_target, wanted.values(), strict=True)])
    assert model.num_targets(**batch, **wanted) == len(losses)
    np.testing.assert_allclose(out.loss.item(), losses.mean(), rtol=1e-10, atol=1e-12)
    ignored = {name: np.full_like(array, -100) for name, array in wanted.items()}
    assert model(**batch, **ignored).loss.item() == model.num_targets(**ignored) == 0
    assert model(**batch).loss is None


@any_head
def test_label_smoothing_mixes_in_the_mean_over_the_classes(kind: str) -> None:
    model, batch = bert(kind), {**tokens(2, 4), **targets(kind, 2, 4)}
    plain, all_smooth, half = (model(**batch, label_smoothing=e).loss.item() for e in (0.0, 1.0, 0.5))
    np.testing.assert_allclose(half, (plain + all_smooth) / 2, rtol=1e-12)
    assert abs(plain - all_smooth) > 1e-3


@any_head
@given(chosen=options(), dropout=st.sampled_from([0.0, 0.3]), T=st.integers(2, LONGEST), seed=SEEDS)
def test_the_gradient_of_the_loss_is_its_complex_step(
    kind: str, chosen: dict[str, Any], dropout: float, T: int, seed: int
) -> None:
    model = bert(kind, seed=seed, hidden_dropout_prob=dropout, **chosen)
    batch = {**tokens(3, T, seed, chosen["type_vocab_size"]), **targets(kind, 3, T, seed, chosen["num_labels"])}
    batch["attention_mask"] = np.arange(T) < np.array([[T], [1], [T - 1]])
    model.train()

    def loss() -> mt.Tensor:
        with random.scope(seed=1, step=2):
            return model(**batch).loss

    assert gradient_error(loss, model.parameters(), directions=1, seed=seed) < 1e-12


@any_head
def test_every_parameter_has_a_gradient(kind: str) -> None:
    model = bert(kind, num_hidden_layers=2)
    loss = model(**tokens(2, LONGEST), **targets(kind, 2, LONGEST)).loss
    names = [name for name, _ in model.named_parameters()]
    assert [n for n, g in zip(names, mt.grad(loss, model.parameters()), strict=True) if not g.any()] == []


def test_dropout_acts_in_training_only_and_by_address() -> None:
    model, batch = bert("classes", hidden_dropout_prob=0.3), tokens(2, 5)
    plain = model(**batch).logits.numpy()
    model.train()

    def trained(step: int) -> np.ndarray:
        with random.scope(seed=0, step=step):
            return model(**batch).logits.numpy()

    assert not np.allclose(trained(0), plain)
    assert not np.allclose(trained(0), trained(1))
    np.testing.assert_array_equal(trained(0), trained(0))
    model.eval()
    np.testing.assert_array_equal(model(**batch).logits.numpy(), plain)


# --- parameters -------------------------------------------------------------------------------------------


def count(kind: str, c: mt.BERTConfig) -> int:
    """The number of parameters, from the published shapes."""
    C, F = c.hidden_size, c.intermediate_size
    dense, norm = C * C + C, 2 * C
    layer = 4 * dense + (C * F + F) + (F * C + C) + 2 * norm
    tables = (c.vocab_size + c.max_position_embeddings + c.type_vocab_size) * C
    head = {
        "plain": dense,
        "masked": dense + norm + c.vocab_size,
        "classes": dense + C * c.num_labels + c.num_labels,
        "answers": 2 * C + 2,
    }
    return tables + norm + c.num_hidden_layers * layer + head[kind]


@any_kind
@given(chosen=options())
def test_the_number_of_parameters_is_that_of_the_shapes(kind: str, chosen: dict[str, Any]) -> None:
    model = bert(kind, **chosen)
    assert model.num_parameters() == count(kind, model.config)


def test_the_default_is_bert_base_with_109_482_240_parameters() -> None:
    assert count("plain", mt.BERTConfig()) == 109_482_240


@any_kind
def test_weights_start_as_berts(kind: str) -> None:
    changes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
    model = KINDS[kind](mt.BERTConfig(**{**SHAPE, **changes, "pad_token_id": 7}))
    for name, parameter in model.named_parameters():
        data = parameter.data
        assert data.dtype == np.float32
        if name.endswith("bias"):
            assert not data.any(), name
        elif data.ndim == 1:
            assert (data == 1).all(), name
        else:
            assert abs(data.std() / 0.05 - 1) < 5 / np.sqrt(2 * data.size) + 0.01, name
            assert abs(data.mean()) < 5 * 0.05 / np.sqrt(data.size), name
    assert [i for i, row in enumerate(model.encoder.embeddings.word.weight.data) if not row.any()] == [7]


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> bytes:
        mt.manual_seed(seed)
        return mt.BERT(mt.BERTConfig(**SHAPE)).files()["model.safetensors"]

    assert weights(1) == weights(1) != weights(2)
