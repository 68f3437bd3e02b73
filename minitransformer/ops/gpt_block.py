"""The block of a GPT by hand: forward and backward as one op, composed of the pairs' kernels on plain arrays.

    z = x + drop1(attention(norm1(x)) Wo^T + bo)
    y = z + drop2(act(norm2(z) Wu^T + bu) Wd^T + bd)

`models/gpt.py` builds the same block out of primitive ops, and autograd derives its backward; the two share no
code above the kernels. Here the residual sums are fused into the norms, biases into the activation, gradients are
added in place, and the graph has one node.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import register
from minitransformer.checks import check_choice
from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.decode.step import BlockWeights, block_shapes
from minitransformer.ops.activation import check_float
from minitransformer.ops.dropout import Dropped, dropout_backward, dropout_forward
from minitransformer.ops.position import Rotation, rope_backward, rope_forward
from minitransformer.random import DrawKey


class BlockOptions(NamedTuple):
    """What is static: `problem` is that of attention, `dropout1` and `dropout2` are rates with their keys."""

    num_heads: int
    num_kv_heads: int
    problem: Problem
    attention: str = "softmax"  # or "linear", for which of `problem` only the mask counts, of keys, and it is causal
    norm: str = "layer"  # or "rms"
    eps: float = 1e-5
    activation: str = "gelu_tanh"  # or "relu", "swiglu"
    rope_positions: np.ndarray | None = None
    dropout1: tuple[float, DrawKey] | None = None
    dropout2: tuple[float, DrawKey] | None = None


class Block(NamedTuple):
    """What backward needs. N = B T rows."""

    x: np.ndarray  # (N, C)
    normed1: np.ndarray  # (N, C)
    stats1: tuple[np.ndarray, ...]
    qkv: tuple[np.ndarray, ...]  # (B, H or K, T, D)
    ropes: tuple[Rotation, Rotation] | None
    merged: np.ndarray  # (N, C), the heads side by side
    sums: np.ndarray  # (B, H, T), of the weights: their log-sum-exp, or linear attention's denominators
    z: np.ndarray  # (N, C)
    normed2: np.ndarray  # (N, C)
    stats2: tuple[np.ndarray, ...]
    inner: np.ndarray  # (N, F) or (N, 2F), what the activation was given, for GELU without its bias
    hidden: np.ndarray  # (N, F)
    dropped: tuple[Dropped | None, Dropped | None]
    weights: BlockWeights
    options: BlockOptions
    shape: tuple[int, int, int]
    attention: ModuleType
    rowwise: ModuleType
    pointwise: ModuleType


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
) -> tuple[np.ndarray, Block]:
    """y (B, T, C) of x (B, T, C) and its `BlockWeights`: GPT-2 (Radford et al. 2019) and its successors."""
    parameters = (norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias, norm2, norm2_bias, up, up_bias, down, down_bias)
    x, weights = _checked(x, BlockWeights(*parameters), options)
    B, T, C = x.shape
    family = "linear_attention" if options.attention == "linear" else "attention"
    attention, rowwise, pointwise = (kernels.serve(family, x) for family in (family, "rowwise", "pointwise"))
    rows = np.ascontiguousarray(x).reshape(B * T, C)

    normed1, *stats1 = _norm(rowwise, options, rows, weights.norm1, weights.norm1_bias)
    q, k, v = _split_heads(_linear(normed1, weights.qkv, weights.qkv_bias), B, T, options)
    ropes = None
    if options.rope_positions is not None:
        (q, rope_q), (k, rope_k) = (rope_forward(a, options.rope_positions) for a in (q, k))
        ropes = rope_q, rope_k
    merged = np.empty((B * T, C), x.dtype)
    heads = _heads(merged, options, B, T)
    if options.attention == "linear":
        k = _hidden(k, options.problem.mask)
        heads[...], sums = attention.forward(q, k, v, True, "elu")
    else:
        _, sums = attention.forward(q, k, v, None, heads, options.problem)

    z, bias, dropped1 = _branch(merged @ weights.proj.T, weights.proj_bias, options.dropout1, x.shape)
    if options.norm == "layer":  # z is the branch, then the branch plus x
        normed2, *stats2 = rowwise.add_layer_norm(z, rows, bias, weights.norm2, weights.norm2_bias, options.eps)
    else:
        rowwise.add_residual(z, rows, bias)
        normed2, *stats2 = rowwise.rms_norm_forward(z, weights.norm2, options.eps)

    inner = normed2 @ weights.up.T
    hidden = _activate(pointwise, options, inner, weights.up_bias)
    y, bias, dropped2 = _branch(hidden @ weights.down.T, weights.down_bias, options.dropout2, x.shape)
    rowwise.add_residual(y, z, bias)
    saved = Block(
        rows,
        normed1,
        tuple(stats1),
        (q, k, v),
        ropes,
        merged,
        sums,
        z,
        normed2,
        tuple(stats2),
        inner,
        hidden,
        (dropped1, dropped2),
        weights,
        options,
        (B, T, C),
        attention,
        rowwise,
        pointwise,
    )
    return y.reshape(B, T, C), saved


def gpt_block_backward(dout: np.ndarray, saved: Block) -> tuple[np.ndarray | None, ...]:
    """dx and the gradients of the twelve weights. The residual stream's gradient flows on, and each branch adds."""
    weights, options, rowwise = saved.weights, saved.options, saved.rowwise
    B, T, C = saved.shape
    dy = np.ascontiguousarray(dout).reshape(B * T, C)

    dbranch, d_down_bias = _branch_backward(rowwise, dy, weights.down_bias, saved.dropped[1], saved.shape)
    d_down = dbranch.T @ saved.hidden
    dinner, d_up_bias = _activate_backward(saved, dbranch @ weights.down)
    d_up = dinner.T @ saved.normed2
    dz = dy.copy()
    d_norm2, d_norm2_bias = _norm_backward_add(
        rowwise, options, dinner @ weights.up, saved.z, weights.norm2, saved.stats2, dz
    )

    dbranch, d_proj_bias = _branch_backward(rowwise, dz, weights.proj_bias, saved.dropped[0], saved.shape)
    d_proj = dbranch.T @ saved.merged
    dout, out = (_heads(rows, options, B, T) for rows in (dbranch @ weights.proj, saved.merged))
    dqkv = np.empty((B * T, len(weights.qkv)), dy.dtype)
    dq, dk, dv = _split_heads(dqkv, B, T, options)
    if options.attention == "linear":
        dq[...], dk[...], dv[...] = saved.attention.backward(dout, *saved.qkv, out, saved.sums, True, "elu")
    else:
        dlse = np.zeros_like(saved.sums)
        saved.attention.backward(dout, dlse, *saved.qkv, None, out, saved.sums, dq, dk, dv, options.problem)
    if saved.ropes is not None:
        for g, rope in zip((dq, dk), saved.ropes, strict=True):
            g[...] = rope_backward(g, rope)[0]
    d_qkv = dqkv.T @ saved.normed1
    d_qkv_bias = None if weights.qkv_bias is None else rowwise.column_sum(dqkv)
    dx = dz  # in place: nobody else has it
    d_norm1, d_norm1_bias = _norm_backward_add(
        rowwise, options, dqkv @ weights.qkv, saved.x, weights.norm1, saved.stats1, dx
    )
    gradients = BlockWeights(
        d_norm1,
        None if weights.norm1_bias is None else d_norm1_bias,
        d_qkv,
        d_qkv_bias,
        d_proj,
        d_proj_bias,
        d_norm2,
        None if weights.norm2_bias is None else d_norm2_bias,
        d_up,
        d_up_bias,
        d_down,
        d_down_bias,
    )
    return dx.reshape(saved.shape), *gradients


