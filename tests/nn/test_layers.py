"""Laws of the layers: modes, dropout addresses, caching, grouped heads and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import masks, nn, random
from minitransformer.errors import RangeError

C = 8


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


LAYERS: dict[str, Callable[[], Any]] = {
    "Linear": lambda: nn.Linear(C, 5),
    "Linear without bias": lambda: nn.Linear(C, 5, bias=False),
    "LayerNorm": lambda: nn.LayerNorm(C),
    "LayerNorm over two axes": lambda: nn.LayerNorm((4, C), bias=False),
    "RMSNorm": lambda: nn.RMSNorm(C),
    "SinusoidalPositions": lambda: nn.SinusoidalPositions(6, C),
    "MultiHeadAttention": lambda: nn.MultiHeadAttention(C, 4),
    "MultiHeadAttention, grouped, no bias": lambda: nn.MultiHeadAttention(C, 4, 2, bias=False),
    "SelfAttention": lambda: nn.SelfAttention(C, 2),
    **{f"FeedForward, {a}": lambda a=a: nn.FeedForward(C, 6, 0.0, a) for a in ("gelu_tanh", "silu", "swiglu")},
    **{
        f"EncoderLayer, norm_first={first}, {a}": lambda first=first, a=a: nn.EncoderLayer(
            C, 2, 6, 0.0, norm_first=first, activation=a
        )
        for first, a in ((False, "gelu"), (True, "swiglu"))
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_without_dropout_the_modes_give_equal_bits(name: str) -> None:
    layer, x = LAYERS[name](), mt.tensor(values(2, 4, C).astype(np.float32))
    train = layer(x).numpy()
    with mt.no_grad():
        free = layer(x)
    assert not free.requires_grad
    np.testing.assert_array_equal(free.numpy(), train)
    np.testing.assert_array_equal(layer.eval()(x).numpy(), train)
    assert train.dtype == np.float32


def check_gradients(loss: Callable[[], mt.Tensor], leaves: list[mt.Tensor]) -> None:
    """Central differences in four random directions through all leaves at once."""
    gradients = mt.grad(loss(), leaves)
    before = [leaf.numpy().copy() for leaf in leaves]
    rng = np.random.default_rng(1)
    for _ in range(4):
        direction = [rng.standard_normal(leaf.shape) for leaf in leaves]
        ends = []
        for step in (1e-5, -1e-5):
            for leaf, start, way in zip(leaves, before, direction, strict=True):
                leaf.data = start + step * way
            ends.append(loss().item())
        slope = sum(float((g * way).sum()) for g, way in zip(gradients, direction, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_input_and_parameters(name: str) -> None:
    layer = LAYERS[name]().to("float64")
    x = mt.tensor(values(2, 4, C), requires_grad=True)
    weights = values(*layer(x).shape, seed=2)
    check_gradients(lambda: (layer(x) * weights).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_of_decoder_layer_and_embedding(norm_first: bool) -> None:
    layer = nn.DecoderLayer(C, 2, 6, 0.0, norm_first=norm_first, activation="gelu").to("float64")
    table = nn.Embedding(5, C).to("float64")
    memory = mt.tensor(values(2, 3, C), requires_grad=True)
    ids = np.array([[1, 4, 1, 0], [2, 2, 2, 1]])
    seen = masks.padding(np.array([[1, 1, 0], [1, 0, 0]]))
    check_gradients(
        lambda: (layer(table(ids), memory, masks.causal(), seen) * values(2, 4, C, seed=2)).sum(),
        [memory, *table.parameters(), *layer.parameters()],
    )


class Model(nn.Module):
    """Dropout in every place that has it: embeddings, attention weights, hidden layer, residuals."""

    def __init__(self, p: float, norm_first: bool = False) -> None:
        self.dropout = nn.Dropout(p)
        self.encoder = [nn.EncoderLayer(C, 2, 6, p, norm_first=norm_first) for _ in range(2)]
        self.decoder = nn.DecoderLayer(C, 2, 6, p, norm_first=norm_first)
        self.name_call_sites()

    def forward(self, x: Any) -> mt.Tensor:
        hidden = self.dropout(x)
        for layer in self.encoder:
            hidden = layer(hidden)
        return self.decoder(x, hidden)


@given(split=st.integers(1, 3), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1))
def test_shards_draw_the_dropout_of_the_whole_batch(split: int, seed: int, step: int) -> None:
    model, x = Model(0.3).to("float64"), values(4, 3, C)

    def run(rows: slice, first_row: int) -> tuple[np.ndarray, list[np.ndarray]]:
        with random.scope(seed, step, first_row):
            out = model(mt.tensor(x[rows]))
        return out.numpy(), mt.grad((out * out).sum(), model.parameters())

    whole, gradients = run(slice(None), 0)
    first, second = run(slice(split), 0), run(slice(split, None), split)
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), whole, rtol=0, atol=1e-12)
    for a, b, expected in zip(first[1], second[1], gradients, strict=True):
        np.testing.assert_allclose(a + b, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_dropout_acts_and_is_addressed_by_its_path(norm_first: bool) -> None:
    """Each rate on alone: training differs from evaluation, and other draws before it change nothing."""
    model, x = Model(0.0, norm_first), mt.tensor(values(2, 5, C).astype(np.float32))
    rated = [m for _, m in model.named_modules() if isinstance(m, (nn.Dropout, nn.MultiHeadAttention))]
    assert len(rated) == 1 + 2 * 4 + 6
    for module in rated:
        name = "p" if isinstance(module, nn.Dropout) else "dropout_rate"
        setattr(module, name, 0.5)
        with random.scope(1, 2):
            out = model(x).numpy()
        with random.scope(1, 2):
            mt.functional.dropout(x)
            np.testing.assert_array_equal(model(x).numpy(), out, err_msg=module.path)
        assert (model.eval()(x).numpy() != out).any(), module.path
        model.train()
        setattr(module, name, 0.0)


def test_dropout_depends_on_path_seed_and_step_alone() -> None:
    first, second = nn.Dropout(0.5), nn.Dropout(0.5)
    first.path, second.path = "blocks.0.dropout", "blocks.1.dropout"
    ones = mt.tensor(np.ones((2, 64)))

    def drawn(layer: nn.Dropout, seed: int = 1, step: int = 2) -> np.ndarray:
        with random.scope(seed, step):
            return layer(ones).numpy()

    expected = drawn(first)
    with random.scope(1, 2):
        second(ones), mt.functional.dropout(ones)  # other draws before it change nothing
        np.testing.assert_array_equal(first(ones).numpy(), expected)
    for other in (drawn(second), drawn(first, seed=3), drawn(first, step=3)):
        assert (other != expected).any()
    assert set(np.unique(expected)) == {0.0, 2.0}


@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    B=st.integers(1, 2),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(0, 5),
    rope=st.booleans(),
    tight=st.booleans(),
)
def test_cached_equals_uncached(
    chunks: list[int], B: int, kv_heads: int, window: int | None, rope: bool, tight: bool
) -> None:
    """Any chunking; with a window, also through a cache that must drop what nobody can see any more."""
    T = sum(chunks)
    layer = nn.MultiHeadAttention(C, 4, kv_heads).to("float64")
    x = values(B, T, C)
    options: dict[str, Any] = {"is_causal": True, "causal_align": "lower_right"}
    capacity = T
    if window is not None:
        options["window_size"] = (window, 0)
        capacity = min(T, window + max(chunks)) if tight else T
    whole = layer(mt.tensor(x), rope_positions=np.arange(T) if rope else None, **options).numpy()
    cache = nn.KVCache(2, B, kv_heads, capacity, C // 4, np.float64)
    parts = []
    for end, n in zip(np.cumsum(chunks), chunks, strict=True):
        cache.reserve(n, window)
        positions = cache.length + np.arange(n) if rope else None
        part = mt.tensor(x[:, end - n : end])
        parts.append(layer(part, rope_positions=positions, cache=cache, cache_layer=1, **options).numpy())
        cache.advance(n)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)
    assert cache.length == T
    assert not cache.keys[0].any()  # the other layer's


def test_reserve_drops_from_the_front_what_is_out_of_reach() -> None:
    cache = nn.KVCache(1, 1, 1, 6, 1, np.float64)
    tokens = mt.tensor(np.arange(1.0, 8).reshape(1, 1, 7, 1))
    cache.reserve(5)
    cache.append(0, tokens[:, :, :5], -tokens[:, :, :5])
    cache.advance(5)
    cache.reserve(1, reach=2)
    assert (cache.stored, cache.length) == (5, 5)  # it fits, nothing is dropped
    cache.reserve(2, reach=3)
    assert (cache.stored, cache.length) == (3, 5)
    keys, stored = cache.append(0, tokens[:, :, 5:], -tokens[:, :, 5:])
    cache.advance(2)
    np.testing.assert_array_equal(keys.numpy().ravel(), [3, 4, 5, 6, 7])
    np.testing.assert_array_equal(stored.numpy().ravel(), [-3, -4, -5, -6, -7])
    assert (cache.stored, cache.length) == (5, 7)
    for reach in (None, 5):
        with pytest.raises(RangeError, match="KVCache: 2 more tokens do not fit, 5 of 6 slots are filled"):
            cache.reserve(2, reach)


@given(B=st.integers(1, 2), T=st.integers(1, 5), S=st.integers(1, 5), causal=st.booleans())
def test_asking_for_weights_changes_no_bit(B: int, T: int, S: int, causal: bool) -> None:
    layer = nn.MultiHeadAttention(C, 4, 2, dropout_rate=0.4)
    query, memory = (mt.tensor(values(B, n, C).astype(np.float32)) for n in (T, S))
    options: dict[str, Any] = {"is_causal": causal, "causal_align": "lower_right"}
    with random.scope(0, 0):
        plain = layer(query, memory, **options)
    with random.scope(0, 0):
        out, weights = layer(query, memory, need_weights=True, **options)
    np.testing.assert_array_equal(out.numpy(), plain.numpy())
    assert weights.shape == (B, 4, T, S)
    may = np.tri(T, S, S - T, dtype=bool) if causal else np.ones((T, S), bool)
    assert not weights.numpy()[..., ~may].any()
    np.testing.assert_allclose(weights.numpy().sum(-1), np.broadcast_to(may.any(-1), (B, 4, T)), atol=1e-6)


@given(kv_heads=st.integers(1, 3), groups=st.integers(1, 3), cross=st.booleans())
def test_grouped_heads_are_heads_with_repeated_weights(kv_heads: int, groups: int, cross: bool) -> None:
    D, H = 2, kv_heads * groups
    width = H * D
    few = nn.MultiHeadAttention(width, H, kv_heads).to("float64")
    full = nn.MultiHeadAttention(width, H).to("float64")

    def repeated(rows: np.ndarray) -> np.ndarray:
        q, k, v = np.split(rows, [width, width + kv_heads * D])
        heads = [x.reshape(kv_heads, D, *x.shape[1:]).repeat(groups, axis=0) for x in (k, v)]
        return np.concatenate([q, *(x.reshape(width, *x.shape[2:]) for x in heads)])

    state = few.state_dict()
    full.load_state_dict({n: repeated(a) if n.startswith("qkv") else a for n, a in state.items()})
    x = [mt.tensor(values(2, n, width)) for n in ((4, 3) if cross else (4,))]
    np.testing.assert_allclose(few(*x).numpy(), full(*x).numpy(), rtol=0, atol=1e-12)


def test_a_query_without_keys_gives_the_output_bias() -> None:
    layer = nn.MultiHeadAttention(C, 2)
    blocked = np.zeros((3, 3), bool)
    out = layer(mt.tensor(values(1, 3, C).astype(np.float32)), attn_mask=blocked)
    np.testing.assert_array_equal(out.numpy(), np.broadcast_to(layer.out.bias.numpy(), (1, 3, C)))


@given(steps=st.lists(st.integers(1, 3), min_size=1, max_size=4), norm_first=st.booleans(), S=st.integers(1, 4))
def test_a_decoder_layer_fed_in_pieces_is_the_whole(steps: list[int], norm_first: bool, S: int) -> None:
    layer = nn.DecoderLayer(C, 2, 12, norm_first=norm_first).to("float64").eval()
    T = sum(steps)
    x, memory = mt.tensor(values(2, T, C)), mt.tensor(values(2, S, C))
    memory_mask = np.arange(S) < np.array([1, S])[:, None, None, None]
    whole = layer(x, memory, memory_mask=memory_mask, is_causal=True).numpy()
    cache = nn.DecoderCache(nn.KVCache(1, 2, 2, T, C // 2, np.float64))
    parts, at, given_memory = [], 0, memory
    for n in steps:
        parts.append(layer(x[:, at : at + n], given_memory, None, memory_mask, is_causal=True, cache=cache).numpy())
        cache.own.advance(n)
        at, given_memory = at + n, mt.tensor(np.full((2, S, C), np.nan))  # it is not read again
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)


def test_selected_rows_of_a_cache() -> None:
    cache = nn.KVCache(1, 3, 2, 4, C // 2, np.float32)
    keys = mt.tensor(values(3, 2, 2, C // 2).astype(np.float32))
    cache.append(0, keys, keys)
    cache.advance(2)
    cache.select(np.array([2, 0, 2]))
    np.testing.assert_array_equal(cache.keys[0, :, :, :2], keys.numpy()[[2, 0, 2]])
    np.testing.assert_array_equal(cache.values[0, :, :, :2], keys.numpy()[[2, 0, 2]])
    assert cache.length == 2
