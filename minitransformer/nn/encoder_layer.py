"""The encoder layer of "Attention is all you need", composed from the layers below."""

from __future__ import annotations

from typing import Any

from minitransformer.autograd import Tensor
from minitransformer.checks import check_flag
from minitransformer.functional.attention import refuse
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm


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
    ) -> None:
        self.norm_first = check_flag("EncoderLayer", "norm_first", norm_first)
        self.attn = MultiHeadAttention(d_model, num_heads, dropout_rate=dropout_rate)
        self.ffn = FeedForward(d_model, dff, dropout_rate, activation)
        self.norm1, self.norm2 = LayerNorm(d_model), LayerNorm(d_model)
        self.dropout1, self.dropout2 = Dropout(dropout_rate), Dropout(dropout_rate)

    def forward(self, x: Tensor, mask: Any = None, **unexpected: Any) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` as in `F.scaled_dot_product_attention`."""
        refuse("EncoderLayer", unexpected)
        if self.norm_first:
            x = x + self.dropout1(self.attn(self.norm1(x), attn_mask=mask))
            return x + self.dropout2(self.ffn(self.norm2(x)))
        x = self.norm1(x + self.dropout1(self.attn(x, attn_mask=mask)))
        return self.norm2(x + self.dropout2(self.ffn(x)))
