"""Generation: the cache changes nothing, and rows end when they should."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, Given, Listener, V, gpt, options, token_ids

import minitransformer as mt
from minitransformer.errors import DTypeError, RangeError
from minitransformer.generate import generate
from minitransformer.nn import KVCache, StateCache

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = st.integers(0, 2**32)
ABSOLUTE = ("learned", "sinusoidal")


def left_padded(B: int, T: int, seed: int) -> np.ndarray:
    """A mask (B, T) with a drawn number of padding tokens in front of each row but the first."""
    padding = np.random.default_rng(seed).integers(0, T, (B, 1))
    padding[0] = 0
    return np.arange(T) >= padding


# --- the cache -------------------------------------------------------------------------------------------


@given(chosen=options(), seed=SEEDS, padded=st.booleans(), data=st.data())
def test_cached_logits_are_the_uncached_ones_however_the_tokens_are_fed(
    chosen: dict[str, Any], seed: int, padded: bool, data: st.DataObject
) -> None:
    model = gpt(seed=seed, **chosen)
    T = data.draw(st.integers(1, 3 * BLOCK if model.config.slides else BLOCK), label="T")
    ids = token_ids(3, T, seed)
    mask = left_padded(3, T, seed) if padded else np.ones((3, T), bool)
    uncached = model(ids, attention_mask=mask if padded else None).logits.data
    cache = model.make_cache(3, T)
    steps = model.steps(cache)
    assert (steps is None) == (model.config.attention == "linear")
    with mt.no_grad():
        while (past := cache.length) < T:
            end = data.draw(st.integers(past + 1, min(T, past + BLOCK)), label="end of piece")
            piece_mask = mask[:, :end] if padded else None
            if steps is not None and end == past + 1 and data.draw(st.booleans(), label="by steps"):
                logits = steps(ids[:, past], piece_mask)[:, None]
            else:
                logits = model(ids[:, past:end], attention_mask=piece_mask, cache=cache).logits.data
            real = mask[:, past:end]
            np.testing.assert_allclose(logits[real], uncached[:, past:end][real], **TIGHT)
    assert cache.length == T


def test_a_sliding_cache_needs_no_more_than_twice_block_size() -> None:
    assert gpt(positions="rope").make_cache(1, 1000).capacity == 2 * BLOCK
    assert gpt().make_cache(1).capacity == BLOCK


def test_first_tokens_that_everybody_sees_stay_in_the_cache_and_a_state_does_not_grow() -> None:
    kept = gpt(positions="rope", attention="global_window", window=2).make_cache(1, 1000)
    assert isinstance(kept, KVCache) and kept.capacity == 1000
    states = [gpt(attention="linear").make_cache(2, T) for T in (1, BLOCK)]
    assert all(isinstance(state, StateCache) and state.sums.shape == (1, 2, 2, 8, 9) for state in states)


def quietly(model: mt.GPT, *args: Any, **kwargs: Any) -> np.ndarray:
    """`generate`, whose warning about re-reading is tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(*args, **kwargs)


@given(chosen=options(), seed=SEEDS, T=st.integers(1, 2 * BLOCK), padded=st.booleans(), do_sample=st.booleans())
def test_tokens_are_the_same_with_and_without_cache_also_past_block_size(
    chosen: dict[str, Any], seed: int, T: int, padded: bool, do_sample: bool
) -> None:
    model, ids = gpt(seed=seed, **chosen), token_ids(2, T, seed)
    mask = left_padded(2, T, seed) if padded else None
    kwargs = {"max_new_tokens": BLOCK + 3, "do_sample": do_sample, "attention_mask": mask, "seed": seed}
    cached, uncached = (quietly(model, ids, use_cache=use, **kwargs) for use in (True, False))
    assert cached.dtype == np.int64
    np.testing.assert_array_equal(cached, uncached)
    np.testing.assert_array_equal(cached[:, :T], ids)


