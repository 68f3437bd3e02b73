"""Counter-based random numbers, keyed by seed, step, call site and logical index.

A number is a pure function of its address: nothing is drawn in sequence, so shards, threads, kernels
and a resumed run all see the same dropout mask. The generator is Philox-4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import itertools
import math
import threading
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from minitransformer.checks import is_integer, shown
from minitransformer.context import Setting
from minitransformer.errors import ConfigError

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four uint32 words for every 128-bit counter.

    `counter` is four broadcastable uint64 arrays holding 32-bit words, `key` two 32-bit words. Returns
    four uint64 arrays whose values fit 32 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


class DrawKey(NamedTuple):
    """The address of one random array: everything but the index inside it.

    `first_row` is the position of row 0 in the whole batch, so that a shard draws its part of the
    whole batch's mask.
    """

    seed: int
    step: int
    site: int
    first_row: int


def uniform_words(shape: tuple[int, ...], key: DrawKey) -> np.ndarray:
    """uint64 array of `shape` with uniform 32-bit values; axis 0 is the batch row.

    The element at row b and flat offset e inside its row is word e % 4 of the counter
    (e // 4, first_row + b, site, step) under the key `seed`: its value depends on no other element.
    """
    rows = shape[0] if shape else 1
    width = math.prod(shape[1:])
    quads = -(-width // 4)
    counter = (
        np.arange(quads, dtype=np.uint64)[None, :],
        np.arange(key.first_row, key.first_row + rows, dtype=np.uint64)[:, None],
        np.uint64(key.site),
        np.uint64(key.step),
    )
    words = np.empty((rows, quads, 4), dtype=np.uint64)
    for lane, word in enumerate(philox(counter, (key.seed & 0xFFFFFFFF, key.seed >> 32))):
        words[:, :, lane] = word
    return words.reshape(rows, quads * 4)[:, :width].reshape(shape)


def keep_mask(shape: tuple[int, ...], p: float, key: DrawKey) -> np.ndarray:
    """Bool array of `shape`: True with probability 1 - p, each element a pure function of `key` and its index."""
    return uniform_words(shape, key) >= np.uint64(round(p * 2**32))


class _Scope:
    """Where a training step is: set by the trainer around each shard."""

    def __init__(self, seed: int, step: int, first_row: int) -> None:
        self.seed, self.step, self.first_row = seed, step, first_row
        self.unnamed = itertools.count()  # call sites without a module path, in call order


_scope: ContextVar[_Scope | None] = ContextVar("minitransformer_random_scope", default=None)
_lock = threading.Lock()
_UNNAMED = 0x80000000  # call-order sites live in the upper half, away from small hand-made ids


class _Process:
    """The process-wide stream used outside a scope."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls = itertools.count()

    @cached_property
    def generator(self) -> np.random.Generator:  # made when first asked for: numpy.random is slow to import
        return np.random.Generator(np.random.Philox(key=self.seed))


_process = _Process(0)


def check_seed(op: str, seed: int) -> int:
    """`seed` as a Python int in [0, 2**64), or `ConfigError`."""
    if not is_integer(seed) or not 0 <= int(seed) < 2**64:
        raise ConfigError(op, f"seed is {shown(seed)}, expected an integer from 0 to 2**64 - 1", "Pass such a seed")
    return int(seed)


def manual_seed(seed: int) -> None:
    """Restart the process-wide stream that initialises weights and draws dropout outside a `scope`.

    A fresh process starts at seed 0: two runs of one program draw the same numbers.
    """
    global _process
    seed = check_seed("manual_seed", seed)
    with _lock:
        _process = _Process(seed)


def generator() -> np.random.Generator:
    """The process-wide NumPy generator for weight initialisation; `manual_seed` restarts it."""
    return _process.generator


def scope(seed: int, step: int, first_row: int = 0) -> Setting[Any]:
    """Address every draw inside by (seed, step) and the global batch row, not by call count."""
    return Setting(_scope, _Scope(seed, step, first_row))


def site_id(path: str) -> int:
    """The 32-bit id of a call site, from its module path."""
    return crc32(path.encode())


def next_key(site: int | None = None) -> DrawKey:
    """The key of one draw at `site`; a call without a site is addressed by its order."""
    if site is not None and (not is_integer(site) or not 0 <= site < 2**32):
        raise ConfigError("dropout", f"site is {shown(site)}, expected an integer from 0 to 2**32 - 1", "Leave it out")
    current = _scope.get()
    if current is None:
        with _lock:
            return DrawKey(_process.seed, next(_process.calls) & 0xFFFFFFFF, site or 0, 0)
    if site is None:
        site = _UNNAMED | next(current.unnamed)
    return DrawKey(current.seed, current.step, site, current.first_row)
