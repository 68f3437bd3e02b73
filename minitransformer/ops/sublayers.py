"""What a layer by hand does between its norm and its last product: attention, or a feed-forward network.

Each forward takes rows (N, C), N = B T, and returns what the last weight of its `Sublayer` is multiplied by. Heads are
read and written where they lie in packed rows.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.gpu.arrays import contiguous, like
from minitransformer.ops.dropout import Dropped, dropout_backward, dropout_forward
from minitransformer.ops.position import Rotation, rope_backward, rope_forward
from minitransformer.random import DrawKey

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu")

Rate = tuple[float, DrawKey]  # of dropout, and where its numbers come from


class Sublayer(NamedTuple):
    """The weights of a sublayer, linear ones as in `linear`, (out, in). Biases may be None."""

    norm: np.ndarray  # (C,)
    norm_bias: np.ndarray | None
    into: np.ndarray  # of queries, keys and values, or of hidden units: what `work` begins with
    into_bias: np.ndarray | None
    out: np.ndarray  # (C, F), of what `work` returns
    out_bias: np.ndarray | None


class Call(NamedTuple):
    """What all sublayers of one call share."""

    shape: tuple[int, int, int]  # (B, T, C)
    attention: ModuleType
    rowwise: ModuleType
    pointwise: ModuleType


class Attended(NamedTuple):
    """What the backward of attention needs, to x itself or to a memory."""

    x: np.ndarray  # (B T, C)
    memory: np.ndarray | None  # (B S, C)
    qkv: tuple[np.ndarray, ...]  # (B, H, T, D), (B, K, S, D) twice
    ropes: tuple[Rotation, Rotation] | None
    merged: np.ndarray  # (B T, C), the heads side by side
    lse: np.ndarray  # (B, H, T), or with linear attention its denominators
    problem: Problem
    linear: ModuleType | None  # the kernel of linear attention, if it is that


class Activated(NamedTuple):
    """What the backward of a feed-forward network needs."""

    x: np.ndarray  # (N, C)
    inner: np.ndarray  # (N, F) or (N, 2F), what the activation was given, for gelu_tanh without its bias
    hidden: np.ndarray  # (N, F), after dropout
    dropped: Dropped | None
    activation: str


def self_attention_forward(
    x: np.ndarray,
    w: Sublayer,
    call: Call,
    *,
    heads: tuple[int, int],
    problem: Problem,
    positions: Any = None,
    linear: bool = False,
) -> tuple[np.ndarray, Attended]:
    """The heads side by side, (N, C). `heads` are those of queries and those of keys, `positions` for RoPE.

    Linear attention is causal, and of the problem it takes the mask, which is one of keys (B, 1, 1, T).
    """
    (B, T, _), (H, K) = call.shape, heads
    q, k, v = _split(_heads(_linear(x, w.into, w.into_bias), B, T, H + 2 * K), H, H + K)
    ropes = None
    if positions is not None:
        (q, rope_q), (k, rope_k) = (rope_forward(a, positions) for a in (q, k))
        ropes = rope_q, rope_k
    kernel = None
    if linear:
        kernel = kernels.serve("linear_attention", x)
        if problem.mask is not None:
            k = np.where(like(k, problem.mask.swapaxes(2, 3)), k, k.dtype.type(-np.inf))  # the feature map of that is 0
        out, lse = kernel.forward(q, k, v, True, "elu")
        merged = out.transpose(0, 2, 1, 3).reshape(B * T, -1)
    else:
        merged, lse = _attend(call, q, k, v, problem)
    return merged, Attended(x, None, (q, k, v), ropes, merged, lse, problem, kernel)


def self_attention_backward(dmerged: np.ndarray, w: Sublayer, saved: Attended, call: Call) -> tuple[Any, ...]:
    (B, H, T, _), K = saved.qkv[0].shape, saved.qkv[1].shape[1]
    dqkv = np.empty_like(dmerged, shape=(B * T, len(w.into)))
    dq, dk, dv = _split(_heads(dqkv, B, T, H + 2 * K), H, H + K)
    _attend_backward(call, saved, dmerged, dq, dk, dv)
    if saved.ropes is not None:
        for g, rope in zip((dq, dk), saved.ropes, strict=True):
            g[...] = rope_backward(g, rope)[0]
    return dqkv @ w.into, dqkv.T @ saved.x, bias_gradient(call, dqkv, w.into_bias)


def cross_attention_forward(
    x: np.ndarray, w: Sublayer, call: Call, *, memory: np.ndarray, num_heads: int, problem: Problem
) -> tuple[np.ndarray, Attended]:
    """The heads side by side, (N, C): queries of x, keys and values of `memory` (B, S, C) in one product."""
    T, (B, S, C) = call.shape[1], memory.shape
    q_bias, kv_bias = (None, None) if w.into_bias is None else (w.into_bias[:C], w.into_bias[C:])
    memory = contiguous(memory).reshape(B * S, C)
    q = _heads(_linear(x, w.into[:C], q_bias), B, T, num_heads)
    k, v = _split(_heads(_linear(memory, w.into[C:], kv_bias), B, S, 2 * num_heads), num_heads)
    merged, lse = _attend(call, q, k, v, problem)
    return merged, Attended(x, memory, (q, k, v), None, merged, lse, problem, None)


def cross_attention_backward(dmerged: np.ndarray, w: Sublayer, saved: Attended, call: Call) -> tuple[Any, ...]:
    """The last one is dmemory (B, S, C)."""
    (B, T, C), (_, H, S, _) = call.shape, saved.qkv[1].shape
    dq, dkv = (np.empty_like(dmerged, shape=shape) for shape in ((B * T, C), (B * S, 2 * C)))
    _attend_backward(call, saved, dmerged, _heads(dq, B, T, H), *_split(_heads(dkv, B, S, 2 * H), H))
    d_into = np.empty_like(w.into, dmerged.dtype)
    np.matmul(dq.T, saved.x, out=d_into[:C])
    np.matmul(dkv.T, saved.memory, out=d_into[C:])  # type: ignore[arg-type]
    d_bias = None if w.into_bias is None else np.concatenate([call.rowwise.column_sum(d) for d in (dq, dkv)])
    return dq @ w.into[:C], d_into, d_bias, (dkv @ w.into[C:]).reshape(B, S, C)


def feed_forward_forward(
    x: np.ndarray, w: Sublayer, call: Call, *, activation: str, dropout: Rate | None = None
) -> tuple[np.ndarray, Activated]:
    """The hidden units (N, F); with swiglu, `into` has 2F rows, gate first."""
    inner = x @ w.into.T
    hidden, dropped = _activate(call.pointwise, activation, inner, w.into_bias), None
    if dropout is not None:
        hidden, dropped = drop(hidden, dropout, call)
    return hidden, Activated(x, inner, hidden, dropped, activation)


def feed_forward_backward(dhidden: np.ndarray, w: Sublayer, saved: Activated, call: Call) -> tuple[Any, ...]:
    if saved.dropped is not None:
        shape = saved.dropped.keep.shape
        dhidden = dropout_backward(dhidden.reshape(shape), saved.dropped)[0].reshape(dhidden.shape)
    dinner, dbias = _activate_backward(call, saved, dhidden, w.into_bias)
    return dinner @ w.into, dinner.T @ saved.x, dbias


# --- the parts -------------------------------------------------------------------------------------------


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    out = x @ weight.T
    if bias is not None:
        out += bias
    return out


def bias_gradient(call: Call, drows: np.ndarray, bias: np.ndarray | None) -> np.ndarray | None:
    """The gradient of a bias that was added to rows, if there is one."""
    return None if bias is None else call.rowwise.column_sum(drows)


def drop(rows: np.ndarray, dropout: Rate, call: Call) -> tuple[np.ndarray, Dropped]:
    """Dropout of rows (N, F), by the address of each in (B, T, F)."""
    (p, key), (B, T, _) = dropout, call.shape
    out, dropped = dropout_forward(rows.reshape(B, T, rows.shape[1]), p=p, key=key)
    return out.reshape(rows.shape), dropped


def _heads(rows: np.ndarray, B: int, T: int, number: int) -> np.ndarray:
    """(B T, number D) as (B, number, T, D), a view."""
    return rows.reshape(B, T, number, rows.shape[1] // number).transpose(0, 2, 1, 3)


def _split(heads: np.ndarray, *ends: int) -> tuple[np.ndarray, ...]:
    """The heads up to each of `ends`, and the rest, as views."""
    return tuple(heads[:, begin:end] for begin, end in zip((0, *ends), (*ends, None), strict=True))


def _attend(call: Call, q: np.ndarray, k: np.ndarray, v: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The heads' results side by side, (B T, C), and the log-sum-exp."""
    B, H, T, D = q.shape
    merged = np.empty_like(q, shape=(B * T, H * D))
    _, lse = call.attention.forward(q, k, v, None, _heads(merged, B, T, H), problem)
    return merged, lse


