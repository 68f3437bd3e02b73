"""Tensors in NumPy's calls: ufuncs by our ops, comparisons, and all other functions on plain arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer.autograd.base import TensorBase
from minitransformer.errors import DTypeError, ShapeError

UFUNCS = {
    **{name: name for name in ("add", "subtract", "multiply", "divide", "power", "matmul", "maximum")},
    **{name: name for name in ("minimum", "exp", "log", "sqrt", "tanh", "absolute", "sin", "cos")},
    "equal": "eq",
    "not_equal": "ne",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
}
_SHAPED_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like"}  # read the shape alone


def compare(name: str, a: Any, b: Any) -> Any:
    """The operator `name` on arrays and numbers."""
    op = name.strip("_")
    if a is None or b is None:
        raise DTypeError(op, "an operand is None, expected arrays or numbers", "Compare objects with `is`")
    try:
        with np.errstate(over="ignore"):  # a number beyond float32 compares as infinity
            return getattr(operator, name)(a, b)
    except ValueError:
        raise ShapeError(
            op,
            f"shapes {np.shape(a)} and {np.shape(b)} do not broadcast",
            "Compared from the right, sizes must be equal or 1",
        ) from None
    except (TypeError, OverflowError):  # of & | ^ for numbers that are no integers, or too large beside the array
        kinds = " and ".join(str(getattr(x, "dtype", type(x).__name__)) for x in (a, b))
        raise DTypeError(op, f"cannot be taken of {kinds}", "Use it on bools, the results of comparisons") from None


def call_on_arrays(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`function` of the plain arrays; `DTypeError` where that would lose a gradient without a word."""
    tensors: list[TensorBase] = []
    try:
        plain_args, plain_kwargs = _plain(args, tensors), _plain(kwargs, tensors)
    except RecursionError:
        problem = "an argument is a list that holds itself"
        raise ShapeError(f"numpy.{function.__name__}", problem, "Pass arrays or Tensors") from None
    result = function(*plain_args, **plain_kwargs)
    name, parts = function.__name__, result if isinstance(result, (tuple, list)) else (result,)
    tracked = any(t._requires_grad for t in tensors) and name not in _SHAPED_LIKE
    if tracked and any(isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "fc" for x in parts):
        raise DTypeError(
            f"numpy.{name}",
            "a Tensor that requires a gradient would lose it in this call",
            "Use the Tensor's own operations or mt.concat, mt.stack, mt.where; or t.detach() for plain numbers",
        )
    return result


def _plain(value: Any, tensors: list[TensorBase]) -> Any:
    """`value` with arrays for the Tensors in it, which are added to `tensors`."""
    if isinstance(value, TensorBase):
        tensors.append(value)
        return value._data
    if isinstance(value, dict):
        return {key: _plain(item, tensors) for key, item in value.items()}
    return type(value)(_plain(item, tensors) for item in value) if type(value) in (tuple, list) else value
