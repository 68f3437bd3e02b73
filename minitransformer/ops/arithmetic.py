"""Elementwise arithmetic with NumPy broadcasting.

Every function is complex-clean: comparisons look at the real part and no `abs` is taken, so that a
complex step through forward gives the derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minitransformer.autograd import cast, check_arrays, register
from minitransformer.errors import DTypeError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import check_device, device_of, move, plain


class Shapes(NamedTuple):
    """Of two operands; None for a Python number, which has no gradient."""

    a: tuple[int, ...] | None
    b: tuple[int, ...] | None


class Pair(NamedTuple):
    """Two operands, each an array or a Python number, and their shapes."""

    a: Any
    b: Any
    shapes: Shapes


class Unary(NamedTuple):
    x: np.ndarray


class Output(NamedTuple):
    out: np.ndarray


class Cast(NamedTuple):
    dtype: np.dtype


class Moved(NamedTuple):
    device: str


def shapes_of(a: Any, b: Any) -> Shapes:
    return Shapes(*(getattr(x, "shape", None) for x in (a, b)))


def sum_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`gradient` summed over the axes along which an operand of `shape` was broadcast; never a view."""
    if gradient.shape == shape:
        return gradient.copy()
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        axis + extra for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis + extra] != 1
    )
    return gradient.sum(axis=axes).reshape(shape)


def check_operands(op: str, a: Any, b: Any) -> None:
    """`DTypeError` for None, which an op with optional inputs may be given but arithmetic may not."""
    if a is None or b is None:
        raise DTypeError(op, "an operand is None, expected arrays or numbers", "Pass 0 or 1 for nothing")


def _broadcast(op: str, function: np.ufunc, a: Any, b: Any) -> np.ndarray:
    check_operands(op, a, b)
    try:
        return function(a, b)
    except TypeError:
        kinds = " and ".join(str(getattr(x, "dtype", type(x).__name__)) for x in (a, b))
        raise DTypeError(op, f"cannot be taken of {kinds}", "Convert bools first: t.to('float32')") from None
    except OverflowError:
        raise RangeError(op, "a number does not fit the dtype of the array beside it", "Use a smaller one") from None
    except ValueError:
        raise ShapeError(
            op,
            f"shapes {np.shape(a)} and {np.shape(b)} do not broadcast",
            "Compared from the right, sizes must be equal or 1: reshape or transpose one side",
        ) from None


def add_forward(a: Any, b: Any) -> tuple[np.ndarray, Shapes]:
    return _broadcast("add", np.add, a, b), shapes_of(a, b)


def add_backward(dout: np.ndarray, saved: Shapes) -> tuple[np.ndarray | None, ...]:
    return tuple(None if shape is None else sum_to(dout, shape) for shape in saved)


def subtract_forward(a: Any, b: Any) -> tuple[np.ndarray, Shapes]:
    return _broadcast("subtract", np.subtract, a, b), shapes_of(a, b)


def subtract_backward(dout: np.ndarray, saved: Shapes) -> tuple[np.ndarray | None, ...]:
    return (
        None if saved.a is None else sum_to(dout, saved.a),
        None if saved.b is None else sum_to(-dout, saved.b),
    )


def multiply_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """a * b; each operand is kept only for the gradient of the other."""
    shapes = shapes_of(a, b)
    out = _broadcast("multiply", np.multiply, a, b)
    return out, Pair(None if shapes.b is None else a, None if shapes.a is None else b, shapes)


def multiply_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b, shapes = saved
    return (
        None if shapes.a is None else sum_to(dout * b, shapes.a),
        None if shapes.b is None else sum_to(dout * a, shapes.b),
    )


def divide_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """a / b; `a` is kept only for the gradient of `b`."""
    shapes = shapes_of(a, b)
    return _broadcast("divide", np.divide, a, b), Pair(None if shapes.b is None else a, b, shapes)


def divide_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b, shapes = saved
    da = dout / b
    return (
        None if shapes.a is None else sum_to(da, shapes.a),
        None if shapes.b is None else sum_to(-da * a / b, shapes.b),
    )


def power_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """`a ** b`. With an integer number `b`, also for negative `a`; an array `b` wants positive `a`."""
    check_operands("power", a, b)
    if np.result_type(a, b).kind in "iub" and np.any(np.less(b, 0)):
        a = plain(a, np.float32)  # NumPy refuses integers to negative integer powers
    return _broadcast("power", np.power, a, b), Pair(a, b, shapes_of(a, b))


