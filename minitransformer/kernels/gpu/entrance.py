"""Between callers and GPU kernels: arrays made ready, and what does not fit refused, as `kernels.entrance` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from minitransformer.errors import DeviceError, DTypeError, ShapeError
from minitransformer.kernels.entrance import check_shapes
from minitransformer.kernels.gpu.arrays import device_of

Function = TypeVar("Function", bound=Callable[..., Any])


def entrance(*shapes: str) -> Callable[[Function], Function]:
    """Decorate a function whose first arguments are arrays on one device, of `shapes`, or None.

    A shape is one letter an axis, and a letter is one size wherever it stands; "*" is any shape, the same wherever it
    stands. Of an array with "~" only the numbers of the last axis need to lie side by side, one with "!" is written
    to. All others come as a copy where they are not contiguous, integers as int64, floats in the widest dtype among
    them. `DeviceError`, `DTypeError` or `ShapeError` if the arrays do not fit each other or cannot be written to.
    """

    def decorate(function: Function) -> Function:
        name, count = function.__name__, len(shapes)

        @wraps(function)
        def enter(*args: Any, **settings: Any) -> Any:
            return function(*_ready(name, shapes, args[:count]), *args[count:], **settings)

        return enter  # type: ignore[return-value]

    return decorate


def _ready(name: str, shapes: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
    given = [array for array in arrays if array is not None]
    devices = {device_of(array) for array in given}
    if len(devices) > 1 or "cpu" in devices:
        problem = f"got arrays on {' and '.join(sorted(devices))}, expected all of them on one GPU"
        raise DeviceError(f"kernels.{name}", problem, "Move them with .to(device)")
    kinds = {array.dtype for array in given if array.dtype.kind not in "iub"}
    if any(kind not in (np.float32, np.float64) for kind in kinds):
        problem = f"got {', '.join(sorted(map(str, kinds)))}, expected float32 or float64"
        raise DTypeError(f"kernels.{name}", problem, "Convert them, or compute on the CPU")
    dtype = np.result_type(*kinds) if kinds else None
    check_shapes(name, shapes, arrays)
    return [a if a is None else _made_ready(name, shape, a, dtype) for shape, a in zip(shapes, arrays, strict=True)]


def _made_ready(name: str, shape: str, array: Any, dtype: Any) -> Any:
    wanted = {"i": np.dtype(np.int64), "u": np.dtype(np.int64), "f": dtype}.get(array.dtype.kind, array.dtype)
    if array.dtype == wanted and _lies_well(array, "~" in shape):
        return array
    if "!" in shape:
        problem = f"an array to write to is {array.dtype} with strides {array.strides}, expected {wanted} without gaps"
        raise ShapeError(f"kernels.{name}", problem, "Pass a new array")
    return array.astype(wanted, order="C")


def _lies_well(array: Any, rows_anywhere: bool) -> bool:
    if rows_anywhere and all(stride >= 0 for stride in array.strides):
        return array.shape[-1] < 2 or array.strides[-1] == array.itemsize
    return bool(array.flags.c_contiguous)
