"""Layer norm and RMS norm in Numba, with the sums over rows for their parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import boolean, float64, njit, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.rowwise import reference
from minitransformer.kernels.rowwise.rows import row_deviations, row_dot, row_sum
from minitransformer.kernels.simd import (
    fma,
    lanes,
    load_up_to,
    splat,
    store_up_to,
    sum_lanes,
    zeros,
)

# A sum of all lanes, a root and a division keep a row waiting. So a few rows take each step one after the other: the
# processor then works on all of them at once.
ROWS = 4

# --- the kernels -----------------------------------------------------------------------------------------


@njit
def _normalise(
    x: Any, weight: Any, bias: Any, eps: Any, begin: Any, end: Any, out: Any, means: Any, rstds: Any
) -> None:
    """Rows of `out` and their statistics, from rows of `x` and their sums, which are in `means`."""
    C, T = weight.size, x.dtype.type
    for n in range(begin, end):
        guess = T(means[n] / C)
        # The mean has an error of some roundings. Its deviations show how large that is.
        first, second = row_deviations(x, n * C, n * C + C, guess)
        shift = first / C
        means[n] = guess if math.isnan(shift) else T(guess + shift)  # infinity stays
        rstds[n] = T(1 / math.sqrt(second / C - shift * shift + eps))
    for n in range(begin, end):
        start, m, r = n * C, splat(means[n]), splat(rstds[n])
        for c in range(0, C, lanes(x)):
            normed = (load_up_to(x, start + c, C - c) - m) * r
            y = fma(normed, load_up_to(weight, c, C - c), load_up_to(bias, c, C - c))
            store_up_to(out, start + c, C - c, y)


@kernel(lambda T: void(T[:, ::1], T[::1], T[::1], float64, T[:, ::1], T[::1], T[::1]))
def _layer_norm(x: Any, weight: Any, bias: Any, eps: Any, out: Any, means: Any, rstds: Any) -> None:
    C, N = weight.size, x.shape[0]
    for begin in range(0, N, ROWS):
        end = min(begin + ROWS, N)
        for n in range(begin, end):
            means[n] = row_sum(x, n * C, n * C + C)
        _normalise(x, weight, bias, eps, begin, end, out, means, rstds)


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[::1], T[::1], T[::1], float64, T[:, ::1], T[::1], T[::1]))
def _add_layer_norm(
    x: Any, delta: Any, delta_bias: Any, weight: Any, bias: Any, eps: Any, out: Any, means: Any, rstds: Any
) -> None:
    C, N = weight.size, x.shape[0]
    for begin in range(0, N, ROWS):
        end = min(begin + ROWS, N)
        for n in range(begin, end):
            start, total = n * C, zeros(x)
            for c in range(0, C, lanes(x)):
                left = C - c
                y = load_up_to(x, start + c, left) + load_up_to(delta, start + c, left)
                y = y + load_up_to(delta_bias, c, left)
                store_up_to(x, start + c, left, y)
                total = total + y
            means[n] = sum_lanes(total)
        _normalise(x, weight, bias, eps, begin, end, out, means, rstds)


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[::1], T[::1], T[::1], boolean, T[:, ::1], T[::1], T[::1]))
def _layer_norm_backward(
    dout: Any, x: Any, weight: Any, mean: Any, rstd: Any, adds: Any, dx: Any, dweight: Any, dbias: Any
) -> None:
    """`adds` says that the gradient is added to `dx`."""
    C, T, L = weight.size, x.dtype.type, lanes(x)
    for n in range(x.shape[0]):
        start = n * C
        m, r = splat(mean[n]), splat(rstd[n])
        total = slope = zeros(x)
        for c in range(0, C, L):
            left = C - c
            d = load_up_to(dout, start + c, left)
            normed = (load_up_to(x, start + c, left) - m) * r  # not 0 behind the end, but d is
            store_up_to(dweight, c, left, fma(d, normed, load_up_to(dweight, c, left)))
            store_up_to(dbias, c, left, d + load_up_to(dbias, c, left))
            d = d * load_up_to(weight, c, left)
            total = total + d
            slope = fma(d, normed, slope)
        t, s = splat(T(sum_lanes(total) / C)), splat(T(sum_lanes(slope) / C))
        for c in range(0, C, L):
            left = C - c
            d = load_up_to(dout, start + c, left) * load_up_to(weight, c, left)
            normed = (load_up_to(x, start + c, left) - m) * r
            y = (d - t - normed * s) * r
            if adds:
                y = y + load_up_to(dx, start + c, left)
            store_up_to(dx, start + c, left, y)


@kernel(lambda T: void(T[:, ::1], T[::1], float64, T[:, ::1], T[::1]))
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any, rrms: Any) -> None:
    C, T = weight.size, x.dtype.type
    for n in range(x.shape[0]):
        start = n * C
        rrms[n] = T(1 / math.sqrt(row_dot(x, x, start, start + C) / C + eps))
        r = splat(rrms[n])
        for c in range(0, C, lanes(x)):
            left = C - c
            store_up_to(out, start + c, left, load_up_to(x, start + c, left) * r * load_up_to(weight, c, left))


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[::1], T[::1], T[:, ::1], T[::1]))
def _rms_norm_backward(dout: Any, x: Any, weight: Any, rrms: Any, dx: Any, dweight: Any) -> None:
    C, T, L = weight.size, x.dtype.type, lanes(x)
    for n in range(x.shape[0]):
        start, r = n * C, splat(rrms[n])
        slope = zeros(x)
        for c in range(0, C, L):
            left = C - c
            d = load_up_to(dout, start + c, left)
            normed = load_up_to(x, start + c, left) * r
            store_up_to(dweight, c, left, fma(d, normed, load_up_to(dweight, c, left)))
            slope = fma(d * load_up_to(weight, c, left), normed, slope)
        s = splat(T(sum_lanes(slope) / C))
        for c in range(0, C, L):
            left = C - c
            d = load_up_to(dout, start + c, left) * load_up_to(weight, c, left)
            store_up_to(dx, start + c, left, (d - load_up_to(x, start + c, left) * r * s) * r)


# --- their entrances -------------------------------------------------------------------------------------


@entrance(reference, "NC", "C", "C")
def layer_norm_forward(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight * (x - mean) * rstd + bias, and the (N,) statistics. The variance is the biased one."""
    out, mean, rstd = np.empty_like(x), *np.empty((2, len(x)), x.dtype)
    _layer_norm(x, *_affine(x, weight, bias), float(eps), out, mean, rstd)
    return out, mean, rstd


