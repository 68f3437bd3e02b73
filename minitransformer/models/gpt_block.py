"""One layer of a GPT, written twice: by hand, and composed of layers whose backward autograd derives."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer import random
from minitransformer.autograd import OPS, Parameter, Tensor, watching
from minitransformer.kernels.attention.problem import Problem
from minitransformer.models.gpt_config import GPTConfig
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.dropout import Dropout, call_site
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.kv_cache import KVCache
from minitransformer.nn.linear import Linear
from minitransformer.nn.linear_attention import LinearSelfAttention, StateCache
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm, RMSNorm
from minitransformer.ops.dropout import check_rate
from minitransformer.ops.gpt_block import BlockOptions, gpt_block_forward
from minitransformer.random import DrawKey


def norm_of(config: GPTConfig) -> LayerNorm | RMSNorm:
    """The norm that `config` names, over its width."""
    return RMSNorm(config.n_embd) if config.norm == "rms" else LayerNorm(config.n_embd, bias=config.bias)


class GPTBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.norm1 = norm_of(config)
        attention = LinearSelfAttention if config.attention == "linear" else MultiHeadAttention
        self.attn = attention(C, config.n_head, config.n_kv_head, config.dropout, config.bias)
        self.dropout1 = Dropout(config.dropout)
        self.norm2 = norm_of(config)
        activation = "gelu_tanh" if config.ffn == "gelu" else config.ffn
        self.ffn = FeedForward(C, config.inner_width, activation=activation, bias=config.bias)
        self.dropout2 = Dropout(config.dropout)

    def forward(self, x: Tensor, problem: Problem | None = None, **attention: Any) -> Tensor:
        """By hand where that can be.

        `problem` is what `attention` asks for, without dropout; it serves all layers of a model. With a cache it is
        for one that is empty, and there are no gradients.
        """
        if problem is not None and self.runs_by_hand():
            return self.by_hand(x, problem, attention["rope_positions"], attention["cache"], attention["cache_layer"])
        return self.composed(x, **attention)

    def runs_by_hand(self) -> bool:
        """Not while somebody watches every op, and not if a part was replaced by another module."""
        parts = (self.norm1, self.norm2, self.attn, self.attn.qkv, self.attn.out, self.ffn, self.ffn.up, self.ffn.down)
        norm, attention = type(self.norm1), type(self.attn)
        return (
            watching.get() is None
            and norm in (LayerNorm, RMSNorm)
            and attention in (MultiHeadAttention, LinearSelfAttention)
            and self.norm1.eps == self.norm2.eps
            and [*map(type, parts)] == [norm, norm, attention, Linear, Linear, FeedForward, Linear, Linear]
        )

    def composed(self, x: Tensor, **attention: Any) -> Tensor:
        """(B, T, C) -> (B, T, C) through the layers, each op a node of the graph."""
        x = x + self.dropout1(self.attn(self.norm1(x), **attention))
        return x + self.dropout2(self.ffn(self.norm2(x)))

    def by_hand(
        self,
        x: Tensor,
        problem: Problem,
        rope_positions: np.ndarray | None,
        cache: KVCache | StateCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """The same through `ops/gpt_block.py`, to rounding, with the same dropout masks; fills a cache's `layer`."""
        attn, ffn = self.attn, self.ffn
        linear = isinstance(attn, LinearSelfAttention)
        if self.training and attn.dropout_rate and not linear:
            rate = check_rate("attention", attn.dropout_rate)
            problem = problem._replace(dropout_p=rate, dropout_key=random.next_key(call_site(attn)))
        options = BlockOptions(
            num_heads=attn.num_heads,
            num_kv_heads=attn.num_kv_heads,
            problem=problem,
            attention="linear" if linear else "softmax",
            norm="rms" if isinstance(self.norm1, RMSNorm) else "layer",
            eps=self.norm1.eps,
            activation=ffn.activation,
            rope_positions=rope_positions,
            dropout1=_draw(self.dropout1),
            dropout2=_draw(self.dropout2),
        )
        if cache is None:
            return OPS["gpt_block"](x, *self.weights(), options=options)
        weights: Any = (None if w is None else w.data for w in self.weights())
        out, block = gpt_block_forward(x.data, *weights, options=options)
        cache.append(layer, Tensor(block.qkv[1]), Tensor(block.qkv[2]))
        return Tensor(out)

    def weights(self) -> tuple[Parameter | None, ...]:
        """The parameters in the order of `BlockWeights`."""
        attn, ffn = self.attn, self.ffn
        return (
            self.norm1.weight,
            getattr(self.norm1, "bias", None),
            attn.qkv.weight,
            attn.qkv.bias,
            attn.out.weight,
            attn.out.bias,
            self.norm2.weight,
            getattr(self.norm2, "bias", None),
            ffn.up.weight,
            ffn.up.bias,
            ffn.down.weight,
            ffn.down.bias,
        )


def _draw(dropout: Dropout) -> tuple[float, DrawKey] | None:
    """The rate and the key of this call; None if nothing is dropped."""
    return (dropout.p, random.next_key(call_site(dropout))) if dropout.training and dropout.p else None
