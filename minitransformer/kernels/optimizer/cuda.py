"""Optimizer kernels on the GPU: the functions of `reference.py`, one pass over flat arrays.

The arithmetic is that of the reference, though a GPU may round a product and a sum once where that rounds twice.
A norm stays on the device: to read it as a number waits for all that was launched before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
from numba import float32, float64, int64

from minitransformer.errors import ShapeError
from minitransformer.kernels.gpu.blocks import (
    WIDE,
    Block,
    U,
    block_for,
    blocks_of,
    functions,
    launch,
    position_of,
    reductions,
    type_of,
)
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.optimizer.reference import clip_factor

__all__ = ["adam_step", "adamw_step", "add_l1", "clip_", "clip_factor", "sgd_step", "squared_norm"]

_ROUNDS, _PARTS = 8, 1024  # a thread adds up at least 8 squares, and the parts' sums are few

# --- the kernels -----------------------------------------------------------------------------------------


@cache
def _sgd(T: Any, block: Block, with_velocity: bool) -> Kernel:
    def build(cuda: Any) -> Any:
        position = position_of(cuda)

        def kernel(data: Any, gradient: Any, velocity: Any, decayed: Any, decay: Any, momentum: Any, lr: Any) -> None:
            i = position()
            if i < U(data.size):
                g = gradient[i]
                if i < U(decayed):
                    g = data[i] * decay + g
                if with_velocity:
                    g = velocity[i] * momentum + g
                    velocity[i] = g
                data[i] -= g * lr

        return kernel

    return Kernel(build, (T[::1], T[::1], T[::1], int64, T, T, T), block.threads)


@cache
def _adam(T: Any, block: Block) -> Kernel:
    """`keep` is AdamW's factor of the first `kept` elements of the data, `decay` Adam's own for the first `decayed`."""

    def build(cuda: Any) -> Any:
        math, position = functions(cuda), position_of(cuda)

        def kernel(
            data: Any,
            gradient: Any,
            first: Any,
            second: Any,
            kept: Any,
            keep: Any,
            decayed: Any,
            decay: Any,
            gain1: Any,
            beta2: Any,
            gain2: Any,
            eps: Any,
            lr: Any,
        ) -> None:
            i = position()
            if i < U(data.size):
                d, g = data[i], gradient[i]
                if i < U(kept):
                    d = d * keep
                if i < U(decayed):
                    g = d * decay + g
                m = first[i] + (g - first[i]) * gain1
                v = second[i] * beta2 + g * g * gain2
                first[i] = m
                second[i] = v
                data[i] = d - m / (math.sqrt(v) + eps) * lr

        return kernel

    return Kernel(build, (T[::1],) * 4 + (int64, T) * 2 + (T,) * 5, block.threads)


@cache
def _add_l1(T: Any, block: Block) -> Kernel:
    def build(cuda: Any) -> Any:
        position = position_of(cuda)

        def kernel(gradient: Any, data: Any, l1: Any, count: Any) -> None:
            i = position()
            if i < U(count):
                d = data[i]
                if d > T(0):
                    d = T(1)
                elif d < T(0):
                    d = T(-1)
                gradient[i] += d * l1  # NaN stays

        return kernel

    return Kernel(build, (T[::1], T[::1], T, int64), block.threads)


@cache
def _sums(T: Any, block: Block, squares: bool) -> Kernel:
    """What each block's part of x, `height` numbers, adds up to, or their squares do."""
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        total, _ = reductions(cuda, block)

        def kernel(x: Any, height: Any, sums: Any) -> None:
            scratch = cuda.shared.array(warps, float64)
            i = cuda.blockIdx.x * height + cuda.threadIdx.x
            last = min((cuda.blockIdx.x + 1) * height, x.size)
            own = float64(0)
            while i < last:
                a = float64(x[U(i)])
                if squares:
                    own += a * a
                else:
                    own += a
                i += threads
            own = total(own, scratch)
            if cuda.threadIdx.x == 0:
                sums[cuda.blockIdx.x] = own

        return kernel

    return Kernel(build, (T[::1], int64, float64[::1]), threads)


