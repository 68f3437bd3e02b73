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

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import models, overload, register_model

__all__ = [
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

intrinsic: Any = extending.intrinsic  # untyped: what it makes has other arguments than what it is given

_INT = ir.IntType(32)


def register_bits() -> int:
    """The width of the vector registers of this processor: 512 with AVX-512, 256 with AVX, else 128 (SSE, NEON)."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return 512 if "+avx512f" in features else 256 if "+avx" in features else 128


REGISTER_BITS = register_bits()


class Vector(types.Type):
    """The Numba type of a register of `count` numbers of type `scalar`."""

    def __init__(self, scalar: Any) -> None:
        self.scalar, self.count = scalar, REGISTER_BITS // scalar.bitwidth
        super().__init__(name=f"vector({scalar}, {self.count})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        scalar = manager.lookup(vector.scalar).get_value_type()
        super().__init__(manager, vector, ir.VectorType(scalar, vector.count))


def _suffix(vector: Vector) -> str:
    return f"v{vector.count}f{vector.scalar.bitwidth}"


def _constant(vt: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vt, [ir.Constant(vt.element, value)] * vt.count)


def _spread(builder: Any, vt: ir.VectorType, scalar: Any) -> Any:
    """A register with `scalar` in every lane."""
    undefined = ir.Constant(vt, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, vt.count), [0] * vt.count))


def _call(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    """A call of one of LLVM's own functions."""
    function = ir.FunctionType(result, [x.type for x in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


# --- memory ----------------------------------------------------------------------------------------------


def _address(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array)(context, builder, value).data, [index])


def _first(builder: Any, vt: ir.VectorType, count: Any) -> Any:
    """Which lanes are among the first `count`, as LLVM's masked loads and stores want it."""
    index = ir.VectorType(ir.IntType(64), vt.count)
    numbers = ir.Constant(index, list(range(vt.count)))
    return builder.icmp_signed("<", numbers, _spread(builder, index, count))


def _is_flat(array: Any) -> bool:
    return isinstance(array, types.Array) and array.layout == "C" and array.dtype in (types.float32, types.float64)


@intrinsic
def lanes(typingctx: Any, array: Any) -> Any:
    """How many numbers of `array`'s dtype a register holds: a constant of the compiled code."""
    count = Vector(array.dtype).count
    return types.intp(array), lambda context, builder, sig, args: context.get_constant(types.intp, count)


@intrinsic
def load(typingctx: Any, array: Any, i: Any) -> Any:
    """array[i], array[i + 1], ... as a register."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(vector)
        address = builder.bitcast(_address(context, builder, array, *args), vt.as_pointer())
        return builder.load(address, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), emit


@intrinsic
def load_some(typingctx: Any, array: Any, i: Any, n: Any) -> Any:
    """The first `n` lanes as `load` has them, and 0 in the others, whose memory is not touched."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(vector)
        address = builder.bitcast(_address(context, builder, array, args[0], args[1]), vt.as_pointer())
        align = _INT(array.dtype.bitwidth // 8)
        given = [address, align, _first(builder, vt, args[2]), _constant(vt, 0.0)]
        return _call(builder, f"llvm.masked.load.{_suffix(vector)}.p0{_suffix(vector)}", vt, given)

    return vector(array, types.intp, types.intp), emit


@intrinsic
def store(typingctx: Any, array: Any, i: Any, x: Any) -> Any:
    """Write the lanes of `x` to array[i], array[i + 1], ..."""
    if not _is_flat(array) or x != Vector(array.dtype):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(x)
        address = builder.bitcast(_address(context, builder, array, args[0], args[1]), vt.as_pointer())
        builder.store(args[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, x), emit


@intrinsic
def store_some(typingctx: Any, array: Any, i: Any, n: Any, x: Any) -> Any:
    """Write the first `n` lanes of `x`, and touch no memory behind them."""
    if not _is_flat(array) or x != Vector(array.dtype):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vt = context.get_value_type(x)
        address = builder.bitcast(_address(context, builder, array, args[0], args[1]), vt.as_pointer())
        given = [args[3], address, _INT(array.dtype.bitwidth // 8), _first(builder, vt, args[2])]
        _call(builder, f"llvm.masked.store.{_suffix(x)}.p0{_suffix(x)}", ir.VoidType(), given)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, x), emit


@intrinsic
def broadcast(typingctx: Any, array: Any, i: Any) -> Any:
    """array[i] in every lane."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _spread(builder, context.get_value_type(vector), builder.load(_address(context, builder, array, *args)))

    return vector(array, types.intp), emit


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """The number `x`, of type float32 or float64, in every lane."""
    if x not in (types.float32, types.float64):
        return None
    vector = Vector(x)
    return vector(x), lambda context, builder, sig, args: _spread(builder, context.get_value_type(vector), args[0])


@intrinsic
def zeros(typingctx: Any, array: Any) -> Any:
    """A register of zeros of `array`'s dtype."""
    vector = Vector(array.dtype)
    return vector(array), lambda context, builder, sig, args: _constant(context.get_value_type(vector), 0.0)


@njit
def load_up_to(array: Any, i: Any, n: Any) -> Any:
    """`load`, or `load_some` where fewer than a register are left: n numbers. One loop then does for any length."""
    return load(array, i) if n >= lanes(array) else load_some(array, i, n)


@njit
def store_up_to(array: Any, i: Any, n: Any, x: Any) -> Any:
    """`store`, or `store_some` where fewer than a register are left: n numbers."""
    if n >= lanes(array):
        store(array, i, x)
    else:
        store_some(array, i, n, x)


@intrinsic
def constant(typingctx: Any, like: Any, value: Any) -> Any:
    """The float64 `value`, rounded to the dtype of the array or register `like`, in every lane."""
    vector = Vector(like.dtype) if isinstance(like, types.Array) else like
    if not isinstance(vector, Vector) or value != types.float64:
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = context.cast(builder, args[1], types.float64, vector.scalar)
        return _spread(builder, context.get_value_type(vector), scalar)

    return vector(like, value), emit


@intrinsic
def first_lanes(typingctx: Any, n: Any, x: Any, y: Any) -> Any:
    """The first `n` lanes of x, and those of y in the others."""
    if not (isinstance(x, Vector) and x == y):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_first(builder, context.get_value_type(x), args[0]), args[1], args[2])

    return x(types.intp, x, x), emit


# --- arithmetic ------------------------------------------------------------------------------------------


def _operation(symbol: Any, emit: Callable[..., Any]) -> None:
    """Teach Numba the operator `symbol` between two registers of one type."""

    def typed(typingctx: Any, a: Any, b: Any) -> Any:
        return a(a, a), lambda context, builder, sig, args: emit(builder, *args)

    function: Any = intrinsic(typed)

    @overload(symbol)
    def operate(a: Any, b: Any) -> Any:
        def implementation(a: Any, b: Any) -> Any:  # Numba wants the very signature of `operate`
            return function(a, b)

        return implementation if isinstance(a, Vector) and a == b else None


_operation(operator.add, lambda builder, a, b: builder.fadd(a, b))
_operation(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_operation(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_operation(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    if not (isinstance(a, Vector) and a == b == c):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fma.{_suffix(a)}", context.get_value_type(a), args)

    return a(a, a, a), emit


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """a without its sign."""
    if not isinstance(a, Vector):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, f"llvm.fabs.{_suffix(a)}", context.get_value_type(a), args)

    return a(a), emit


@intrinsic
def select_less(typingctx: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x where a < b, else y; y where a or b is NaN."""
    if not (isinstance(a, Vector) and a == b and x == y):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return x(a, a, x, x), emit


def _extreme(sign: str) -> Callable[..., Any]:
    """The larger or smaller of two; of NaN and a number, NaN."""

    def emit(builder: Any, a: Any, b: Any) -> Any:
        keep = builder.fcmp_unordered(sign, a, b)  # true also where one is NaN
        nan = builder.fcmp_unordered("uno", b, b)
        return builder.select(nan, b, builder.select(keep, a, b))

    return emit


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of the two; NaN if either is."""
    return a(a, a), lambda context, builder, sig, args: _extreme(">")(builder, *args)


@intrinsic
def minimum(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller of the two; NaN if either is."""
    return a(a, a), lambda context, builder, sig, args: _extreme("<")(builder, *args)


def _across(combine: Callable[..., Any]) -> Any:
    """All lanes into one number, halves upon halves: the order depends on the width of the register alone."""

    @intrinsic
    def function(typingctx: Any, a: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, half = args[0], a.count
            while half > 1:
                half //= 2
                order = [lane + half if lane < half else lane for lane in range(a.count)]
                order = ir.Constant(ir.VectorType(_INT, a.count), order)
                x = combine(builder, x, builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), order))
            return builder.extract_element(x, _INT(0))

        return a.scalar(a), emit

    return function


sum_lanes = _across(lambda builder, a, b: builder.fadd(a, b))
max_lanes = _across(lambda builder, a, b: _extreme(">")(builder, a, b))


# --- functions -------------------------------------------------------------------------------------------
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
        self.builder, self.vt, self.bits, self.suffix = builder, vt, vector.scalar.bitwidth, _suffix(vector)

    def constant(self, value: float) -> Any:
        return _constant(self.vt, value)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return _call(self.builder, f"llvm.fma.{self.suffix}", self.vt, (a, b, c))

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
            p = code.fma(p, args[0], _spread(builder, code.vt, scalar))
        return p

    return x(x, for32, for64), emit
