"""Activations and their derivatives as functions of one number, compiled into the kernels of `cuda.py`.

Each factory takes `cuda` and the type T of the number, and returns a device function.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

from minitransformer.kernels.gpu.blocks import functions

_LINEAR = 2 * sqrt(2 / pi)  # GELU's (1 + tanh(u)) / 2 is sigmoid(2u), and 2u = _LINEAR x + _CUBIC x^3
_CUBIC = 0.044715 * _LINEAR


def erf(cuda: Any, T: Any) -> Any:
    math = functions(cuda)
    return cuda.jit(device=True)(lambda x: math.erf(x))


def normal(cuda: Any, T: Any) -> Any:
    """Phi(x), by erfc: in the lower tail 1 + erf would cancel."""
    math, half, root = functions(cuda), T(0.5), T(-sqrt(0.5))
    return cuda.jit(device=True)(lambda x: half * math.erfc(x * root))


def gelu(cuda: Any, T: Any) -> Any:
    probability = normal(cuda, T)
    return cuda.jit(device=True)(lambda x: x * probability(x))


def gelu_backward(cuda: Any, T: Any) -> Any:
    math, probability, half, density = functions(cuda), normal(cuda, T), T(-0.5), T(1 / sqrt(2 * pi))
    return cuda.jit(device=True)(lambda d, x: d * (probability(x) + x * density * math.exp(half * x * x)))


def sigmoid(cuda: Any, T: Any) -> Any:
    math, one = functions(cuda), T(1)
    return cuda.jit(device=True)(lambda x: one / (one + math.exp(-x)))


def sigmoid_and_slope(cuda: Any, T: Any) -> Any:
    """s and s (1 - s), to a few roundings of each however large |x| is."""
    math, one = functions(cuda), T(1)

    def both(x: Any) -> Any:
        e = math.exp(-abs(x))
        small = one / (one + e)  # s of |x|; e times that is s of -|x|
        large = e * small
        return (large if x < 0 else small), large * small

    return cuda.jit(device=True)(both)


def sigmoid_backward(cuda: Any, T: Any) -> Any:
    one = T(1)
    return cuda.jit(device=True)(lambda d, s: d * s * (one - s))


def tanh_backward(cuda: Any, T: Any) -> Any:
    one = T(1)
    return cuda.jit(device=True)(lambda d, t: d * (one - t * t))


def relu_backward(cuda: Any, T: Any) -> Any:
    zero = T(0)
    return cuda.jit(device=True)(lambda d, y: d if y > zero else zero)


def silu(cuda: Any, T: Any) -> Any:
    s = sigmoid(cuda, T)
    return cuda.jit(device=True)(lambda x: x * s(x))


def silu_backward(cuda: Any, T: Any) -> Any:
    both = sigmoid_and_slope(cuda, T)

    def backward(d: Any, x: Any) -> Any:
        s, slope = both(x)
        return d * (x * slope + s)

    return cuda.jit(device=True)(backward)


def swiglu(cuda: Any, T: Any) -> Any:
    s = sigmoid(cuda, T)
    return cuda.jit(device=True)(lambda gate, up: gate * s(gate) * up)


def gelu_tanh(cuda: Any, T: Any) -> Any:
    s, linear, cubic = sigmoid(cuda, T), T(_LINEAR), T(_CUBIC)
    return cuda.jit(device=True)(lambda x: x * s(x * (x * x * cubic + linear)))


def gelu_tanh_backward(cuda: Any, T: Any) -> Any:
    both, linear, cubic, steep = sigmoid_and_slope(cuda, T), T(_LINEAR), T(_CUBIC), T(3 * _CUBIC)

    def backward(d: Any, x: Any) -> Any:
        square = x * x
        s, slope = both(x * (square * cubic + linear))
        return d * (x * (square * steep + linear) * slope + s)

    return cuda.jit(device=True)(backward)


OF_ONE = (erf, gelu, gelu_tanh, sigmoid, silu)
OF_TWO = (gelu_backward, gelu_tanh_backward, relu_backward, sigmoid_backward, silu_backward, swiglu, tanh_backward)
