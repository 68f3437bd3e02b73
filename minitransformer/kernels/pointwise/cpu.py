"""Elementwise kernels in Numba: the functions of `reference.py` in one pass over memory.

Each runs on the calling thread. Arrays of more than one float dtype are served by the reference; see `entrance.py`
for what else is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.entrance import entrance, mapped
from minitransformer.kernels.pointwise import reference
from minitransformer.kernels.pointwise.dropout import dropout_backward, dropout_forward
from minitransformer.kernels.pointwise.functions import sigmoid_and_slope
from minitransformer.kernels.pointwise.gelu import (
    add_bias_gelu_tanh,
    gelu_backward,
    gelu_forward,
    gelu_tanh_backward,
    gelu_tanh_bias_backward,
    gelu_tanh_forward,
)
from minitransformer.kernels.pointwise.reference import erf
from minitransformer.kernels.simd import fma, lanes, load_up_to, sigmoid, store_up_to, tanh

__all__ = [
    "add_bias_gelu_tanh",
    "dropout_backward",
    "dropout_forward",
    "erf",
    "gelu_backward",
    "gelu_forward",
    "gelu_tanh_backward",
    "gelu_tanh_bias_backward",
    "gelu_tanh_forward",
    "relu_backward",
    "relu_forward",
    "sigmoid_backward",
    "sigmoid_forward",
    "silu_backward",
    "silu_forward",
    "swiglu_backward",
    "swiglu_forward",
    "tanh_backward",
    "tanh_forward",
]


@njit
def _silu_slope(x: Any) -> Any:
    s, slope = sigmoid_and_slope(x)
    return fma(x, slope, s)


# --- the kernels -----------------------------------------------------------------------------------------


@kernel(lambda T: void(T[::1], T[::1]))
def _sigmoid(x: Any, out: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        store_up_to(out, i, left, sigmoid(load_up_to(x, i, left)))


@kernel(lambda T: void(T[::1], T[::1]))
def _tanh(x: Any, out: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        store_up_to(out, i, left, tanh(load_up_to(x, i, left)))


@kernel(lambda T: void(T[::1], T[::1]))
def _silu(x: Any, out: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        a = load_up_to(x, i, left)
        store_up_to(out, i, left, a * sigmoid(a))


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _silu_backward(dout: Any, x: Any, dx: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        left = x.size - i
        d = load_up_to(dout, i, left) * _silu_slope(load_up_to(x, i, left))
        store_up_to(dx, i, left, d)


@kernel(lambda T: void(T[::1], T[::1]))
def _relu(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = x.dtype.type(0) if x[i] <= 0 else x[i]


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _relu_backward(dout: Any, out: Any, dx: Any) -> None:
    for i in range(out.size):
        dx[i] = dout[i] if out[i] > 0 else out.dtype.type(0)


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _sigmoid_backward(dout: Any, out: Any, dx: Any) -> None:
    for i in range(out.size):
        dx[i] = dout[i] * out[i] * (out.dtype.type(1) - out[i])


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _tanh_backward(dout: Any, out: Any, dx: Any) -> None:
    for i in range(out.size):
        dx[i] = dout[i] * (out.dtype.type(1) - out[i] * out[i])


@kernel(lambda T: void(T[::1], T[::1], T[::1]))
def _swiglu(gate: Any, up: Any, out: Any) -> None:
    for i in range(0, gate.size, lanes(gate)):
        left = gate.size - i
        g = load_up_to(gate, i, left)
        store_up_to(out, i, left, g * sigmoid(g) * load_up_to(up, i, left))


@kernel(lambda T: void(T[::1], T[::1], T[::1], T[::1], T[::1]))
def _swiglu_backward(dout: Any, gate: Any, up: Any, dgate: Any, dup: Any) -> None:
    for i in range(0, gate.size, lanes(gate)):
        left = gate.size - i
        d, g = load_up_to(dout, i, left), load_up_to(gate, i, left)
        s, slope = sigmoid_and_slope(g)
        store_up_to(dgate, i, left, d * load_up_to(up, i, left) * fma(g, slope, s))
        store_up_to(dup, i, left, d * (g * s))


# --- their entrances -------------------------------------------------------------------------------------


@entrance(reference, "*")
def relu_forward(x: np.ndarray) -> np.ndarray:
    """max(x, 0); NaN stays NaN."""
    return mapped(_relu, x)


@entrance(reference, "*", "*")
def relu_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout where out > 0"""
    return mapped(_relu_backward, dout, out)


@entrance(reference, "*")
def sigmoid_forward(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))"""
    return mapped(_sigmoid, x)


@entrance(reference, "*", "*")
def sigmoid_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout s (1 - s)"""
    return mapped(_sigmoid_backward, dout, out)


@entrance(reference, "*")
def tanh_forward(x: np.ndarray) -> np.ndarray:
    """The hyperbolic tangent."""
    return mapped(_tanh, x)


@entrance(reference, "*", "*")
def tanh_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout (1 - t^2)"""
    return mapped(_tanh_backward, dout, out)


@entrance(reference, "*")
def silu_forward(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x), also called swish."""
    return mapped(_silu, x)


@entrance(reference, "*", "*")
def silu_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx = dout s (1 + x (1 - s))"""
    return mapped(_silu_backward, dout, x)


@entrance(reference, "*", "*")
def swiglu_forward(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up (Shazeer 2020, "GLU variants improve transformer")."""
    return mapped(_swiglu, gate, up)


@entrance(reference, "*", "*", "*")
def swiglu_backward(dout: np.ndarray, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dgate = dout up silu'(gate), dup = dout silu(gate)"""
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    _swiglu_backward(*(a.reshape(-1) for a in (dout, gate, up, dgate, dup)))
    return dgate, dup
