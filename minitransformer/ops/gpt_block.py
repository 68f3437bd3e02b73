"""The block of a GPT by hand: forward and backward as one op, composed of the pairs' kernels on plain arrays.

    z = x + drop1(attention(norm1(x)) Wo^T + bo)
    y = z + drop2(act(norm2(z) Wu^T + bu) Wd^T + bd)

`models/gpt_block.py` builds the same block out of primitive ops, and autograd derives its backward; the two share no
code above the kernels. Here the graph has one node; see `sublayers.py` for what both layers of it are made of.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from minitransformer.autograd import register
from minitransformer.checks import check_choice
from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.decode.step import BlockWeights
from minitransformer.ops.stream import Norms, Stream, check_layer, in_one_dtype, stream_backward, stream_forward
from minitransformer.ops.sublayers import (
    Rate,
    feed_forward_backward,
    feed_forward_forward,
    self_attention_backward,
    self_attention_forward,
)


class BlockOptions(NamedTuple):
    """What is static: `problem` is that of attention, `dropout1` and `dropout2` are rates with their keys."""

    num_heads: int
    num_kv_heads: int
    problem: Problem
    linear: bool = False  # linear attention: of `problem` only the mask counts, which is one of keys
    norm: str = "layer"  # or "rms"
    eps: float = 1e-5
    activation: str = "gelu_tanh"  # or "relu", "swiglu"
    rope_positions: np.ndarray | None = None
    dropout1: Rate | None = None
    dropout2: Rate | None = None


def gpt_block_forward(
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
    options: BlockOptions,
) -> tuple[np.ndarray, Stream]:
    """y (B, T, C) of x (B, T, C) and its `BlockWeights`: GPT-2 (Radford et al. 2019) and its successors."""
    parameters = (norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, norm2, norm2_bias, up, up_bias, down, down_bias)
    _check(x, BlockWeights(*parameters), options)
    weights, (x,) = in_one_dtype(parameters, x)
    attention = partial(
        self_attention_forward,
        heads=(options.num_heads, options.num_kv_heads),
        problem=options.problem,
        positions=options.rope_positions,
        linear=options.linear,
    )
    feed_forward = partial(feed_forward_forward, activation=options.activation)
    norms = Norms(first=True, eps=options.eps, kind=options.norm)
    return stream_forward(x, weights, (attention, feed_forward), (options.dropout1, options.dropout2), norms)


def gpt_block_backward(dout: np.ndarray, saved: Stream) -> tuple[np.ndarray | None, ...]:
    """dx and the gradients of the twelve weights."""
    dx, gradients, _ = stream_backward(dout, saved, (self_attention_backward, feed_forward_backward))
    return dx, *gradients


register("gpt_block", gpt_block_forward, gpt_block_backward)


def _check(x: np.ndarray, weights: BlockWeights, options: BlockOptions) -> None:
    if not isinstance(options, BlockOptions):
        raise DTypeError("gpt_block", f"options is a {type(options).__name__}, expected BlockOptions", "Make them")
    check_choice("gpt_block", "norm", options.norm, ("layer", "rms"))
    check_choice("gpt_block", "activation", options.activation, ("gelu_tanh", "relu", "swiglu"))
    check_layer("gpt_block", x, weights, (options.num_heads, options.num_kv_heads), options.activation)
    B, T, _ = x.shape
    options.problem.check(B, options.num_heads, T, T)
    if options.norm == "rms" and (weights.norm1_bias is not None or weights.norm2_bias is not None):
        raise ShapeError("gpt_block", "an RMS norm has a bias, expected none", "Pass None")
