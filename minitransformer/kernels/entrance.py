"""Between callers and compiled kernels: arrays made ready, and what does not fit refused.

A compiled kernel reads and writes where it is told to and takes arrays of one layout only. So each stands behind
an entrance, a Python function that says the shapes of its arrays:

    @entrance(reference, "NC", "C!")
    def add_rows(x, total): ...        # x (N, C) is read, total (C,) is written to
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from minitransformer.errors import ShapeError

Function = TypeVar("Function", bound=Callable[..., Any])

_MOST = 1000  # kinds of calls that an entrance remembers


def entrance(reference: ModuleType, *shapes: str) -> Callable[[Function], Function]:
    """Decorate an entrance whose first arguments are arrays of `shapes`, or None.

    A shape is one letter an axis, and a letter is one size wherever it stands; "*" is any shape, and the same
    wherever it stands. Of an array with "~" only the numbers of the last axis need to lie side by side. An array with
    "!" is written to: it must be contiguous, aligned and writable. All others come as a copy where they are not, and
    integers as int64. Floats of more than one dtype are no case for a kernel: the function of that name in
    `reference` then serves the call. `ShapeError` if the shapes do not fit.
    """

    def decorate(function: Function) -> Function:
        name, count = function.__name__, len(shapes)
        slow = getattr(reference, name)
        ready: set[Any] = set()  # calls whose arrays the kernel takes as they are

        @wraps(function)
        def enter(*args: Any, **settings: Any) -> Any:
            call = tuple([a if a is None else (a.shape, a.strides, a.dtype, a.flags.behaved) for a in args[:count]])
            if call in ready:
                return function(*args, **settings)
            arrays = _ready(name, shapes, args[:count])
            if len({a.dtype for a in arrays if a is not None and a.dtype.kind == "f"}) != 1:
                return slow(*arrays, *args[count:], **settings)
            if all(new is old for new, old in zip(arrays, args, strict=False)):
                if len(ready) == _MOST:
                    ready.clear()
                ready.add(call)
            return function(*arrays, *args[count:], **settings)

        return enter  # type: ignore[return-value]

    return decorate


def check_shapes(name: str, shapes: Sequence[str], arrays: Sequence[Any]) -> None:
    """`ShapeError` unless every array that is there has its shape, as in `entrance`; wherever the arrays are."""
    sizes: dict[str, Any] = {}
    for shape, array in zip(shapes, arrays, strict=False):
        if array is None:
            continue
        axes = shape.rstrip("~!")
        if axes == "*":
            fits = sizes.setdefault("*", array.shape) == array.shape
        else:
            fits = len(axes) == array.ndim
            for axis, size in zip(axes, array.shape, strict=False):
                fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            found = " and ".join(str(a.shape) for a in arrays if a is not None)
            problem = f"got arrays of shapes {found}, expected {', '.join(s.rstrip('~!') for s in shapes)}"
            raise ShapeError(f"kernels.{name}", problem, "The same letter must be the same size")


def _ready(name: str, shapes: Sequence[str], arrays: Sequence[Any]) -> list[Any]:
    """The arrays as `shapes` want them, each itself if it is so already."""
    check_shapes(name, shapes, arrays)
    out = []
    for shape, array in zip(shapes, arrays, strict=False):
        if array is not None:
            integers = array.dtype.kind in "iu"
            if not _lies_well(array, "~" in shape) or (integers and array.dtype != np.int64):
                if "!" in shape:
                    problem = f"an array to write to has strides {array.strides} or is locked"
                    raise ShapeError(f"kernels.{name}", problem, "Pass a new array")
                array = np.require(array, np.int64 if integers else array.dtype, ["C", "A", "W"])
        out.append(array)
    return out


def _lies_well(array: np.ndarray, rows_anywhere: bool) -> bool:
    if rows_anywhere:
        return array.flags.behaved and (array.shape[-1] < 2 or array.strides[-1] == array.itemsize)
    return array.flags.carray


def mapped(kernel: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """What an elementwise kernel of flat arrays, the last of which it writes, makes of arrays of one shape."""
    out = np.empty_like(arrays[0])
    kernel(*(x.reshape(-1) for x in (*arrays, out)))
    return out
