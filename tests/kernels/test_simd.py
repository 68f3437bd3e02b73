"""Registers of a vector unit as Numba values: every function of `kernels/simd.py`, lane by lane and at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import pytest
from guarded import CONTIGUOUS, Layout, needs_guard_pages
from hypothesis import example, given
from hypothesis import strategies as st

from minitransformer.kernels import simd
from minitransformer.kernels.simd import lanes, load, load_some, load_up_to, store, store_some, store_up_to

DTYPES = [np.float32, np.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def width(dtype: Any) -> int:
    return simd.REGISTER_BITS // (8 * np.dtype(dtype).itemsize)


@cache
def mapped(function: Any, count: int) -> Callable[..., Any]:
    """`function` of `count` registers, over arrays of any one size."""

    def one(x: Any, out: Any) -> None:
        for i in range(0, x.size, lanes(x)):
            store_up_to(out, i, x.size - i, function(load_up_to(x, i, x.size - i)))

    def two(x: Any, y: Any, out: Any) -> None:
        for i in range(0, x.size, lanes(x)):
            n = x.size - i
            store_up_to(out, i, n, function(load_up_to(x, i, n), load_up_to(y, i, n)))

    def three(x: Any, y: Any, z: Any, out: Any) -> None:
        for i in range(0, x.size, lanes(x)):
            n = x.size - i
            store_up_to(out, i, n, function(load_up_to(x, i, n), load_up_to(y, i, n), load_up_to(z, i, n)))

    compiled = numba.njit(error_model="numpy")((one, two, three)[count - 1])

    def call(*arrays: np.ndarray) -> np.ndarray:
        out = np.full_like(arrays[0], 7)
        compiled(*arrays, out)
        return out

    return call


def edges(dtype: Any) -> np.ndarray:
    kind = np.finfo(dtype)
    powers = 2.0 ** np.arange(-24, 11)
    found = [
        0.0,
        1.0,
        kind.tiny,
        kind.smallest_subnormal,
        kind.tiny / 3,
        kind.max,
        math.inf,
        *powers,
        *np.nextafter(1, [0, 2]),
    ]
    found += [
        85.9,
        86.0,
        86.1,
        88.72,
        88.73,
        103.0,
        706.9,
        707.1,
        709.78,
        709.79,
        745.0,
        math.log(2) / 2,
        math.log(2) * 1.5,
    ]
    return np.array([math.nan, *found, *(-x for x in found)]).astype(dtype)


def error(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest, in units in the last place of the exact number."""
    with np.errstate(over="ignore"):
        rounded = exact.astype(got.dtype)
        finite = np.isfinite(rounded)
        unit = np.spacing(abs(rounded[finite])).astype(np.longdouble)
    assert np.array_equal(got[~finite], rounded[~finite], equal_nan=True)
    return float((abs(got[finite] - exact[finite]) / unit).max(initial=0))


def wide_sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# name: (exact function, units in the last place that it may be off, where it may be 0 instead)
FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, dict[Any, float]]] = {
    "absolute": (np.abs, 0, {}),
    "exp": (np.exp, 1.5, {np.float32: math.exp(-86), np.float64: math.exp(-707)}),
    "exp_low": (np.exp, 1.5, {np.float32: math.exp(-86), np.float64: math.exp(-707)}),
    "log": (np.log, 2.5, {}),
    "sigmoid": (wide_sigmoid, 3, {np.float32: math.exp(-86), np.float64: math.exp(-707)}),
    "tanh": (np.tanh, 4, {}),
}


@dtypes
@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.lists(st.floats(-800, 800) | st.floats(-1, 1) | st.floats(), max_size=40))
@example([])
def test_functions_are_as_good_as_rounding(name: str, dtype: Any, drawn: list[float]) -> None:
    exactly, units, least = FUNCTIONS[name]
    with np.errstate(all="ignore"):
        x = np.concatenate([edges(dtype), np.array(drawn).astype(dtype)])
        if name == "exp_low":
            x = x[~(x > (88 if dtype == np.float32 else 709))]
        got, exact = mapped(getattr(simd, name), 1)(x), exactly(x.astype(np.longdouble))
    floor = least.get(dtype, 0.0)
    small = exact < floor if floor else np.zeros(x.shape, bool)
    assert (abs(got[small]) <= floor * 1.001).all()
    assert error(got[~small], exact[~small]) <= units


@dtypes
def test_functions_are_dense_in_accuracy(dtype: Any) -> None:
    """No gap between the edges: a sweep over where the values change."""
    x = np.linspace(-30, 30, 50_001).astype(dtype)
    for name in ("exp", "sigmoid", "tanh"):
        exactly, units, _ = FUNCTIONS[name]
        assert error(mapped(getattr(simd, name), 1)(x), exactly(x.astype(np.longdouble))) <= units, name
    positive = np.logspace(-37, 38, 50_001).astype(dtype)
    assert error(mapped(simd.log, 1)(positive), np.log(positive.astype(np.longdouble))) <= 2.5


PAIRS = {
    "add": (lambda a, b: a + b, np.add),
    "sub": (lambda a, b: a - b, np.subtract),
    "mul": (lambda a, b: a * b, np.multiply),
    "truediv": (lambda a, b: a / b, np.divide),
    "maximum": (simd.maximum, np.maximum),
    "minimum": (simd.minimum, np.minimum),
}
COMPILED_PAIRS = {
    name: f if name in ("maximum", "minimum") else numba.njit(error_model="numpy")(f) for name, (f, _) in PAIRS.items()
}


