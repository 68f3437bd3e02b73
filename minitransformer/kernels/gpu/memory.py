"""Memory of the simulated device: its edges, what it holds before anybody has written, and who races for it."""

from __future__ import annotations

import threading
from operator import index as integer
from typing import Any, NamedTuple

import numpy as np
from numba.np.numpy_support import as_dtype

from minitransformer.errors import MiniTransformerError, RangeError

running = threading.local()  # of a thread that runs a kernel: its `thread` and its `launch`


class KernelError(MiniTransformerError, RuntimeError):
    """A kernel that goes wrong on a GPU."""


class Index(NamedTuple):
    """The position of a thread or block, or a size, along three axes."""

    x: int
    y: int
    z: int


class Moment(NamedTuple):
    """When something was done: by which thread, between which two barriers of its block."""

    block: Index | None
    interval: int
    thread: int | None

    def beside(self, other: Moment) -> bool:
        """Whether a GPU may do both at once."""
        return self.block != other.block or (self.interval == other.interval and self.thread != other.thread)


class Accesses:
    """When each element was last read and written to, by its address."""

    def __init__(self) -> None:
        self.reads: dict[int, Moment] = {}
        self.writes: dict[int, Moment] = {}

    def race(self, address: int, now: Moment, writes: bool) -> Moment | None:
        """The access that this one races with, or None."""
        written, read = self.writes.get(address), self.reads.get(address)
        if written is not None and written.beside(now):
            return written
        if not writes:
            if read is not None and read.beside(now):  # by several threads, or blocks, who may all not write
                now = Moment(now.block if now.block == read.block else None, now.interval, None)
            self.reads[address] = now
            return None
        self.writes[address] = now
        return read if read is not None and read.beside(now) else None


class Memory:
    """An array of one axis as a kernel sees it: it has no negative indices and no end to run past."""

    def __init__(self, name: str, array: np.ndarray, accesses: Accesses) -> None:
        self.name, self.array, self.accesses = name, array, accesses
        self.address, self.size = array.__array_interface__["data"][0], array.size

    def __getitem__(self, index: Any) -> Any:
        return self.array[self._checked(index, writes=False)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[self._checked(index, writes=True)] = value

    def _checked(self, index: Any, writes: bool) -> int:
        i = integer(index)
        if not 0 <= i < self.size:
            problem = f"index {i} is outside of {self.name}, which has {self.size} elements"
            raise RangeError("simulator", f"{problem}, in {here()}", "Test the index before the access")
        address = self.address + i * self.array.itemsize
        other = self.accesses.race(address, running.thread.now, writes)
        if other is not None:
            does = "writes to" if writes else "reads"
            problem = f"{here()} {does} element {i} of {self.name} while {_who(other)} may be there"
            raise KernelError("simulator", problem, "Put a barrier between them, or let one thread own the element")
        return i


def here() -> str:
    return _who(running.thread.now)


def _who(moment: Moment) -> str:
    thread = "another thread" if moment.thread is None else f"thread {moment.thread}"
    return f"{thread} of {'another block' if moment.block is None else f'block {tuple(moment.block)}'}"


def fresh_memory(size: int, dtype: Any, name: str) -> Memory:
    """Memory that nothing has been written to."""
    kind = as_dtype(dtype)
    return Memory(name, np.full(size, np.nan if kind.kind == "f" else np.iinfo(kind).min, kind), Accesses())
