"""Arrays in memory of their own, flush with a page that nobody may read: one element too far is a SIGSEGV.

The pages of a read-only array may not be written either, whatever the flags of a view of it say.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from minitransformer.kernels.decode.step import Weights

AVAILABLE = os.name == "posix"
needs_guard_pages = pytest.mark.skipif(not AVAILABLE, reason="memory is guarded with mprotect, which is POSIX's")

_NONE, _READ = 0, 1  # PROT_NONE and PROT_READ: the same everywhere


@cache
def _mprotect() -> Any:
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


class _Memory:
    """`size` bytes, page by page zero, between two unreadable pages."""

    def __init__(self, size: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        self._inner = max(-(-size // page), 1) * page
        self.map = mmap.mmap(-1, self._inner + 2 * page)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.start = page + (self._inner - size if at_end else 0)
        self._protect(0, page, _NONE)
        self._protect(page + self._inner, page, _NONE)

    def protect(self, rights: int) -> None:
        self._protect(mmap.PAGESIZE, self._inner, rights)

    def _protect(self, offset: int, size: int, rights: int) -> None:
        if _mprotect()(self._address + offset, size, rights):
            raise OSError(ctypes.get_errno(), "mprotect")


def _place(x: np.ndarray, strides: tuple[int, ...], at_end: bool, writable: bool) -> np.ndarray:
    """A copy of `x` with these strides in bytes, whose outermost bytes touch a guard page."""
    reach = [(n - 1) * s for n, s in zip(x.shape, strides, strict=True)] if x.size else []
    before = -sum(r for r in reach if r < 0)  # how far the first element lies from the lowest
    size = before + sum(r for r in reach if r > 0) + x.itemsize if x.size else 0
    memory = _Memory(size, at_end)
    out: np.ndarray = np.ndarray(x.shape, x.dtype, memory.map, memory.start + before, strides)
    out[...] = x
    if not writable:
        out.flags.writeable = False
        memory.protect(_READ)
    return out


def _strides(x: np.ndarray, factors: Callable[[int], int] = lambda axis: 1, order: str = "C") -> tuple[int, ...]:
    """Those of a new array of that shape, axis by axis times `factors`."""
    step, strides = x.itemsize, [0] * x.ndim
    for axis in range(x.ndim) if order == "F" else reversed(range(x.ndim)):
        strides[axis] = step * (sign := factors(axis))
        step = abs(step * sign) * max(x.shape[axis], 1)
    return tuple(strides)


Layout = Callable[[np.ndarray, bool], np.ndarray]

# How a copy of an array lies in guarded memory: (array, writable) -> the copy.
CONTIGUOUS: dict[str, Layout] = {
    "ends at a guard": lambda x, writable: _place(x, _strides(x), True, writable),
    "begins after a guard": lambda x, writable: _place(x, _strides(x), False, writable),
}
STRIDED: dict[str, Layout] = {
    "every third, ends at a guard": lambda x, writable: _place(x, _strides(x, lambda axis: 3), True, writable),
    "backwards, begins after a guard": lambda x, writable: _place(x, _strides(x, lambda axis: -1), False, writable),
    "backwards with gaps, ends at a guard": lambda x, writable: _place(
        x, _strides(x, lambda axis: -2 if axis == x.ndim - 1 else 1), True, writable
    ),
    "columns first, ends at a guard": lambda x, writable: _place(x, _strides(x, order="F"), True, writable),
    "off its alignment, ends at a guard": lambda x, writable: _place(
        x, tuple(s + 1 for s in _strides(x, lambda axis: 2)), True, writable
    ),
}
LAYOUTS = CONTIGUOUS | STRIDED


def unreadable(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that nobody may read one element of."""
    x: np.ndarray = np.zeros(shape, dtype)
    memory = _Memory(x.nbytes, True)
    memory.protect(_NONE)
    return np.ndarray(shape, dtype, memory.map, memory.start)


def guarded(value: Any, layout: Layout, writable: bool = False) -> Any:
    """`value` with every array in it, also in tuples, lists, dicts and blocks, copied to memory of that layout."""
    if isinstance(value, np.ndarray):
        return layout(value, writable)
    if isinstance(value, dict):
        return {key: guarded(item, layout, writable) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [guarded(item, layout, writable) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Weights):  # which copies what is locked
        rebuild, (weights, *settings) = value.__reduce__()
        return rebuild(guarded(weights, layout, True), *settings)
    return value
