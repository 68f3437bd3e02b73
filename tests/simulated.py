"""Kernels on the simulated GPU: launched in a line, and nothing left of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from numba import float32

from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.kernel import Kernel


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def zeros(size: int, dtype: Any = np.float32) -> SimulatedArray:
    return SimulatedArray(np.zeros(size, dtype))


def launch(
    body: Callable[..., None], size: int, *more: Any, threads: int = 4, blocks: tuple[int, int, int] = (1, 1, 1)
) -> np.ndarray:
    """What the kernel `body(cuda, out, *more)` makes of an array of zeros; all are vectors of float32."""
    out = zeros(size)
    kernel = Kernel(lambda cuda: partial(body, cuda), (float32[::1],) * (1 + len(more)), threads)
    kernel(blocks, out, *more)
    return out.host


def reversing(size: int) -> Kernel:
    def build(cuda: Any) -> Any:
        def kernel(x: Any, out: Any) -> None:
            tile = cuda.shared.array(size, float32)
            thread, start = cuda.threadIdx.x, cuda.blockIdx.x * size
            tile[thread] = x[start + thread]
            cuda.syncthreads()
            out[start + thread] = tile[size - 1 - thread]

        return kernel

    return Kernel(build, (float32[::1], float32[::1]), size)