def _attend_backward(call: Call, saved: Attended, dmerged: np.ndarray, *targets: np.ndarray) -> None:
    """dq, dk and dv, written into `targets`."""
    B, H, T, _ = saved.qkv[0].shape
    dout, out = _heads(dmerged, B, T, H), _heads(saved.merged, B, T, H)
    if saved.linear is not None:
        for target, g in zip(
            targets, saved.linear.backward(dout, *saved.qkv, out, saved.lse, True, "elu"), strict=True
        ):
            target[...] = g
        return
    dlse = np.zeros_like(saved.lse)
    call.attention.backward(dout, dlse, *saved.qkv, None, out, saved.lse, *targets, saved.problem)


def _activate(pointwise: ModuleType, activation: str, inner: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The activation of inner + bias; the sum is left in `inner`, but by gelu_tanh."""
    if activation == "gelu_tanh":
        return pointwise.add_bias_gelu_tanh(inner, bias)
    if bias is not None:
        inner += bias
    if activation == "swiglu":
        return pointwise.swiglu_forward(*_halves(inner))
    forwards = {"relu": pointwise.relu_forward, "gelu": pointwise.gelu_forward, "silu": pointwise.silu_forward}
    return forwards[activation](inner)


def _activate_backward(
    call: Call, saved: Activated, dhidden: np.ndarray, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The gradients of `inner` and of its bias; `dhidden` is ours to write into."""
    pointwise, inner = call.pointwise, saved.inner
    if saved.activation == "gelu_tanh":
        dinner, dbias = pointwise.gelu_tanh_bias_backward(dhidden, inner, bias)
        return dinner, None if bias is None else dbias
    if saved.activation == "swiglu":
        dinner = np.concatenate(pointwise.swiglu_backward(dhidden, *_halves(inner)), axis=1)
    elif saved.activation == "relu":  # what was dropped has no gradient in either case
        dinner = pointwise.relu_backward(dhidden, saved.hidden)
    else:
        backward = pointwise.gelu_backward if saved.activation == "gelu" else pointwise.silu_backward
        dinner = backward(dhidden, inner)
    return dinner, bias_gradient(call, dinner, bias)


def _halves(inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    F = inner.shape[1] // 2
    return inner[:, :F], inner[:, F:]
