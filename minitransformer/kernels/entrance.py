"""Between callers and compiled kernels: arrays made ready, and what does not fit refused.

A compiled kernel reads and writes where it is told to and takes arrays of one layout only. So each stands behind
an entrance, a Python function that says the shapes of its arrays:

    @entrance(reference, "NC", "C!")
    def add_rows(x, total): ...        # x (N, C) is read, total (C,) is written to
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from minitransformer.errors import ShapeError

Function = TypeVar("Function", bound=Callable[..., Any])


def entrance(reference: ModuleType, *shapes: str) -> Callable[[Function], Function]:
    """Decorate an entrance whose first arguments are arrays of `shapes`, or None.

    A shape is one letter an axis, and a letter is one size wherever it stands; "*" is any shape, and the same
    wherever it stands. An array with "!" is written to: it must be contiguous, aligned and writable. All others come
    as a copy where they are not, and integers as int64. Floats of more than one dtype are no case for a kernel: the
    function of that name in `reference` then serves the call. `ShapeError` if the shapes do not fit.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        slow = getattr(reference, name)

        @wraps(function)
        def enter(*args: Any, **settings: Any) -> Any:
            sizes: dict[str, Any] = {}
            dtypes = set()
            ready = list(args)
            for i, (shape, array) in enumerate(zip(shapes, args, strict=False)):
                if array is None:
                    continue
                axes = shape.removesuffix("!")
                if axes == "*":
                    fits = sizes.setdefault("*", array.shape) == array.shape
                else:
                    fits = len(axes) == array.ndim
                    for axis, size in zip(axes, array.shape, strict=False):
                        fits = fits and sizes.setdefault(axis, size) == size
                if not fits:
                    found = " and ".join(str(a.shape) for a in args[: len(shapes)] if a is not None)
                    problem = f"got arrays of shapes {found}, expected {', '.join(shapes).replace('!', '')}"
                    raise ShapeError(f"kernels.{name}", problem, "The same letter must be the same size")
                if array.dtype.kind == "f":
                    dtypes.add(array.dtype)
                if array.flags.carray and array.dtype.kind not in "iu":
                    continue
                if axes != shape:
                    problem = f"an array to write to has strides {array.strides} or is locked"
                    raise ShapeError(f"kernels.{name}", problem, "Pass a new array")
                dtype = np.int64 if array.dtype.kind in "iu" else array.dtype
                ready[i] = np.require(array, dtype, ["C", "A", "W"])
            return (function if len(dtypes) == 1 else slow)(*ready, **settings)

        return enter  # type: ignore[return-value]

    return decorate


def mapped(kernel: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """What an elementwise kernel of flat arrays, the last of which it writes, makes of arrays of one shape."""
    out = np.empty_like(arrays[0])
    kernel(*(x.reshape(-1) for x in (*arrays, out)))
    return out
