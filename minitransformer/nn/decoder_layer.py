"""The decoder layer of "Attention is all you need", composed from the layers below."""

from __future__ import annotations

from typing import Any

from minitransformer.autograd import Tensor
from minitransformer.checks import check_flag, shown
from minitransformer.errors import DTypeError
from minitransformer.functional.attention import refuse
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.kv_cache import DecoderCache
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm


class DecoderLayer(Module):
    """Self-attention, attention to an encoder's output, and feed-forward, each as in `EncoderLayer`.

    Nothing is causal by itself: pass `is_causal=True` for a language model's decoder.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dff: int,
        dropout_rate: float = 0.1,
        *,
        norm_first: bool = False,
        activation: str = "relu",
    ) -> None:
        self.norm_first = check_flag("DecoderLayer", "norm_first", norm_first)
        self.attn = MultiHeadAttention(d_model, num_heads, dropout_rate=dropout_rate)
        self.cross_attn = MultiHeadAttention(d_model, num_heads, dropout_rate=dropout_rate)
        self.ffn = FeedForward(d_model, dff, dropout_rate, activation)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(d_model) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (Dropout(dropout_rate) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Any = None,
        memory_mask: Any = None,
        *,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
        cache_layer: int = 0,
        **unexpected: Any,
    ) -> Tensor:
        """(B, T, C) from x (B, T, C) and memory (B, S, C).

        `mask` is for self-attention (B, H, T, T), `memory_mask` for attention to memory (B, H, T, S). With `cache`,
        x continues the tokens whose keys and values layer `cache_layer` of it holds, `mask` is for all of them,
        and the memory is projected once.
        """
        refuse("DecoderLayer", unexpected)
        if cache is not None and not isinstance(cache, DecoderCache):
            problem = f"cache is {shown(cache)}, expected a DecoderCache"
            raise DTypeError("DecoderLayer", problem, "Make it with model.make_cache(batch_size)")
        own: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "causal_align": "lower_right"}
        other: dict[str, Any] = {"attn_mask": memory_mask}
        if cache is not None:
            own |= {"cache": cache.own, "cache_layer": cache_layer}
            other |= {"cache": cache.memory, "cache_layer": cache_layer}
        if self.norm_first:
            x = x + self.dropout1(self.attn(self.norm1(x), **own))
            x = x + self.dropout2(self.cross_attn(self.norm2(x), memory, **other))
            return x + self.dropout3(self.ffn(self.norm3(x)))
        x = self.norm1(x + self.dropout1(self.attn(x, **own)))
        x = self.norm2(x + self.dropout2(self.cross_attn(x, memory, **other)))
        return self.norm3(x + self.dropout3(self.ffn(x)))
