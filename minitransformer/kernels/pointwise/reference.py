"""Elementwise kernels in NumPy: the specification. Any shape; complex-clean forwards.

Backwards recompute what they need from the input or the output: that costs less than to write and read it.
"""

from __future__ import annotations

import math

import numpy as np

from minitransformer.random import DrawKey, keep_mask

# Rational minimax approximations of erf and erfc by W. J. Cody, "Rational Chebyshev approximation for
# the error function", Math. Comp. 23 (1969): coefficients from the highest power down.
# fmt: off
_ERF_P = (
    1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2,
    3.20937758913846947e3,
)
_ERF_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_ERFC_P = (
    2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1,
    2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
    1.23033935479799725e3,
)
_ERFC_Q = (
    1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
    3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3,
)
_TAIL_P = (
    1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
    1.60837851487422766e-2, 6.58749161529837803e-4,
)
_TAIL_Q = (
    1.0, 2.56852019228982242, 1.87295284992346725, 5.27905102951428412e-1, 6.05183413124413191e-2,
    2.33520497626869185e-3,
)
# fmt: on

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _ratio(p: tuple[float, ...], q: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    top, bottom = p[0] * x, q[0] * x
    for a, b in zip(p[1:-1], q[1:-1], strict=True):
        top, bottom = (top + a) * x, (bottom + b) * x
    return (top + p[-1]) / (bottom + q[-1])


def erf(x: np.ndarray) -> np.ndarray:
    """The error function to a few units in the last place, for real and complex arrays.

    Built from its own rational approximations, not from the Gaussian that is its derivative: a gradient
    check through it tests something. Off the real axis it is good near the axis, as a complex step needs.
    """
    sign = np.where(x.real < 0, -1, 1).astype(x.real.dtype)
    y = x * sign
    size = y.real
    out = sign * np.where(np.isnan(size), y, 1)  # the limit, reached to rounding at 6
    near = size <= 0.46875
    out[near] = sign[near] * y[near] * _ratio(_ERF_P, _ERF_Q, y[near] * y[near])
    middle = (size > 0.46875) & (size <= 4)
    z = y[middle]
    out[middle] = sign[middle] * (1 - np.exp(-z * z) * _ratio(_ERFC_P, _ERFC_Q, z))
    far = (size > 4) & (size <= 6)
    if far.any():  # rare
        z = y[far]
        square = 1 / (z * z)
        tail = (1 / math.sqrt(math.pi) - square * _ratio(_TAIL_P, _TAIL_Q, square)) / z
        out[far] = sign[far] * (1 - np.exp(-z * z) * tail)
    return out


def gelu_forward(x: np.ndarray) -> np.ndarray:
    """x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dout (Phi(x) + x phi(x))"""
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return dout * (0.5 * (1 + erf(x / math.sqrt(2))) + x * density)


def gelu_tanh_forward(x: np.ndarray) -> np.ndarray:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form of GPT-2."""
    out = _gelu_tanh(x)
    out += 1
    out *= x
    out *= 0.5
    return out


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    tanh = x * x
    tanh *= _GELU_SCALE * _GELU_CUBIC
    tanh += _GELU_SCALE
    tanh *= x
    return np.tanh(tanh, out=tanh)


def gelu_tanh_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dout/2 (1 + t + x (1 - t^2) u'), u' the derivative of the argument of the tanh t."""
    tanh = _gelu_tanh(x)
    slope = x * x
    slope *= 3 * _GELU_SCALE * _GELU_CUBIC
    slope += _GELU_SCALE
    slope *= x
    square = tanh * tanh
    np.subtract(1, square, out=square)
    slope *= square
    slope += tanh
    slope += 1
    slope *= 0.5
    slope *= dout
    return slope


def add_bias_gelu_tanh(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """gelu_tanh(x + bias) of rows (N, F). The sum is not kept: adding again costs less than to write and read it."""
    return gelu_tanh_forward(x if bias is None else x + bias)


def gelu_tanh_bias_backward(dout: np.ndarray, x: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """dx, written over `dout`, and dbias (F,), of what `add_bias_gelu_tanh` was given."""
    dout[...] = gelu_tanh_backward(dout, x if bias is None else x + bias)
    return dout, dout.sum(axis=0)


def relu_forward(x: np.ndarray) -> np.ndarray:
    """max(x, 0); NaN stays NaN."""
    return np.where(x.real <= 0, x.dtype.type(0), x)


def relu_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout where x > 0"""
    return np.where(out > 0, dout, dout.dtype.type(0))


def sigmoid_forward(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), written as a tanh because that cannot overflow."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


def sigmoid_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout s (1 - s)"""
    return dout * out * (1 - out)


def tanh_forward(x: np.ndarray) -> np.ndarray:
    return np.tanh(x)


def tanh_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout (1 - t^2)"""
    return dout * (1 - out * out)


def silu_forward(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x), also called swish."""
    return x * sigmoid_forward(x)


def silu_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dout s (1 + x (1 - s))"""
    s = sigmoid_forward(x)
    return dout * s * (1 + x * (1 - s))


def swiglu_forward(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up (Shazeer 2020, "GLU variants improve transformer")."""
    return silu_forward(gate) * up


def swiglu_backward(dout: np.ndarray, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dgate = dout up silu'(gate), dup = dout silu(gate)"""
    return silu_backward(dout * up, gate), dout * silu_forward(gate)


def dropout_forward(x: np.ndarray, p: float, key: DrawKey) -> tuple[np.ndarray, np.ndarray]:
    """x / (1 - p) where kept, 0 elsewhere; and what is kept, `random.keep_mask` of `key`."""
    keep = keep_mask(x.shape, p, key)
    return dropout_backward(x, keep, 1 / (1 - p)), keep


def dropout_backward(dout: np.ndarray, keep: np.ndarray, scale: float) -> np.ndarray:
    """dx = dout scale where kept, scale being 1 / (1 - p)"""
    return np.where(keep, dout * scale, dout.dtype.type(0))
