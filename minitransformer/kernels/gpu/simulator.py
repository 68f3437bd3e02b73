"""A GPU in Python: the threads of a block, one at a time, from barrier to barrier.

A kernel is built with `cuda`, the module of Numba or the object of this file, and so runs in both unchanged. What goes
wrong unseen on a GPU is an error here: an index out of range, a barrier that some threads of a block do not reach, a
shuffle with a thread that is not there, and a race: two threads at one element, at least one of which writes, with no
barrier between them. Shared and local memory begins as NaN, or as the lowest integer. `thread_order` draws the order of
the threads from a seed: without a race, the bits are the same for all.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from inspect import signature
from itertools import groupby, product
from queue import SimpleQueue
from typing import Any

import numpy as np

from minitransformer.context import Setting
from minitransformer.errors import MiniTransformerError
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.memory import Accesses, Index, KernelError, Memory, Moment, fresh_memory, here, running

WARP = 32

_seed: ContextVar[int] = ContextVar("minitransformer_simulator_seed", default=0)


def thread_order(seed: int) -> Setting[int]:
    """Run blocks, and threads between barriers, in the order that `seed` draws; in that of their numbers if it is 0."""
    return Setting(_seed, seed)


# --- threads ---------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """Ends the threads of a launch in which another has failed."""


class _Thread:
    """One thread of the block that is running."""

    def __init__(self, number: int) -> None:
        self.number, self.index = number, Index(number, 0, 0)
        self.turns: SimpleQueue[bool] = SimpleQueue()  # True to go on, False to stop
        self.waits_at = "its end"  # of the block before

    def enter(self, block: Index) -> None:
        """Be a thread of that block, which all begin as if behind a barrier."""
        self.waits_at = "syncthreads"
        self.now = Moment(block, 0, self.number)
        self.made: set[Any] = set()  # places of shared arrays
        self.shuffles = 0
        self.offered: list[Any] = [None, None]  # to shuffles of even and of odd number

    def sleep(self) -> None:
        if not self.turns.get():
            raise _Stopped


class _Launch:
    """A grid of blocks, one after another. One thread runs at a time, up to a barrier, where it wakes the next."""

    def __init__(self, kernel: Callable[..., None], blocks: tuple[int, int, int], threads: int, seed: int) -> None:
        self.kernel, self.grid, self.size = kernel, Index(*blocks), Index(threads, 1, 1)
        self.draw = np.random.default_rng(seed) if seed else None
        self.blocks = self._ordered([Index(x, y, z) for z, y, x in product(*map(range, self.grid[::-1]))])
        self.threads = [_Thread(number) for number in range(threads)]
        self.to_run: list[_Thread] = []  # before anybody may pass the barrier
        self.block, self.shared = Index(0, 0, 0), dict[Any, Memory]()
        self.outcome: SimpleQueue[BaseException | None] = SimpleQueue()

    def run(self, args: tuple[Any, ...]) -> None:
        workers = [threading.Thread(target=self._work, args=(thread, args), daemon=True) for thread in self.threads]
        try:
            for worker in workers:
                worker.start()
            self._wake_next()
            failure = self.outcome.get()
        finally:
            for thread in self.threads:
                thread.turns.put(False)
            for worker in workers:
                if worker.is_alive():
                    worker.join()
        if failure is not None:
            raise failure

    def _work(self, thread: _Thread, args: tuple[Any, ...]) -> None:
        running.thread, running.launch = thread, self
        try:
            with np.errstate(all="ignore"):
                while True:
                    thread.sleep()
                    self.kernel(*args)
                    thread.waits_at = "its end"
                    self._wake_next()
        except _Stopped:
            pass
        except MiniTransformerError as error:
            self.outcome.put(error)
        except BaseException as error:  # noqa: BLE001 (raised by `run`)
            problem = f"{type(error).__name__} ({error}) in {here()}"
            failure = KernelError("simulator", problem, "Its traceback is above")
            failure.__cause__ = error
            self.outcome.put(failure)

    def wait(self, what: str) -> None:
        """Let the other threads run until this one may go on."""
        thread = running.thread
        thread.waits_at = what
        self._wake_next()
        thread.sleep()

    def _wake_next(self) -> None:
        if not self.to_run:
            self.to_run = self._ordered(self._released() or self._next_block())
        if self.to_run:
            self.to_run.pop(0).turns.put(True)
        else:
            self.outcome.put(None)

    def _released(self) -> list[_Thread]:
        """The threads that may go on: warps that all shuffle, or else the whole block at a barrier."""
        waiting = [t for t in self.threads if t.waits_at != "its end"]
        warps = [list(threads) for _, threads in groupby(waiting, lambda t: t.number // WARP)]
        shuffling = [t for warp in warps if all(t.waits_at == "a shuffle" for t in warp) for t in warp]
        places = {t.waits_at: f"thread {t.number} is at {t.waits_at}" for t in self.threads}
        if not shuffling and len(places) > 1:
            problem = f"in block {tuple(self.block)} {' and '.join(places.values())}, expected all at one barrier"
            raise KernelError("simulator", problem, "Leave no loop or function early before a barrier")
        return shuffling or waiting

    def _next_block(self) -> list[_Thread]:
        if not self.blocks:
            return []
        self.block, self.shared = self.blocks.pop(0), {}
        for thread in self.threads:
            thread.enter(self.block)
        return self.threads

    def _ordered(self, some: list[Any]) -> list[Any]:
        return [some[i] for i in (range(len(some)) if self.draw is None else self.draw.permutation(len(some)))]


# --- what a kernel calls ---------------------------------------------------------------------------------


class _Shared:
    """`cuda.shared`: one array for a block at each place of the code that makes one."""

    @staticmethod
    def array(shape: int, dtype: Any, alignment: int | None = None) -> Memory:
        thread, arrays, caller = running.thread, running.launch.shared, sys._getframe(1)
        place = caller.f_code, caller.f_lasti
        if place in thread.made:
            problem = f"{here()} makes a shared array again at one place, where a block has only one"
            raise KernelError("simulator", problem, "Make it in the kernel itself, and pass it on")
        thread.made.add(place)
        if place not in arrays:
            arrays[place] = fresh_memory(shape, dtype, f"shared array {len(arrays)}")
        return arrays[place]


class _Local:
    """`cuda.local`: memory of one thread."""

    @staticmethod
    def array(shape: int, dtype: Any, alignment: int | None = None) -> Memory:
        return fresh_memory(shape, dtype, "a local array")


class Simulator:
    """What kernels use of Numba's `cuda` module."""

    shared, local = _Shared(), _Local()

    threadIdx = property(lambda self: running.thread.index)
    blockIdx = property(lambda self: running.launch.block)
    blockDim = property(lambda self: running.launch.size)
    gridDim = property(lambda self: running.launch.grid)

    @staticmethod
    def jit(**options: Any) -> Callable[[Any], Any]:
        """Device functions stay as they are."""
        return lambda function: function

    @staticmethod
    def syncthreads() -> None:
        """Wait for all threads of the block."""
        running.launch.wait("syncthreads")
        thread = running.thread
        thread.now = thread.now._replace(interval=thread.now.interval + 1)

    @staticmethod
    def shfl_xor_sync(mask: int, value: Any, lane_mask: int) -> Any:
        """The value of the thread of the same warp whose number differs from this one's by `lane_mask`."""
        return _shuffled(mask, value, lambda lane: lane ^ lane_mask)

    @staticmethod
    def shfl_down_sync(mask: int, value: Any, delta: int) -> Any:
        """The value of the thread `delta` further in the warp, or its own."""
        return _shuffled(mask, value, lambda lane: lane + delta if lane + delta < WARP else lane)

    @staticmethod
    def shfl_sync(mask: int, value: Any, source: int) -> Any:
        """The value of the thread with number `source` in the warp."""
        return _shuffled(mask, value, lambda lane: source)


