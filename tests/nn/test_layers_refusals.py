"""What layers and their caches refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer import nn
from minitransformer.errors import ConfigError, DTypeError, MaskError, RangeError, ShapeError

C = 8


def attend(*shapes: tuple[int, ...], **options: Any) -> Any:
    shapes = shapes or ((2, 3, C),)
    return nn.MultiHeadAttention(C, 2)(*[mt.tensor(np.zeros(s, np.float32)) for s in shapes], **options)


def small_cache(batch_size: int = 2, capacity: int = 4) -> nn.KVCache:
    return nn.KVCache(1, batch_size, 2, capacity, C // 2, np.float32)


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.MultiHeadAttention(10, 4), ConfigError, "d_model 10 is not divisible by num_heads 4"),
    (lambda: nn.MultiHeadAttention(8, 4, 3), ConfigError, "num_heads 4 is not divisible by num_kv_heads 3"),
    (lambda: nn.MultiHeadAttention(8, 0), ConfigError, "num_heads is 0, expected a positive integer"),
    (lambda: nn.MultiHeadAttention(8, 2, dropout_rate=1.0), ConfigError, "dropout rate is 1.0, expected"),
    (lambda: nn.Linear(2.0, 3), ConfigError, "in_features is 2.0, expected a positive integer"),
    (lambda: nn.LayerNorm((3, 0)), ConfigError, "normalized_shape is 0, expected a positive integer"),
    (lambda: nn.EncoderLayer(8, 2, 0), ConfigError, "dff is 0"),
    (lambda: nn.FeedForward(8, 4, activation="glu"), ConfigError, "activation is 'glu', expected one of"),
    (lambda: attend((2, 3, C + 1)), ShapeError, r"query has shape \(2, 3, 9\), expected \(batch, length, 8\)"),
    (lambda: attend((2, 3, C), (2, C)), ShapeError, r"key has shape \(2, 8\), expected \(batch, length, 8\)"),
    (lambda: attend((2, 3, C), (1, 3, C)), ShapeError, "the batch sizes differ"),
    (lambda: attend((2, 3, C), (2, 3, C), (2, 4, C)), ShapeError, "key and value differ in heads or length"),
    (lambda: attend(value=mt.tensor(np.zeros((2, 3, C)))), ConfigError, "got a value without a key"),
    (
        lambda: attend((2, 3, C), (2, 3, C), rope_positions=np.arange(3)),
        ConfigError,
        "rope_positions belong to self-attention",
    ),
    (
        lambda: attend((2, 3, C), (2, 3, C), cache=small_cache()),
        DTypeError,
        r"cache is <.*KVCache.*>, expected a MemoryCache",
    ),
    (
        lambda: small_cache().select(np.array([0])),
        ShapeError,
        r"rows have shape \(1,\) and dtype int64, expected \(2,\)",
    ),
    (lambda: small_cache().select(np.array([0, 2])), RangeError, r"rows are \[0, 2\], expected 0 to 1"),
    (lambda: nn.DecoderCache(3), DTypeError, "DecoderCache: own is 3, expected a KVCache"),
    (
        lambda: attend((2, 3, C), (2, 3, C), cache=nn.DecoderCache(small_cache()).memory, cache_layer=1),
        RangeError,
        "MemoryCache: layer is 1, expected 0 to 0",
    ),
    (lambda: nn.DecoderLayer(C, 2, 4)(None, None), DTypeError, "DecoderLayer: there is no memory to attend to. Pass"),
    (
        lambda: nn.DecoderLayer(C, 2, 4)(None, None, cache=small_cache()),
        DTypeError,
        r"DecoderLayer: cache is <.*KVCache.*>, expected a DecoderCache",
    ),
    (
        lambda: attend(key_padding_mask=np.zeros((2, 3), bool)),
        TypeError,
        r"True = blocked.*Pass attn_mask=masks.padding\(~key_padding_mask\)",
    ),
    (
        lambda: nn.EncoderLayer(C, 2, 4)(None, src_key_padding_mask=None),
        DTypeError,
        r"EncoderLayer: .*masks.padding\(~src_key_padding_mask\)",
    ),
    (
        lambda: nn.DecoderLayer(C, 2, 4)(None, None, memory_key_padding_mask=None),
        DTypeError,
        r"DecoderLayer: .*masks.padding\(~memory_key_padding_mask\)",
    ),
    (lambda: attend(attention_mask=None), TypeError, "unexpected argument 'attention_mask'"),
    (
        lambda: attend(attn_mask=np.ones((3, 3), np.int64)),
        MaskError,
        "dtype int64, expected bool .* Write attn_mask != 0 if 1 means 'may attend'",
    ),
    (
        lambda: attend(attn_mask=np.tri(3)),
        MaskError,
        "holds only 0 and 1.* Pass a bool mask: attn_mask != 0",
    ),
    (
        lambda: attend(attn_mask=np.ones((2, 3), bool)),
        MaskError,
        r"shape \(2, 3\), expected one that broadcasts to \(B, H, T, S\) = \(2, 2, 3, 3\)",
    ),
    (lambda: attend((2, 3, C), (2, 5, C), is_causal=True), MaskError, "Pass causal_align='lower_right'"),
    (lambda: attend(cache=small_cache(capacity=2)), ShapeError, "do not fit behind 0 tokens"),
    (lambda: attend(cache=small_cache(batch_size=1)), ShapeError, r"Make the cache with model.make_cache"),
    (lambda: small_cache().reserve(5), RangeError, "5 more tokens do not fit, 0 of 4 slots are filled"),
    (
        lambda: nn.SinusoidalPositions(4, C)(mt.tensor(np.zeros((1, 5, C)))),
        RangeError,
        "the sequence has length 5, expected at most 4",
    ),
    (lambda: nn.Embedding(4, C)(np.array([[0, 4]])), RangeError, r"the id at position \(0, 1\) is 4"),
    (lambda: nn.Embedding(4, C)(np.array([0.0])), DTypeError, "ids have dtype float64"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
