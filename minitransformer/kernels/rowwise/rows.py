"""Sums and maxima of one row, compiled into the kernels: positions `start` to `end` of a flat array.

An addition takes four cycles until the next may use its result: so four registers add up in turns. Which number
goes to which register depends on the length of the row alone.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit

from minitransformer.kernels.simd import (
    constant,
    first_lanes,
    fma,
    lanes,
    load,
    load_up_to,
    max_lanes,
    maximum,
    splat,
    sum_lanes,
    zeros,
)


@njit
def row_sum(x: Any, start: Any, end: Any) -> Any:
    L = lanes(x)
    a = b = c = d = zeros(x)
    i = start
    while i + 4 * L <= end:
        a = a + load(x, i)
        b = b + load(x, i + L)
        c = c + load(x, i + 2 * L)
        d = d + load(x, i + 3 * L)
        i += 4 * L
    while i < end:
        a = a + load_up_to(x, i, end - i)
        i += L
    return sum_lanes((a + b) + (c + d))


@njit
def row_dot(x: Any, y: Any, start: Any, end: Any) -> Any:
    """The sum of the products with the same row of `y`."""
    L = lanes(x)
    a = b = c = d = zeros(x)
    i = start
    while i + 4 * L <= end:
        a = fma(load(x, i), load(y, i), a)
        b = fma(load(x, i + L), load(y, i + L), b)
        c = fma(load(x, i + 2 * L), load(y, i + 2 * L), c)
        d = fma(load(x, i + 3 * L), load(y, i + 3 * L), d)
        i += 4 * L
    while i < end:
        a = fma(load_up_to(x, i, end - i), load_up_to(y, i, end - i), a)
        i += L
    return sum_lanes((a + b) + (c + d))


@njit
def row_max(x: Any, start: Any, end: Any) -> Any:
    """-inf of no numbers, NaN if one is NaN."""
    L = lanes(x)
    lowest = constant(x, -math.inf)
    a = b = lowest
    i = start
    while i + 2 * L <= end:
        a = maximum(a, load(x, i))
        b = maximum(b, load(x, i + L))
        i += 2 * L
    while i < end:
        a = maximum(a, first_lanes(end - i, load_up_to(x, i, end - i), lowest))
        i += L
    return max_lanes(maximum(a, b))


@njit
def row_deviations(x: Any, start: Any, end: Any, origin: Any) -> Any:
    """The sums of x - origin and of its square."""
    L = lanes(x)
    o, none = splat(origin), zeros(x)
    a = b = c = d = none
    i = start
    while i + 2 * L <= end:
        p, q = load(x, i) - o, load(x, i + L) - o
        a, b = a + p, b + q
        c, d = fma(p, p, c), fma(q, q, d)
        i += 2 * L
    while i < end:
        p = first_lanes(end - i, load_up_to(x, i, end - i) - o, none)
        a, c = a + p, fma(p, p, c)
        i += L
    return sum_lanes(a + b), sum_lanes(c + d)
