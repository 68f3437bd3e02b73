"""GELU in Numba, exact and in the form of GPT-2, and the latter fused with the sum before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.entrance import entrance, mapped
from minitransformer.kernels.pointwise import reference
from minitransformer.kernels.pointwise.functions import normal, sigmoid_and_slope
from minitransformer.kernels.simd import constant, fma, lanes, load_up_to, sigmoid, store_up_to

# --- functions of a register -----------------------------------------------------------------------------

_DENSITY = 1 / math.sqrt(2 * math.pi)  # of the normal distribution at 0
_LINEAR = 2 * math.sqrt(2 / math.pi)  # GELU's (1 + tanh(u)) / 2 is sigmoid(2u), and 2u = _LINEAR x + _CUBIC x^3
_CUBIC = 0.044715 * _LINEAR


@njit
def _gelu_slope(x: Any) -> Any:
    probability, bell = normal(x)
    return fma(x * constant(x, _DENSITY), bell, probability)


@njit
def _gelu_tanh_of(x: Any) -> Any:
    return x * sigmoid(x * fma(x * x, constant(x, _CUBIC), constant(x, _LINEAR)))


@njit
def _gelu_tanh_slope(x: Any) -> Any:
    square = x * x
    s, slope = sigmoid_and_slope(x * fma(square, constant(x, _CUBIC), constant(x, _LINEAR)))
    return fma(x * fma(square, constant(x, 3 * _CUBIC), constant(x, _LINEAR)), slope, s)


# --- the kernels -----------------------------------------------------------------------------------------


@kernel(lambda T: void(T[::1], T[::1]))
def _gelu(x: Any, out: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        a = load_up_to(x, i, left)
        store_up_to(out, i, left, a * normal(a)[0])


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _gelu_backward(dout: Any, x: Any, dx: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        d = load_up_to(dout, i, left) * _gelu_slope(load_up_to(x, i, left))
        store_up_to(dx, i, left, d)


@kernel(lambda T: void(T[::1], T[::1]))
def _gelu_tanh(x: Any, out: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        store_up_to(out, i, left, _gelu_tanh_of(load_up_to(x, i, left)))


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _gelu_tanh_backward(dout: Any, x: Any, dx: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        d = load_up_to(dout, i, left) * _gelu_tanh_slope(load_up_to(x, i, left))
        store_up_to(dx, i, left, d)


@kernel(lambda T: void(T[:, ::1], T[::1], T[:, ::1]))
def _add_bias_gelu_tanh(x: Any, bias: Any, out: Any) -> None:
    F = bias.size
    for n in range(x.shape[0]):
        start = n * F
        for c in range(0, F, lanes(x)):
            left = F - c
            a = load_up_to(x, start + c, left) + load_up_to(bias, c, left)
            store_up_to(out, start + c, left, _gelu_tanh_of(a))


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[::1], T[::1]))
def _gelu_tanh_bias_backward(dout: Any, x: Any, bias: Any, dbias: Any) -> None:
    F = dbias.size
    for n in range(x.shape[0]):
        start = n * F
        for c in range(0, F, lanes(x)):
            left = F - c
            a = load_up_to(x, start + c, left) + load_up_to(bias, c, left)
            d = load_up_to(dout, start + c, left) * _gelu_tanh_slope(a)
            store_up_to(dout, start + c, left, d)
            store_up_to(dbias, c, left, load_up_to(dbias, c, left) + d)


# --- their entrances -------------------------------------------------------------------------------------


@entrance(reference, "*")
def gelu_forward(x: np.ndarray) -> np.ndarray:
    """x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return mapped(_gelu, x)


@entrance(reference, "*", "*")
def gelu_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dout (Phi(x) + x phi(x))"""
    return mapped(_gelu_backward, dout, x)


@entrance(reference, "*")
def gelu_tanh_forward(x: np.ndarray) -> np.ndarray:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form of GPT-2."""
    return mapped(_gelu_tanh, x)


@entrance(reference, "*", "*")
def gelu_tanh_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dout (s + x s (1 - s) u'), s the sigmoid of u, twice the argument of the tanh."""
    return mapped(_gelu_tanh_backward, dout, x)


@entrance(reference, "NF", "F")
def add_bias_gelu_tanh(x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """gelu_tanh(x + bias) of rows (N, F). The sum is not kept: adding again costs less than to write and read it."""
    out = np.empty_like(x)
    _add_bias_gelu_tanh(x, np.zeros(x.shape[1], x.dtype) if bias is None else bias, out)
    return out


@entrance(reference, "NF!", "NF", "F")
def gelu_tanh_bias_backward(dout: np.ndarray, x: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """dx, written over `dout`, and dbias (F,), of what `add_bias_gelu_tanh` was given."""
    dbias = np.zeros(x.shape[1], x.dtype)
    _gelu_tanh_bias_backward(dout, x, np.zeros_like(dbias) if bias is None else bias, dbias)
    return dout, dbias
