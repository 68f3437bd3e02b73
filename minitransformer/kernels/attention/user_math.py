"""Functions of scores for users' code, in a form that LLVM can spread over the lanes of a register.

Numba calls the C library for `np.tanh` and `np.exp`, a number at a time, and makes arrays for `np.where`. Here they
are arithmetic without branches, in the precision of the scores. Of a complex number they take the real part and the
first order in the imaginary one, which is exact for the complex step that differentiates a `score_mod`.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.extending import overload

intrinsic: Any = extending.intrinsic  # untyped: what it makes has other arguments than what it is given

# As in simd/functions.py: exp(x) = 2**n exp(r) with x = n log(2) + r, and a series for exp(r).
_TERMS = {32: 7, 64: 13}
_LOWEST, _HIGHEST = {32: -86.0, 64: -707.0}, {32: 88.72283935546875, 64: 709.782712893384}
_LOG2 = {32: (0.693147182464599609375, -1.904654299957768e-9), 64: (math.log(2), 2.3190468138462996e-17)}
_EXPONENT = {32: (23, 127), 64: (52, 1023)}
_FLAT = {32: 80.0, 64: 700.0}  # tanh is 1 long before

# Division is NumPy's; "contract" lets a product and a sum be one instruction.
_inlined = njit(fastmath={"contract"}, error_model="numpy", forceinline=True)


@intrinsic
def _expm1_parts(typingctx: Any, x: Any) -> Any:
    """q and p with exp(x) = 2 p (1 + q), for x that is not too large."""
    bits = x.bitwidth
    shift, bias = _EXPONENT[bits]

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        T, integer = args[0].type, ir.IntType(bits)
        # Beside a number this large there is no room for a fraction: adding it rounds to whole numbers, which then are
        # the last bits of the sum, with the bias that makes an exponent of them; one less, as 2**bias is no float.
        large = T(1.5 * 2**shift + bias - 1)
        sum_ = builder.fma(args[0], T(1 / math.log(2)), large)
        n, r = builder.fsub(sum_, large), args[0]
        for part in _LOG2[bits]:
            r = builder.fma(n, T(-part), r)
        y = T(1 / math.factorial(_TERMS[bits]))
        for k in range(_TERMS[bits] - 1, 1, -1):
            y = builder.fma(y, r, T(1 / math.factorial(k)))
        p = builder.bitcast(builder.shl(builder.bitcast(sum_, integer), integer(shift)), T)
        return context.make_tuple(builder, sig.return_type, [builder.fma(builder.fmul(y, r), r, r), p])

    return types.UniTuple(x, 2)(x), emit


@_inlined
def _between(x: Any, low: Any, high: Any) -> Any:
    x = low if x < low else x  # NaN stays
    return high if x > high else x


def _functions(T: Any) -> tuple[Any, Any]:
    """exp, and tanh with its derivative, of numbers of type T."""
    bits = T(0).itemsize * 8
    lowest, highest, flat = T(_LOWEST[bits]), T(_HIGHEST[bits]), T(_FLAT[bits])
    zero, one, two, four, infinity = T(0), T(1), T(2), T(4), T(math.inf)

    @_inlined
    def exp_of(number: Any) -> Any:
        x = T(number)
        q, p = _expm1_parts(_between(x, lowest, highest))
        y = q * p + p
        y = zero if x < lowest else y + y
        return infinity if x > highest else y

    @_inlined
    def tanh_of(number: Any) -> Any:
        """With e = exp(2x) and m = e - 1, m / (m + 2) and the derivative 4 e / (m + 2)**2 lose no bits."""
        x = T(number)
        q, p = _expm1_parts(_between(x + x, -flat, flat))
        p = p + p
        m = q * p + (p - one)
        part = one / (m + two)
        return m * part, four * ((q * p + p) * part) * part

    return exp_of, tanh_of


def _is_real(x: Any) -> bool:
    return isinstance(x, (types.Integer, types.Float))


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(x, (types.Number, types.Boolean)) for x in values)


def where(condition: Any, x: Any, y: Any) -> Any:
    """np.where of numbers."""


@overload(where)
def _where(condition: Any, x: Any, y: Any) -> Any:
    def implementation(condition: Any, x: Any, y: Any) -> Any:
        return x if condition else y

    return implementation if _are_numbers(condition, x, y) else None


def clip(x: Any, low: Any, high: Any) -> Any:
    """np.clip of numbers."""


@overload(clip)
def _clip(x: Any, low: Any, high: Any) -> Any:
    def implementation(x: Any, low: Any, high: Any) -> Any:
        return np.minimum(np.maximum(x, low), high)

    return implementation if _are_numbers(x, low, high) else None


def _pair(real: Any, with_slope: Any) -> tuple[Any, Any]:
    """A function of NumPy's, of real and complex numbers, and its like in math, which has no complex ones."""

    def of_numbers(x: Any) -> Any:
        """What Numba knows this function by."""

    def of_reals(x: Any) -> Any:
        """What Numba knows this function by."""

    @overload(of_reals)
    def _of_reals(x: Any) -> Any:
        def implementation(x: Any) -> Any:
            return real(x)

        return implementation if _is_real(x) else None

    @overload(of_numbers)
    def _of_numbers(x: Any) -> Any:
        def implementation(x: Any) -> Any:
            y, slope = with_slope(x.real)
            return complex(y, slope * x.imag)

        return implementation if isinstance(x, types.Complex) else _of_reals(x)

    return of_numbers, of_reals


def _with(module: ModuleType, functions: dict[Any, Any]) -> ModuleType:
    """A module like `module` with some functions exchanged; Numba looks names up in whatever module it is given."""
    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module))
    vars(copy).update({old.__name__: new for old, new in functions.items()})
    return copy


@cache
def exchanged(dtype: np.dtype) -> tuple[dict[ModuleType, ModuleType], dict[Any, Any]]:
    """What stands in the place of the modules and the functions that a user's code names, for scores of `dtype`."""
    exp_of, tanh_of = _functions(dtype.type)

    @_inlined
    def exp_twice(x: Any) -> Any:
        y = exp_of(x)
        return y, y

    @_inlined
    def tanh_alone(x: Any) -> Any:
        return tanh_of(x)[0]

    (exp, real_exp), (tanh, real_tanh) = _pair(exp_of, exp_twice), _pair(tanh_alone, tanh_of)
    of_numpy = {np.exp: exp, np.tanh: tanh, np.where: where, np.clip: clip}
    of_math = {math.exp: real_exp, math.tanh: real_tanh}
    return {np: _with(np, of_numpy), math: _with(math, of_math)}, of_numpy | of_math
