"""Embedding lookup; the gradient of a repeated id is the sum over its occurrences."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import check_arrays, register
from minitransformer.errors import DTypeError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import contiguous, is_array, like


class Lookup(NamedTuple):
    shape: tuple[int, int]
    ids: np.ndarray
    kernel: ModuleType


def check_ids(op: str, ids: np.ndarray, vocab_size: int) -> None:
    """`DTypeError` unless ids are integers, `RangeError` naming the first one outside the vocabulary."""
    if not is_array(ids) or ids.dtype.kind not in "iu":
        raise DTypeError(
            op,
            f"ids have dtype {getattr(ids, 'dtype', type(ids).__name__)}, expected an integer type",
            "Encode the text with a tokenizer, or cast: ids.astype(np.int64)",
        )
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = np.argwhere((ids < 0) | (ids >= vocab_size))[0]
        position = tuple(int(i) for i in wrong)
        raise RangeError(
            op,
            f"the id at position {position} is {int(ids[position])}, expected 0 to {vocab_size - 1} "
            f"(vocabulary size {vocab_size})",
            "Use the tokenizer that the model was made with, or a larger vocab_size",
        )


def embedding_forward(weight: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, Lookup]:
    """Rows of weight (V, C) at ids (...): (..., C). Ids may be on the host, where they are checked soonest."""
    check_arrays("embedding", weight=weight)
    if weight.ndim != 2:
        raise ShapeError("embedding", f"weight has shape {weight.shape}, expected (V, C)", "Pass a matrix")
    check_ids("embedding", ids, weight.shape[0])
    if ids.ndim == 64:  # no array has more axes
        raise ShapeError("embedding", f"ids have {ids.ndim} axes, expected less", "Reshape them")
    ids = like(weight, ids)
    return np.take(weight, ids, axis=0), Lookup(weight.shape, ids, kernels.serve("rowwise", weight))


def embedding_backward(dout: np.ndarray, saved: Lookup) -> tuple[np.ndarray]:
    """dweight[v] = sum of dout over the positions with id v, in order of position."""
    vocab_size, width = saved.shape
    ids = saved.ids.reshape(-1)
    drows = contiguous(dout).reshape(ids.size, width)
    return (saved.kernel.embedding_backward(drows, ids, vocab_size),)


register("embedding", embedding_forward, embedding_backward)
