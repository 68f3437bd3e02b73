"""The layers by hand: sublayers that read a residual stream and add to it, forward and backward on plain arrays.

    y = x + drop(work(norm(x)) Wo^T + bo)    with the norm first (Xiong et al. 2020)
    y = norm(x + drop(work(x) Wo^T + bo))    with the norm last (Vaswani et al. 2017)

`work` is one of `sublayers.py`. Residual sums are made with the norms that read them, and gradients are added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.errors import ShapeError
from minitransformer.kernels.decode.step import block_shapes
from minitransformer.kernels.gpu.arrays import contiguous, is_array
from minitransformer.ops.activation import check_float
from minitransformer.ops.dropout import Dropped, dropout_backward
from minitransformer.ops.sublayers import Call, Rate, Sublayer, bias_gradient, drop

Work = Callable[[np.ndarray, Sublayer, Call], tuple[np.ndarray, Any]]  # rows -> hidden, and what backward needs
WorkBackward = Callable[[np.ndarray, Sublayer, Any, Call], tuple[Any, ...]]  # dhidden -> drows, dinto, dinto_bias, more


class Norms(NamedTuple):
    """The norms of a stream. Those that come last are layer norms."""

    first: bool
    eps: float
    kind: str = "layer"  # or "rms"


class Step(NamedTuple):
    """What backward needs of one sublayer."""

    read: np.ndarray  # (N, C), what the norm read: the stream before the sublayer, or the sum behind it
    stats: tuple[np.ndarray, ...]  # of the norm
    hidden: np.ndarray  # (N, F), what `work` returned
    dropped: Dropped | None
    worked: Any  # what `work` saved


class Stream(NamedTuple):
    """What backward needs of all sublayers."""

    steps: tuple[Step, ...]
    weights: tuple[Sublayer, ...]
    norms: Norms
    call: Call


def stream_forward(
    x: np.ndarray, weights: Sequence[Any], works: Sequence[Work], dropouts: Sequence[Rate | None], norms: Norms
) -> tuple[np.ndarray, Stream]:
    """y (B, T, C) of x (B, T, C) through one sublayer after the other; `weights` are six for each."""
    B, T, C = x.shape
    call = Call((B, T, C), *(kernels.serve(family, x) for family in ("attention", "rowwise", "pointwise")))
    sublayers = tuple(Sublayer(*weights[i : i + 6]) for i in range(0, len(weights), 6))
    rows = contiguous(x).reshape(B * T, C)
    given, stats = _norm(call, norms, rows, sublayers[0]) if norms.first else (rows, ())
    steps = []
    for w, following, work, rate in zip(sublayers, (*sublayers[1:], None), works, dropouts, strict=True):
        hidden, worked = work(given, w, call)
        out, bias, dropped = _branch(call, hidden @ w.out.T, w.out_bias, rate)  # which becomes the residual sum
        if norms.first:
            steps.append(Step(rows, stats, hidden, dropped, worked))
            if following is None:
                call.rowwise.add_residual(out, rows, bias)
            else:
                given, stats = _add_norm(call, norms, out, rows, bias, following)
            rows = out
        else:
            given, stats = _add_norm(call, norms, out, rows, bias, w)
            steps.append(Step(out, stats, hidden, dropped, worked))
            rows = given
    return rows.reshape(B, T, C), Stream(tuple(steps), sublayers, norms, call)


def stream_backward(
    dout: np.ndarray, saved: Stream, works: Sequence[WorkBackward]
) -> tuple[np.ndarray, list[np.ndarray | None], list[np.ndarray]]:
    """dx, the gradients of the weights, and what `works`, the backwards, return besides.

    The gradient of the residual stream flows on, and each branch adds to it.
    """
    norms, call = saved.norms, saved.call
    B, T, C = call.shape
    dy = contiguous(dout).reshape(B * T, C)
    dx, gradients, others = dy, [], []
    for w, step, work in zip(saved.weights[::-1], saved.steps[::-1], works[::-1], strict=True):
        if not norms.first:
            dx, d_norm, d_norm_bias = call.rowwise.layer_norm_backward(dx, step.read, w.norm, *step.stats)
        dbranch = dx
        if step.dropped is not None:
            dbranch = dropout_backward(dx.reshape(B, T, C), step.dropped)[0].reshape(B * T, C)
        d_out_bias = bias_gradient(call, dbranch, w.out_bias)
        d_out = dbranch.T @ step.hidden
        dgiven, d_into, d_into_bias, *more = work(dbranch @ w.out, w, step.worked, call)
        if norms.first:
            dx = dy.copy() if dx is dy else dx  # in place from here on: nobody else has it
            d_norm, d_norm_bias = _norm_backward_add(call, norms, dgiven, step, w, dx)
        else:
            call.rowwise.add_residual(dx, dgiven, None)
        d_norm_bias = None if w.norm_bias is None else d_norm_bias
        gradients.append(Sublayer(d_norm, d_norm_bias, d_into, d_into_bias, d_out, d_out_bias))
        others += more
    return dx.reshape(B, T, C), [g for sublayer in gradients[::-1] for g in sublayer], others


# --- the parts -------------------------------------------------------------------------------------------


def _norm(call: Call, norms: Norms, x: np.ndarray, w: Sublayer) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The normed rows and their statistics."""
    if norms.kind == "layer":
        normed, *stats = call.rowwise.layer_norm_forward(x, w.norm, w.norm_bias, norms.eps)
    else:
        normed, *stats = call.rowwise.rms_norm_forward(x, w.norm, norms.eps)
    return normed, tuple(stats)


