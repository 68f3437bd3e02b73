"""One token through a GPT, in Numba: matrix-vector products, each reading its weights once.

At one token a step the weights are read for next to no arithmetic, so the time is that of memory, if only nothing
else costs: here all of it is one call. On the calling thread.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import boolean, float64, int64, njit, void

from minitransformer.errors import DTypeError
from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.decode.step import NOWHERE, Step, Weights, check
from minitransformer.kernels.simd import (
    broadcast,
    exp,
    first_lanes,
    fma,
    lanes,
    load,
    load_some,
    load_up_to,
    sigmoid,
    splat,
    store,
    store_some,
    store_up_to,
    sum_lanes,
    zeros,
)

_ACTIVATIONS = {"gelu_tanh": 0, "relu": 1, "swiglu": 2}
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


@njit
def _products(x: Any, x0: Any, flat: Any, w0: Any, rows: Any, n: Any, out: Any, out0: Any, bias: Any, add: Any) -> None:
    """out[out0 + r] (+)= W[r] . x + b[r], with x (n,) from x[x0], W (rows, n) from flat[w0] and b from flat[bias] on.

    Four rows at once: they share what is read of x, and their sums do not wait for each other.
    """
    step = lanes(flat)
    for r in range(0, rows - rows % 4, 4):
        w = w0 + r * n
        s0, s1, s2, s3 = zeros(flat), zeros(flat), zeros(flat), zeros(flat)
        for i in range(0, n - n % step, step):
            v = load(x, x0 + i)
            s0 = fma(load(flat, w + i), v, s0)
            s1 = fma(load(flat, w + n + i), v, s1)
            s2 = fma(load(flat, w + 2 * n + i), v, s2)
            s3 = fma(load(flat, w + 3 * n + i), v, s3)
        left = n % step
        if left:
            i = n - left
            v = load_some(x, x0 + i, left)
            s0 = fma(load_some(flat, w + i, left), v, s0)
            s1 = fma(load_some(flat, w + n + i, left), v, s1)
            s2 = fma(load_some(flat, w + 2 * n + i, left), v, s2)
            s3 = fma(load_some(flat, w + 3 * n + i, left), v, s3)
        a0, a1, a2, a3 = sum_lanes(s0), sum_lanes(s1), sum_lanes(s2), sum_lanes(s3)
        if bias != NOWHERE:
            a0 += flat[bias + r]
            a1 += flat[bias + r + 1]
            a2 += flat[bias + r + 2]
            a3 += flat[bias + r + 3]
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
        for i in range(0, n, step):
            total = fma(load_up_to(flat, w0 + r * n + i, n - i), load_up_to(x, x0 + i, n - i), total)
        a = sum_lanes(total)
        if bias != NOWHERE:
            a += flat[bias + r]
        out[out0 + r] = out[out0 + r] + a if add else a


@njit
def _norm(x: Any, x0: Any, C: Any, flat: Any, weight: Any, bias: Any, centred: Any, eps: Any, out: Any) -> None:
    """out = norm(x[x0 : x0 + C]), with the weight from flat[weight] on."""
    T, step = x.dtype.type, lanes(x)
    mean = T(0)
    if centred:
        total = zeros(x)
        for i in range(0, C, step):
            total = total + load_up_to(x, x0 + i, C - i)
        mean = sum_lanes(total) / T(C)
    square, none, origin = zeros(x), zeros(x), splat(mean)
    for i in range(0, C, step):
        d = first_lanes(C - i, load_up_to(x, x0 + i, C - i) - origin, none)
        square = fma(d, d, square)
    rstd = splat(T(1 / math.sqrt(sum_lanes(square) / T(C) + eps)))
    for i in range(0, C, step):
        left = C - i
        y = (load_up_to(x, x0 + i, left) - origin) * rstd * load_up_to(flat, weight + i, left)
        if bias != NOWHERE:
            y = y + load_up_to(flat, bias + i, left)
        store_up_to(out, i, left, y)


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
    _products(q, q0, keys, base + first * D, S - first, D, scores, first, NOWHERE, False)
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
        T[:, ::1],
        T[::1],
        int64[:, ::1],
        int64[::1],
        T[:, :, :, :, ::1],
        T[:, :, :, :, ::1],
        int64,
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
def _next_logits(
    x: Any,
    logits: Any,
    anchor: Any,
    table: Any,
    ends: Any,
    keys: Any,
    values: Any,
    H: Any,
    F: Any,
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
    """A row of `table` says where the weights of a block are, counted from the first number of `anchor`.

    `ends` says the same of the head. Arrays that there are not have size 0. `first` is the first key within reach.
    """
    B, C = x.shape
    K, capacity, D = keys.shape[2], keys.shape[3], keys.shape[4]
    S = stored + 1
    V = logits.shape[1]
    out = logits.reshape(logits.size)
    flat, k, v = x.reshape(x.size), keys.reshape(keys.size), values.reshape(values.size)
    normed, merged = np.empty(C, x.dtype), np.empty(C, x.dtype)
    packed, scores = np.empty((H + 2 * K) * D, x.dtype), np.empty(S, x.dtype)
    inner = np.empty(2 * F if activation == 2 else F, x.dtype)
    for layer in range(table.shape[0]):
        n1, n1_bias, qkv, qkv_bias, proj, proj_bias, n2, n2_bias, up, up_bias, down, down_bias = table[layer]
        for b in range(B):
            cache = (layer * B + b) * K * capacity * D
            _norm(flat, b * C, C, anchor, n1, n1_bias, centred, eps, normed)
            _products(normed, 0, anchor, qkv, packed.size, C, packed, 0, qkv_bias, False)
            if cos.size:
                _rotate(packed, H + K, D, cos, sin, b)
            for h in range(K):
                slot = cache + (h * capacity + stored) * D
                for i in range(D):
                    k[slot + i] = packed[(H + h) * D + i]
                    v[slot + i] = packed[(H + K + h) * D + i]
            for h in range(H):
                base = cache + h // (H // K) * capacity * D
                slope = slopes[h] if slopes.size else 0.0
                _attend(packed, h * D, k, v, base, D, first, S, visible, b, slope, scores, merged, h * D)
            _products(merged, 0, anchor, proj, C, C, flat, b * C, proj_bias, True)
            _norm(flat, b * C, C, anchor, n2, n2_bias, centred, eps, normed)
            _products(normed, 0, anchor, up, inner.size, C, inner, 0, up_bias, False)
            if activation == 0:
                _gelu_tanh(inner, F)
            elif activation == 2:
                _swiglu(inner, F)
            else:
                for i in range(F):
                    inner[i] = 0 if inner[i] <= 0 else inner[i]
            _products(inner, 0, anchor, down, C, F, flat, b * C, down_bias, True)
    norm, norm_bias, head = ends
    for b in range(B):
        _norm(flat, b * C, C, anchor, norm, norm_bias, centred, eps, normed)
        _products(normed, 0, anchor, head, V, C, out, b * V, NOWHERE, False)


_NO_FLOAT64 = np.empty(0)
_NO_BOOL = np.empty(0, bool)
_NOTHING = {np.dtype(np.float32): np.empty(0, np.float32), np.dtype(np.float64): _NO_FLOAT64}


def next_logits(x: np.ndarray, weights: Weights, keys: np.ndarray, values: np.ndarray, step: Step) -> np.ndarray:
    """See `reference.next_logits`. x and the cache must be contiguous, for they are written to."""
    check(x, weights, keys, values, step)
    for name, array in (("x", x), ("keys", keys), ("values", values)):
        if not array.flags.carray or array.dtype != weights.dtype or array.dtype not in _NOTHING:
            problem = f"{name} is {array.dtype} with strides {array.strides}, expected contiguous, writable floats"
            raise DTypeError("next_logits", problem, f"Pass the cache's own arrays and weights of {array.dtype}")
    nothing = _NOTHING[x.dtype]
    cos, sin = nothing, nothing
    if step.rotation is not None:
        cos, sin = (np.require(part, x.dtype, ["C", "A", "W"]).reshape(-1) for part in step.rotation)
    logits = np.empty((len(x), weights.V), x.dtype)
    _next_logits(
        x,
        logits,
        weights.anchor,
        weights.table,
        weights.ends,
        keys,
        values,
        weights.H,
        weights.F,
        step.stored,
        0 if step.reach is None else max(0, step.stored - step.reach),
        _NO_BOOL if step.visible is None else np.require(step.visible, bool, ["C", "A", "W"]).reshape(-1),
        _NO_FLOAT64 if step.slopes is None else np.require(step.slopes, np.float64, ["C", "A", "W"]),
        cos,
        sin,
        weights.norm == "layer",
        weights.eps,
        _ACTIVATIONS[weights.activation],
    )
    return logits
