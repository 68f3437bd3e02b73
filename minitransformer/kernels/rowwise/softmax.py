"""Softmax, log-softmax and cross-entropy in Numba."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import boolean, float64, int64, njit, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.rowwise import reference
from minitransformer.kernels.rowwise.rows import row_dot, row_max, row_sum
from minitransformer.kernels.simd import (
    broadcast,
    constant,
    exp,
    exp_low,
    first_lanes,
    lanes,
    load,
    load_up_to,
    splat,
    store_some,
    store_up_to,
    sum_lanes,
    zeros,
)

# --- softmax ---------------------------------------------------------------------------------------------


@njit
def _log_sum(x: Any, start: Any, end: Any, top: Any) -> Any:
    """The logarithm of the sum of exp(x - top)."""
    t, L, none = splat(top), lanes(x), zeros(x)
    a = b = none
    i = start
    while i + 2 * L <= end:
        a = a + exp_low(load(x, i) - t)
        b = b + exp_low(load(x, i + L) - t)
        i += 2 * L
    while i < end:
        a = a + first_lanes(end - i, exp_low(load_up_to(x, i, end - i) - t), none)
        i += L
    return x.dtype.type(math.log(sum_lanes(a + b)))


@kernel(lambda T: void(T[:, ::1], T[:, ::1]))
def _softmax(x: Any, out: Any) -> None:
    C, T, none = x.shape[1], x.dtype.type, zeros(x)
    for n in range(x.shape[0]):
        start, total = n * C, none
        top = splat(row_max(x, start, start + C))
        for c in range(0, C, lanes(x)):
            left = C - c
            y = exp_low(load_up_to(x, start + c, left) - top)
            store_up_to(out, start + c, left, y)
            total = total + first_lanes(left, y, none)
        share = splat(T(1 / sum_lanes(total)))
        for c in range(0, C, lanes(x)):
            left = C - c
            store_up_to(out, start + c, left, load_up_to(out, start + c, left) * share)


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[:, ::1]))
def _softmax_backward(dout: Any, out: Any, dx: Any) -> None:
    C = out.shape[1]
    for n in range(out.shape[0]):
        start = n * C
        inner = splat(row_dot(dout, out, start, start + C))
        for c in range(0, C, lanes(out)):
            left = C - c
            d = load_up_to(out, start + c, left) * (load_up_to(dout, start + c, left) - inner)
            store_up_to(dx, start + c, left, d)


@kernel(lambda T: void(T[:, ::1], T[:, ::1]))
def _log_softmax(x: Any, out: Any) -> None:
    C = x.shape[1]
    for n in range(x.shape[0]):
        start = n * C
        top = row_max(x, start, start + C)
        t, log_sum = splat(top), splat(_log_sum(x, start, start + C, top))
        for c in range(0, C, lanes(x)):
            left = C - c
            store_up_to(out, start + c, left, (load_up_to(x, start + c, left) - t) - log_sum)


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[:, ::1]))
def _log_softmax_backward(dout: Any, out: Any, dx: Any) -> None:
    C = out.shape[1]
    for n in range(out.shape[0]):
        start = n * C
        total = splat(row_sum(dout, start, start + C))
        for c in range(0, C, lanes(out)):
            left = C - c
            d = load_up_to(dout, start + c, left) - exp(load_up_to(out, start + c, left)) * total
            store_up_to(dx, start + c, left, d)


@entrance(reference, "NC")
def softmax_forward(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x) along each row, shifted by the row's maximum so that nothing overflows."""
    out = np.empty_like(x)
    _softmax(x, out)
    return out


@entrance(reference, "NC", "NC")
def softmax_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = p * (dout - <dout, p>)"""
    dx = np.empty_like(out)
    _softmax_backward(dout, out, dx)
    return dx


@entrance(reference, "NC")
def log_softmax_forward(x: np.ndarray) -> np.ndarray:
    """x - log sum exp(x) along each row."""
    out = np.empty_like(x)
    _log_softmax(x, out)
    return out


@entrance(reference, "NC", "NC")
def log_softmax_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout - p * sum(dout)"""
    dx = np.empty_like(out)
    _log_softmax_backward(dout, out, dx)
    return dx


# --- cross-entropy ---------------------------------------------------------------------------------------


@njit
def _loss(logits: Any, start: Any, V: Any, target: Any, lse: Any, smoothing: Any) -> Any:
    loss = (1 - smoothing) * (lse - logits[start // V, target])
    if smoothing:
        loss += smoothing * (lse - row_sum(logits, start, start + V) / V)
    return loss


@njit
def _dlogits(logits: Any, start: Any, V: Any, target: Any, lse: Any, smoothing: Any, dloss: Any, out: Any) -> None:
    """dloss (p - (1 - e) onehot - e / V)."""
    l, d, e = splat(lse), splat(dloss), constant(logits, smoothing / V)
    y = exp(broadcast(logits, start + target) - l) - e - constant(logits, 1 - smoothing)
    for c in range(0, V, lanes(logits)):
        left = V - c
        store_up_to(out, start + c, left, (exp(load_up_to(logits, start + c, left) - l) - e) * d)
    store_some(out, start + target, 1, y * d)


@kernel(lambda T: void(T[:, ::1], int64[::1], boolean[::1], float64, T[::1], T[::1]))
def _cross_entropy(logits: Any, targets: Any, valid: Any, smoothing: Any, losses: Any, lses: Any) -> None:
    V = logits.shape[1]
    for n in range(logits.shape[0]):
        top = row_max(logits, n * V, n * V + V)
        lses[n] = _log_sum(logits, n * V, n * V + V, top) + top
        losses[n] = _loss(logits, n * V, V, targets[n], lses[n], smoothing) if valid[n] else 0


@kernel(lambda T: void(T[::1], T[:, ::1], int64[::1], boolean[::1], T[::1], float64, T[:, ::1]))
def _cross_entropy_backward(
    dlosses: Any, logits: Any, targets: Any, valid: Any, lses: Any, smoothing: Any, dlogits: Any
) -> None:
    V = logits.shape[1]
    for n in range(logits.shape[0]):
        if valid[n]:
            _dlogits(logits, n * V, V, targets[n], lses[n], smoothing, dlosses[n], dlogits)
        else:
            dlogits[n] = 0


@entrance(reference, "NV", "N", "N")
def cross_entropy_forward(
    logits: np.ndarray, targets: np.ndarray, valid: np.ndarray, label_smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N,), 0 where not `valid`, and the log-sum-exp of each row.

    With smoothing e over V classes: (1 - e) * -log p[target] + e * mean over classes of -log p.
    """
    losses, lse = np.empty((2, len(logits)), logits.dtype)
    _cross_entropy(logits, targets, valid, float(label_smoothing), losses, lse)
    return losses, lse


@entrance(reference, "N", "NV", "N", "N", "N")
def cross_entropy_backward(
    dlosses: np.ndarray,
    logits: np.ndarray,
    targets: np.ndarray,
    valid: np.ndarray,
    lse: np.ndarray,
    label_smoothing: float,
) -> np.ndarray:
    """dlogits = dloss (p - (1 - e) onehot - e / V), 0 in rows that are not valid."""
    dlogits = np.empty_like(logits)
    _cross_entropy_backward(dlosses, logits, targets, valid, lse, float(label_smoothing), dlogits)
    return dlogits