def _add_norm(
    call: Call, norms: Norms, x: np.ndarray, delta: np.ndarray, bias: np.ndarray | None, w: Sublayer
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """x += delta + bias in place, and the norm of that."""
    if norms.kind == "layer":
        normed, *stats = call.rowwise.add_layer_norm(x, delta, bias, w.norm, w.norm_bias, norms.eps)
        return normed, tuple(stats)
    call.rowwise.add_residual(x, delta, bias)
    return _norm(call, norms, x, w)


def _norm_backward_add(
    call: Call, norms: Norms, dnormed: np.ndarray, step: Step, w: Sublayer, dx: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """dweight and dbias; the gradient of what was normed is added to `dx`."""
    if norms.kind == "layer":
        return call.rowwise.layer_norm_backward_add(dnormed, step.read, w.norm, *step.stats, dx)
    more, dweight = call.rowwise.rms_norm_backward(dnormed, step.read, w.norm, *step.stats)
    dx += more
    return dweight, None


def _branch(
    call: Call, branch: np.ndarray, bias: np.ndarray | None, dropout: Rate | None
) -> tuple[np.ndarray, np.ndarray | None, Dropped | None]:
    """(branch, bias still to be added, what dropout saved): without dropout the bias is left to the residual sum."""
    if dropout is None:
        return branch, bias, None
    if bias is not None:
        branch += bias
    out, dropped = drop(branch, dropout, call)
    return out, None, dropped


# --- the entrance ----------------------------------------------------------------------------------------


def check_layer(op: str, x: np.ndarray, weights: Any, heads: tuple[int, int], activation: str) -> None:
    """`DTypeError` or `ShapeError` unless x is (B, T, C), and `weights` six for each sublayer, feed-forward the last.

    `weights` is a named tuple; its biases may be None.
    """
    check_float(op, x=x)
    H, K = heads
    C = x.shape[-1] if x.ndim == 3 else 0
    if C == 0 or H < 1 or K < 1 or C % H or H % K:
        problem = f"x has shape {x.shape}, expected (B, T, C) with C divisible by {H} heads, and those by {K}"
        raise ShapeError(op, problem, "Choose a number of heads that divides the width")
    down = weights[-2]
    F = 0 if down is None or down.ndim != 2 else down.shape[1]
    shapes = block_shapes(H, K, C // H, F, activation)
    attention, feed_forward = shapes[:6], shapes[6:]
    expected = attention * (len(weights) // 6 - 1) + feed_forward
    array: Any
    for name, array, shape in zip(weights._fields, weights, expected, strict=True):
        if array is None and name.endswith("bias"):
            continue
        if not is_array(array) or array.dtype.kind not in "fc":
            check_float(op, **{name: array})
        if array.shape != shape:
            problem = f"{name} has shape {array.shape}, expected {shape} for x {x.shape}"
            raise ShapeError(op, problem, "Make the weights for this width")


def in_one_dtype(weights: Sequence[Any], *arrays: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
    """The weights, contiguous, and the arrays, in the widest dtype among them."""
    dtype = np.result_type(*{a.dtype for a in (*weights, *arrays) if a is not None})
    ready = [None if w is None else contiguous(w, dtype) for w in weights]
    return ready, [a.astype(dtype, copy=False) for a in arrays]
