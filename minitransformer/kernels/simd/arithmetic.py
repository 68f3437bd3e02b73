"""Arithmetic of registers, lane by lane and across lanes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.extending import overload

from minitransformer.kernels.simd.registers import (
    INDEX,
    Vector,
    call,
    intrinsic,
    suffix,
)


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
        return call(builder, f"llvm.fma.{suffix(a)}", context.get_value_type(a), args)

    return a(a, a, a), emit


@intrinsic
def absolute(typingctx: Any, a: Any) -> Any:
    """a without its sign."""
    if not isinstance(a, Vector):
        return None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, f"llvm.fabs.{suffix(a)}", context.get_value_type(a), args)

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
                order = ir.Constant(ir.VectorType(INDEX, a.count), order)
                x = combine(builder, x, builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), order))
            return builder.extract_element(x, INDEX(0))

        return a.scalar(a), emit

    return function


sum_lanes = _across(lambda builder, a, b: builder.fadd(a, b))
max_lanes = _across(lambda builder, a, b: _extreme(">")(builder, a, b))
