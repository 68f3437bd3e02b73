"""The encoder layer of "Attention is all you need", written twice: by hand, and composed of layers."""

from __future__ import annotations

from typing import Any

from minitransformer.autograd import OPS, Parameter, Tensor
from minitransformer.checks import check_flag
from minitransformer.functional.attention import refuse
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.by_hand import is_untouched, selects, sublayer_weights
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.linear import as_sequence
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm
from minitransformer.ops.encoder_layer import EncoderOptions


class EncoderLayer(Module):
    """Self-attention and feed-forward, each with dropout, residual connection and layer norm.

    The norm comes after the residual sum as in the paper, or before each sublayer with `norm_first`
    (Xiong et al. 2020). `activation` as in `FeedForward`.
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
        layer_norm_eps: float = 1e-5,
    ) -> None:
        self.norm_first = check_flag("EncoderLayer", "norm_first", norm_first)
        self.d_model = d_model
        self.attn = MultiHeadAttention(d_model, num_heads, dropout_rate=dropout_rate)
        self.ffn = FeedForward(d_model, dff, dropout_rate, activation)
        self.norm1, self.norm2 = LayerNorm(d_model, layer_norm_eps), LayerNorm(d_model, layer_norm_eps)
        self.dropout1, self.dropout2 = Dropout(dropout_rate), Dropout(dropout_rate)

    def forward(self, x: Tensor, mask: Any = None, **unexpected: Any) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` as in `F.scaled_dot_product_attention`. By hand where that can be."""
        refuse("EncoderLayer", unexpected)
        x = as_sequence("EncoderLayer", "x", x, self.d_model)
        return self.by_hand(x, mask) if self.runs_by_hand(mask) else self.composed(x, mask)

    def runs_by_hand(self, mask: Any) -> bool:
        """Not while somebody watches every op, not if a part was replaced, and not with a mask that adds to scores."""
        norms, dropouts = (self.norm1, self.norm2), (self.dropout1, self.dropout2)
        return (
            selects(mask)
            and is_untouched(LayerNorm, norms, (self.attn,), self.ffn, dropouts)
            and self.attn.num_heads == self.attn.num_kv_heads
        )

    def composed(self, x: Tensor, mask: Any = None) -> Tensor:
        """The same through the layers, each op a node of the graph."""
        if self.norm_first:
            x = x + self.dropout1(self.attn(self.norm1(x), attn_mask=mask))
            return x + self.dropout2(self.ffn(self.norm2(x)))
        x = self.norm1(x + self.dropout1(self.attn(x, attn_mask=mask)))
        return self.norm2(x + self.dropout2(self.ffn(x)))

    def by_hand(self, x: Tensor, mask: Any = None) -> Tensor:
        """The same through `ops/encoder_layer.py`, to rounding, with the same dropout masks."""
        B, T, _ = x.shape
        # Dropout is drawn in the order of `composed`: without a path, its numbers are addressed by that.
        options = EncoderOptions(
            num_heads=self.attn.num_heads,
            problem=self.attn.problem(mask, B, T, T),
            dropout1=self.dropout1.draw(),
            hidden_dropout=self.ffn.dropout.draw(),
            dropout2=self.dropout2.draw(),
            norm_first=self.norm_first,
            eps=self.norm1.eps,
            activation=self.ffn.activation,
        )
        return OPS["encoder_layer"](x, *self.weights(), options=options)

    def weights(self) -> tuple[Parameter | None, ...]:
        """The parameters in the order of `ops/encoder_layer.py`."""
        return (
            *sublayer_weights(self.norm1, self.attn.qkv, self.attn.out),
            *sublayer_weights(self.norm2, self.ffn.up, self.ffn.down),
        )
