"""The loops of the optimizer's kernels: what is compiled. See `cpu.py` for what calls them, and checks before."""

from __future__ import annotations

import math
from typing import Any

from numba import boolean, float64, void

from minitransformer.kernels.compiled import kernel

LANES = 256  # partial sums of the norm: enough for any vector unit, and few to add up

# Numbers come as float64 and are rounded to the dtype once, as NumPy rounds a Python number beside an array.


@kernel(lambda T: void(T[::1], T[::1], float64, boolean, float64))
def sgd(data: Any, gradient: Any, decay: Any, decays: Any, lr: Any) -> None:
    T = data.dtype.type
    for i in range(data.size):
        g = gradient[i]
        if decays:
            g = data[i] * T(decay) + g
        data[i] -= g * T(lr)


@kernel(lambda T: void(T[::1], T[::1], T[::1], float64, boolean, float64, float64))
def sgd_momentum(data: Any, gradient: Any, velocity: Any, decay: Any, decays: Any, momentum: Any, lr: Any) -> None:
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
def adam(
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
def squared_norm(rows: Any, rest: Any, lanes: Any) -> Any:
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
def add_l1(gradient: Any, data: Any, l1: Any) -> None:
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
