"""Indices as NumPy takes them, and writes through them."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.autograd.base import as_array, check_same_device
from minitransformer.errors import DTypeError, GradientError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import device_of, is_writable, plain

_KINDS = "buifc"  # of dtypes, each of which fits into those behind it


def plain_index(op: str, index: Any) -> Any:
    """`index` with arrays for Tensors and lists. Copies, because a static argument has no version to look at."""
    if isinstance(index, tuple):
        return tuple(plain_index(op, i) for i in index)
    if isinstance(index, (list, range)):
        array = as_array(op, list(index))
        return array if array.size else array.astype(np.intp)  # `t[[]]` is no index of floats
    return as_array(op, index).copy() if hasattr(index, "__array__") and not isinstance(index, np.generic) else index


def refused_index(op: str, shape: tuple[int, ...], error: Exception) -> RangeError:
    return RangeError(op, f"the index does not fit shape {shape} ({error})", "Check the index against t.shape")


def check_writable(op: str, array: np.ndarray) -> None:
    if not is_writable(array):
        raise GradientError(op, "the memory of the tensor is read-only", "Make a copy first: mt.tensor(t.numpy())")


def assign(target: np.ndarray, index: Any, value: Any) -> None:
    """`target[index] = value` where it loses no more than float32 must."""
    array = plain(as_array("setitem", value))
    if array.ndim:
        check_same_device("setitem", "the value", array, device_of(target))
    if _KINDS.find(array.dtype.kind) > _KINDS.find(target.dtype.kind) or array.dtype.kind not in _KINDS:
        raise DTypeError("setitem", f"{array.dtype} does not fit into {target.dtype}", "Convert it first")
    check_writable("setitem", target)
    where = plain_index("setitem", index)
    try:
        with np.errstate(all="ignore"):  # too large for float32 is infinity
            target[where] = array
    except (IndexError, TypeError, OverflowError) as error:
        raise refused_index("setitem", target.shape, error) from None
    except ValueError as error:
        raise ShapeError(
            "setitem",
            f"a value of shape {array.shape} does not fit there ({error})",
            "Give a value that broadcasts to the indexed shape",
        ) from None
