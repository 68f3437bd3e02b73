"""Dropout on the GPU: the numbers of `random.philox`, compared and applied where they are made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import boolean, float32, float64, int64, uint32, uint64

from minitransformer.kernels.gpu.blocks import WIDE, Block, block_for, launch, type_of
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.philox import philox

if TYPE_CHECKING:
    from minitransformer.random import DrawKey

_U = np.uint64  # beside a signed number, an unsigned one would become a float
_LOW, _SHIFT = _U(0xFFFFFFFF), _U(32)


@cache
def _dropout(T: Any, block: Block) -> Kernel:
    """Each block has a tile of a row, and each thread makes four words of it: see `random.uniform_words`.

    They go through shared memory, so that threads side by side write numbers side by side.
    """
    threads = block.threads
    tile = 4 * threads

    def build(cuda: Any) -> Any:
        four = cuda.jit(device=True)(philox)

        def kernel(
            x: Any,
            width: Any,
            tiles: Any,
            scale: Any,
            threshold: Any,
            seed: Any,
            step: Any,
            site: Any,
            first_row: Any,
            out: Any,
            keep: Any,
        ) -> None:
            words = cuda.shared.array(tile, uint32)
            row, t = cuda.blockIdx.x // tiles, cuda.threadIdx.x
            first = cuda.blockIdx.x % tiles * tile
            quad, batch_row = _U(first // 4 + t), _U(first_row) + _U(row)
            a, b, c, d = four(quad, batch_row, _U(site), _U(step), _U(seed) & _LOW, _U(seed) >> _SHIFT)
            words[4 * t] = a
            words[4 * t + 1] = b
            words[4 * t + 2] = c
            words[4 * t + 3] = d
            cuda.syncthreads()
            for i in range(t, min(tile, width - first), threads):
                at = row * width + first + i
                kept = _U(words[i]) >= _U(threshold)
                keep[at] = kept
                out[at] = x[at] * scale if kept else T(0)

        return kernel

    return Kernel(build, (T[::1], int64, int64, T) + (uint64,) * 5 + (T[::1], boolean[::1]), threads)


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel of this file as a GPU gets it."""
    for T in (float32, float64):
        yield f"dropout {T}", _dropout(T, WIDE)


@entrance("*")
def dropout_forward(x: Any, p: float, key: DrawKey) -> tuple[Any, Any]:
    """x / (1 - p) where kept, 0 elsewhere; and what is kept, `random.keep_mask` of `key`."""
    rows = len(x) if x.ndim else 1
    width, block = x.size // max(rows, 1), block_for(x)
    tiles = -(-width // (4 * block.threads))
    out, keep = np.empty_like(x), np.empty_like(x, dtype=np.bool_)
    words = round(p * 2**32), key.seed, key.step, key.site, key.first_row
    launch(_dropout(type_of(x), block), rows * tiles, x, width, tiles, 1 / (1 - p), *words, out, keep)
    return out, keep
