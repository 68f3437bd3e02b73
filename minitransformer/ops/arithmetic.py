"""Elementwise arithmetic with NumPy broadcasting.

Every function is complex-clean: comparisons look at the real part and no `abs` is taken, so that a
complex step through forward gives the derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minitransformer.autograd import register
from minitransformer.errors import ShapeError


class Pair(NamedTuple):
    """Two operands, each an array or a Python number."""

    a: Any
    b: Any


class Unary(NamedTuple):
    x: np.ndarray


class Output(NamedTuple):
    out: np.ndarray


class Cast(NamedTuple):
    dtype: np.dtype


def sum_to(gradient: np.ndarray, operand: Any) -> np.ndarray | None:
    """`gradient` summed over the axes along which `operand` was broadcast; never a view of it.

    None for a Python number, which has no gradient.
    """
    if not isinstance(operand, np.ndarray):
        return None
    if gradient.shape == operand.shape:
        return gradient.copy()
    extra = gradient.ndim - operand.ndim
    axes = tuple(range(extra)) + tuple(
        axis + extra for axis, size in enumerate(operand.shape) if size == 1 and gradient.shape[axis + extra] != 1
    )
    return gradient.sum(axis=axes).reshape(operand.shape)


def _broadcast(op: str, function: np.ufunc, a: Any, b: Any) -> np.ndarray:
    try:
        return function(a, b)
    except ValueError:
        raise ShapeError(
            op,
            f"shapes {np.shape(a)} and {np.shape(b)} do not broadcast",
            "Compared from the right, sizes must be equal or 1: reshape or transpose one side",
        ) from None


def add_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    return _broadcast("add", np.add, a, b), Pair(a, b)


def add_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    return sum_to(dout, saved.a), sum_to(dout, saved.b)


def subtract_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    return _broadcast("subtract", np.subtract, a, b), Pair(a, b)


def subtract_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    return sum_to(dout, saved.a), sum_to(-dout, saved.b)


def multiply_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    return _broadcast("multiply", np.multiply, a, b), Pair(a, b)


def multiply_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b = saved
    return (
        sum_to(dout * b, a) if isinstance(a, np.ndarray) else None,
        sum_to(dout * a, b) if isinstance(b, np.ndarray) else None,
    )


def divide_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    return _broadcast("divide", np.divide, a, b), Pair(a, b)


def divide_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b = saved
    da = dout / b
    return (
        sum_to(da, a),
        sum_to(-da * a / b, b) if isinstance(b, np.ndarray) else None,
    )


def power_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """`a ** b`. With an integer number `b`, also for negative `a`; an array `b` wants positive `a`."""
    if isinstance(a, np.ndarray) and a.dtype.kind in "iub" and np.any(np.real(b) < 0):
        a = a.astype(np.float32)  # NumPy refuses integers to negative integer powers
    return _broadcast("power", np.power, a, b), Pair(a, b)


def power_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b = saved
    # d(a^b)/da is 0 where b is 0, also at a = 0, where b * a^(b-1) would be 0 * inf
    da = dout * np.where(np.equal(b, 0), 0, b * np.power(a, np.where(np.equal(b, 0), 1, b) - 1))
    # and d(a^b)/db is 0 at a = 0, where the limit of a^b log(a) is 0 for b > 0
    zero = np.equal(a, 0)
    db = dout * np.where(zero, 0, np.power(a, b) * np.log(np.where(zero, 1, a)))
    return sum_to(da, a), sum_to(db, b)


def exp_forward(x: np.ndarray) -> tuple[np.ndarray, Output]:
    out = np.exp(x)
    return out, Output(out)


def exp_backward(dout: np.ndarray, saved: Output) -> tuple[np.ndarray]:
    return (dout * saved.out,)


def log_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    return np.log(x), Unary(x)


def log_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (dout / saved.x,)


def sqrt_forward(x: np.ndarray) -> tuple[np.ndarray, Output]:
    out = np.sqrt(x)
    return out, Output(out)


def sqrt_backward(dout: np.ndarray, saved: Output) -> tuple[np.ndarray]:
    return (dout / (2 * saved.out),)


def sin_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    return np.sin(x), Unary(x)


def sin_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (dout * np.cos(saved.x),)


def cos_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    return np.cos(x), Unary(x)


def cos_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (-dout * np.sin(saved.x),)


def absolute_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    return np.where(x.real < 0, -x, x), Unary(x)


def absolute_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (dout * np.sign(saved.x.real),)


def _share(mine: Any, other: Any) -> Any:
    """1 where mine is larger, 1/2 at a tie, 0 elsewhere: the slope of the maximum."""
    return (np.greater(mine, other) + np.greater_equal(mine, other)) / 2


def maximum_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """The larger of each pair; NaN where either is NaN. A tie shares the gradient equally."""
    return _broadcast("maximum", np.maximum, a, b), Pair(a, b)


def maximum_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b = saved
    return (
        sum_to((dout * _share(a, b)).astype(dout.dtype), a),
        sum_to((dout * _share(b, a)).astype(dout.dtype), b),
    )


def minimum_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """The smaller of each pair; NaN where either is NaN. A tie shares the gradient equally."""
    return _broadcast("minimum", np.minimum, a, b), Pair(a, b)


def minimum_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b = saved
    return (
        sum_to((dout * _share(b, a)).astype(dout.dtype), a),
        sum_to((dout * _share(a, b)).astype(dout.dtype), b),
    )


def cast_forward(x: np.ndarray, *, dtype: np.dtype) -> tuple[np.ndarray, Cast]:
    """`x` in another dtype; the gradient comes back in the dtype of `x`."""
    return x.astype(dtype), Cast(x.dtype)


def cast_backward(dout: np.ndarray, saved: Cast) -> tuple[np.ndarray]:
    return (dout.astype(saved.dtype),)


register("add", add_forward, add_backward)
register("subtract", subtract_forward, subtract_backward)
register("multiply", multiply_forward, multiply_backward)
register("divide", divide_forward, divide_backward)
register("power", power_forward, power_backward)
register("exp", exp_forward, exp_backward)
register("log", log_forward, log_backward)
register("sqrt", sqrt_forward, sqrt_backward)
register("sin", sin_forward, sin_backward)
register("cos", cos_forward, cos_backward)
register("absolute", absolute_forward, absolute_backward)
register("maximum", maximum_forward, maximum_backward)
register("minimum", minimum_forward, minimum_backward)
register("cast", cast_forward, cast_backward)