register("gpt_block", gpt_block_forward, gpt_block_backward)


# --- the parts -------------------------------------------------------------------------------------------


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    out = x @ weight.T
    if bias is not None:
        out += bias
    return out


def _norm(
    rowwise: ModuleType, options: BlockOptions, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    """The normed rows and their statistics."""
    if options.norm == "layer":
        return rowwise.layer_norm_forward(x, weight, bias, options.eps)
    return rowwise.rms_norm_forward(x, weight, options.eps)


def _norm_backward_add(
    rowwise: ModuleType,
    options: BlockOptions,
    dnormed: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    stats: tuple[np.ndarray, ...],
    dx: np.ndarray,
) -> tuple[np.ndarray, np.ndarray | None]:
    """dweight and dbias; the gradient of x is added to `dx`."""
    if options.norm == "layer":
        return rowwise.layer_norm_backward_add(dnormed, x, weight, *stats, dx)
    more, dweight = rowwise.rms_norm_backward(dnormed, x, weight, *stats)
    dx += more
    return dweight, None


def _branch(
    branch: np.ndarray, bias: np.ndarray | None, dropout: tuple[float, DrawKey] | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None, Dropped | None]:
    """(branch, bias still to be added, what dropout saved): without dropout the bias is left to the residual sum."""
    if dropout is None:
        return branch, bias, None
    if bias is not None:
        branch += bias
    p, key = dropout
    out, dropped = dropout_forward(branch.reshape(shape), p=p, key=key)
    return out.reshape(branch.shape), None, dropped


def _branch_backward(
    rowwise: ModuleType, dy: np.ndarray, bias: np.ndarray | None, dropped: Dropped | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The gradient of the branch before dropout, and of its bias."""
    if dropped is not None:
        dy = dropout_backward(dy.reshape(shape), dropped)[0].reshape(dy.shape)
    return dy, None if bias is None else rowwise.column_sum(dy)


def _split_heads(qkv: np.ndarray, B: int, T: int, options: BlockOptions) -> tuple[np.ndarray, ...]:
    """q (B, H, T, D), k and v (B, K, T, D), as views."""
    H, K = options.num_heads, options.num_kv_heads
    heads = qkv.reshape(B, T, H + 2 * K, qkv.shape[1] // (H + 2 * K)).transpose(0, 2, 1, 3)  # (B, H + 2K, T, D)
    return heads[:, :H], heads[:, H : H + K], heads[:, H + K :]


def _heads(rows: np.ndarray, options: BlockOptions, B: int, T: int) -> np.ndarray:
    """(N, C) as the query heads (B, H, T, D), a view."""
    H = options.num_heads
    return rows.reshape(B, T, H, rows.shape[1] // H).transpose(0, 2, 1, 3)


def _hidden(k: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """k with -inf, of which the feature map is 0, in the rows of keys that `mask` (B, 1, 1, T) hides."""
    return k if mask is None else np.where(mask.swapaxes(2, 3), k, k.dtype.type(-np.inf))


def _activate(pointwise: ModuleType, options: BlockOptions, inner: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The activation of inner + bias; the sum is left in `inner`, but by GELU."""
    if options.activation == "gelu_tanh":
        return pointwise.add_bias_gelu_tanh(inner, bias)
    if bias is not None:
        inner += bias
    if options.activation == "relu":
        return pointwise.relu_forward(inner)
    F = inner.shape[1] // 2
    return pointwise.swiglu_forward(inner[:, :F], inner[:, F:])


def _activate_backward(saved: Block, dhidden: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The gradients of `inner` and of its bias; `dhidden` is ours to write into."""
    pointwise, inner, biased = saved.pointwise, saved.inner, saved.weights.up_bias is not None
    if saved.options.activation == "gelu_tanh":
        dinner, dbias = pointwise.gelu_tanh_bias_backward(dhidden, inner, saved.weights.up_bias)
        return dinner, dbias if biased else None
    if saved.options.activation == "relu":
        dinner = pointwise.relu_backward(dhidden, saved.hidden)
    else:
        F = inner.shape[1] // 2
        dinner = np.concatenate(pointwise.swiglu_backward(dhidden, inner[:, :F], inner[:, F:]), axis=1)
    return dinner, saved.rowwise.column_sum(dinner) if biased else None


# --- the entrance ----------------------------------------------------------------------------------------


def _checked(x: np.ndarray, weights: BlockWeights, options: BlockOptions) -> tuple[np.ndarray, BlockWeights]:
    """x and the weights in one dtype, after checking all shapes."""
    check_float("gpt_block", x=x)
    if not isinstance(options, BlockOptions):
        raise DTypeError("gpt_block", f"options is a {type(options).__name__}, expected BlockOptions", "Make them")
    check_choice("gpt_block", "attention", options.attention, ("softmax", "linear"))
    check_choice("gpt_block", "norm", options.norm, ("layer", "rms"))
    check_choice("gpt_block", "activation", options.activation, ("gelu_tanh", "relu", "swiglu"))
    H, K = options.num_heads, options.num_kv_heads
    C = x.shape[-1] if x.ndim == 3 else 0
    if C == 0 or H < 1 or K < 1 or C % H or H % K:
        problem = f"x has shape {x.shape}, expected (B, T, C) with C divisible by {H} heads, and those by {K}"
        raise ShapeError("gpt_block", problem, "Choose a number of heads that divides the width")
    F = 0 if weights.down is None or weights.down.ndim != 2 else weights.down.shape[1]
    expected = block_shapes(H, K, C // H, F, options.activation)
    array: Any
    for name, array, shape in zip(BlockWeights._fields, weights, expected, strict=True):
        if array is None and name.endswith("bias"):
            continue
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fc":
            check_float("gpt_block", **{name: array})
        if array.shape != shape:
            problem = f"{name} has shape {array.shape}, expected {shape} for x {x.shape}"
            raise ShapeError("gpt_block", problem, "Make the weights for this width")
    options.problem.check(x.shape[0], H, x.shape[1], x.shape[1])
    if options.norm == "rms" and (weights.norm1_bias is not None or weights.norm2_bias is not None):
        raise ShapeError("gpt_block", "an RMS norm has a bias, expected none", "Pass None")
    dtype = np.result_type(*{a.dtype for a in (x, *weights) if a is not None})
    cast: Any = [None if w is None else np.ascontiguousarray(w, dtype) for w in weights]
    return x.astype(dtype, copy=False), BlockWeights(*cast)
