"""Row kernels on the GPU: the functions of `reference.py`, each row read by one block.

They add in an order that depends on the shapes alone, without atomics. See `gpu/entrance.py` for what is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import float32, float64, int64

from minitransformer.kernels.gpu import blocks
from minitransformer.kernels.gpu.blocks import NARROW, WIDE, Block, U, block_for, launch, strip_sums, type_of
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.rowwise import cuda_norms, cuda_softmax
from minitransformer.kernels.rowwise.cuda_norms import (
    add_layer_norm,
    layer_norm_backward,
    layer_norm_backward_add,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from minitransformer.kernels.rowwise.cuda_softmax import (
    cross_entropy_backward,
    cross_entropy_forward,
    log_softmax_backward,
    log_softmax_forward,
    softmax_backward,
    softmax_forward,
)

__all__ = [
    "add_layer_norm",
    "add_residual",
    "column_sum",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "embedding_backward",
    "layer_norm_backward",
    "layer_norm_backward_add",
    "layer_norm_forward",
    "log_softmax_backward",
    "log_softmax_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "softmax_backward",
    "softmax_forward",
]


@cache
def _embedding_backward(T: Any, block: Block) -> Kernel:
    """Row v of `dweight` is the sum of the rows order[ends[v]], ... of `dout`, up to ends[v + 1]."""
    threads = block.threads

    def build(cuda: Any) -> Any:
        def kernel(dout: Any, order: Any, ends: Any, C: Any, dweight: Any) -> None:
            v = U(cuda.blockIdx.x)
            first, last = ends[v], ends[v + U(1)]
            c = cuda.threadIdx.x
            while c < C:
                total = T(0)
                i = first
                while i < last:
                    total += dout[U(order[U(i)]) * U(C) + U(c)]
                    i += 1
                dweight[v * U(C) + U(c)] = total
                c += threads

        return kernel

    return Kernel(build, (T[::1], int64[::1], int64[::1], int64, T[::1]), threads)


@entrance("NC!", "NC", "C")
def add_residual(x: Any, delta: Any, bias: Any | None) -> None:
    """x += delta + bias, in place: rows (N, C) and a bias (C,)."""
    x += delta
    if bias is not None:
        x += bias


@entrance("NC")
def column_sum(x: Any) -> Any:
    """The sum of the rows, (C,): the gradient of a bias."""
    return blocks.column_sum(x)


@entrance("NC", "N")
def embedding_backward(dout: Any, ids: Any, num_rows: int) -> Any:
    """(V, C) from dout (N, C) and ids (N,): row v is the sum of dout[n] over all n with ids[n] = v, in order of n."""
    C = dout.shape[1]
    dweight = np.empty_like(dout, shape=(num_rows, C))
    order = np.argsort(ids, kind="stable")
    ends = np.searchsorted(ids[order], np.arange(num_rows + 1, like=ids))
    launch(_embedding_backward(type_of(dout), block_for(dout, C)), num_rows, dout, order, ends, C, dweight)
    return dweight


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel of this family as a GPU gets it, with its name."""
    yield from cuda_norms.configurations()
    yield from cuda_softmax.configurations()
    for T in (float32, float64):
        yield f"column_sum {T}", strip_sums(T, WIDE)
        for block in (WIDE, NARROW):
            yield f"embedding_backward {T} {block.threads}", _embedding_backward(T, block)
