"""What kernels of rows and of single numbers share: sizes of blocks, functions of a number, sums over threads.

The order of additions is fixed by the sizes of arrays and blocks. Factories of device functions take `cuda`,
as `build` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numba import float32, from_dtype, int64

from minitransformer.kernels.gpu import simulator
from minitransformer.kernels.gpu.arrays import SimulatedArray, flat, on_device
from minitransformer.kernels.gpu.kernel import Kernel


class Block(NamedTuple):
    """So many threads, in warps, which can shuffle. Over a matrix, a warp lies along a row."""

    threads: int
    warp: int

    @property
    def warps(self) -> int:
        """How many: a kernel's shared memory is for one number of each, or one of each thread."""
        return self.threads // self.warp


# An index. Numba lets a signed one be negative, and tests for that at every access. Loops here are `while`s over signed
# numbers and index by unsigned ones: one that adds up compiles to 3 instructions a number, with `range` and signed
# indices to 13.
U = np.uint64

WIDE, NARROW, TOY = Block(256, 32), Block(32, 32), Block(4, 2)
_NARROW = 128  # numbers in a row: with more, a warp would go through it more than four times

# Sums of columns are made in two stages: strips of rows first, as many as keep a GPU busy but not more than that.
_ROUNDS, _STRIPS = 8, 64


def block_for(array: Any, width: int | None = None) -> Block:
    """The block that takes a row of `width` numbers, or numbers of no rows: tiny ones in the simulator."""
    if isinstance(array, SimulatedArray):
        return TOY
    return WIDE if width is None or width > _NARROW else NARROW


def blocks_of(size: int, block: Block) -> int:
    """How many blocks have a thread for each of `size` elements."""
    return -(-size // block.threads)


def launch(kernel: Kernel, blocks: int | tuple[int, int], *args: Any) -> None:
    """Launch over that many blocks, if any, with arrays as vectors."""
    x, y = (blocks, 1) if isinstance(blocks, int) else blocks
    if x and y:
        kernel((x, y, 1), *(flat(arg) if on_device(arg) else arg for arg in args))


def type_of(array: Any) -> Any:
    """The type of its elements, as Numba calls it."""
    return from_dtype(array.dtype)


# --- device functions ------------------------------------------------------------------------------------


def _of_its_dtype(function: Callable[[float], float]) -> Callable[[Any], Any]:
    return lambda x: type(x)(function(x))


# Python's functions raise where a GPU overflows, and make every number a float64.
_SIMULATED = SimpleNamespace(
    exp=np.exp, log=np.log, sqrt=np.sqrt, tanh=np.tanh, erf=_of_its_dtype(math.erf), erfc=_of_its_dtype(math.erfc)
)


def functions(cuda: Any) -> Any:
    """The module `math` for a kernel: Python's for the compiler, which knows it, for the simulator one like a GPU's."""
    return _SIMULATED if cuda is simulator.cuda else math


def position_of(cuda: Any) -> Any:
    """position(): the number of the thread in the grid, as an index."""

    def position() -> Any:
        return U(cuda.blockIdx.x) * U(cuda.blockDim.x) + U(cuda.threadIdx.x)

    return cuda.jit(device=True)(position)


def reductions(cuda: Any, block: Block) -> tuple[Any, Any]:
    """total(value, scratch) and largest(value, scratch): over all threads, given to all, NaN if one is NaN.

    All threads of the block call them. `scratch` is shared memory for one value a warp. The order of the additions
    is fixed by the block's size.
    """
    warp, warps, half = block.warp, block.warps, block.warp // 2

    def over_all(combine: Callable[[Any, Any], Any]) -> Any:
        combined = cuda.jit(device=True)(combine)

        def reduce(value: Any, scratch: Any) -> Any:
            distance = half
            while distance > 0:
                value = combined(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, distance))
                distance //= 2
            if warps > 1:
                if cuda.threadIdx.x % warp == 0:
                    scratch[cuda.threadIdx.x // warp] = value
                cuda.syncthreads()
                value = scratch[0]
                for i in range(1, warps):
                    value = combined(value, scratch[i])
                cuda.syncthreads()  # until then, no thread may begin the next one
            return value

        return cuda.jit(device=True)(reduce)

    return over_all(lambda a, b: a + b), over_all(lambda a, b: a if a > b or a != a else b)


def down_columns(cuda: Any, block: Block) -> Any:
    """down(value, scratch): the sum over the threads of the own column of a block, given to all of them.

    All threads of the block call it. `scratch` is shared memory for one value a thread.
    """
    warp, warps = block.warp, block.warps

    def down(value: Any, scratch: Any) -> Any:
        scratch[cuda.threadIdx.x] = value
        cuda.syncthreads()
        column = cuda.threadIdx.x % warp
        value = scratch[column]
        for row in range(1, warps):
            value += scratch[row * warp + column]
        cuda.syncthreads()
        return value

    return cuda.jit(device=True)(down)


# --- sums of columns -------------------------------------------------------------------------------------


def strips(rows: int, block: Block) -> tuple[int, int]:
    """Into how many strips so many rows are cut, and how many rows each but the last one has."""
    least = _ROUNDS * block.warps
    height = max(least, -(-rows // _STRIPS))
    return -(-rows // height), height


def column_blocks(columns: int, block: Block) -> int:
    """How many blocks lie side by side over that many columns."""
    return -(-columns // block.warp)


def column_sum(x: Any) -> Any:
    """The sums of the columns of a contiguous x (N, C), in an order that depends on N alone."""
    block = block_for(x)
    while True:
        N, C = x.shape
        count, height = strips(N, block)
        sums = np.empty_like(x, shape=(count, C)) if N else np.zeros_like(x, shape=(1, C))
        launch(strip_sums(type_of(x), block), (column_blocks(C, block), count), x, N, C, height, sums)
        if count <= 1:
            return sums[0]
        x = sums


@cache
def strip_sums(T: Any, block: Block) -> Kernel:
    """Row y of `out` is the sum of strip y of x (N, C). Along a row, threads read what lies side by side."""
    threads, warp, warps = block.threads, block.warp, block.warps

    def build(cuda: Any) -> Any:
        down = down_columns(cuda, block)

        def kernel(x: Any, N: Any, C: Any, height: Any, out: Any) -> None:
            scratch = cuda.shared.array(threads, T)
            c = cuda.blockIdx.x * warp + cuda.threadIdx.x % warp
            n = cuda.blockIdx.y * height + cuda.threadIdx.x // warp
            last = min((cuda.blockIdx.y + 1) * height, N)
            total = T(0)
            if c < C:
                while n < last:
                    total += x[U(n) * U(C) + U(c)]
                    n += warps
            total = down(total, scratch)
            if cuda.threadIdx.x < warp and c < C:
                out[U(cuda.blockIdx.y) * U(C) + U(c)] = total

        return kernel

    return Kernel(build, (T[::1], int64, int64, int64, T[::1]), threads)


# --- for measurements ------------------------------------------------------------------------------------


@cache
def empty_kernel() -> Kernel:
    """c = a + b for the first n of up to 32 float32 numbers: what it takes is the launch."""

    def build(cuda: Any) -> Any:
        def kernel(a: Any, b: Any, c: Any, n: Any) -> None:
            i = cuda.threadIdx.x
            if i < n:
                c[i] = a[i] + b[i]

        return kernel

    return Kernel(build, (float32[::1], float32[::1], float32[::1], int64), 32)