@entrance(reference, "NC!", "NC", "C", "C", "C")
def add_layer_norm(
    x: np.ndarray,
    delta: np.ndarray,
    delta_bias: np.ndarray | None,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x += delta + delta_bias in place, a residual sum; then the layer norm of that x, as `layer_norm_forward`."""
    if delta_bias is None:
        delta_bias = np.zeros(x.shape[1], x.dtype)
    out, mean, rstd = np.empty_like(x), *np.empty((2, len(x)), x.dtype)
    _add_layer_norm(x, delta, delta_bias, *_affine(x, weight, bias), float(eps), out, mean, rstd)
    return out, mean, rstd


@entrance(reference, "NC", "NC", "C", "N", "N")
def layer_norm_backward(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray | None, mean: np.ndarray, rstd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dweight, dbias."""
    dx, dweight, dbias = np.empty_like(x), *np.zeros((2, x.shape[1]), x.dtype)
    _layer_norm_backward(dout, x, _affine(x, weight, None)[0], mean, rstd, False, dx, dweight, dbias)
    return dx, dweight, dbias


@entrance(reference, "NC", "NC", "C", "N", "N", "NC!")
def layer_norm_backward_add(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    dx: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """dweight, dbias; the gradient of x is added to `dx` in place, where that of the residual stream is."""
    dweight, dbias = np.zeros((2, x.shape[1]), x.dtype)
    _layer_norm_backward(dout, x, _affine(x, weight, None)[0], mean, rstd, True, dx, dweight, dbias)
    return dweight, dbias


@entrance(reference, "NC", "C")
def rms_norm_forward(x: np.ndarray, weight: np.ndarray | None, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """weight * x * rrms, and the (N,) reciprocal root mean squares."""
    out, rrms = np.empty_like(x), np.empty(len(x), x.dtype)
    _rms_norm(x, _affine(x, weight, None)[0], float(eps), out, rrms)
    return out, rrms


@entrance(reference, "NC", "NC", "C", "N")
def rms_norm_backward(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray | None, rrms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dx, dweight. With n = x rrms and dn = dout weight: dx = rrms (dn - n mean(dn n))"""
    dx, dweight = np.empty_like(x), np.zeros(x.shape[1], x.dtype)
    _rms_norm_backward(dout, x, _affine(x, weight, None)[0], rrms, dx, dweight)
    return dx, dweight


def _affine(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Those that change nothing in place of None."""
    C = x.shape[1]
    return np.ones(C, x.dtype) if weight is None else weight, np.zeros(C, x.dtype) if bias is None else bias
