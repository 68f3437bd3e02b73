"""One layer of a GPT, written twice: by hand, and composed of layers whose backward autograd derives."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.autograd import OPS, Parameter, Tensor
from minitransformer.kernels.attention.problem import Problem
from minitransformer.models.gpt_config import GPTConfig
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.by_hand import is_untouched, sublayer_weights
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.kv_cache import KVCache
from minitransformer.nn.linear_attention import LinearSelfAttention, StateCache
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm, RMSNorm
from minitransformer.ops.gpt_block import BlockOptions, gpt_block_forward


def norm_of(config: GPTConfig) -> LayerNorm | RMSNorm:
    """The norm that `config` names, over its width."""
    return RMSNorm(config.n_embd) if config.norm == "rms" else LayerNorm(config.n_embd, bias=config.bias)


class GPTBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.norm1 = norm_of(config)
        self.linear = config.attention == "linear"
        heads = LinearSelfAttention if self.linear else MultiHeadAttention
        self.attn = heads(C, config.n_head, config.n_kv_head, config.dropout, config.bias)
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
        norms, dropouts = (self.norm1, self.norm2), (self.dropout1, self.dropout2)
        kind, heads = type(self.norm1), LinearSelfAttention if self.linear else MultiHeadAttention
        return (
            kind in (LayerNorm, RMSNorm)
            and is_untouched(kind, norms, (self.attn,), self.ffn, dropouts, heads)
            and not self.ffn.dropout.p
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
        options = BlockOptions(
            num_heads=attn.num_heads,
            num_kv_heads=attn.num_kv_heads,
            problem=problem if self.linear else attn.with_dropout(problem),
            linear=self.linear,
            norm="rms" if isinstance(self.norm1, RMSNorm) else "layer",
            eps=self.norm1.eps,
            activation=ffn.activation,
            rope_positions=rope_positions,
            dropout1=self.dropout1.draw(),
            dropout2=self.dropout2.draw(),
        )
        if cache is None:
            return OPS["gpt_block"](x, *self.weights(), options=options)
        weights: Any = (None if w is None else w.data for w in self.weights())
        out, saved = gpt_block_forward(x.data, *weights, options=options)
        _, k, v = saved.steps[0].worked.qkv
        cache.append(layer, Tensor(k), Tensor(v))
        return Tensor(out)

    def weights(self) -> tuple[Parameter | None, ...]:
        """The parameters in the order of `BlockWeights`."""
        return (
            *sublayer_weights(self.norm1, self.attn.qkv, self.attn.out),
            *sublayer_weights(self.norm2, self.ffn.up, self.ffn.down),
        )
