"""A GPU in Python: the threads of a block, one at a time, from barrier to barrier.

A kernel is built with `cuda`, the module of Numba or the object of this file, and so runs in both unchanged. What goes
wrong unseen on a GPU is an error here: an index out of range, a barrier that some threads of a block do not reach, a
shuffle with a thread that is not there. Shared and local memory begins as NaN, or as the lowest integer. Between two
barriers the order of the threads is drawn from a seed, so what depends on it, a race, gives different bits for
different seeds. Numba's own simulator does none of that, and has no shuffles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np
from numba.np.numpy_support import as_dtype

from minitransformer.context import Setting
from minitransformer.errors import ConfigError, RangeError
from minitransformer.kernels.gpu.arrays import SimulatedArray

WARP = 32

_seed: ContextVar[int] = ContextVar("minitransformer_simulator_seed", default=0)
_running = threading.local()


def thread_order(seed: int) -> Setting[int]:
    """Run the threads of every block inside in the order that `seed` draws; in that of their numbers if it is 0."""
    return Setting(_seed, seed)


class Index(NamedTuple):
    """The position of a thread, block, or size, along three axes."""

    x: int
    y: int
    z: int


class Memory:
    """An array of one axis as a kernel sees it: it has no negative indices and no end to run past."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def __len__(self) -> int:
        return len(self.array)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.array.size

    def __getitem__(self, index: Any) -> Any:
        return self.array[self._checked(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        with np.errstate(all="ignore"):
            self.array[self._checked(index)] = value

    def _checked(self, index: Any) -> int:
        if not 0 <= index < self.array.size:
            problem = f"index {index} is outside of {self.name}, which has {self.array.size} elements"
            raise RangeError("simulator", f"{problem}, in {_here()}", "Test the index before the access")
        return int(index)


class _Thread:
    """One thread of the block that is running."""

    def __init__(self, number: int, index: Index) -> None:
        self.number, self.index = number, index
        self.may_run = threading.Lock()
        self.may_run.acquire()
        self.waits: str | None = None  # what it waits for, None once it has ended
        self.offered: Any = None  # to a shuffle
        self.allocations = 0


class _Stopped(BaseException):
    """Ends a thread of a block in which another has failed."""


class _Block:
    """The block that is running: one thread at a time, handed over at barriers."""

    def __init__(self, index: Index, grid: Index, threads: Index, seed: int) -> None:
        self.index, self.grid, self.size = index, grid, threads
        self.threads = [_Thread(n, Index(x, y, z)) for n, (z, y, x) in enumerate(product(*map(range, threads[::-1])))]
        self.shared: list[Memory] = []
        self.handed_back = threading.Lock()
        self.handed_back.acquire()
        self.failure: BaseException | None = None
        self.stopping = False
        self.draw = np.random.default_rng(seed) if seed else None

    def run(self, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        workers = [threading.Thread(target=self._work, args=(t, kernel, args), daemon=True) for t in self.threads]
        for worker in workers:
            worker.start()
        ready = self.threads
        while ready and self.failure is None:
            for thread in ready if self.draw is None else [ready[i] for i in self.draw.permutation(len(ready))]:
                self._hand_over(thread)
                if self.failure is not None:
                    break
            else:
                ready = self._ready()
        self.stopping = True
        for thread in self.threads:
            if thread.waits is not None:
                self._hand_over(thread)
        for worker in workers:
            worker.join()
        if self.failure is not None:
            raise self.failure

    def _hand_over(self, thread: _Thread) -> None:
        thread.may_run.release()
        self.handed_back.acquire()

    def _work(self, thread: _Thread, kernel: Callable[..., None], args: tuple[Any, ...]) -> None:
        thread.waits = "its start"
        thread.may_run.acquire()
        _running.thread, _running.block = thread, self
        try:
            with suppress(_Stopped), np.errstate(all="ignore"):
                if not self.stopping:
                    kernel(*args)
        except BaseException as error:  # noqa: BLE001 (raised by `run`)
            self.failure = error
        thread.waits = None
        self.handed_back.release()

    def wait(self, thread: _Thread, what: str) -> None:
        """Let the others run up to `what`."""
        thread.waits = what
        self.handed_back.release()
        thread.may_run.acquire()
        if self.stopping:
            raise _Stopped

    def _ready(self) -> list[_Thread]:
        """The threads that may go on: warps that all shuffle, or else the whole block at a barrier."""
        waiting = [t for t in self.threads if t.waits is not None]
        warps = [list(threads) for _, threads in groupby(waiting, lambda t: t.number // WARP)]
        ready = [t for warp in warps if all(t.waits == "a shuffle" for t in warp) for t in warp]
        if ready or not waiting:
            return ready
        if len(waiting) < len(self.threads) or any(t.waits != "syncthreads" for t in waiting):
            places = " and ".join(sorted({str(t.waits) for t in waiting}))
            ended = len(self.threads) - len(waiting)
            problem = f"in block {tuple(self.index)} {len(waiting)} threads wait at {places} while {ended} have ended"
            fix = "Let all threads of a block reach the same barriers: leave no loop or function early before one"
            self.failure = ConfigError("simulator", problem, fix)
        return waiting


def _here() -> str:
    return f"thread {tuple(_running.thread.index)} of block {tuple(_running.block.index)}"


def _fresh(size: int, dtype: Any, name: str) -> Memory:
    """Memory that nothing has been written to."""
    kind = as_dtype(dtype)
    return Memory(name, np.full(size, np.nan if kind.kind == "f" else np.iinfo(kind).min, kind))


class _Shared:
    """`cuda.shared`: the threads of a block that make their n-th array there get the same one."""

    @staticmethod
    def array(shape: int, dtype: Any, alignment: int | None = None) -> Memory:
        thread, block = _running.thread, _running.block
        if thread.allocations == len(block.shared):
            block.shared.append(_fresh(shape, dtype, f"shared array {thread.allocations}"))
        thread.allocations += 1
        return block.shared[thread.allocations - 1]


class _Local:
    """`cuda.local`: memory of one thread."""

    @staticmethod
    def array(shape: int, dtype: Any, alignment: int | None = None) -> Memory:
        return _fresh(shape, dtype, "a local array")


class Simulator:
    """What kernels use of Numba's `cuda` module."""

    shared, local = _Shared(), _Local()

    @property
    def threadIdx(self) -> Index:
        return _running.thread.index

    @property
    def blockIdx(self) -> Index:
        return _running.block.index

    @property
    def blockDim(self) -> Index:
        return _running.block.size

    @property
    def gridDim(self) -> Index:
        return _running.block.grid

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        """Device functions stay as they are."""
        return function if function is not None else (lambda function: function)

    def syncthreads(self) -> None:
        """Wait for all threads of the block."""
        _running.block.wait(_running.thread, "syncthreads")

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        """The value of the thread of the same warp whose number differs from this one's by `lane_mask`."""
        return self._shuffle(value, lambda lane: lane ^ lane_mask)

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        """The value of the thread `delta` further in the warp, or its own."""
        return self._shuffle(value, lambda lane: lane + delta if lane + delta < WARP else lane)

    def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
        """The value of the thread with number `source` in the warp."""
        return self._shuffle(value, lambda lane: source)

    @staticmethod
    def _shuffle(value: Any, partner: Callable[[int], int]) -> Any:
        thread, block = _running.thread, _running.block
        thread.offered = value
        block.wait(thread, "a shuffle")
        first = thread.number // WARP * WARP
        number = first + partner(thread.number - first)
        if number >= len(block.threads) or block.threads[number].waits is None:
            problem = f"a shuffle reads thread {number}, which is not there, in {_here()}"
            raise RangeError("simulator", problem, "Let whole warps take part")
        got = block.threads[number].offered
        block.wait(thread, "a shuffle")  # so that nobody offers the next value before all have this one
        return got


cuda = Simulator()
_one_at_a_time = threading.Lock()


def run(kernel: Callable[..., None], blocks: tuple[int, int, int], threads: int, args: tuple[Any, ...]) -> None:
    """Launch a kernel that was built with the `cuda` of this file."""
    names = kernel.__code__.co_varnames
    ready = tuple(_as_memory(name, arg) for name, arg in zip(names, args, strict=False))
    grid = Index(*blocks)
    for block in _all_blocks(grid):
        with _one_at_a_time:
            _Block(block, grid, Index(threads, 1, 1), _seed.get()).run(kernel, ready)


def _as_memory(name: str, value: Any) -> Any:
    """What a kernel sees of an argument, of tuples field by field."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = (_as_memory(f"{name}.{field}", part) for field, part in zip(names, value, strict=True))
        return getattr(type(value), "_make", tuple)(parts)
    return Memory(name, value.host) if isinstance(value, SimulatedArray) else value


def _all_blocks(grid: Index) -> Iterator[Index]:
    return (Index(x, y, z) for z, y, x in product(*map(range, grid[::-1])))