@given(chosen=options(), seed=SEEDS, T=st.integers(1, BLOCK + 4))
def test_greedy_takes_the_likeliest_token_after_what_the_model_can_see(
    chosen: dict[str, Any], seed: int, T: int
) -> None:
    model, ids = gpt(seed=seed, **chosen), token_ids(2, T, seed)
    expected = ids
    for _ in range(6):
        seen = expected if model.config.slides else expected[:, -BLOCK:]
        new = model(seen).logits.data[:, -1].argmax(-1)
        expected = np.concatenate([expected, new[:, None]], axis=1)
    np.testing.assert_array_equal(quietly(model, ids, max_new_tokens=6), expected)


@given(chosen=options(), seed=SEEDS, padding=st.integers(1, 4), do_sample=st.booleans())
def test_padding_on_the_left_changes_no_token(chosen: dict[str, Any], seed: int, padding: int, do_sample: bool) -> None:
    model, ids = gpt(seed=seed, **chosen), token_ids(2, 2, seed)
    padded = np.concatenate([token_ids(2, padding, seed), ids], axis=1)
    mask = np.arange(padding + 2)[None].repeat(2, 0) >= padding
    kwargs = {"max_new_tokens": 2, "do_sample": do_sample, "seed": seed}
    expected = model.generate(ids, **kwargs)[:, 2:]
    np.testing.assert_array_equal(model.generate(padded, attention_mask=mask, **kwargs)[:, padding + 2 :], expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "alibi", None])
