"""Linear attention as a layer, and its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import functional as F
from minitransformer import nn, tensor
from minitransformer.errors import DTypeError, MiniTransformerError, RangeError, ShapeError

D = 3


def tokens(heads: int, T: int, seed: int, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng([heads, T, seed]).standard_normal((2, heads, T, D)).astype(dtype)


@given(T=st.integers(1, 70), K=st.integers(1, 2), groups=st.integers(1, 3), data=st.data())
def test_in_pieces_it_is_the_whole(T: int, K: int, groups: int, data: st.DataObject) -> None:
    q, k, v = (tensor(tokens(heads, T, n)) for n, heads in enumerate((K * groups, K, K)))
    whole = F.linear_attention(q, k, v, is_causal=True).numpy()
    cache, out, start = nn.StateCache(2, 2, K, D, np.dtype(np.float64)), [], 0
    while start < T:
        end = data.draw(st.integers(start + 1, T), label="end of piece")
        out.append(cache.attend(1, *(x[:, :, start:end] for x in (q, k, v))).numpy())
        start = end
    np.testing.assert_allclose(np.concatenate(out, axis=2), whole, rtol=1e-11, atol=1e-11)
    assert not cache.sums[0].any()
    again = nn.StateCache(1, 2, K, D, np.dtype(np.float64))
    again.append(0, k, v)
    np.testing.assert_allclose(again.sums[0], cache.sums[1], rtol=1e-11, atol=1e-11)


def test_tokens_without_weight_give_nothing() -> None:
    cache = nn.StateCache(1, 2, 1, D, np.dtype(np.float32))
    nowhere = tensor(np.full((2, 1, 4, D), -np.inf, np.float32))
    q, v = (tensor(tokens(1, 4, n, np.float32)) for n in range(2))
    assert not cache.attend(0, q, nowhere, v).numpy().any()
    assert not cache.sums.any()


def test_rows_are_selected() -> None:
    cache = nn.StateCache(1, 2, 1, D, np.dtype(np.float64))
    cache.append(0, *(tensor(tokens(1, 2, n)) for n in range(2)))
    before = cache.sums.copy()
    cache.select(np.array([1, 1]))
    np.testing.assert_array_equal(cache.sums, before[:, [1, 1]])


def test_hidden_keys_are_as_if_they_were_not_there() -> None:
    layer = nn.LinearSelfAttention(8, 4, 2)
    layer.to("float64")
    x = np.random.default_rng(0).standard_normal((2, 6, 8))
    mask = np.array([True, False, True, True, False, True])
    out = layer(tensor(x), attn_mask=np.broadcast_to(mask, (2, 1, 1, 6))).numpy()
    np.testing.assert_allclose(out[:, mask], layer(tensor(x[:, mask])).numpy(), rtol=1e-12, atol=1e-12)


def state() -> nn.StateCache:
    return nn.StateCache(1, 2, 2, D, np.dtype(np.float32))


REFUSALS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: state().append(0, tensor(tokens(1, 2, 0)), tensor(tokens(1, 2, 0))),
        ShapeError,
        "StateCache.append: k and v have shapes (2, 1, 2, 3) and (2, 1, 2, 3), expected one (2, 2, T, 3). Make the "
        "cache with model.make_cache(batch_size) for this batch size.",
    ),
    (
        lambda: state().attend(1, *[tensor(tokens(2, 2, 0))] * 3),
        RangeError,
        "StateCache.attend: layer is 1, expected 0 to 0. Make the cache for as many layers as the model has.",
    ),
    (
        lambda: state().select(np.array([0, 2])),
        RangeError,
        "StateCache.select: rows are [0, 2], expected 0 to 1. Count the rows of the cache from 0.",
    ),
    (
        lambda: nn.LinearSelfAttention(8, 2)(tensor(np.zeros((1, 3, 8))), attn_mask=np.ones((3, 3), bool)),
        ShapeError,
        "LinearSelfAttention: attn_mask is a ndarray of shape (3, 3), expected bools of shape (1, 1, 1, 3). Only whole "
        "keys can be hidden from linear attention.",
    ),
    (
        lambda: nn.LinearSelfAttention(8, 2)(tensor(np.zeros((1, 3, 8))), cache=3),
        DTypeError,
        "LinearSelfAttention: cache is 3, expected a StateCache. Make it with model.make_cache(batch_size).",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals(call: Callable[[], Any], error: type[MiniTransformerError], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
