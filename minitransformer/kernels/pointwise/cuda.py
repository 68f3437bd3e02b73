"""Elementwise kernels on the GPU: the functions of `reference.py` in one pass over memory, a thread an element."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import boolean, float32, float64, int64

from minitransformer.kernels.gpu.blocks import (
    NARROW,
    WIDE,
    Block,
    U,
    block_for,
    blocks_of,
    column_blocks,
    column_sum,
    down_columns,
    launch,
    position_of,
    strips,
    type_of,
)
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.pointwise import cuda_dropout, cuda_functions
from minitransformer.kernels.pointwise.cuda_dropout import dropout_forward

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

# --- the kernels -----------------------------------------------------------------------------------------


@cache
def _of_one(T: Any, block: Block, make: Callable[[Any, Any], Any]) -> Kernel:
    """out = f(x), element by element; `make(cuda, T)` returns f."""

    def build(cuda: Any) -> Any:
        f, position = make(cuda, T), position_of(cuda)

        def kernel(x: Any, out: Any) -> None:
            i = position()
            if i < U(out.size):
                out[i] = f(x[i])

        return kernel

    return Kernel(build, (T[::1], T[::1]), block.threads)


@cache
def _of_two(T: Any, block: Block, make: Callable[[Any, Any], Any]) -> Kernel:
    """out = f(x, y), element by element."""

    def build(cuda: Any) -> Any:
        f, position = make(cuda, T), position_of(cuda)

        def kernel(x: Any, y: Any, out: Any) -> None:
            i = position()
            if i < U(out.size):
                out[i] = f(x[i], y[i])

        return kernel

    return Kernel(build, (T[::1], T[::1], T[::1]), block.threads)


@cache
def _swiglu_backward(T: Any, block: Block) -> Kernel:
    def build(cuda: Any) -> Any:
        sigmoid_and_slope, position = cuda_functions.sigmoid_and_slope(cuda, T), position_of(cuda)

        def kernel(dout: Any, gate: Any, up: Any, dgate: Any, dup: Any) -> None:
            i = position()
            if i < U(gate.size):
                d, g = dout[i], gate[i]
                s, slope = sigmoid_and_slope(g)
                dgate[i] = d * up[i] * (g * slope + s)
                dup[i] = d * (g * s)

        return kernel

    return Kernel(build, (T[::1],) * 5, block.threads)


@cache
def _add_bias_gelu_tanh(T: Any, block: Block) -> Kernel:
    """A block a row."""
    threads = block.threads

    def build(cuda: Any) -> Any:
        gelu_tanh = cuda_functions.gelu_tanh(cuda, T)

        def kernel(x: Any, bias: Any, F: Any, out: Any) -> None:
            start = U(cuda.blockIdx.x) * U(F)
            f = cuda.threadIdx.x
            while f < F:
                i = start + U(f)
                out[i] = gelu_tanh(x[i] + bias[U(f)])
                f += threads

        return kernel

    return Kernel(build, (T[::1], T[::1], int64, T[::1]), threads)


@cache
def _gelu_tanh_bias_backward(T: Any, block: Block) -> Kernel:
    """Row y of `sums` is the sum of strip y of the new `dout`."""
    threads, warp, warps = block.threads, block.warp, block.warps

    def build(cuda: Any) -> Any:
        gelu_tanh_backward = cuda_functions.gelu_tanh_backward(cuda, T)
        down = down_columns(cuda, block)

        def kernel(dout: Any, x: Any, bias: Any, N: Any, F: Any, height: Any, sums: Any) -> None:
            scratch = cuda.shared.array(threads, T)
            f = cuda.blockIdx.x * warp + cuda.threadIdx.x % warp
            n = cuda.blockIdx.y * height + cuda.threadIdx.x // warp
            last = min((cuda.blockIdx.y + 1) * height, N)
            total = T(0)
            if f < F:
                while n < last:
                    i = U(n) * U(F) + U(f)
                    d = gelu_tanh_backward(dout[i], x[i] + bias[U(f)])
                    dout[i] = d
                    total += d
                    n += warps
            total = down(total, scratch)
            if cuda.threadIdx.x < warp and f < F:
                sums[U(cuda.blockIdx.y) * U(F) + U(f)] = total

        return kernel

    return Kernel(build, (T[::1], T[::1], T[::1], int64, int64, int64, T[::1]), threads)


@cache
def _dropout_backward(T: Any, block: Block) -> Kernel:
    def build(cuda: Any) -> Any:
        position = position_of(cuda)

        def kernel(dout: Any, keep: Any, scale: Any, dx: Any) -> None:
            i = position()
            if i < U(dx.size):
                dx[i] = dout[i] * scale if keep[i] else T(0)

        return kernel

    return Kernel(build, (T[::1], boolean[::1], T, T[::1]), block.threads)


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel of this family as a GPU gets it, with its name."""
    yield from cuda_dropout.configurations()
    for T in (float32, float64):
        for make in cuda_functions.OF_ONE:
            yield f"{make.__name__} {T}", _of_one(T, WIDE, make)
        for make in cuda_functions.OF_TWO:
            yield f"{make.__name__} {T}", _of_two(T, WIDE, make)
        yield f"swiglu_backward {T}", _swiglu_backward(T, WIDE)
        for block in (WIDE, NARROW):
            yield f"add_bias_gelu_tanh {T} {block.threads}", _add_bias_gelu_tanh(T, block)
        yield f"gelu_tanh_bias_backward {T}", _gelu_tanh_bias_backward(T, WIDE)
        yield f"dropout_backward {T}", _dropout_backward(T, WIDE)


