"""One token through a GPT block, in Numba: a few matrix-vector products, each reading its weights once.

At one token a step the weights are read for next to no arithmetic, so the time is that of memory, if only nothing
else costs: here the whole block is one call. On the calling thread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import boolean, float64, int64, njit, void

from minitransformer.errors import DTypeError
from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.decode.step import Step, Weights, check
from minitransformer.kernels.simd import (
    broadcast,
    exp,
    fma,
    lanes,
    load,
    load_some,
    sigmoid,
    splat,
    store_some,
    sum_lanes,
    zeros,
)

_ACTIVATIONS = {"gelu_tanh": 0, "relu": 1, "swiglu": 2}
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


@njit
def _dot(a: Any, a0: Any, b: Any, b0: Any, n: Any) -> Any:
    """sum a[a0 + i] * b[b0 + i] over i < n"""
    total = zeros(a)
    step = lanes(a)
    whole = n - n % step
    for i in range(0, whole, step):
        total = fma(load(a, a0 + i), load(b, b0 + i), total)
    if whole < n:
        total = fma(load_some(a, a0 + whole, n - whole), load_some(b, b0 + whole, n - whole), total)
    return sum_lanes(total)


@njit
def _linear(x: Any, x0: Any, weight: Any, bias: Any, out: Any, out0: Any, add: Any) -> None:
    """out[out0 + r] (+)= weight[r] . x[x0:] + bias[r]; four rows at once, which share what is read of x."""
    n = weight.shape[1]
    flat = weight.reshape(weight.size)
    step = lanes(flat)
    whole = n - n % step
    rest = n - whole
    rows = weight.shape[0]
    for r in range(0, rows - rows % 4, 4):
        w = r * n
        s0, s1, s2, s3 = zeros(flat), zeros(flat), zeros(flat), zeros(flat)
        for i in range(0, whole, step):
            v = load(x, x0 + i)
            s0 = fma(load(flat, w + i), v, s0)
            s1 = fma(load(flat, w + n + i), v, s1)
            s2 = fma(load(flat, w + 2 * n + i), v, s2)
            s3 = fma(load(flat, w + 3 * n + i), v, s3)
        if rest:
            v = load_some(x, x0 + whole, rest)
            s0 = fma(load_some(flat, w + whole, rest), v, s0)
            s1 = fma(load_some(flat, w + n + whole, rest), v, s1)
            s2 = fma(load_some(flat, w + 2 * n + whole, rest), v, s2)
            s3 = fma(load_some(flat, w + 3 * n + whole, rest), v, s3)
        _finish(out, out0 + r, sum_lanes(s0), bias, r, add)
        _finish(out, out0 + r + 1, sum_lanes(s1), bias, r + 1, add)
        _finish(out, out0 + r + 2, sum_lanes(s2), bias, r + 2, add)
        _finish(out, out0 + r + 3, sum_lanes(s3), bias, r + 3, add)
    for r in range(rows - rows % 4, rows):
        _finish(out, out0 + r, _dot(flat, r * n, x, x0, n), bias, r, add)


@njit
def _finish(out: Any, i: Any, value: Any, bias: Any, r: Any, add: Any) -> None:
    if bias.size:
        value += bias[r]
    out[i] = out[i] + value if add else value


@njit
def _norm(x: Any, x0: Any, weight: Any, bias: Any, centred: Any, eps: Any, out: Any) -> None:
    C = weight.size
    T = x.dtype.type
    mean = T(0)
    if centred:
        for i in range(C):
            mean += x[x0 + i]
        mean /= T(C)
    square = T(0)
    for i in range(C):
        d = x[x0 + i] - mean
        out[i] = d
        square += d * d
    rstd = T(1) / math.sqrt(square / T(C) + T(eps))
    for i in range(C):
        out[i] = out[i] * rstd * weight[i]
        if bias.size:
            out[i] += bias[i]


@njit
def _gelu_tanh(inner: Any, F: Any) -> None:
    """x sigmoid(2u), u the argument of the tanh."""
    T = inner.dtype.type
    step = lanes(inner)
    cubic, scale = splat(T(2 * _GELU_SCALE * _GELU_CUBIC)), splat(T(2 * _GELU_SCALE))
    for i in range(0, F, step):
        x = load_some(inner, i, F - i)
        u = fma(x * x, cubic, scale) * x
        store_some(inner, i, F - i, x * sigmoid(u))


@njit
def _swiglu(inner: Any, F: Any) -> None:
    """silu of the first half times the second, into the first."""
    step = lanes(inner)
    for i in range(0, F, step):
        gate, up = load_some(inner, i, F - i), load_some(inner, F + i, F - i)
        store_some(inner, i, F - i, gate * sigmoid(gate) * up)


@njit
def _rotate(heads: Any, count: Any, D: Any, cos: Any, sin: Any, row: Any) -> None:
    half = D // 2
    for h in range(count):
        for i in range(half):
            c, s = cos[row * half + i], sin[row * half + i]
            a, b = heads[h * D + i], heads[h * D + half + i]
            heads[h * D + i] = a * c - b * s
            heads[h * D + half + i] = b * c + a * s


@njit
def _attend(
    q: Any,
    q0: Any,
    keys: Any,
    values: Any,
    base: Any,
    D: Any,
    first: Any,
    S: Any,
    visible: Any,
    row: Any,
    slope: Any,
    scores: Any,
    out: Any,
    out0: Any,
) -> None:
    """out[out0:out0 + D] = softmax(q K^T / sqrt(D)) V over the visible keys from `first` to S."""
    T = q.dtype.type
    scale = T(1 / math.sqrt(D))
    top = T(-np.inf)
    for j in range(first, S):
        if visible.size and not visible[row * S + j]:
            scores[j] = T(-np.inf)
            continue
        s = scale * _dot(q, q0, keys, base + j * D, D) - T(slope * (S - 1 - j))
        scores[j] = s
        top = s if not s <= top else top  # NaN too
    step = lanes(q)
    if top == T(-np.inf):
        top = T(0)
    shift = splat(top)
    total = zeros(q)
    for j in range(first, S, step):
        store_some(scores, j, S - j, exp(load_some(scores, j, S - j) - shift))
        total = total + load_some(scores, j, S - j)  # what was stored: lanes behind the last key must not count
    sum_ = sum_lanes(total)
    inverse = T(1) / (T(1) if sum_ == 0 else sum_)
    for i in range(0, D, step):
        acc = zeros(q)
        for j in range(first, S):
            acc = fma(broadcast(scores, j), load_some(values, base + j * D + i, D - i), acc)
        store_some(out, out0 + i, D - i, acc * splat(inverse))


@kernel(
    lambda T: void(
        T[:, ::1],
        T[::1],
        T[::1],
        T[:, ::1],
        T[::1],
        T[:, ::1],
        T[::1],
        T[::1],
        T[::1],
        T[:, ::1],
        T[::1],
        T[:, ::1],
        T[::1],
        T[:, :, :, ::1],
        T[:, :, :, ::1],
        int64,
        int64,
        int64,
        boolean[::1],
        float64[::1],
        T[::1],
        T[::1],
        boolean,
        float64,
        int64,
    )
)
def _block_step(
    x: Any,
    norm1: Any,
    norm1_bias: Any,
    qkv: Any,
    qkv_bias: Any,
    proj: Any,
    proj_bias: Any,
    norm2: Any,
    norm2_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
    keys: Any,
    values: Any,
    H: Any,
    stored: Any,
    first: Any,
    visible: Any,
    slopes: Any,
    cos: Any,
    sin: Any,
    centred: Any,
    eps: Any,
    activation: Any,
) -> None:
    """Arrays that there are not have size 0. `first` is the first key within reach."""
    B, C = x.shape
    K, capacity, D = keys.shape[1], keys.shape[2], keys.shape[3]
    S, F = stored + 1, down.shape[1]
    flat, k, v = x.reshape(x.size), keys.reshape(keys.size), values.reshape(values.size)
    normed, merged = np.empty(C, x.dtype), np.empty(C, x.dtype)
    packed, inner, scores = np.empty(qkv.shape[0], x.dtype), np.empty(up.shape[0], x.dtype), np.empty(S, x.dtype)
    for b in range(B):
        _norm(flat, b * C, norm1, norm1_bias, centred, eps, normed)
        _linear(normed, 0, qkv, qkv_bias, packed, 0, False)
        if cos.size:
            _rotate(packed, H + K, D, cos, sin, b)
        for h in range(K):
            slot = ((b * K + h) * capacity + stored) * D
            for i in range(D):
                k[slot + i] = packed[(H + h) * D + i]
                v[slot + i] = packed[(H + K + h) * D + i]
        for h in range(H):
            base = (b * K + h // (H // K)) * capacity * D
            slope = slopes[h] if slopes.size else 0.0
            _attend(packed, h * D, k, v, base, D, first, S, visible, b, slope, scores, merged, h * D)
        _linear(merged, 0, proj, proj_bias, flat, b * C, True)
        _norm(flat, b * C, norm2, norm2_bias, centred, eps, normed)
        _linear(normed, 0, up, up_bias, inner, 0, False)
        if activation == 0:
            _gelu_tanh(inner, F)
        elif activation == 2:
            _swiglu(inner, F)
        else:
            for i in range(F):
                inner[i] = 0 if inner[i] <= 0 else inner[i]
        _linear(inner, 0, down, down_bias, flat, b * C, True)


_NO_FLOAT64 = np.empty(0)
_NO_BOOL = np.empty(0, bool)
_NOTHING = {np.dtype(np.float32): np.empty(0, np.float32), np.dtype(np.float64): _NO_FLOAT64}


def block_step(x: np.ndarray, weights: Weights, keys: np.ndarray, values: np.ndarray, step: Step) -> None:
    """See `reference.block_step`. x and the cache must be contiguous, for they are written to."""
    H, _, _ = check(x, weights, keys, values, step)
    for name, array in (("x", x), ("keys", keys), ("values", values)):
        if not array.flags.carray or array.dtype not in _NOTHING:
            problem = f"{name} is {array.dtype} with strides {array.strides}, expected contiguous, writable floats"
            raise DTypeError("block_step", problem, "Pass the cache's own arrays")
    nothing = _NOTHING[x.dtype]

    def ready(array: np.ndarray | None) -> np.ndarray:
        if array is None:
            return nothing
        return array if array.flags.carray and array.dtype == x.dtype else np.require(array, x.dtype, ["C", "A", "W"])

    cos, sin = (nothing, nothing) if step.rotation is None else (ready(part).reshape(-1) for part in step.rotation)
    visible = _NO_BOOL if step.visible is None else np.require(step.visible, bool, ["C", "A", "W"]).reshape(-1)
    slopes = _NO_FLOAT64 if step.slopes is None else np.require(step.slopes, np.float64, ["C", "A", "W"])
    _block_step(
        x,
        *map(ready, weights),
        keys,
        values,
        H,
        step.stored,
        0 if step.reach is None else max(0, step.stored - step.reach),
        visible,
        slopes,
        cos,
        sin,
        step.norm == "layer",
        float(step.eps),
        _ACTIVATIONS[step.activation],
    )