def test_absolute_positions_warn_once_that_they_read_again_and_others_do_not(
    positions: str | None, use_cache: bool
) -> None:
    model = gpt(positions=positions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(token_ids(1, 3), max_new_tokens=2 * BLOCK, use_cache=use_cache)
    assert len(caught) == (positions in ABSOLUTE)
    if caught:
        assert str(caught[0].message) == (
            "generate: past block_size 8 the last 8 tokens are read again for every new one, because their "
            "positions are absolute"
        )
        assert caught[0].filename == __file__


def test_up_to_block_size_nothing_is_read_again() -> None:
    gpt().generate(token_ids(1, 3), max_new_tokens=BLOCK - 2)  # the last token is not read; a warning would fail


def test_float32_generates_with_its_cache() -> None:
    model = gpt("float32", positions="rope")
    ids = token_ids(2, 4)
    cached, uncached = (model.generate(ids, max_new_tokens=5, use_cache=use) for use in (True, False))
    np.testing.assert_array_equal(cached, uncached)


class Constant(mt.GPT):
    """Whatever it reads, it says 3."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return replace(out, logits=mt.tensor(np.broadcast_to(np.eye(V)[3], out.logits.shape)))


class Louder(mt.nn.LayerNorm):
    """A layer of somebody else's."""

    def forward(self, x: mt.Tensor) -> mt.Tensor:
        return 2 * super().forward(x)


def test_a_model_whose_forward_is_its_own_is_asked_for_every_token() -> None:
    model = Constant(gpt().config)
    assert model.steps(model.make_cache(1)) is None
    assert (model.generate(token_ids(1, 2), max_new_tokens=4)[:, 2:] == 3).all()
    plain = gpt()
    plain.forward = model.forward  # type: ignore[method-assign]
    assert plain.steps(plain.make_cache(1)) is None


@pytest.mark.parametrize("place", ["norm", "blocks.0.norm1", "blocks.0.norm2", "blocks.0"])
def test_replaced_parts_are_asked_for_every_token(place: str) -> None:
    model, ids = gpt(), token_ids(2, 3)
    *path, name = place.split(".")
    owner: Any = model
    for part in path:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    if isinstance(owner, list):
        block = owner[0]

        class Twice(mt.nn.Module):
            def forward(self, x: mt.Tensor, *args: Any, **attention: Any) -> mt.Tensor:
                return 2 * block(x, *args, **attention)

        owner[0] = Twice()
    else:
        setattr(owner, name, Louder(getattr(owner, name).weight.shape[0]).to("float64"))
    assert model.steps(model.make_cache(2)) is None
    cached, uncached = (model.generate(ids, max_new_tokens=4, use_cache=use) for use in (True, False))
    np.testing.assert_array_equal(cached, uncached)


@pytest.mark.parametrize("ids, message", [([9 * V], "the id at position"), ([-1], "the id at position"), ([0], "long")])
def test_steps_refuse_what_the_model_refuses(ids: list[int], message: str) -> None:
    model = gpt()
    cache = model.make_cache(1, BLOCK + 1)
    steps = model.steps(cache)
    assert steps is not None
    if message == "long":
        for _ in range(BLOCK):
            steps(np.array(ids))
    with pytest.raises(RangeError, match=f"^GPT: .*{message}"):
        steps(np.array(ids))
    with pytest.raises(DTypeError, match=r"^GPT: cache is 'x', expected a KVCache"):
        model.steps("x")
    assert cache.length == (BLOCK if message == "long" else 0)


# --- how it ends, and what it leaves alone ---------------------------------------------------------------


def scripted(*steps: list[int]) -> Given:
    """A model of two rows that says the tokens of each step, from a prompt of one token on."""
    return Given(lambda length: np.eye(V)[steps[min(length, len(steps)) - 1]])


def test_a_row_that_has_ended_is_filled_and_all_ended_is_the_end() -> None:
    listener = Listener()
    model = scripted([5, 9], [1, 5], [9, 2], [5, 9], [5, 5])
    ids = generate(model, [[0], [5]], max_new_tokens=9, eos_token_id=9, streamer=listener)
    assert ids.tolist() == [[0, 5, 1, 9], [5, 9, 9, 9]]
    assert np.stack(listener.received, axis=1).tolist() == [[5, 1, 9], [9, 9, 9]]
    assert listener.ended == 1


def test_an_end_in_the_prompt_ends_nothing() -> None:
    assert generate(scripted([1, 2]), [[9], [9]], max_new_tokens=2, eos_token_id=9).tolist() == [[9, 1, 1], [9, 2, 2]]


@given(new=st.integers(0, 6), do_sample=st.booleans())
def test_the_streamer_receives_the_new_tokens(new: int, do_sample: bool) -> None:
    listener, ids = Listener(), token_ids(2, 2)
    out = gpt().generate(ids, max_new_tokens=new, do_sample=do_sample, streamer=listener, seed=1)
    assert out.shape == (2, 2 + new)
    received = np.array(listener.received).reshape(new, 2)
    np.testing.assert_array_equal(received.T, out[:, 2:])
    assert listener.ended == 1


def test_no_new_tokens_is_a_copy_of_the_prompt() -> None:
    ids = token_ids(2, 3)
    out = gpt().generate(ids, max_new_tokens=0)
    np.testing.assert_array_equal(out, ids)
    assert not np.shares_memory(out, ids)


def test_no_rows_give_no_rows() -> None:
    assert gpt().generate(np.zeros((0, 3), int), max_new_tokens=2).shape == (0, 5)


def test_the_model_and_the_prompt_are_left_as_they_were() -> None:
    model, ids = gpt(dropout=0.5), token_ids(2, 3)
    prompt, weights = ids.copy(), model.state_dict()
    for training in (True, False):
        model.train(training)
        model.generate(ids, max_new_tokens=3)
        assert {module.training for _, module in model.named_modules()} == {training}
    assert all(p.grad is None for p in model.parameters())
    np.testing.assert_array_equal(ids, prompt)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, weights[name])


def test_dropout_is_off_while_generating() -> None:
    model, ids = gpt(dropout=0.5), token_ids(2, 3)
    expected = model.generate(ids, max_new_tokens=4)
    model.train()
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=4), expected)


def test_an_error_inside_leaves_the_model_in_training() -> None:
    class Broken(Listener):
        def put(self, ids: np.ndarray) -> None:
            raise OSError("the terminal is gone")

    model = gpt()
    model.train()
    with pytest.raises(OSError, match="terminal"):
        model.generate(token_ids(1, 2), max_new_tokens=2, streamer=Broken())
    assert model.training
    x = mt.tensor([1.0], requires_grad=True)
    assert (x * 2).requires_grad  # gradients are on again
