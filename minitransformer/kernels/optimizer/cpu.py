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

import numpy as np

from minitransformer.errors import ShapeError
from minitransformer.kernels.optimizer import loops
from minitransformer.kernels.optimizer.loops import LANES
from minitransformer.kernels.optimizer.reference import clip_factor
from minitransformer.threads import split

__all__ = ["adam_step", "adamw_step", "add_l1", "clip_", "clip_factor", "sgd_step", "squared_norm"]

_CHUNK = 1 << 16  # numbers whose squares are added up before all others: a multiple of LANES
_SMALL = 1 << 17  # numbers that one thread has done before a second has begun


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
            loops.sgd(data[part], gradient[part], float(weight_decay), decays, float(lr))
        else:
            d, g, v = data[part], gradient[part], velocity[part]
            loops.sgd_momentum(d, g, v, float(weight_decay), decays, float(momentum), float(lr))

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
        loops.adam(*arrays, 1.0, float(weight_decay), decays, *numbers)

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
        loops.adam(*arrays, 1.0 - lr * weight_decay if decays else 1.0, 0.0, False, *numbers)

    _in_parts("adamw_step", data.size, num_decayed if weight_decay else 0, update)


def squared_norm(flat: np.ndarray) -> float:
    """Sum of squares, in float64 whatever the dtype, in an order that depends on the size alone."""
    flat = _checked("squared_norm", flat)
    sums = [0.0] * -(-flat.size // _CHUNK)

    def add_up(first: int, last: int) -> None:
        for chunk in range(first, last):
            part = flat[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            whole = part.size - part.size % LANES
            sums[chunk] = loops.squared_norm(part[:whole].reshape(-1, LANES), part[whole:], np.zeros(LANES))

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

        def scale(part: slice, _: bool) -> None:
            gradient[part] *= factor

        _in_parts("clip_", gradient.size, 0, scale)
    return norm


def add_l1(gradient: np.ndarray, data: np.ndarray, l1: float, num_decayed: int) -> None:
    """gradient += l1 sign(data), the gradient of l1 |data|, over the first `num_decayed` elements."""
    data = _checked("add_l1", data, gradient)

    def add(part: slice, decays: bool) -> None:
        if decays:
            loops.add_l1(gradient[part], data[part], float(l1))

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
