"""One kernel of numba.cuda: how it is made, what it takes, and its launch on the device where its arrays are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import as_dtype

from minitransformer.errors import require
from minitransformer.kernels.gpu import simulator
from minitransformer.kernels.gpu.arrays import SimulatedArray, cupy


class Kernel:
    """A function for a block of `threads` threads, made by `build(cuda)`, and the Numba types of its arguments.

    Arrays are vectors without gaps, `T[::1]`, see `arrays.flat`; all else are numbers, converted to their types, and
    named tuples of both. Call `build` factories through `functools.cache`, so that each is compiled once, when it is
    first launched.
    """

    def __init__(
        self, build: Callable[[Any], Callable[..., None]], types: tuple[Any, ...], threads: int, registers: int = 255
    ) -> None:
        self.build, self.types, self.threads, self.registers = build, types, threads, registers

    def __call__(self, blocks: tuple[int, int, int], *args: Any) -> None:
        """Launch over a grid of `blocks`, each axis at least 1; the host does not wait for the device."""
        if any(isinstance(arg, SimulatedArray) for arg in args):
            simulator.run(self._simulated, blocks, self.threads, self._converted(args))
        else:
            self._compiled[blocks, self.threads, _stream()](*args)

    def _converted(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_converted(a, t) for a, t in zip(args, self.types, strict=True))

    @cached_property
    def _simulated(self) -> Callable[..., None]:
        return self.build(simulator.cuda)

    @cached_property
    def _compiled(self) -> Any:
        cuda = numba_cuda()
        return cuda.jit(self.types, max_registers=self.registers)(self.build(cuda))


def _converted(value: Any, type_: Any) -> Any:
    if isinstance(type_, types.BaseTuple):
        parts = (_converted(v, t) for v, t in zip(value, type_, strict=True))
        return getattr(type(value), "_make", tuple)(parts)
    return value if isinstance(value, SimulatedArray) else _number(value, as_dtype(type_))


def _number(value: Any, dtype: np.dtype) -> Any:
    """A number as a kernel gets it: integers stay Python's, which do not wrap around unseen."""
    return int(value) if dtype.kind in "iu" else dtype.type(value)


def numba_cuda() -> Any:
    """Numba's module of kernels for the GPU."""
    require("numba_cuda", extra="cuda", purpose="device cuda")
    return import_module("numba.cuda")


def _stream() -> Any:
    """CuPy's current stream, which orders our kernels with its own."""
    cuda, pointer = numba_cuda(), cupy().cuda.get_current_stream().ptr
    return cuda.external_stream(pointer) if pointer else cuda.default_stream()
