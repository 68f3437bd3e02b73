"""GPT: what every option must keep (causality, gradients, padding), its parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, OPTIONS, SHAPE, V, gpt, options, token_ids

import minitransformer as mt
from minitransformer import random
from minitransformer.models.gpt import INIT_STD

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
LENGTHS = st.integers(1, BLOCK)
SEEDS = st.integers(0, 2**32)
every_option = pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)


# --- laws, for each option alone and for all combinations ------------------------------------------------


def check_shapes_and_loss(model: mt.GPT, ids: np.ndarray) -> None:
    out = model(ids, labels=ids)
    assert out.logits.shape == (*ids.shape, V)
    assert out.logits.dtype == np.float64
    assert out.loss.shape == ()
    assert model(ids).loss is None
    logits = out.logits.data[:, :-1]
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(out.loss.item(), nll.mean() if nll.size else 0, rtol=1e-10)


def check_causal(model: mt.GPT, ids: np.ndarray, first: int) -> None:
    other = ids.copy()
    other[:, first:] = (other[:, first:] + 1) % V
    a, b = model(ids).logits.data, model(other).logits.data
    np.testing.assert_allclose(a[:, :first], b[:, :first], **TIGHT)
    assert abs(a[:, first:] - b[:, first:]).max(axis=-1).min() > 1e-9


def check_padding(model: mt.GPT, ids: np.ndarray, padding: int, seed: int) -> None:
    B, T = ids.shape
    padded = np.concatenate([token_ids(B, padding, seed), ids], axis=1)
    mask = np.concatenate([np.zeros((B, padding), int), np.ones((B, T), int)], axis=1)
    logits = model(padded, attention_mask=mask).logits.data[:, padding:]
    np.testing.assert_allclose(logits, model(ids).logits.data, **TIGHT)


def check_gradient(model: mt.GPT, ids: np.ndarray, seed: int) -> None:
    """Central differences along random directions through all parameters at once."""
    parameters = model.parameters()
    gradients = mt.grad(model(ids, labels=ids).loss, parameters)
    rng = np.random.default_rng(seed)
    start = [p.data.copy() for p in parameters]
    for _ in range(3):
        directions = [rng.standard_normal(p.shape) for p in parameters]
        losses = []
        for step in (1e-6, -1e-6):
            for p, data, v in zip(parameters, start, directions, strict=True):
                p.data = data + step * v
            losses.append(model(ids, labels=ids).loss.item())
        terms = [np.sum(g * v) for g, v in zip(gradients, directions, strict=True)]
        assert abs((losses[0] - losses[1]) / 2e-6 - sum(terms)) < 1e-6 * max(1, np.abs(terms).sum())
    assert all(np.any(g) for g in gradients)


@every_option
def test_an_option_alone_keeps_the_laws(chosen: dict[str, Any]) -> None:
    model, ids = gpt(**chosen), token_ids(2, BLOCK)
    check_shapes_and_loss(model, ids)
    check_causal(model, ids, 5)
    check_padding(model, ids[:, :5], 3, seed=1)
    check_gradient(model, ids, seed=2)


@given(chosen=options(), B=st.integers(1, 3), T=LENGTHS, seed=SEEDS, data=st.data())
def test_combined_options_keep_the_laws(chosen: dict[str, Any], B: int, T: int, seed: int, data: st.DataObject) -> None:
    model, ids = gpt(seed=seed, **chosen), token_ids(B, T, seed)
    check_shapes_and_loss(model, ids)
    check_causal(model, ids, data.draw(st.integers(0, T - 1), label="first changed"))
    check_padding(model, ids, data.draw(st.integers(0, BLOCK - T), label="padding"), seed + 1)


# relu is checked alone, at one point: a drawn one may lie on its kink.
@given(chosen=options(ffn=("gelu", "swiglu")), T=st.integers(3, BLOCK), seed=SEEDS)
def test_combined_options_have_the_gradient_of_differences(chosen: dict[str, Any], T: int, seed: int) -> None:
    check_gradient(gpt(seed=seed, **chosen), token_ids(2, T, seed), seed)


@given(chosen=options(), seed=SEEDS)
def test_rows_of_different_length_do_not_disturb_each_other(chosen: dict[str, Any], seed: int) -> None:
    model, ids = gpt(seed=seed, **chosen), token_ids(3, BLOCK, seed)
    lengths = [3, BLOCK, 1]
    mask = np.arange(BLOCK) >= BLOCK - np.array(lengths)[:, None]
    logits = model(ids, attention_mask=mask).logits.data
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, -length:]).logits.data[0]
        np.testing.assert_allclose(logits[row, -length:], alone, **TIGHT)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "alibi", None])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_window_ends_where_it_says(positions: str | None, window: int) -> None:
    model = gpt(positions=positions, attention="window", window=window)
    ids = token_ids(1, BLOCK)
    other = ids.copy()
    other[0, 2] = (other[0, 2] + 1) % V
    changed = abs(model(ids).logits.data - model(other).logits.data).max(axis=-1)[0]
    assert (changed[2 : 2 + window] > 1e-9).all()
    np.testing.assert_allclose(changed[2 + window :], 0, atol=1e-12)


@pytest.mark.parametrize("kind", [{"attention": "global_window", "window": 2, "n_global": 2}, {"attention": "strided"}])
@pytest.mark.parametrize("changed", range(BLOCK))
def test_a_token_is_seen_by_those_whose_pattern_has_it(changed: int, kind: dict[str, Any]) -> None:
    model, ids = gpt(**kind), token_ids(1, BLOCK)
    other = ids.copy()
    other[0, changed] = (other[0, changed] + 1) % V
    differs = abs(model(ids).logits.data - model(other).logits.data).max(axis=-1)[0] > 1e-9
    if kind["attention"] == "strided":
        assert model.config.stride == 3  # about the square root of 8
        expected = [t >= changed and (t // 3 == changed // 3 or changed % 3 == 2) for t in range(BLOCK)]
    else:
        expected = [t >= changed and (t - changed < 2 or changed < 2) for t in range(BLOCK)]
    assert differs.tolist() == expected


@pytest.mark.parametrize(
    "limit",
    [
        {"attention": "window", "window": BLOCK},
        {"attention": "global_window", "window": 1, "n_global": BLOCK},
        {"attention": "global_window", "window": BLOCK, "n_global": 1},
        {"attention": "strided", "stride": 1},
        {"attention": "strided", "stride": BLOCK},
    ],
    ids=str,
)
@pytest.mark.parametrize("positions", ["learned", "alibi"])
def test_kinds_of_attention_at_their_limits_are_full(positions: str, limit: dict[str, Any]) -> None:
    ids = token_ids(2, BLOCK)
    full = gpt(positions=positions)(ids).logits.data
    np.testing.assert_allclose(gpt(positions=positions, **limit)(ids).logits.data, full, **TIGHT)


@pytest.mark.parametrize("positions", ["rope", "alibi", None])
def test_sequences_longer_than_block_size_look_back_on_block_size_tokens(positions: str | None) -> None:
    ids = token_ids(2, 2 * BLOCK + 3)
    sliding = gpt(positions=positions)
    windowed = gpt(positions=positions, block_size=len(ids[0]), attention="window", window=BLOCK)
    np.testing.assert_allclose(sliding(ids).logits.data, windowed(ids).logits.data, **TIGHT)


def test_without_positions_the_order_of_the_past_does_not_matter_and_with_them_it_does() -> None:
    ids = np.array([[1, 2, 3, 4]])
    turned = np.array([[3, 1, 2, 4]])
    for positions in ("learned", "sinusoidal", "rope", "alibi", None):
        model = gpt(positions=positions)
        same = np.allclose(model(ids).logits.data[:, -1], model(turned).logits.data[:, -1], rtol=1e-9, atol=1e-9)
        assert same == (positions is None), positions


@given(T=st.integers(2, BLOCK), seed=SEEDS, ignored=st.integers(0, BLOCK), smoothing=st.sampled_from([0.0, 0.2]))
def test_labels_are_targets_shifted_inside(T: int, seed: int, ignored: int, smoothing: float) -> None:
    model, ids = gpt(), token_ids(2, T, seed)
    labels = np.where(np.arange(T) == ignored, -100, ids)
    targets = np.concatenate([labels[:, 1:], np.full((2, 1), -100)], axis=1)
    by_labels = model(ids, labels=labels, label_smoothing=smoothing)
    by_targets = model(ids, targets=targets, label_smoothing=smoothing)
    np.testing.assert_allclose(by_labels.loss.item(), by_targets.loss.item(), **TIGHT)
    count = int((targets != -100).sum())
    assert model.num_targets(labels=labels) == model.num_targets(input_ids=ids, targets=targets) == count


def test_label_smoothing_mixes_in_the_mean_over_the_vocabulary() -> None:
    model, ids = gpt(), token_ids(2, 5)
    out = model(ids, targets=ids, label_smoothing=0.3)
    logits = out.logits.data
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, ids[..., None], -1)
    np.testing.assert_allclose(out.loss.item(), 0.7 * nll.mean() - 0.3 * log_p.mean(), rtol=1e-12)


def test_no_target_at_all_is_loss_zero() -> None:
    model, ids = gpt(), token_ids(2, 1)
    assert model(ids, labels=ids).loss.item() == 0
    assert model(ids, targets=np.full((2, 1), -100)).loss.item() == 0


def test_a_batch_of_no_rows_has_logits_of_no_rows() -> None:
    assert gpt()(np.zeros((0, 3), int)).logits.shape == (0, 3, V)


def test_dropout_acts_in_training_only_and_by_address() -> None:
    model, ids = gpt(dropout=0.3), token_ids(2, BLOCK)
    plain = gpt()(ids).logits.data
    np.testing.assert_array_equal(model(ids).logits.data, plain)

    def trained(step: int) -> np.ndarray:
        with random.scope(seed=0, step=step):
            return model(ids).logits.data

    model.train()
    assert not np.allclose(trained(0), plain)
    assert not np.allclose(trained(0), trained(1))
    np.testing.assert_array_equal(trained(0), trained(0))


# --- parameters ------------------------------------------------------------------------------------------


def count(c: mt.GPTConfig) -> int:
    """The number of parameters, from the published shapes."""
    C, F, D = c.n_embd, c.inner_width, c.n_embd // c.n_head
    kv = (c.n_kv_head or c.n_head) * D
    norm = C * (1 + (c.bias and c.norm == "layer"))
    attention = C * (C + 2 * kv) + C * C + c.bias * (C + 2 * kv + C)
    matrices = 3 if c.ffn == "swiglu" else 2
    feed_forward = matrices * C * F + c.bias * ((matrices - 1) * F + C)
    embeddings = c.vocab_size * C * (1 if c.tie_weights else 2) + c.block_size * C * (c.positions == "learned")
    return embeddings + c.n_layer * (attention + feed_forward + 2 * norm) + norm


@given(chosen=options())
def test_the_number_of_parameters_is_that_of_the_shapes(chosen: dict[str, Any]) -> None:
    model = gpt(**chosen)
    assert model.num_parameters() == count(model.config) == sum(p.data.size for p in model.parameters())


def test_the_default_is_gpt2_with_124_439_808_parameters() -> None:
    assert count(mt.GPTConfig()) == 124_439_808


def test_swiglu_has_two_thirds_of_the_width_rounded_up_to_a_multiple_of_8() -> None:
    assert mt.GPTConfig(**{**SHAPE, "n_embd": 768, "ffn": "swiglu"}).inner_width == 2048
    assert mt.GPTConfig(**{**SHAPE, "n_embd": 16, "ffn": "swiglu"}).inner_width == 48
    assert mt.GPTConfig(**{**SHAPE, "ffn": "swiglu", "n_inner": 7}).inner_width == 7


def test_tied_weights_are_one_parameter_under_one_name() -> None:
    tied, untied = gpt(), gpt(tie_weights=False)
    assert untied.num_parameters() - tied.num_parameters() == V * SHAPE["n_embd"]
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head.weight"}
    assert len(tied.parameters()) == len({id(p) for p in tied.parameters()})


def test_weights_start_as_gpt2s() -> None:
    model = mt.GPT(mt.GPTConfig(vocab_size=400, block_size=200, n_layer=3, n_head=4, n_embd=64, tie_weights=False))
    residual = 0
    for name, parameter in model.named_parameters():
        data = parameter.data
        assert data.dtype == np.float32
        if name.endswith("bias"):
            assert not data.any(), name
        elif data.ndim == 1:
            assert (data == 1).all(), name
        else:
            scaled = name.endswith(("attn.out.weight", "ffn.down.weight"))
            residual += scaled
            std = INIT_STD / math.sqrt(2 * 3) if scaled else INIT_STD
            assert abs(data.std() / std - 1) < 5 / math.sqrt(2 * data.size), name
            assert abs(data.mean()) < 5 * std / math.sqrt(data.size), name
    assert residual == 2 * 3
    ids = token_ids(4, 50)
    assert abs(model(ids, labels=ids).loss.item() - math.log(400)) < 0.1


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> bytes:
        mt.manual_seed(seed)
        return mt.GPT(mt.GPTConfig(**SHAPE)).wte.weight.data.tobytes()

    assert weights(1) == weights(1) != weights(2)
