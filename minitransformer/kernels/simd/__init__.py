"""SIMD registers as Numba values: one instruction works on all lanes of a register at once.

A processor's vector unit holds 4 to 16 floats in a register and adds or multiplies all of them in the time of
one. Compilers find such code in simple loops; where they do not, as in the tiles of a matrix product that must
stay in registers, a kernel says it itself:

    @njit
    def dot(x, y, n):                        # n a multiple of lanes(x)
        total = zeros(x)                     # a register of zeros, of x's dtype
        for i in range(0, n, lanes(x)):
            total = fma(load(x, i), load(y, i), total)      # x[i:i+lanes] * y[i:i+lanes] + total
        return sum_lanes(total)

Registers hold float32 or float64; `lanes(array)` is how many of its dtype, decided once for this processor. Memory
is one-dimensional and contiguous, positions are flat, and nothing is checked: the entrances of the kernels do that.
Everything here propagates NaN. Only for code compiled by Numba; of the functions below, each is what its name says,
lane by lane.
"""

from __future__ import annotations

from minitransformer.kernels.simd.arithmetic import absolute, fma, max_lanes, maximum, minimum, select_less, sum_lanes
from minitransformer.kernels.simd.functions import exp, exp_low, log, polynomial, sigmoid, tanh
from minitransformer.kernels.simd.registers import (
    REGISTER_BITS,
    Vector,
    broadcast,
    constant,
    first_lanes,
    lanes,
    load,
    load_some,
    load_up_to,
    splat,
    store,
    store_some,
    store_up_to,
    zeros,
)

__all__ = [
    "REGISTER_BITS",
    "Vector",
    "absolute",
    "broadcast",
    "constant",
    "exp",
    "exp_low",
    "first_lanes",
    "fma",
    "lanes",
    "load",
    "load_some",
    "load_up_to",
    "log",
    "max_lanes",
    "maximum",
    "minimum",
    "polynomial",
    "select_less",
    "sigmoid",
    "splat",
    "store",
    "store_some",
    "store_up_to",
    "sum_lanes",
    "tanh",
    "zeros",
]
