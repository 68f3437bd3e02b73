"""Multi-head attention: self, cross and cached."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor
from minitransformer.checks import check_flag, check_size, shown
from minitransformer.errors import ConfigError, DTypeError
from minitransformer.functional.attention import refuse
from minitransformer.kernels.attention.problem import Problem
from minitransformer.nn.dropout import call_site
from minitransformer.nn.kv_cache import KVCache, MemoryCache
from minitransformer.nn.linear import Linear, as_sequence
from minitransformer.nn.module import Module
from minitransformer.ops.attention import split_mask
from minitransformer.ops.dropout import check_rate


class MultiHeadAttention(Module):
    """Multi-head attention (Vaswani et al. 2017) with one packed projection for query, key and value.

    `qkv.weight` is (C + 2 K D, C): C = d_model rows for the queries of H = num_heads heads of width
    D = C / H, then K D rows for the keys and K D for the values of K = num_kv_heads heads (K = H unless
    given; fewer are shared, Ainslie et al. 2023). `out` is (C, C).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        dropout_rate: float = 0.0,
        bias: bool = True,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_size("MultiHeadAttention", d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if d_model % num_heads:
            raise ConfigError(
                "MultiHeadAttention",
                f"d_model {d_model} is not divisible by num_heads {num_heads}",
                "Choose a number of heads that divides the width",
            )
        if num_heads % num_kv_heads:
            raise ConfigError(
                "MultiHeadAttention",
                f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}",
                "Choose a number of key heads that divides the number of query heads",
            )
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_width = d_model // num_heads
        self.dropout_rate = check_rate("MultiHeadAttention", dropout_rate)
        self.qkv = Linear(d_model, d_model + 2 * num_kv_heads * self.head_width, bias)
        self.out = Linear(d_model, d_model, bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Any = None,
        is_causal: bool = False,
        causal_align: str | None = None,
        window_size: tuple[int | None, int | None] | None = None,
        sparse: F.Sparse | None = None,
        key_lengths: Any = None,
        alibi_slopes: Any = None,
        rope_positions: Any = None,
        cache: KVCache | MemoryCache | None = None,
        cache_layer: int = 0,
        need_weights: bool = False,
        **unexpected: Any,
    ) -> Any:
        """(B, T, C) from query (B, T, C), key and value (B, S, C); self-attention if no key is given.

        Masks and positions as in `F.scaled_dot_product_attention`. `rope_positions` (T,) or (B, T) turns
        queries and keys. In self-attention the new keys and values go behind those that a `KVCache` holds of
        layer `cache_layer`, and all of them are attended to; with a key, a `MemoryCache` keeps what the first call
        made of it, and later ones do not look at it. With `need_weights` also returns the weights (B, H, T, S).
        """
        refuse("MultiHeadAttention", unexpected)
        if key is None and value is not None:
            raise ConfigError("MultiHeadAttention", "got a value without a key", "Pass both, or neither")
        if key is not None and rope_positions is not None:
            raise ConfigError("MultiHeadAttention", "rope_positions belong to self-attention", "Leave out the key")
        kind = KVCache if key is None else MemoryCache
        if cache is not None and not isinstance(cache, kind):
            problem = f"cache is {shown(cache)}, expected a {kind.__name__}"
            raise DTypeError("MultiHeadAttention", problem, "Make it with model.make_cache(batch_size)")
        need_weights = check_flag("MultiHeadAttention", "need_weights", need_weights)
        query = as_sequence("MultiHeadAttention", "query", query, self.d_model)
        key, value = (
            None if x is None else as_sequence("MultiHeadAttention", name, x, self.d_model)
            for name, x in (("key", key), ("value", value))
        )
        made = cache.of(cache_layer) if isinstance(cache, MemoryCache) else None
        if made is not None:
            q, (k, v) = self._query(query), made
        else:
            q, k, v = self._project(query, key, value)  # (B, H, T, D), (B, K, S, D) twice
        if rope_positions is not None:
            q, k = F.apply_rope(q, rope_positions), F.apply_rope(k, rope_positions)
        if isinstance(cache, KVCache):
            k, v = cache.append(cache_layer, k, v)
        elif cache is not None:
            cache.keep(cache_layer, k, v)
        result = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            dropout_p=self.dropout_rate if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=True,
            causal_align=causal_align,
            window_size=window_size,
            sparse=sparse,
            key_lengths=key_lengths,
            alibi_slopes=alibi_slopes,
            need_weights=need_weights,
            dropout_site=call_site(self),
        )
        heads, weights = result if need_weights else (result, None)
        B, H, T, D = heads.shape
        merged = heads.transpose(1, 2).reshape(B, T, H * D)  # (B, T, C)
        return (self.out(merged), weights) if need_weights else self.out(merged)

    def problem(self, mask: Any, B: int, T: int, S: int, is_causal: bool = False) -> Problem:
        """What attention of T queries to S keys asks of the kernel, for a layer by hand, dropout included.

        `mask` is one that `selects` keys; with `is_causal` T is S.
        """
        selected, _ = split_mask("attention", mask, B, self.num_heads, T, S)
        if selected is not None and isinstance(mask, Tensor):
            selected = selected.copy()  # backward needs it as it was, and a static argument has no version
        causal = check_flag("attention", "is_causal", is_causal)
        offset = np.zeros(1, np.int64)
        return self.with_dropout(Problem(1 / math.sqrt(self.head_width), offset, causal=causal, mask=selected))

    def with_dropout(self, problem: Problem) -> Problem:
        """`problem` with the dropout of this call, if there is any."""
        if not (self.training and self.dropout_rate):
            return problem
        rate = check_rate("attention", self.dropout_rate)
        return problem._replace(dropout_p=rate, dropout_key=random.next_key(call_site(self)))

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        widths = [self.d_model, *[self.num_kv_heads * self.head_width] * 2]
        if key is None:
            q, k, v = F.split(self.qkv(query), widths, dim=-1)  # each (B, T, width)
        else:
            weights = F.split(self.qkv.weight, widths, dim=0)
            biases = (None,) * 3 if self.qkv.bias is None else F.split(self.qkv.bias, widths, dim=0)
            inputs = (query, key, key if value is None else value)
            q, k, v = (F.linear(*each) for each in zip(inputs, weights, biases, strict=True))
        return self._split_heads(q), self._split_heads(k), self._split_heads(v)

    def _query(self, query: Tensor) -> Tensor:
        C, bias = self.d_model, self.qkv.bias
        return self._split_heads(F.linear(query, self.qkv.weight[:C], None if bias is None else bias[:C]))

    def _split_heads(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        D = self.head_width
        return x.reshape(B, T, width // D, D).transpose(1, 2)  # (B, heads, T, D)


class SelfAttention(MultiHeadAttention):
    """(B, T, C) -> (B, T, C): every position attends to all that `mask` allows."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, attn_mask=mask)
