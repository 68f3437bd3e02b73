"""Dropout in Numba: the numbers of `random.philox`, compared and applied where they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import boolean, float64, njit, uint32, uint64, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.philox import philox
from minitransformer.kernels.pointwise import reference

if TYPE_CHECKING:
    from minitransformer.random import DrawKey

_U = np.uint64  # beside a signed number, an unsigned one would become a float
PART = 1024  # words at a time: 4 KiB of cache


@njit
def _fill(words: Any, first: Any, row: Any, site: Any, step: Any, seed: Any) -> None:
    """The words of the counters from (first, row, site, step) on: `random.philox`, many counters at a time."""
    for quad in range(words.size // 4):
        i = 4 * quad
        words[i], words[i + 1], words[i + 2], words[i + 3] = philox(
            first + _U(quad), row, site, step, seed & _U(0xFFFFFFFF), seed >> _U(32)
        )


@njit
def _apply(x: Any, words: Any, threshold: Any, scale: Any, out: Any, keep: Any) -> None:
    for i in range(x.size):
        kept = words[i] >= threshold
        keep[i] = kept
        y = x[i] * scale  # whether it is kept or not: a branch would be guessed wrong
        out[i] = y if kept else x.dtype.type(0)


@kernel(
    lambda T: void(T[:, ::1], float64, uint64, uint64, uint64, uint64, uint64, uint32[::1], T[:, ::1], boolean[:, ::1])
)
def _dropout(
    x: Any,
    scale: Any,
    threshold: Any,
    seed: Any,
    step: Any,
    site: Any,
    first_row: Any,
    words: Any,
    out: Any,
    keep: Any,
) -> None:
    """See `random.uniform_words` for who gets which word. `words` is for those of a part of a row, and 3 more."""
    T, width, part = x.dtype.type, x.shape[1], words.size - 3
    for row in range(x.shape[0]):
        batch_row = first_row + _U(row)
        for start in range(0, width, part):
            size = min(width - start, part)
            _fill(words[: size + 3], _U(start // 4), batch_row, site, step, seed)
            end = start + size
            _apply(x[row, start:end], words, threshold, T(scale), out[row, start:end], keep[row, start:end])


@kernel(lambda T: void(T[::1], boolean[::1], float64, T[::1]))
def _dropout_backward(dout: Any, keep: Any, scale: Any, dx: Any) -> None:
    T = dout.dtype.type
    for i in range(dout.size):
        y = dout[i] * T(scale)
        dx[i] = y if keep[i] else T(0)


@entrance(reference, "*")
def dropout_forward(x: np.ndarray, p: float, key: DrawKey) -> tuple[np.ndarray, np.ndarray]:
    """x / (1 - p) where kept, 0 elsewhere; and what is kept, `random.keep_mask` of `key`."""
    rows = len(x) if x.ndim else 1
    shape = rows, x.size // max(rows, 1)
    out, keep = np.empty_like(x), np.empty(x.shape, np.bool_)
    key_words = (_U(word) for word in (round(p * 2**32), key.seed, key.step, key.site, key.first_row))
    words = np.empty(PART + 3, np.uint32)
    _dropout(x.reshape(shape), 1 / (1 - p), *key_words, words, out.reshape(shape), keep.reshape(shape))
    return out, keep


@entrance(reference, "*", "*")
def dropout_backward(dout: np.ndarray, keep: np.ndarray, scale: float) -> np.ndarray:
    """dx = dout scale where kept, scale being 1 / (1 - p)"""
    dx = np.empty_like(dout)
    _dropout_backward(dout.reshape(-1), keep.reshape(-1), float(scale), dx.reshape(-1))
    return dx
