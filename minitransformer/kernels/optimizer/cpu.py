"""Optimizer kernels in Numba: one pass over memory, where the reference makes one per operation in the cache.

The same functions and the same arithmetic as in `reference.py`, element by element in the same order, so
that every bit of an update is the same. Only `squared_norm` adds in another order, fixed too. Large arrays are
cut into parts for several threads, which changes no bit. Arrays must be flat, contiguous and of one size and
dtype: what else would be read or written beyond its end is refused by a `ShapeError`, another dtype by a
`DTypeError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import boolean, float64, void

from minitransformer.errors import ShapeError
from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.optimizer.reference import clip_factor
from minitransformer.threads import split

__all__ = ["adam_step", "adamw_step", "add_l1", "clip_", "clip_factor", "sgd_step", "squared_norm"]

LANES = 256  # partial sums of the norm: enough for any vector unit, and few to add up
_CHUNK = 1 << 16  # numbers whose squares are added up before all others: a multiple of LANES
_SMALL = 1 << 17  # numbers that one thread has done before a second has begun

# --- the kernels -----------------------------------------------------------------------------------------
# Numbers come as float64 and are rounded to the dtype once, as NumPy rounds a Python number beside an array.


@kernel(lambda T: void(T[::1], T[::1], float64, boolean, float64))
def _sgd(data: Any, gradient: Any, decay: Any, decays: Any, lr: Any) -> None:
    T = data.dtype.type
    for i in range(data.size):
        g = gradient[i]
        if decays:
            g = data[i] * T(decay) + g
        data[i] -= g * T(lr)


@kernel(lambda T: void(T[::1], T[::1], T[::1], float64, boolean, float64, float64))
def _sgd_momentum(data: Any, gradient: Any, velocity: Any, decay: Any, decays: Any, momentum: Any, lr: Any) -> None:
    T = data.dtype.type
    for i in range(data.size):
        g = gradient[i]
        if decays:
            g = data[i] * T(decay) + g
        g = velocity[i] * T(momentum) + g
        velocity[i] = g
        data[i] -= g * T(lr)


@kernel(
    lambda T: void(
        T[::1], T[::1], T[::1], T[::1], float64, float64, boolean, float64, float64, float64, float64, float64
    )
)
def _adam(
    data: Any,
    gradient: Any,
    first: Any,
    second: Any,
    keep: Any,
    decay: Any,
    decays: Any,
    gain1: Any,
    beta2: Any,
    gain2: Any,
    eps: Any,
    lr: Any,
) -> None:
    """`keep` is AdamW's factor of the data, 1 for Adam; `decay` and `decays` are Adam's own."""
    T = data.dtype.type
    for i in range(data.size):
        d = data[i] * T(keep)
        g = gradient[i]
        if decays:
            g = d * T(decay) + g
        m = first[i] + (g - first[i]) * T(gain1)
        v = second[i] * T(beta2) + g * g * T(gain2)
        first[i] = m
        second[i] = v
        data[i] = d - m / (math.sqrt(v) + T(eps)) * T(lr)


@kernel(lambda T: float64(T[:, ::1], T[::1], float64[::1]))
def _squared_norm(rows: Any, rest: Any, lanes: Any) -> Any:
    """Every lane adds up its column of `rows`, (rows, LANES), so that a vector unit adds many at once."""
    for row in range(rows.shape[0]):
        for lane in range(lanes.size):
            lanes[lane] += float64(rows[row, lane]) * float64(rows[row, lane])
    total = 0.0
    for lane in range(lanes.size):
        total += lanes[lane]
    for i in range(rest.size):
        total += float64(rest[i]) * float64(rest[i])
    return total


@kernel(lambda T: void(T[::1], T[::1], float64))
def _add_l1(gradient: Any, data: Any, l1: Any) -> None:
    T = data.dtype.type
    for i in range(data.size):
        d = data[i]
        if d > 0:
            d = T(1)
        elif d < 0:
            d = T(-1)
        elif d == 0:
            d = T(0)  # of -0 too; NaN stays
        gradient[i] += d * T(l1)


# --- their entrances -------------------------------------------------------------------------------------


def sgd_step(
    data: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    num_decayed: int,
) -> None:
    """g = gradient + weight_decay data;  velocity = momentum velocity + g;  data -= lr velocity

    With `velocity` None, data -= lr g. A first velocity of zeros gives torch's first step.
    """
    gradient = _checked("sgd_step", gradient, data if velocity is None else velocity, data)

    def update(part: slice, decays: bool) -> None:
        if velocity is None:
            _sgd(data[part], gradient[part], float(weight_decay), decays, float(lr))
        else:
            d, g, v = data[part], gradient[part], velocity[part]
            _sgd_momentum(d, g, v, float(weight_decay), decays, float(momentum), float(lr))

    _in_parts("sgd_step", data.size, num_decayed if weight_decay else 0, update)


def adam_step(
    data: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
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
    gradient = _checked("adam_step", gradient, first, second, data)
    numbers = _adam_numbers(lr, beta1, beta2, eps, step)

    def update(part: slice, decays: bool) -> None:
        arrays = data[part], gradient[part], first[part], second[part]
        _adam(*arrays, 1.0, float(weight_decay), decays, *numbers)

    _in_parts("adam_step", data.size, num_decayed if weight_decay else 0, update)


def adamw_step(
    data: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
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
    gradient = _checked("adamw_step", gradient, first, second, data)
    numbers = _adam_numbers(lr, beta1, beta2, eps, step)

    def update(part: slice, decays: bool) -> None:
        arrays = data[part], gradient[part], first[part], second[part]
        _adam(*arrays, 1.0 - lr * weight_decay if decays else 1.0, 0.0, False, *numbers)

    _in_parts("adamw_step", data.size, num_decayed if weight_decay else 0, update)


def squared_norm(flat: np.ndarray) -> float:
    """Sum of squares, in float64 whatever the dtype, in an order that depends on the size alone."""
    flat = _checked("squared_norm", flat)
    sums = [0.0] * -(-flat.size // _CHUNK)

    def add_up(first: int, last: int) -> None:
        for chunk in range(first, last):
            part = flat[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            whole = part.size - part.size % LANES
            sums[chunk] = _squared_norm(part[:whole].reshape(-1, LANES), part[whole:], np.zeros(LANES))

    if flat.size < _SMALL:
        add_up(0, len(sums))
    else:
        split(len(sums), add_up)
    return sum(sums)


def clip_(gradient: np.ndarray, max_norm: float) -> float:
    """Scale `gradient` in place to norm `max_norm` if it is longer; return the norm that it had.

    If that is NaN or infinite, nothing is written.
    """
    norm = math.sqrt(squared_norm(gradient))
    factor = clip_factor(norm, max_norm)
    if factor < 1:
        gradient *= factor
    return norm


def add_l1(gradient: np.ndarray, data: np.ndarray, l1: float, num_decayed: int) -> None:
    """gradient += l1 sign(data), the gradient of l1 |data|, over the first `num_decayed` elements."""
    data = _checked("add_l1", data, gradient)

    def add(part: slice, decays: bool) -> None:
        if decays:
            _add_l1(gradient[part], data[part], float(l1))

    _in_parts("add_l1", data.size, num_decayed, add)


def _adam_numbers(lr: float, beta1: float, beta2: float, eps: float, step: int) -> tuple[float, ...]:
    """What the kernel multiplies with, as in the reference: see `_adam_update` there."""
    root = math.sqrt(1 - beta2**step)
    return 1.0 - beta1, float(beta2), 1.0 - beta2, eps * root, lr * root / (1 - beta1**step)


def _checked(op: str, read: np.ndarray, *written: np.ndarray) -> np.ndarray:
    """`read` as a kernel reads it (copied if it has gaps or is locked), after all arrays were found to fit."""
    for array in (read, *written):
        if array.ndim != 1 or array.size != read.size:
            shapes = " and ".join(str(other.shape) for other in (read, *written))
            raise ShapeError(f"kernels.{op}", f"got arrays of shapes {shapes}, expected flat ones of one size", _FIX)
    for array in written:
        if not array.flags.carray:  # contiguous, aligned and writable
            raise ShapeError(f"kernels.{op}", f"an array to write to has strides {array.strides} or is locked", _FIX)
    return np.require(np.asarray(read), requirements=["C", "A", "W"])


_FIX = "Pass arrays like optimizer.flat.data"


def _in_parts(op: str, size: int, num_decayed: int, update: Callable[[slice, bool], None]) -> None:
    """Call update(part, whether it decays) for parts that are all numbers together, on several threads if many."""
    if not 0 <= num_decayed <= size:
        problem = f"num_decayed is {num_decayed}, expected a number from 0 to {size}"
        raise ShapeError(f"kernels.{op}", problem, "Pass optimizer.flat.num_decayed")

    def run(first: int, last: int) -> None:
        edge = min(max(num_decayed, first), last)
        update(slice(first, edge), True)
        update(slice(edge, last), False)

    if size < _SMALL:
        run(0, size)
    else:
        split(size, run)