def power_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b, shapes = saved
    da = db = None
    if shapes.a is not None:
        # 0 where b is 0, also at a = 0, where b * a^(b-1) would be 0 * inf
        slope = np.where(np.equal(b, 0), 0, b * np.power(a, b - 1))
        da = sum_to(dout * slope, shapes.a)
    if shapes.b is not None:
        # 0 at a = 0, where the limit of a^b log(a) is 0 for b > 0
        slope = np.where(np.equal(a, 0), 0, np.power(a, b) * np.log(a, dtype=dout.dtype))
        db = sum_to(dout * slope, shapes.b)
    return da, db


def _as_float(op: str, x: np.ndarray) -> np.ndarray:
    """Integers as float32, where NumPy would make some of them float16."""
    check_arrays(op, x=x)
    return x.astype(np.float32) if x.dtype.kind in "biu" else x


def exp_forward(x: np.ndarray) -> tuple[np.ndarray, Output]:
    out = np.exp(_as_float("exp", x))
    return out, Output(out)


def exp_backward(dout: np.ndarray, saved: Output) -> tuple[np.ndarray]:
    return (dout * saved.out,)


def log_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    x = _as_float("log", x)
    return np.log(x), Unary(x)


def log_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (dout / saved.x,)


def sqrt_forward(x: np.ndarray) -> tuple[np.ndarray, Output]:
    out = np.sqrt(_as_float("sqrt", x))
    return out, Output(out)


def sqrt_backward(dout: np.ndarray, saved: Output) -> tuple[np.ndarray]:
    return (dout / (2 * saved.out),)


def sin_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    x = _as_float("sin", x)
    return np.sin(x), Unary(x)


def sin_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (dout * np.cos(saved.x),)


def cos_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    x = _as_float("cos", x)
    return np.cos(x), Unary(x)


def cos_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (-dout * np.sin(saved.x),)


def absolute_forward(x: np.ndarray) -> tuple[np.ndarray, Unary]:
    return (x.copy() if x.dtype.kind in "bu" else np.where(x.real < 0, -x, x)), Unary(x)


def absolute_backward(dout: np.ndarray, saved: Unary) -> tuple[np.ndarray]:
    return (dout * np.sign(saved.x.real),)


def _share(mine: Any, other: Any) -> Any:
    """1 where mine is larger, 1/2 at a tie, 0 elsewhere: the slope of the maximum."""
    return np.add(np.greater(mine, other), np.greater_equal(mine, other), dtype=np.float32) / 2


def maximum_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """The larger of each pair; NaN where either is NaN. A tie shares the gradient equally."""
    return _broadcast("maximum", np.maximum, a, b), Pair(a, b, shapes_of(a, b))


def maximum_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b, shapes = saved
    return (
        None if shapes.a is None else sum_to(dout * _share(a, b), shapes.a),
        None if shapes.b is None else sum_to(dout * _share(b, a), shapes.b),
    )


def minimum_forward(a: Any, b: Any) -> tuple[np.ndarray, Pair]:
    """The smaller of each pair; NaN where either is NaN. A tie shares the gradient equally."""
    return _broadcast("minimum", np.minimum, a, b), Pair(a, b, shapes_of(a, b))


def minimum_backward(dout: np.ndarray, saved: Pair) -> tuple[np.ndarray | None, ...]:
    a, b, shapes = saved
    return (
        None if shapes.a is None else sum_to(dout * _share(b, a), shapes.a),
        None if shapes.b is None else sum_to(dout * _share(a, b), shapes.b),
    )


def cast_forward(x: np.ndarray, *, dtype: np.dtype) -> tuple[np.ndarray, Cast]:
    """`x` in another dtype; the gradient comes back in the dtype of `x`."""
    return cast("to", x, dtype), Cast(x.dtype)


def cast_backward(dout: np.ndarray, saved: Cast) -> tuple[np.ndarray]:
    return ((dout if saved.dtype.kind == "c" else dout.real).astype(saved.dtype),)


def move_forward(x: np.ndarray, *, device: str) -> tuple[np.ndarray, Moved]:
    """`x` on another device; the gradient comes back to where `x` is."""
    check_arrays("move", x=x)
    out = move(x, check_device("move", device))
    return (x.copy() if out is x else out), Moved(device_of(x))


def move_backward(dout: np.ndarray, saved: Moved) -> tuple[np.ndarray]:
    dx = move(dout, saved.device)
    return (dout.copy() if dx is dout else dx,)


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
register("move", move_forward, move_backward)
