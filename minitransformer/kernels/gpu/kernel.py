"""One kernel of numba.cuda: how it is made, what it takes, and its launch on the device where its arrays are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from operator import index as integer
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import as_dtype

from minitransformer.errors import ConfigError, DTypeError, require
from minitransformer.kernels.gpu import simulator
from minitransformer.kernels.gpu.arrays import SimulatedArray, cupy

_MOST_BLOCKS = 2**31 - 1, 2**16 - 1, 2**16 - 1  # along each axis, on every GPU


class Kernel:
    """A function for a block of `threads` threads, made by `build(cuda)`, and the Numba types of its arguments.

    Arrays are vectors without gaps, `T[::1]`, see `arrays.flat`; those of a read-only type may have more axes. All else
    are numbers, converted to their types, and tuples of both. Call `build` factories through `functools.cache`, so
    that each is compiled once, when it is first launched.
    """

    def __init__(
        self, build: Callable[[Any], Callable[..., None]], types: tuple[Any, ...], threads: int, registers: int = 255
    ) -> None:
        self.build, self.types, self.threads, self.registers = build, types, threads, registers

    def __call__(self, blocks: tuple[int, int, int], *args: Any) -> None:
        """Launch over a grid of `blocks`; the host does not wait for the device."""
        if not all(1 <= number <= most for number, most in zip(blocks, _MOST_BLOCKS, strict=True)):
            problem = f"got a grid of {blocks} blocks, expected at least 1 along each axis and at most {_MOST_BLOCKS}"
            raise ConfigError("kernels.gpu", problem, "Launch nothing for empty arrays; put the longest axis first")
        if any(isinstance(arg, SimulatedArray) for arg in args):
            ready = tuple(_argument(arg, kind) for arg, kind in zip(args, self.types, strict=True))
            simulator.run(self._simulated, blocks, self.threads, ready)
        else:
            self._compiled[blocks, self.threads, _stream()](*args)

    @cached_property
    def _simulated(self) -> Callable[..., None]:
        return self.build(simulator.cuda)

    @cached_property
    def _compiled(self) -> Any:
        cuda = numba_cuda()
        return cuda.jit(self.types, max_registers=self.registers)(self.build(cuda))


def _argument(value: Any, kind: Any) -> Any:
    """What a simulated kernel gets; integers stay Python's, which do not wrap around unseen."""
    if isinstance(kind, types.BaseTuple):
        kinds: Any = kind
        parts = (_argument(part, its) for part, its in zip(value, kinds, strict=True))
        return getattr(type(value), "_make", tuple)(parts)
    if isinstance(kind, types.Integer):
        return integer(value)
    if not isinstance(kind, types.Array):
        return as_dtype(kind).type(value)
    given = (value.dtype, value.ndim, value.flags.c_contiguous) if isinstance(value, SimulatedArray) else None
    if given != (as_dtype(kind.dtype), kind.ndim, True):
        problem = f"got {type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}, expected {kind}"
        raise DTypeError("kernels.gpu", problem, "Pass arrays through `flat`, in the dtype of the kernel")
    if kind.mutable:
        return value
    readable: np.ndarray = value.host.view()
    readable.flags.writeable = False
    return readable


def numba_cuda() -> Any:
    """Numba's module of kernels for the GPU."""
    require("numba_cuda", extra="cuda", purpose="device cuda")
    return import_module("numba.cuda")


def _stream() -> Any:
    """CuPy's current stream, which orders our kernels with its own."""
    cuda, pointer = numba_cuda(), cupy().cuda.get_current_stream().ptr
    return cuda.external_stream(pointer) if pointer else cuda.default_stream()