def _shuffled(mask: int, value: Any, partner: Callable[[int], int]) -> Any:
    thread, launch = running.thread, running.launch
    if mask % 2**WARP != 2**WARP - 1:
        raise KernelError("simulator", f"a shuffle has the mask {mask:#x}, expected -1", "Let whole warps take part")
    thread.shuffles += 1
    slot = thread.shuffles % 2  # nobody is two shuffles ahead
    thread.offered[slot] = value
    launch.wait("a shuffle")
    lane = thread.number % WARP
    number = thread.number - lane + partner(lane)
    inside = 0 <= partner(lane) < WARP and number < len(launch.threads)
    if not inside or launch.threads[number].shuffles < thread.shuffles:
        problem = f"a shuffle reads thread {number}, which is not there, in {here()}"
        raise KernelError("simulator", problem, "Let whole warps take part")
    return launch.threads[number].offered[slot]


cuda = Simulator()


def run(kernel: Callable[..., None], blocks: tuple[int, int, int], threads: int, args: tuple[Any, ...]) -> None:
    """Launch a kernel that was built with the `cuda` of this file."""
    accesses = Accesses()
    ready = tuple(_as_memory(name, arg, accesses) for name, arg in zip(signature(kernel).parameters, args, strict=True))
    _Launch(kernel, blocks, threads, _seed.get()).run(ready)


def _as_memory(name: str, value: Any, accesses: Accesses) -> Any:
    """What a kernel sees of an argument, of tuples field by field."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = (_as_memory(f"{name}.{field}", part, accesses) for field, part in zip(names, value, strict=True))
        return getattr(type(value), "_make", tuple)(parts)
    return Memory(name, value.host, accesses) if isinstance(value, SimulatedArray) else value
