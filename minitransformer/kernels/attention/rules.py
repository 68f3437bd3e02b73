"""What the options of an attention call mean to a tile of its scores.

All rules that compare positions (causal, window, lengths, documents) leave each query one interval of keys. So they
cost a kernel nothing: what lies outside is never computed, and only rows of a tile where some of its queries have a
key and others have not are masked. All else is in `Rules`, and plain attention is compiled without it. With `Sparse`
there are two intervals: one of near keys, one of the numbers of far keys, whose rows lie evenly spaced.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import boolean, float64, int64, types, uint8, uint64

from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.kernels.attention.user_code import TileCode

_FAR = 2**62
_NONE = np.zeros(0, np.int64)


class Sizes(NamedTuple):
    """B batch rows, H query heads, K key heads, T queries, S keys, D the width of queries and keys, E of values."""

    B: int
    H: int
    K: int
    T: int
    S: int
    D: int
    E: int


SIZES = types.NamedUniTuple(int64, len(Sizes._fields), Sizes)


class Reach(NamedTuple):
    """What leaves each query an interval of keys; arrays are empty for rules that are not set.

    The query at position p reaches from p - left to p + right.
    """

    offset: np.ndarray  # (B,) or (1,) int64: query t is at position t + offset
    left: int
    right: int
    lengths: np.ndarray  # (B,) int64
    starts: np.ndarray  # (T,) int64: of the query's document
    ends: np.ndarray  # (T,) int64


REACH = types.NamedTuple([int64[::1], int64, int64, int64[::1], int64[::1], int64[::1]], Reach)


class Far(NamedTuple):
    """`Sparse` in numbers: where near keys begin, and which are far; `step` is 0 if there is no such rule."""

    left: int
    block: int
    first: int
    step: int
    total: int


FAR = types.NamedUniTuple(int64, len(Far._fields), Far)


class Rules(NamedTuple):
    """Everything that changes single scores or weights; numbers that are not used are 0 and arrays empty.

    Masks and biases are flat, with strides in elements for B, H, T and S, 0 where they are broadcast.
    """

    softcap: float
    score_mod: int  # the address of the code of the user's function
    buffers: np.ndarray  # int64: for that code
    failed: np.ndarray  # (1,) int64, not 0 if it raised
    offset: np.ndarray  # (B,) int64
    slopes: np.ndarray  # (H,) float64, or empty
    mask: np.ndarray  # uint8
    mask_strides: tuple[int, int, int, int]
    bias: np.ndarray
    bias_strides: tuple[int, int, int, int]
    dropout: bool
    drop_below: np.uint64  # words below this are dropped
    kept: float  # factor of what is kept
    counter: tuple[np.uint64, ...]  # first row, site, step
    key: tuple[np.uint64, ...]
    far: Far
    origin: np.ndarray  # (B,) int64, or empty


def rules_type(T: Any) -> Any:
    """Numba's type of `Rules` for scores of type T."""
    strides, words = types.UniTuple(int64, 4), types.UniTuple(uint64, 3)
    fields = [
        float64,
        int64,
        int64[::1],
        int64[::1],
        int64[::1],
        float64[::1],
        uint8[::1],
        strides,
        T[::1],
        strides,
        boolean,
        uint64,
        float64,
    ]
    return types.NamedTuple([*fields, words, types.UniTuple(uint64, 2), FAR, int64[::1]], Rules)


def reach_of(problem: Problem) -> Reach:
    """The rules that compare positions."""
    left, right = problem.window
    right = _FAR if right is None else right
    documents, starts, ends = problem.documents, _NONE, _NONE
    if documents is not None and _ascending(documents):
        starts, ends = np.searchsorted(documents, documents), np.searchsorted(documents, documents, "right")
    return Reach(
        offset=_ready(problem.offset, np.int64),
        left=_FAR if left is None else left,
        right=min(right, 0) if problem.causal else right,
        lengths=_NONE if problem.key_lengths is None else _ready(problem.key_lengths, np.int64),
        starts=starts,
        ends=ends,
    )


def _ready(array: np.ndarray, dtype: Any) -> np.ndarray:
    if array.dtype == dtype and array.flags.carray:
        return array
    return np.require(array, dtype, ["C", "A", "W"])


def _ascending(documents: np.ndarray) -> bool:
    return bool((documents[1:] >= documents[:-1]).all())


def rules_of(
    problem: Problem, bias: np.ndarray | None, sizes: Sizes, dtype: np.dtype, code: TileCode | None
) -> Rules | None:
    """The rules that are more than intervals; None if there are none. `code` is that of `problem.score_mod`."""
    mask = problem.mask
    if problem.documents is not None and not _ascending(problem.documents):
        same = problem.documents[:, None] == problem.documents
        mask = same if mask is None else mask & same
    slopes, sparse = problem.alibi_slopes, problem.sparse
    if mask is bias is slopes is code is sparse is None and not problem.softcap and not problem.dropout_p:
        return None
    flat_mask, mask_strides = _flat(mask, np.bool_, sizes)
    flat_bias, bias_strides = _flat(bias, dtype, sizes)
    seed, step, site, row = problem.dropout_key or (0, 0, 0, 0)
    return Rules(
        softcap=float(problem.softcap),
        score_mod=0 if code is None else code.address,
        buffers=_NONE if code is None else code.buffers,
        failed=_NONE if code is None else code.failed,
        offset=_ready(np.broadcast_to(problem.offset, (sizes.B,)), np.int64),
        slopes=np.zeros(0) if slopes is None else _ready(slopes, np.float64),
        mask=flat_mask.view(np.uint8),
        mask_strides=mask_strides,
        bias=flat_bias,
        bias_strides=bias_strides,
        dropout=problem.dropout_p > 0,
        drop_below=np.uint64(round(problem.dropout_p * 2**32)),
        kept=1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0,
        counter=(np.uint64(row), np.uint64(site), np.uint64(step)),
        key=(np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)),
        far=Far(0, 1, 0, 0, 0) if sparse is None else far_of(sparse),
        origin=_NONE if sparse is None else _ready(np.broadcast_to(sparse.origin, (sizes.B,)), np.int64),
    )


def far_of(sparse: Sparse) -> Far:
    """The rule in numbers."""
    return Far(sparse.left, sparse.block, sparse.far.start, sparse.far.step, len(sparse.far))


def _flat(array: np.ndarray | None, dtype: Any, sizes: Sizes) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The elements of an array that broadcasts to (B, H, T, S), each once, and the strides of those four axes."""
    if array is None:
        return np.zeros(0, dtype), (0, 0, 0, 0)
    array = array[(np.newaxis,) * (4 - array.ndim)]
    array = array[tuple(slice(1 if stride == 0 else None) for stride in array.strides)]
    array = _ready(array, dtype)
    steps = [0 if n == 1 else stride // array.itemsize for n, stride in zip(array.shape, array.strides, strict=True)]
    return array.reshape(-1), (steps[0], steps[1], steps[2], steps[3])
