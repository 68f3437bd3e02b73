"""Valid calls of `nn`: layers made, and layers called."""

from __future__ import annotations

import numpy as np
from material import Lines, bools, call, filled, ids, layer, leaf, real, some, writes

from minitransformer import functional as F
from minitransformer import masks, nn

LAYERS: Lines = {
    "nn.DecoderLayer": lambda: call(nn.DecoderLayer, 4, 2, 8, 0.1, norm_first=True, activation="gelu"),
    "nn.DecoderLayer.forward": lambda: layer(
        lambda: nn.DecoderLayer(4, 2, 8).eval(), leaf(2, 3, 4), leaf(2, 5, 4), masks.causal(), memory_mask=bools(3, 5)
    ),
    "nn.Dropout": lambda: call(nn.Dropout, 0.5),
    "nn.Dropout.forward": lambda: layer(lambda: nn.Dropout(0.5), leaf(2, 3)),
    "nn.Embedding": lambda: call(nn.Embedding, 5, 4),
    "nn.Embedding.forward": lambda: layer(lambda: nn.Embedding(5, 4), ids(2, 3)),
    "nn.EncoderLayer": lambda: call(
        nn.EncoderLayer, 4, 2, 8, 0.1, norm_first=False, activation="swiglu", layer_norm_eps=1e-6
    ),
    "nn.EncoderLayer.forward": lambda: layer(lambda: nn.EncoderLayer(4, 2, 8).eval(), leaf(2, 3, 4), bools(3, 3)),
    "nn.FeedForward": lambda: call(nn.FeedForward, 4, 8, 0.0, "relu", True),
    "nn.FeedForward.forward": lambda: layer(lambda: nn.FeedForward(4, 8), leaf(2, 4)),
    "nn.KVCache": lambda: call(nn.KVCache, 1, 2, 2, 4, 3, np.dtype(np.float32)),
    "nn.KVCache.append": lambda: call(
        nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).append, 0, leaf(2, 2, 3, 3), leaf(2, 2, 3, 3)
    ),
    "nn.KVCache.reserve": lambda: call(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).reserve, 2, reach=1),
    "nn.KVCache.select": lambda: call(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).select, np.array([1, 1])),
    "nn.DecoderCache": lambda: call(nn.DecoderCache, nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32))),
    "nn.DecoderCache.select": lambda: call(
        nn.DecoderCache(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32))).select, np.array([1, 1])
    ),
    "nn.MemoryCache": lambda: call(nn.MemoryCache, 2),
    "nn.MemoryCache.of": lambda: call(nn.MemoryCache(2).of, 1),
    "nn.MemoryCache.keep": lambda: call(nn.MemoryCache(2).keep, 1, leaf(2, 2, 3, 3), leaf(2, 2, 3, 3)),
    "nn.StateCache": lambda: call(nn.StateCache, 1, 2, 2, 3, np.dtype(np.float32)),
    "nn.StateCache.append": lambda: call(
        nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).append, 0, leaf(2, 2, 4, 3), leaf(2, 2, 4, 3)
    ),
    "nn.StateCache.attend": lambda: call(
        nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).attend,
        0,
        leaf(2, 4, 4, 3),
        leaf(2, 2, 4, 3),
        leaf(2, 2, 4, 3),
    ),
    "nn.StateCache.select": lambda: call(nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).select, np.array([1, 1])),
    "nn.StateCache.advance": lambda: call(nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).advance, 2),
    "nn.KVCache.advance": lambda: call(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).advance, 2),
    "nn.LayerNorm": lambda: call(nn.LayerNorm, (3, 4), eps=1e-5, bias=True),
    "nn.LayerNorm.forward": lambda: layer(lambda: nn.LayerNorm((3, 4)), leaf(2, 3, 4)),
    "nn.Linear": lambda: call(nn.Linear, 3, 4, bias=True),
    "nn.Linear.forward": lambda: layer(lambda: nn.Linear(3, 4), leaf(2, 3)),
    "nn.Module": lambda: call(nn.Module),
    "nn.Module.load_state_dict": lambda: writes(
        nn.Linear(3, 4).load_state_dict, {"weight": real(4, 3), "bias": real(4)}, strict=True
    ),
    "nn.Module.named_modules": lambda: call(lambda prefix: some(nn.Linear(3, 4).named_modules(prefix)), "model"),
    "nn.Module.to": lambda: call(lambda target: nn.Linear(3, 4).to(target), "float64"),
    "nn.Module.train": lambda: call(nn.Linear(3, 4).train, True),
    "nn.LinearSelfAttention": lambda: call(nn.LinearSelfAttention, 8, 4, 2, 0.1, True),
    "nn.LinearSelfAttention.forward": lambda: layer(
        lambda: nn.LinearSelfAttention(8, 4, 2), leaf(2, 3, 8), attn_mask=bools(2, 1, 1, 3), rope_positions=ids(3)
    ),
    "nn.LinearSelfAttention.forward cached": lambda: layer(
        lambda: nn.LinearSelfAttention(8, 4, 2),
        leaf(2, 3, 8),
        cache=nn.StateCache(1, 2, 2, 2, np.dtype(np.float32)),
        cache_layer=0,
    ),
    "nn.MultiHeadAttention": lambda: call(nn.MultiHeadAttention, 8, 4, 2, 0.1, True),
    "nn.MultiHeadAttention.forward": lambda: layer(
        lambda: nn.MultiHeadAttention(8, 4, 2),
        leaf(2, 3, 8),
        attn_mask=bools(3, 3),
        is_causal=True,
        causal_align="upper_left",
        window_size=(2, 0),
        sparse=F.Sparse(range(1, 9, 2), block=2, origin=np.array([0, 1])),
        key_lengths=np.array([3, 2]),
        alibi_slopes=real(4),
        rope_positions=ids(3),
        need_weights=True,
    ),
    "nn.MultiHeadAttention.forward cross": lambda: layer(
        lambda: nn.MultiHeadAttention(8, 4), leaf(2, 3, 8), leaf(2, 5, 8), leaf(2, 5, 8)
    ),
    "nn.MultiHeadAttention.forward cache": lambda: layer(
        lambda: nn.MultiHeadAttention(8, 4),
        leaf(2, 3, 8),
        cache=nn.KVCache(1, 2, 4, 6, 2, np.dtype(np.float32)),
        cache_layer=0,
    ),
    "nn.Parameter": lambda: call(nn.Parameter, real(2, 3), False),
    "nn.PatchEmbedding": lambda: call(nn.PatchEmbedding, 4, 2, 3, 5),
    "nn.PatchEmbedding.forward": lambda: layer(lambda: nn.PatchEmbedding(4, 2, 1, 5), leaf(2, 1, 4, 4)),
    "nn.RMSNorm": lambda: call(nn.RMSNorm, 4, 1e-5),
    "nn.RMSNorm.forward": lambda: layer(lambda: nn.RMSNorm(4), leaf(2, 4)),
    "nn.SelfAttention": lambda: call(nn.SelfAttention, 8, 4),
    "nn.SelfAttention.forward": lambda: layer(lambda: nn.SelfAttention(8, 4), leaf(2, 3, 8), masks.causal()),
    "nn.SinusoidalPositions": lambda: call(nn.SinusoidalPositions, 6, 4),
    "nn.SinusoidalPositions.forward": lambda: layer(lambda: nn.SinusoidalPositions(6, 4), leaf(2, 3, 4)),
    "nn.clip_grad_norm_": lambda: writes(nn.clip_grad_norm_, [filled(real(2, 3)), filled(real(3))], 0.5),
}