@cache
def _clip(T: Any, block: Block) -> Kernel:
    """Every thread computes `clip_factor` for itself, from the squared norm on the device."""

    def build(cuda: Any) -> Any:
        math, position = functions(cuda), position_of(cuda)

        def kernel(gradient: Any, squared: Any, max_norm: Any, norm: Any) -> None:
            i = position()
            length = math.sqrt(squared[0])
            factor = max_norm / (length + float64(1e-6))
            if i == U(0):
                norm[0] = length
            if i < U(gradient.size) and length - length == float64(0) and factor < float64(1):  # finite, and too long
                gradient[i] *= T(factor)

        return kernel

    return Kernel(build, (T[::1], float64[::1], float64, float64[::1]), block.threads)


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel of this family as a GPU gets it, with its name."""
    for T in (float32, float64):
        yield f"sgd {T}", _sgd(T, WIDE, False)
        yield f"sgd_momentum {T}", _sgd(T, WIDE, True)
        yield f"adam {T}", _adam(T, WIDE)
        yield f"add_l1 {T}", _add_l1(T, WIDE)
        yield f"squares {T}", _sums(T, WIDE, True)
        yield f"clip {T}", _clip(T, WIDE)
    yield "sums", _sums(float64, WIDE, False)


# --- their entrances -------------------------------------------------------------------------------------


@entrance("N!", "N", "N!")
def sgd_step(
    data: Any,
    gradient: Any,
    velocity: Any | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    num_decayed: int,
) -> None:
    """g = gradient + weight_decay data;  velocity = momentum velocity + g;  data -= lr velocity

    With `velocity` None, data -= lr g. A first velocity of zeros gives torch's first step.
    """
    decayed = _checked("sgd_step", data, num_decayed) if weight_decay else 0
    block = block_for(data)
    kernel = _sgd(type_of(data), block, velocity is not None)
    arrays = data, gradient, data if velocity is None else velocity  # which is then not touched
    launch(kernel, blocks_of(data.size, block), *arrays, decayed, weight_decay, momentum, lr)


@entrance("N!", "N", "N!", "N!")
def adam_step(
    data: Any,
    gradient: Any,
    first: Any,
    second: Any,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    num_decayed: int,
    step: int,
) -> None:
    """Adam on gradient + weight_decay data (Kingma and Ba 2015). `step` counts from 1."""
    decayed = _checked("adam_step", data, num_decayed) if weight_decay else 0
    numbers = _adam_numbers(lr, beta1, beta2, eps, step)
    _adam_update(data, gradient, first, second, 0, 1.0, decayed, weight_decay, *numbers)


@entrance("N!", "N", "N!", "N!")
def adamw_step(
    data: Any,
    gradient: Any,
    first: Any,
    second: Any,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    num_decayed: int,
    step: int,
) -> None:
    """data *= 1 - lr weight_decay, then Adam (Loshchilov and Hutter 2019). `step` counts from 1."""
    kept = _checked("adamw_step", data, num_decayed)
    numbers = _adam_numbers(lr, beta1, beta2, eps, step)
    _adam_update(data, gradient, first, second, kept, 1 - lr * weight_decay, 0, 0.0, *numbers)


@entrance("N")
def squared_norm(flat: Any) -> Any:
    """Sum of squares as an array of the device without axes, in float64 whatever the dtype.

    The order of the additions depends on the size alone.
    """
    block = block_for(flat)
    height = max(_ROUNDS * block.threads, -(-flat.size // _PARTS))
    parts = -(-flat.size // height)
    sums = np.empty_like(flat, shape=(parts,), dtype=np.float64)
    launch(_sums(type_of(flat), block, True), parts, flat, height, sums)
    norm = np.empty_like(flat, shape=(1,), dtype=np.float64).reshape(())
    launch(_sums(float64, block, False), 1, sums, max(parts, 1), norm)
    return norm


@entrance("N!")
def clip_(gradient: Any, max_norm: float) -> Any:
    """Scale `gradient` in place to norm `max_norm` if it is longer; return the norm that it had.

    If that is NaN or infinite, nothing is written. It is an array of the device without axes, and nothing waits for it.
    """
    squared, block = squared_norm(gradient), block_for(gradient)
    norm = np.empty_like(squared)
    launch(_clip(type_of(gradient), block), max(blocks_of(gradient.size, block), 1), gradient, squared, max_norm, norm)
    return norm


@entrance("N!", "N")
def add_l1(gradient: Any, data: Any, l1: float, num_decayed: int) -> None:
    """gradient += l1 sign(data), the gradient of l1 |data|, over the first `num_decayed` elements."""
    count, block = _checked("add_l1", data, num_decayed), block_for(data)
    launch(_add_l1(type_of(data), block), blocks_of(count, block), gradient, data, l1, count)


def _adam_update(data: Any, gradient: Any, first: Any, second: Any, *numbers: float) -> None:
    block = block_for(data)
    launch(_adam(type_of(data), block), blocks_of(data.size, block), data, gradient, first, second, *numbers)


def _adam_numbers(lr: float, beta1: float, beta2: float, eps: float, step: int) -> tuple[float, ...]:
    """What the kernel multiplies with, as in the reference: see `_adam_update` there."""
    root = sqrt(1 - beta2**step)
    return 1 - beta1, beta2, 1 - beta2, eps * root, lr * root / (1 - beta1**step)


def _checked(op: str, data: Any, num_decayed: int) -> int:
    if not 0 <= num_decayed <= data.size:
        problem = f"num_decayed is {num_decayed}, expected a number from 0 to {data.size}"
        raise ShapeError(f"kernels.{op}", problem, "Pass optimizer.flat.num_decayed")
    return num_decayed
