"""Row kernels in Numba: the functions of `reference.py`, each row read once from memory and then in the cache.

Each runs on the calling thread, and adds in an order that depends on the shapes and the processor's registers alone.
Arrays of more than one float dtype are served by the reference; see `entrance.py` for what else is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.rowwise import reference
from minitransformer.kernels.rowwise.norms import (
    add_layer_norm,
    layer_norm_backward,
    layer_norm_backward_add,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from minitransformer.kernels.rowwise.softmax import (
    cross_entropy_backward,
    cross_entropy_forward,
    log_softmax_backward,
    log_softmax_forward,
    softmax_backward,
    softmax_forward,
)
from minitransformer.kernels.simd import lanes, load_up_to, store_up_to

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


@kernel(lambda T: void(T[:, ::1], T[:, ::1], T[::1]))
def _add_residual(x: Any, delta: Any, bias: Any) -> None:
    C = bias.size
    for n in range(x.shape[0]):
        for c in range(0, C, lanes(x)):
            i, left = n * C + c, C - c
            total = load_up_to(x, i, left) + load_up_to(delta, i, left)
            store_up_to(x, i, left, total + load_up_to(bias, c, left))


@kernel(lambda T: void(T[:, ::1], T[::1]))
def _column_sum(x: Any, out: Any) -> None:
    """Eight rows at a time: `out` is then read and written once for all of them."""
    N, C, L = x.shape[0], x.shape[1], lanes(x)
    for n in range(0, N - N % 8, 8):
        i = n * C
        for c in range(0, C, L):
            left = C - c
            a = load_up_to(x, i + c, left) + load_up_to(x, i + C + c, left)
            b = load_up_to(x, i + 2 * C + c, left) + load_up_to(x, i + 3 * C + c, left)
            d = load_up_to(x, i + 4 * C + c, left) + load_up_to(x, i + 5 * C + c, left)
            e = load_up_to(x, i + 6 * C + c, left) + load_up_to(x, i + 7 * C + c, left)
            store_up_to(out, c, left, load_up_to(out, c, left) + ((a + b) + (d + e)))
    for n in range(N - N % 8, N):
        for c in range(0, C, L):
            left = C - c
            store_up_to(out, c, left, load_up_to(out, c, left) + load_up_to(x, n * C + c, left))


@kernel(lambda T: void(T[:, ::1], int64[::1], T[:, ::1]))
def _embedding_backward(dout: Any, ids: Any, dweight: Any) -> None:
    C = dout.shape[1]
    for n in range(ids.size):
        start, row = n * C, ids[n] * C
        for c in range(0, C, lanes(dout)):
            left = C - c
            store_up_to(dweight, row + c, left, load_up_to(dweight, row + c, left) + load_up_to(dout, start + c, left))


@entrance(reference, "NC!", "NC", "C")
def add_residual(x: np.ndarray, delta: np.ndarray, bias: np.ndarray | None) -> None:
    """x += delta + bias, in place: rows (N, C) and a bias (C,)."""
    _add_residual(x, delta, np.zeros(x.shape[1], x.dtype) if bias is None else bias)


@entrance(reference, "NC")
def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows, (C,): the gradient of a bias."""
    out = np.zeros(x.shape[1], x.dtype)
    _column_sum(x, out)
    return out


@entrance(reference, "NC", "N")
def embedding_backward(dout: np.ndarray, ids: np.ndarray, num_rows: int) -> np.ndarray:
    """(V, C) from dout (N, C) and ids (N,): row v is the sum of dout[n] over all n with ids[n] = v, in order of n."""
    dweight = np.zeros((num_rows, dout.shape[1]), dout.dtype)
    _embedding_backward(dout, ids, dweight)
    return dweight
