"""The decoder layer by hand: forward and backward as one op, composed of the pairs' kernels on plain arrays.

    s = norm1(x + drop1(attention(x) Wo^T + bo))
    z = norm2(s + drop2(attention(s, memory) Vo^T + co))
    y = norm3(z + drop3(drop(act(z Wu^T + bu)) Wd^T + bd))

or, with `norm_first`, each norm before its sublayer. `nn/decoder_layer.py` composes the same of layers, and autograd
derives its backward; the two share no code above the kernels.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from minitransformer.autograd import register
from minitransformer.checks import check_choice
from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.attention.problem import Problem
from minitransformer.ops.activation import check_float
from minitransformer.ops.stream import Norms, Stream, check_layer, in_one_dtype, stream_backward, stream_forward
from minitransformer.ops.sublayers import (
    ACTIVATIONS,
    Rate,
    cross_attention_backward,
    cross_attention_forward,
    feed_forward_backward,
    feed_forward_forward,
    self_attention_backward,
    self_attention_forward,
)


class DecoderWeights(NamedTuple):
    """The parameters of a decoder layer, linear ones as in `linear`, (out, in). Biases may be None, all else may not.

    C is the width, F that of the feed-forward network.
    """

    norm1: np.ndarray  # (C,)
    norm1_bias: np.ndarray | None
    qkv: np.ndarray  # (3 C, C): rows of the queries, keys and values
    qkv_bias: np.ndarray | None
    proj: np.ndarray  # (C, C), of the heads side by side
    proj_bias: np.ndarray | None
    norm2: np.ndarray  # (C,)
    norm2_bias: np.ndarray | None
    cross_qkv: np.ndarray  # (3 C, C): the queries' rows are for x, the others for the memory
    cross_qkv_bias: np.ndarray | None
    cross_proj: np.ndarray  # (C, C)
    cross_proj_bias: np.ndarray | None
    norm3: np.ndarray  # (C,)
    norm3_bias: np.ndarray | None
    up: np.ndarray  # (F, C); (2 F, C) with swiglu, gate first
    up_bias: np.ndarray | None
    down: np.ndarray  # (C, F)
    down_bias: np.ndarray | None


class DecoderOptions(NamedTuple):
    """What is static: the problems of attention to x and to the memory, and dropouts as rates with their keys, of the
    sublayers' results and of the hidden units."""

    num_heads: int
    problem: Problem
    memory_problem: Problem
    norm_first: bool = False
    eps: float = 1e-5
    activation: str = "relu"  # or another of `ACTIVATIONS`
    dropout1: Rate | None = None
    dropout2: Rate | None = None
    hidden_dropout: Rate | None = None
    dropout3: Rate | None = None


def decoder_layer_forward(
    x: np.ndarray,
    memory: np.ndarray,
    norm1: np.ndarray,
    norm1_bias: np.ndarray | None,
    qkv: np.ndarray,
    qkv_bias: np.ndarray | None,
    proj: np.ndarray,
    proj_bias: np.ndarray | None,
    norm2: np.ndarray,
    norm2_bias: np.ndarray | None,
    cross_qkv: np.ndarray,
    cross_qkv_bias: np.ndarray | None,
    cross_proj: np.ndarray,
    cross_proj_bias: np.ndarray | None,
    norm3: np.ndarray,
    norm3_bias: np.ndarray | None,
    up: np.ndarray,
    up_bias: np.ndarray | None,
    down: np.ndarray,
    down_bias: np.ndarray | None,
    *,
    options: DecoderOptions,
) -> tuple[np.ndarray, Stream]:
    """y (B, T, C) of x (B, T, C), memory (B, S, C) and its `DecoderWeights` (Vaswani et al. 2017)."""
    own = norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias
    other = norm2, norm2_bias, cross_qkv, cross_qkv_bias, cross_proj, cross_proj_bias
    parameters = (*own, *other, norm3, norm3_bias, up, up_bias, down, down_bias)
    _check(x, memory, DecoderWeights(*parameters), options)
    weights, (x, memory) = in_one_dtype(parameters, x, memory)
    H = options.num_heads
    works = (
        partial(self_attention_forward, heads=(H, H), problem=options.problem),
        partial(cross_attention_forward, memory=memory, num_heads=H, problem=options.memory_problem),
        partial(feed_forward_forward, activation=options.activation, dropout=options.hidden_dropout),
    )
    dropouts = options.dropout1, options.dropout2, options.dropout3
    return stream_forward(x, weights, works, dropouts, Norms(options.norm_first, options.eps))


def decoder_layer_backward(dout: np.ndarray, saved: Stream) -> tuple[np.ndarray | None, ...]:
    """dx, dmemory and the gradients of the eighteen weights."""
    works = self_attention_backward, cross_attention_backward, feed_forward_backward
    dx, gradients, (dmemory,) = stream_backward(dout, saved, works)
    return dx, dmemory, *gradients


register("decoder_layer", decoder_layer_forward, decoder_layer_backward)


def _check(x: np.ndarray, memory: np.ndarray, weights: DecoderWeights, options: DecoderOptions) -> None:
    if not isinstance(options, DecoderOptions):
        raise DTypeError(
            "decoder_layer", f"options is a {type(options).__name__}, expected DecoderOptions", "Make them"
        )
    check_choice("decoder_layer", "activation", options.activation, ACTIVATIONS)
    H = options.num_heads
    check_layer("decoder_layer", x, weights, (H, H), options.activation)
    check_float("decoder_layer", memory=memory)
    B, T, C = x.shape
    if memory.ndim != 3 or memory.shape[::2] != (B, C):
        problem = f"memory has shape {memory.shape}, expected ({B}, S, {C}) for x {x.shape}"
        raise ShapeError("decoder_layer", problem, "Pass the encoder's output for the same rows")
    options.problem.check(B, H, T, T)
    options.memory_problem.check(B, H, T, memory.shape[1])
