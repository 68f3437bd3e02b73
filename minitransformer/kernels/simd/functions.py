"""Functions of registers: series on intervals so short that few terms are exact to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from minitransformer.kernels.simd.registers import (
    Vector,
    call,
    filled,
    intrinsic,
    spread,
    suffix,
)

# exp(x) = 2**n exp(r) with x = n log(2) + r and |r| <= log(2) / 2, where a few terms of the series are exact to
# rounding. The others follow from it.

_TERMS = {32: 7, 64: 13}  # of the series: the next one is below half a unit in the last place
_LOWEST = {32: -86.0, 64: -707.0}  # exp of less is 0: below, numbers soon have fewer bits
_HIGHEST = {32: 88.72283935546875, 64: 709.782712893384}  # exp of more is infinite
_LOG2 = {32: (0.693147182464599609375, -1.904654299957768e-9), 64: (math.log(2), 2.3190468138462996e-17)}  # and rest
_ODD_TERMS = {32: 11, 64: 23}  # of artanh's series: the power of the last
_EXPONENT = {32: (23, 127), 64: (52, 1023)}  # how many bits the exponent is to be shifted by, and its bias


class _Code:
    """Writes the instructions of a function of registers of one type."""

    def __init__(self, builder: Any, vector: Vector, vt: ir.VectorType) -> None:
        self.builder, self.vt, self.bits, self.suffix = builder, vt, vector.scalar.bitwidth, suffix(vector)

    def constant(self, value: float) -> Any:
        return filled(self.vt, value)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return call(self.builder, f"llvm.fma.{self.suffix}", self.vt, (a, b, c))

    def clip(self, x: Any, low: float, high: float) -> Any:
        for sign, bound in (("<", low), (">", high)):
            limit = self.constant(bound)
            x = self.builder.select(self.builder.fcmp_ordered(sign, x, limit), limit, x)
        return x

    def expm1(self, x: Any, below: int) -> tuple[Any, Any]:
        """q and 2**(n - below) with exp(x) = 2**n (1 + q)."""
        shift, bias = _EXPONENT[self.bits]
        integers = ir.VectorType(ir.IntType(self.bits), self.vt.count)
        # Beside a number this large there is no room for a fraction: adding it rounds to whole numbers, which then
        # are the last bits of the sum, with the bias that makes an exponent of them.
        large = self.constant(1.5 * 2**shift + bias - below)
        sum_ = self.fma(x, self.constant(1 / math.log(2)), large)
        n = self.builder.fsub(sum_, large)
        r = x
        for part in _LOG2[self.bits]:
            r = self.fma(n, self.constant(-part), r)
        p = self.constant(1 / math.factorial(_TERMS[self.bits]))
        for k in range(_TERMS[self.bits] - 1, 1, -1):
            p = self.fma(p, r, self.constant(1 / math.factorial(k)))
        q = self.fma(self.builder.fmul(p, r), r, r)
        bits = self.builder.bitcast(sum_, integers)
        exponent = self.builder.shl(bits, ir.Constant(integers, [shift] * self.vt.count))
        return q, self.builder.bitcast(exponent, self.vt)

    def exp(self, x: Any) -> Any:
        low, high = _LOWEST[self.bits], _HIGHEST[self.bits]
        q, half = self.expm1(self.clip(x, low, high), 1)  # half, because 2**n itself may be too large for a float
        y = self.fma(q, half, half)
        y = self.builder.fadd(y, y)
        y = self.builder.select(self.builder.fcmp_ordered("<", x, self.constant(low)), self.constant(0.0), y)
        beyond = self.builder.fcmp_ordered(">", x, self.constant(high))
        return self.builder.select(beyond, self.constant(math.inf), y)

    def exp_low(self, x: Any) -> Any:
        """With no regard to what is too large."""
        below = self.builder.fcmp_ordered("<", x, self.constant(_LOWEST[self.bits]))
        q, power = self.expm1(x, 0)
        return self.builder.select(below, self.constant(0.0), self.fma(q, power, power))

    def log(self, x: Any) -> Any:
        """With x = 2**n m and m from sqrt(1/2) to sqrt(2), n log(2) + 2 artanh(r), r = (m - 1) / (m + 1)."""
        shift, bias = _EXPONENT[self.bits]
        integers, builder = ir.VectorType(ir.IntType(self.bits), self.vt.count), self.builder

        def whole(value: int) -> Any:
            return ir.Constant(integers, [value] * self.vt.count)

        # Numbers below the normal ones are scaled up, by an even power of 2 so that nothing is rounded.
        tiny = builder.fcmp_ordered("<", x, self.constant(2.0 ** (1 - bias)))
        normal = builder.select(tiny, builder.fmul(x, self.constant(2.0 ** (shift + 1))), x)
        bits = builder.bitcast(normal, integers)
        root = int(np.array(math.sqrt(0.5), f"f{self.bits // 8}").view(f"i{self.bits // 8}"))
        n = builder.ashr(builder.sub(bits, whole(root)), whole(shift))
        m = builder.bitcast(builder.sub(bits, builder.shl(n, whole(shift))), self.vt)
        one = self.constant(1.0)
        r = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
        square, p = builder.fmul(r, r), self.constant(0.0)
        for k in range(_ODD_TERMS[self.bits], 1, -2):
            p = self.fma(p, square, self.constant(2 / k))
        n = builder.sitofp(n, self.vt)
        n = builder.fsub(n, builder.select(tiny, self.constant(shift + 1), self.constant(0.0)))
        high, low = _LOG2[self.bits]
        double = builder.fadd(r, r)
        rest = self.fma(n, self.constant(low), builder.fmul(builder.fmul(p, square), r))
        y = self.fma(n, self.constant(high), builder.fadd(double, rest))
        infinity = self.constant(math.inf)
        y = builder.select(builder.fcmp_unordered("<", x, infinity), y, x)  # infinity stays
        y = builder.select(builder.fcmp_ordered("==", x, self.constant(0.0)), self.constant(-math.inf), y)
        nan = builder.fcmp_unordered("<", x, self.constant(0.0))  # NaN stays too
        return builder.select(nan, self.constant(math.nan), y)

    def sigmoid(self, x: Any) -> Any:
        one = self.constant(1.0)
        return self.builder.fdiv(one, self.builder.fadd(one, self.exp(self.builder.fsub(self.constant(-0.0), x))))

    def tanh(self, x: Any) -> Any:
        """With m = exp(2x) - 1, m / (m + 2): no bits are lost near 0."""
        q, power = self.expm1(self.clip(self.builder.fadd(x, x), -44.0, 44.0), 0)
        m = self.fma(q, power, self.builder.fsub(power, self.constant(1.0)))
        return self.builder.fdiv(m, self.builder.fadd(m, self.constant(2.0)))


def _function(emit: Callable[[_Code, Any], Any]) -> Any:
    @intrinsic
    def function(typingctx: Any, x: Any) -> Any:
        if not isinstance(x, Vector):
            return None

        def emit_all(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return emit(_Code(builder, x, context.get_value_type(x)), args[0])

        return x(x), emit_all

    return function


exp = _function(_Code.exp)
exp_low = _function(_Code.exp_low)  # exp where nothing is so large that exp overflows, as in a softmax: faster
log = _function(_Code.log)
sigmoid = _function(_Code.sigmoid)
tanh = _function(_Code.tanh)


@intrinsic
def polynomial(typingctx: Any, x: Any, for32: Any, for64: Any) -> Any:
    """terms[0] + terms[1] x + terms[2] x**2 + ...: `for32` are the terms for float32, `for64` those for float64."""
    if not isinstance(x, Vector) or not all(isinstance(t, types.UniTuple) for t in (for32, for64)):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        code = _Code(builder, x, context.get_value_type(x))
        terms = cgutils.unpack_tuple(builder, args[1 if code.bits == 32 else 2])
        p = code.constant(0.0)
        for term in reversed(terms):
            scalar = context.cast(builder, term, types.float64, x.scalar)
            p = code.fma(p, args[0], spread(builder, code.vt, scalar))
        return p

    return x(x, for32, for64), emit
