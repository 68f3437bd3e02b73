"""The decoder layer of "Attention is all you need", written twice: by hand, and composed of layers."""

from __future__ import annotations

from typing import Any

from minitransformer.autograd import OPS, Parameter, Tensor
from minitransformer.checks import check_flag, shown
from minitransformer.errors import DTypeError
from minitransformer.functional.attention import refuse
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.by_hand import is_untouched, selects, sublayer_weights
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.kv_cache import DecoderCache
from minitransformer.nn.linear import as_sequence
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm
from minitransformer.ops.decoder_layer import DecoderOptions


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
        self.d_model = d_model
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
        and the memory is projected once. By hand where that can be.
        """
        refuse("DecoderLayer", unexpected)
        if cache is not None and not isinstance(cache, DecoderCache):
            problem = f"cache is {shown(cache)}, expected a DecoderCache"
            raise DTypeError("DecoderLayer", problem, "Make it with model.make_cache(batch_size)")
        if memory is None:
            raise DTypeError("DecoderLayer", "there is no memory to attend to", "Pass the encoder's output (B, S, C)")
        x = as_sequence("DecoderLayer", "x", x, self.d_model)
        memory = as_sequence("DecoderLayer", "memory", memory, self.d_model)
        if cache is None and self.runs_by_hand(mask, memory_mask):
            return self.by_hand(x, memory, mask, memory_mask, is_causal=is_causal)
        return self.composed(x, memory, mask, memory_mask, is_causal=is_causal, cache=cache, cache_layer=cache_layer)

    def runs_by_hand(self, mask: Any, memory_mask: Any) -> bool:
        """Not while somebody watches every op, not if a part was replaced, and not with a mask that adds to scores."""
        norms, dropouts = (self.norm1, self.norm2, self.norm3), (self.dropout1, self.dropout2, self.dropout3)
        attentions = self.attn, self.cross_attn
        return (
            selects(mask)
            and selects(memory_mask)
            and is_untouched(LayerNorm, norms, attentions, self.ffn, dropouts)
            and len({number for attn in attentions for number in (attn.num_heads, attn.num_kv_heads)}) == 1
        )

    def composed(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Any = None,
        memory_mask: Any = None,
        *,
        is_causal: bool = False,
        cache: DecoderCache | None = None,
        cache_layer: int = 0,
    ) -> Tensor:
        """The same through the layers, each op a node of the graph."""
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

    def by_hand(
        self, x: Tensor, memory: Tensor, mask: Any = None, memory_mask: Any = None, *, is_causal: bool = False
    ) -> Tensor:
        """The same through `ops/decoder_layer.py`, to rounding, with the same dropout masks."""
        (B, T, _), S = x.shape, memory.shape[1]
        # Dropout is drawn in the order of `composed`: without a path, its numbers are addressed by that.
        options = DecoderOptions(
            num_heads=self.attn.num_heads,
            problem=self.attn.problem(mask, B, T, T, is_causal),
            dropout1=self.dropout1.draw(),
            memory_problem=self.cross_attn.problem(memory_mask, B, T, S),
            dropout2=self.dropout2.draw(),
            hidden_dropout=self.ffn.dropout.draw(),
            dropout3=self.dropout3.draw(),
            norm_first=self.norm_first,
            eps=self.norm1.eps,
            activation=self.ffn.activation,
        )
        return OPS["decoder_layer"](x, memory, *self.weights(), options=options)

    def weights(self) -> tuple[Parameter | None, ...]:
        """The parameters in the order of `DecoderWeights`."""
        return (
            *sublayer_weights(self.norm1, self.attn.qkv, self.attn.out),
            *sublayer_weights(self.norm2, self.cross_attn.qkv, self.cross_attn.out),
            *sublayer_weights(self.norm3, self.ffn.up, self.ffn.down),
        )
