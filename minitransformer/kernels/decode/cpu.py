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
from minitransformer.kernels.decode.step import BlockWeights, Step, check
from minitransformer.kernels.simd import (
    broadcast,
    exp,
    fma,
    lanes,
    load,
    load_some,
    sigmoid,
    splat,
    store,
    store_some,
    sum_lanes,
    zeros,
)

_ACTIVATIONS = {"gelu_tanh": 0, "relu": 1, "swiglu": 2}
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


@njit
def _products(x: Any, x0: Any, flat: Any, w0: Any, rows: Any, n: Any, out: Any, out0: Any, bias: Any, add: Any) -> None:
    """out[out0 + r] (+)= W[r] . x + bias[r], with W (rows, n) from flat[w0] and x (n,) from x[x0] on.

    Four rows at once: they share what is read of x, and their sums do not wait for each other.
    """
    step = lanes(flat)
    whole = n - n % step
    for r in range(0, rows - rows % 4, 4):
        w = w0 + r * n
        s0, s1, s2, s3 = zeros(flat), zeros(flat), zeros(flat), zeros(flat)
        for i in range(0, whole, step):
            v = load(x, x0 + i)
            s0 = fma(load(flat, w + i), v, s0)
            s1 = fma(load(flat, w + n + i), v, s1)
            s2 = fma(load(flat, w + 2 * n + i), v, s2)
            s3 = fma(load(flat, w + 3 * n + i), v, s3)
        a0, a1, a2, a3 = sum_lanes(s0), sum_lanes(s1), sum_lanes(s2), sum_lanes(s3)
        for i in range(whole, n):
            v = x[x0 + i]
            a0 += flat[w + i] * v
            a1 += flat[w + n + i] * v
            a2 += flat[w + 2 * n + i] * v
            a3 += flat[w + 3 * n + i] * v
        if bias.size:
            a0 += bias[r]
            a1 += bias[r + 1]
            a2 += bias[r + 2]
            a3 += bias[r + 3]
        o = out0 + r
        if add:
            a0 += out[o]
            a1 += out[o + 1]
            a2 += out[o + 2]
            a3 += out[o + 3]
        out[o] = a0
        out[o + 1] = a1
        out[o + 2] = a2
        out[o + 3] = a3
    for r in range(rows - rows % 4, rows):
        total = zeros(flat)
        for i in range(0, whole, step):
            total = fma(load(flat, w0 + r * n + i), load(x, x0 + i), total)
        a = sum_lanes(total)
        for i in range(whole, n):
            a += flat[w0 + r * n + i] * x[x0 + i]
        if bias.size:
            a += bias[r]
        out[out0 + r] = out[out0 + r] + a if add else a


@njit
def _linear(x: Any, x0: Any, weight: Any, bias: Any, out: Any, out0: Any, add: Any) -> None:
    _products(x, x0, weight.reshape(weight.size), 0, weight.shape[0], weight.shape[1], out, out0, bias, add)


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
    _products(q, q0, keys, base + first * D, S - first, D, scores, first, scores[:0], False)
    for j in range(first, S):
        s = scale * scores[j] - T(slope * (S - 1 - j))
        if visible.size and not visible[row * S + j]:
            s = T(-np.inf)
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
    inverses = splat(inverse)
    whole = D - D % step
    for i in range(0, whole, step):
        acc0, acc1 = zeros(q), zeros(q)  # two sums, so that none waits for the other
        for j in range(first, S - 1, 2):
            acc0 = fma(broadcast(scores, j), load(values, base + j * D + i), acc0)
            acc1 = fma(broadcast(scores, j + 1), load(values, base + (j + 1) * D + i), acc1)
        if (S - first) % 2:
            acc0 = fma(broadcast(scores, S - 1), load(values, base + (S - 1) * D + i), acc0)
        store(out, out0 + i, (acc0 + acc1) * inverses)
    for i in range(whole, D):
        a = T(0)
        for j in range(first, S):
            a += scores[j] * values[base + j * D + i]
        out[out0 + i] = a * inverse


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


def block_step(x: np.ndarray, weights: BlockWeights, keys: np.ndarray, values: np.ndarray, step: Step) -> None:
    """See `reference.block_step`. x and the cache must be contiguous, for they are written to."""
    H, _, _ = check(x, weights, keys, values, step)
    for name, array in (("x", x), ("keys", keys), ("values", values)):
        if not array.flags.carray or array.dtype not in _NOTHING:
            problem = f"{name} is {array.dtype} with strides {array.strides}, expected contiguous, writable floats"
            raise DTypeError("block_step", problem, "Pass the cache's own arrays")
    nothing = _NOTHING[x.dtype]

    def ready(array: np.ndarray | None) -> Any:
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
