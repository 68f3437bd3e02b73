"""Dropout on the GPU: the numbers of `random.philox`, compared and applied where they are made."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import boolean, float32, float64, int64, uint32, uint64

from minitransformer.kernels.gpu.blocks import WIDE, Block, U, block_for, launch, type_of
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.philox import philox

if TYPE_CHECKING:
    from minitransformer.random import DrawKey

_LOW, _SHIFT = U(0xFFFFFFFF), U(32)


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
            quad, batch_row = U(first // 4 + t), U(first_row) + U(row)
            a, b, c, d = four(quad, batch_row, U(site), U(step), U(seed) & _LOW, U(seed) >> _SHIFT)
            i = U(4 * t)
            words[i], words[i + U(1)], words[i + U(2)], words[i + U(3)] = a, b, c, d
            cuda.syncthreads()
            own, last = t, min(tile, width - first)
            while own < last:
                kept = U(words[U(own)]) >= U(threshold)
                i = U(row * width + first + own)
                keep[i] = kept
                out[i] = x[i] * scale if kept else T(0)
                own += threads

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