# --- their entrances -------------------------------------------------------------------------------------


@entrance("*")
def erf(x: Any) -> Any:
    """The error function."""
    return _mapped(cuda_functions.erf, x)


@entrance("*")
def gelu_forward(x: Any) -> Any:
    """x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return _mapped(cuda_functions.gelu, x)


@entrance("*", "*")
def gelu_backward(dout: Any, x: Any) -> Any:
    """dx = dout (Phi(x) + x phi(x))"""
    return _mapped(cuda_functions.gelu_backward, dout, x)


@entrance("*")
def gelu_tanh_forward(x: Any) -> Any:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form of GPT-2."""
    return _mapped(cuda_functions.gelu_tanh, x)


@entrance("*", "*")
def gelu_tanh_backward(dout: Any, x: Any) -> Any:
    """dx = dout (s + x s (1 - s) u'), s the sigmoid of u, twice the argument of the tanh."""
    return _mapped(cuda_functions.gelu_tanh_backward, dout, x)


@entrance("NF", "F")
def add_bias_gelu_tanh(x: Any, bias: Any | None) -> Any:
    """gelu_tanh(x + bias) of rows (N, F). The sum is not kept: adding again costs less than to write and read it."""
    (N, F), out = x.shape, np.empty_like(x)
    launch(_add_bias_gelu_tanh(type_of(x), block_for(x, F)), N, x, _or_zeros(x, bias), F, out)
    return out


@entrance("NF!", "NF", "F")
def gelu_tanh_bias_backward(dout: Any, x: Any, bias: Any | None) -> tuple[Any, Any]:
    """dx, written over `dout`, and dbias (F,), of what `add_bias_gelu_tanh` was given."""
    (N, F), block = x.shape, block_for(x)
    count, height = strips(N, block)
    sums = np.empty_like(x, shape=(count, F))
    kernel = _gelu_tanh_bias_backward(type_of(x), block)
    launch(kernel, (column_blocks(F, block), count), dout, x, _or_zeros(x, bias), N, F, height, sums)
    return dout, column_sum(sums)


@entrance("*")
def relu_forward(x: Any) -> Any:
    """max(x, 0); NaN stays NaN."""
    return np.maximum(x, 0)


@entrance("*", "*")
def relu_backward(dout: Any, out: Any) -> Any:
    """dx = dout where out > 0"""
    return _mapped(cuda_functions.relu_backward, dout, out)


@entrance("*")
def sigmoid_forward(x: Any) -> Any:
    """1 / (1 + exp(-x))"""
    return _mapped(cuda_functions.sigmoid, x)


@entrance("*", "*")
def sigmoid_backward(dout: Any, out: Any) -> Any:
    """dx = dout s (1 - s)"""
    return _mapped(cuda_functions.sigmoid_backward, dout, out)


@entrance("*")
def tanh_forward(x: Any) -> Any:
    """The hyperbolic tangent."""
    return np.tanh(x)


@entrance("*", "*")
def tanh_backward(dout: Any, out: Any) -> Any:
    """dx = dout (1 - t^2)"""
    return _mapped(cuda_functions.tanh_backward, dout, out)


@entrance("*")
def silu_forward(x: Any) -> Any:
    """x sigmoid(x), also called swish."""
    return _mapped(cuda_functions.silu, x)


@entrance("*", "*")
def silu_backward(dout: Any, x: Any) -> Any:
    """dx = dout s (1 + x (1 - s))"""
    return _mapped(cuda_functions.silu_backward, dout, x)


@entrance("*", "*")
def swiglu_forward(gate: Any, up: Any) -> Any:
    """silu(gate) * up (Shazeer 2020, "GLU variants improve transformer")."""
    return _mapped(cuda_functions.swiglu, gate, up)


@entrance("*", "*", "*")
def swiglu_backward(dout: Any, gate: Any, up: Any) -> tuple[Any, Any]:
    """dgate = dout up silu'(gate), dup = dout silu(gate)"""
    block, dgate, dup = block_for(gate), np.empty_like(gate), np.empty_like(up)
    kernel = _swiglu_backward(type_of(gate), block)
    launch(kernel, blocks_of(gate.size, block), dout, gate, up, dgate, dup)
    return dgate, dup


@entrance("*", "*")
def dropout_backward(dout: Any, keep: Any, scale: float) -> Any:
    """dx = dout scale where kept, scale being 1 / (1 - p)"""
    block, dx = block_for(dout), np.empty_like(dout)
    launch(_dropout_backward(type_of(dout), block), blocks_of(dx.size, block), dout, keep, scale, dx)
    return dx


def _mapped(make: Callable[[Any, Any], Any], *arrays: Any) -> Any:
    """What a function of one or two numbers makes of arrays of one shape."""
    out, block = np.empty_like(arrays[0]), block_for(arrays[0])
    kernel = (_of_one, _of_two)[len(arrays) - 1](type_of(out), block, make)
    launch(kernel, blocks_of(out.size, block), *arrays, out)
    return out


def _or_zeros(x: Any, bias: Any | None) -> Any:
    return np.zeros_like(x, shape=x.shape[1:]) if bias is None else bias
