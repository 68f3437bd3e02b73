"""The encoder layer by hand: forward and backward as one op, composed of the pairs' kernels on plain arrays.

    z = norm1(x + drop1(attention(x) Wo^T + bo))
    y = norm2(z + drop2(drop(act(z Wu^T + bu)) Wd^T + bd))

or, with `norm_first`, each norm before its sublayer. `nn/encoder_layer.py` composes the same of layers, and autograd
derives its backward; the two share no code above the kernels.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from minitransformer.autograd import register
from minitransformer.checks import check_choice
from minitransformer.errors import DTypeError
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.decode.step import BlockWeights
from minitransformer.ops.stream import Norms, Stream, check_layer, in_one_dtype, stream_backward, stream_forward
from minitransformer.ops.sublayers import (
    ACTIVATIONS,
    Rate,
    feed_forward_backward,
    feed_forward_forward,
    self_attention_backward,
    self_attention_forward,
)


class EncoderOptions(NamedTuple):
    """What is static: `problem` is that of attention, dropouts are rates with their keys, of both sublayers' results
    and of the hidden units."""

    num_heads: int
    problem: Problem
    norm_first: bool = False
    eps: float = 1e-5
    activation: str = "relu"  # or another of `ACTIVATIONS`
    dropout1: Rate | None = None
    hidden_dropout: Rate | None = None
    dropout2: Rate | None = None


def encoder_layer_forward(
    x: np.ndarray,
    norm1: np.ndarray,
    norm1_bias: np.ndarray | None,
    qkv: np.ndarray,
    qkv_bias: np.ndarray | None,
    proj: np.ndarray,
    proj_bias: np.ndarray | None,
    norm2: np.ndarray,
    norm2_bias: np.ndarray | None,
    up: np.ndarray,
    up_bias: np.ndarray | None,
    down: np.ndarray,
    down_bias: np.ndarray | None,
    *,
    options: EncoderOptions,
) -> tuple[np.ndarray, Stream]:
    """y (B, T, C) of x (B, T, C) and its `BlockWeights` (Vaswani et al. 2017; Xiong et al. 2020)."""
    parameters = (norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, norm2, norm2_bias, up, up_bias, down, down_bias)
    if not isinstance(options, EncoderOptions):
        raise DTypeError(
            "encoder_layer", f"options is a {type(options).__name__}, expected EncoderOptions", "Make them"
        )
    check_choice("encoder_layer", "activation", options.activation, ACTIVATIONS)
    heads = options.num_heads, options.num_heads
    check_layer("encoder_layer", x, BlockWeights(*parameters), heads, options.activation)
    B, T, _ = x.shape
    options.problem.check(B, options.num_heads, T, T)
    weights, (x,) = in_one_dtype(parameters, x)
    attention = partial(self_attention_forward, heads=heads, problem=options.problem)
    feed_forward = partial(feed_forward_forward, activation=options.activation, dropout=options.hidden_dropout)
    norms = Norms(options.norm_first, options.eps)
    return stream_forward(x, weights, (attention, feed_forward), (options.dropout1, options.dropout2), norms)


def encoder_layer_backward(dout: np.ndarray, saved: Stream) -> tuple[np.ndarray | None, ...]:
    """dx and the gradients of the twelve weights."""
    dx, gradients, _ = stream_backward(dout, saved, (self_attention_backward, feed_forward_backward))
    return dx, *gradients


register("encoder_layer", encoder_layer_forward, encoder_layer_backward)