@dtypes
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_registers(name: str, dtype: Any) -> None:
    x, y = (a.ravel() for a in np.meshgrid(edges(dtype), edges(dtype)))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(mapped(COMPILED_PAIRS[name], 2)(x, y), PAIRS[name][1](x, y))


@dtypes
def test_fma_rounds_once(dtype: Any) -> None:
    eps = np.finfo(dtype).eps
    a, b, c = np.array([[1 + eps, 1 - eps, -1], [3, 4, 5], [math.inf, 0, 1], [1, math.nan, 1], [0, 0, -0.0]], dtype).T
    got = mapped(simd.fma, 3)(*(np.ascontiguousarray(v) for v in (a, b, c)))
    np.testing.assert_array_equal(got, np.array([-eps * eps, 17, math.nan, math.nan, 0], dtype))


@numba.njit
def _choose(a: Any, b: Any, out: Any) -> None:
    for i in range(0, a.size, lanes(a)):
        x, y = load_up_to(a, i, a.size - i), load_up_to(b, i, a.size - i)
        store_up_to(out, i, a.size - i, simd.select_less(x, y, simd.constant(a, 1.0), simd.constant(x, 2.0)))


@dtypes
def test_select_less_takes_the_second_for_nan(dtype: Any) -> None:
    x, y = (a.ravel() for a in np.meshgrid(edges(dtype), edges(dtype)))
    out = np.empty_like(x)
    _choose(x, y, out)
    np.testing.assert_array_equal(out, np.where(x < y, 1, 2))


@numba.njit
def _gather(x: Any, number: Any, out: Any) -> Any:
    L = lanes(x)
    store(out, 0, simd.broadcast(x, 3))
    store(out, L, simd.splat(number))
    store(out, 2 * L, simd.zeros(x))
    store(out, 3 * L, simd.constant(x, 0.1))
    return L


@dtypes
def test_one_number_in_every_lane(dtype: Any) -> None:
    L = width(dtype)
    x, out = np.arange(5).astype(dtype), np.ones(4 * L, dtype)
    assert _gather(x, dtype(0.3), out) == L
    np.testing.assert_array_equal(out, np.repeat(np.array([3, 0.3, 0, 0.1], dtype), L))


@numba.njit
def _first_lanes(n: Any, x: Any, y: Any, out: Any) -> None:
    store(out, 0, simd.first_lanes(n, load(x, 0), load(y, 0)))


@dtypes
def test_first_lanes(dtype: Any) -> None:
    L = width(dtype)
    x, y, out = np.arange(L).astype(dtype), -np.arange(L).astype(dtype), np.empty(L, dtype)
    for n in (-1, 0, 1, L - 1, L, L + 1):
        _first_lanes(n, x, y, out)
        np.testing.assert_array_equal(out, np.where(np.arange(L) < n, x, y))


@numba.njit
def _across(x: Any) -> Any:
    return simd.sum_lanes(load(x, 0)), simd.max_lanes(load(x, 0))


@dtypes
def test_all_lanes_into_one_number(dtype: Any) -> None:
    L = width(dtype)
    x = (np.random.default_rng(0).standard_normal(L) * 10.0 ** np.arange(L)).astype(dtype)
    total = x
    while total.size > 1:  # halves upon halves
        total = total[: total.size // 2] + total[total.size // 2 :]
    assert _across(x) == (total[0], x.max())
    for lane in range(L):
        for value in (math.nan, math.inf, -math.inf):
            y = x.copy()
            y[lane] = value
            np.testing.assert_array_equal(_across(y), (y.sum(), y.max()))


TERMS32, TERMS64 = (0.1, -2.0, 0.0, 5.0), (0.3, 1.0)


@numba.njit
def _series(x: Any) -> Any:
    return simd.polynomial(x, TERMS32, TERMS64)


@dtypes
def test_the_polynomial_of_the_dtype(dtype: Any) -> None:
    x = np.linspace(-2, 2, 41).astype(dtype)
    exact = np.polyval((TERMS32 if dtype == np.float32 else TERMS64)[::-1], x.astype(np.float64))
    np.testing.assert_allclose(mapped(_series, 1)(x), exact, rtol=0, atol=20 * np.finfo(dtype).eps)


@numba.njit
def _copy_some(x: Any, i: Any, n: Any, out: Any, at: Any) -> None:
    store(out, 0, load_some(x, i, n))
    store_some(out, at, n, load_some(x, i, n))


@numba.njit
def _copy(x: Any, out: Any) -> None:
    for i in range(0, x.size, lanes(x)):
        store_up_to(out, i, x.size - i, load_up_to(x, i, x.size - i))


@needs_guard_pages
@dtypes
@pytest.mark.parametrize("layout", CONTIGUOUS.values(), ids=CONTIGUOUS)
def test_tails_touch_no_memory_behind_them(layout: Layout, dtype: Any) -> None:
    L = width(dtype)
    for n in range(L + 1):
        x = layout(np.arange(1, n + 2).astype(dtype), True)  # the last n numbers of n + 1
        out = layout(np.full(L + n, -1, dtype), True)
        _copy_some(x, 1, n, out, L)
        np.testing.assert_array_equal(out, [*range(2, n + 2), *[0] * (L - n), *range(2, n + 2)])
    for size in range(3 * L + 1):
        x, out = (layout(a.astype(dtype), True) for a in (np.arange(size), np.full(size, -1)))
        _copy(x, out)
        np.testing.assert_array_equal(x, out)


@dtypes
def test_what_is_no_flat_array_of_floats_is_refused(dtype: Any) -> None:
    out = np.empty(64, dtype)
    for x in (np.arange(64).astype(dtype)[::2], np.arange(64)):
        with pytest.raises(numba.TypingError):
            _copy(x, out)
