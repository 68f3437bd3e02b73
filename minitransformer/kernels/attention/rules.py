"""What the options of an attention call mean to a tile of its scores.

All rules that compare positions (causal, window, lengths, documents) leave each query one interval of keys. So they
cost a kernel nothing: what lies outside is never computed, and only rows of a tile where some of its queries have a
key and others have not are masked. All else is in `Rules`, and plain attention is compiled without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import boolean, float64, int64, types, uint8, uint64

from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.tiles import from_lanes, routine
from minitransformer.kernels.philox import philox
from minitransformer.kernels.simd import exp_low, lanes, load, select_less, splat, store, tanh

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


class Rules(NamedTuple):
    """Everything that changes single scores or weights; numbers that are not used are 0 and arrays empty.

    Masks and biases are flat, with strides in elements for B, H, T and S, 0 where they are broadcast.
    """

    softcap: float
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


def rules_type(T: Any) -> Any:
    """Numba's type of `Rules` for scores of type T."""
    strides, words = types.UniTuple(int64, 4), types.UniTuple(uint64, 3)
    fields = [float64, int64[::1], float64[::1], uint8[::1], strides, T[::1], strides, boolean, uint64, float64]
    return types.NamedTuple([*fields, words, types.UniTuple(uint64, 2)], Rules)


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


def rules_of(problem: Problem, bias: np.ndarray | None, sizes: Sizes, dtype: np.dtype) -> Rules | None:
    """The rules that are more than intervals; None if there are none."""
    mask = problem.mask
    if problem.documents is not None and not _ascending(problem.documents):
        same = problem.documents[:, None] == problem.documents
        mask = same if mask is None else mask & same
    slopes = problem.alibi_slopes
    if mask is None and bias is None and slopes is None and not problem.softcap and not problem.dropout_p:
        return None
    flat_mask, mask_strides = _flat(mask, np.bool_, sizes)
    flat_bias, bias_strides = _flat(bias, dtype, sizes)
    seed, step, site, row = problem.dropout_key or (0, 0, 0, 0)
    return Rules(
        softcap=float(problem.softcap),
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
    )


def _flat(array: np.ndarray | None, dtype: Any, sizes: Sizes) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The elements of an array that broadcasts to (B, H, T, S), each once, and the strides of those four axes."""
    if array is None:
        return np.zeros(0, dtype), (0, 0, 0, 0)
    array = array[(np.newaxis,) * (4 - array.ndim)]
    array = array[tuple(slice(1 if stride == 0 else None) for stride in array.strides)]
    array = _ready(array, dtype)
    steps = [0 if n == 1 else stride // array.itemsize for n, stride in zip(array.shape, array.strides, strict=True)]
    return array.reshape(-1), (steps[0], steps[1], steps[2], steps[3])


# --- on a tile -------------------------------------------------------------------------------------------
# A tile of scores stands at w[s], a row of 2 L lanes for each key, a lane for each query: `queries` of them from
# query t of head h and batch row b on, `keys` keys from key j on.


@routine
def fill_spans(spans: Any, reach: Any, b: Any, T: Any, S: Any) -> None:
    """First key and end of the keys of each query of batch row b; without any S and 0, so that they widen no tile."""
    offset = reach.offset[b if reach.offset.size > 1 else 0]
    end = min(S, reach.lengths[b]) if reach.lengths.size else S
    starts, ends = reach.starts, reach.ends
    for t in range(T):
        first, last = max(t + offset - reach.left, 0), min(t + offset + reach.right + 1, end)
        if starts.size:
            first, last = max(first, starts[t]), min(last, ends[t])
        spans[2 * t] = first if first < last else S
        spans[2 * t + 1] = last if first < last else 0


@routine
def span_together(spans: Any, t: Any, queries: Any) -> Any:
    """Keys that any of some queries may attend to, and keys that all of them may: two intervals, as four numbers."""
    low, high = spans[2 * t], spans[2 * t + 1]
    inner_low, inner_high = low, high
    for q in range(t + 1, t + queries):
        low, inner_low = min(low, spans[2 * q]), max(inner_low, spans[2 * q])
        high, inner_high = max(high, spans[2 * q + 1]), min(inner_high, spans[2 * q + 1])
    return low, high, inner_low, inner_high


@routine
def cut(
    w: Any, s: Any, bounds: Any, spans: Any, t: Any, queries: Any, j: Any, keys: Any, inner_low: Any, inner_high: Any
) -> None:
    """-inf, in one register of each key, for keys outside of a query's span; those of the inner one are in all.

    Two rows of scratch memory at `bounds` hold the spans.
    """
    T, L = w.dtype.type, lanes(w)
    for q in range(min(L, queries)):
        w[bounds + q] = T(min(max(spans[2 * (t + q)] - j, 0), keys))
        w[bounds + 2 * L + q] = T(min(max(spans[2 * (t + q) + 1] - j, 0), keys))
    for q in range(queries, L):
        w[bounds + q], w[bounds + 2 * L + q] = T(0), T(keys)
    firsts, ends, never = load(w, bounds), load(w, bounds + 2 * L), splat(T(-np.inf))
    for i in range(keys):
        if j + i < inner_low or j + i >= inner_high:
            key, at = splat(T(i)), s + i * 2 * L
            store(w, at, select_less(key, ends, select_less(key, firsts, never, load(w, at)), never))


@routine
def change_scores(
    w: Any, s: Any, slope: Any, keeps_slope: Any, rules: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any
) -> None:
    """Softcap, ALiBi, bias and mask; the derivative of the first is kept at w[slope] if `keeps_slope`."""
    T, L = w.dtype.type, lanes(w)
    W = 2 * L
    if rules.softcap != 0:
        cap, one, four = splat(T(rules.softcap)), splat(T(1)), splat(T(4))
        for at in range(0, keys * W, L):
            x = load(w, s + at) / cap
            store(w, s + at, cap * tanh(x))
            if keeps_slope:  # 1 - tanh(x)**2, without the loss of its bits near 1: 4 e / (1 + e)**2, e = exp(-2 |x|)
                opposite = splat(T(0)) - x
                below = select_less(x, opposite, x, opposite)
                e = exp_low(below + below)
                store(w, slope + at, four * e / ((one + e) * (one + e)))
    if rules.slopes.size:
        for q in range(queries):
            own, steepness = t + q + rules.offset[b], rules.slopes[h]
            for i in range(keys):
                w[s + i * W + q] -= T(steepness * abs(own - j - i))
    if rules.bias.size:
        stride_b, stride_h, stride_t, stride_s = rules.bias_strides
        start = b * stride_b + h * stride_h + t * stride_t + j * stride_s
        for q in range(queries):
            for i in range(keys):
                w[s + i * W + q] += rules.bias[start + q * stride_t + i * stride_s]
    if rules.mask.size:
        stride_b, stride_h, stride_t, stride_s = rules.mask_strides
        start = b * stride_b + h * stride_h + t * stride_t + j * stride_s
        if stride_t == 0:  # a mask of keys: the same for all queries
            for i in range(keys):
                if not rules.mask[start + i * stride_s]:
                    w[s + i * W : s + i * W + W] = -np.inf
        else:
            for q in range(queries):
                for i in range(keys):
                    if not rules.mask[start + q * stride_t + i * stride_s]:
                        w[s + i * W + q] = -np.inf


@routine
def draw_factors(
    w: Any, f: Any, rules: Any, sizes: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any
) -> None:
    """The factors of dropout at w[f], laid out as the tile: those of `random.keep_mask` for (B, H, T, S)."""
    T, W = w.dtype.type, 2 * lanes(w)
    kept = T(rules.kept)
    row, site, step = rules.counter
    row += np.uint64(b)
    for q in range(queries):
        start = (h * sizes.T + t + q) * sizes.S + j
        for quad in range(start // 4, (start + keys + 3) // 4):
            words = philox(np.uint64(quad), row, site, step, rules.key[0], rules.key[1])
            for n in range(4):
                i = 4 * quad + n - start
                if 0 <= i < keys:
                    w[f + i * W + q] = T(0) if words[n] < rules.drop_below else kept
    for q in range(queries, W):
        for i in range(keys):
            w[f + i * W + q] = T(0)


@routine
def keep_dbias(
    w: Any, s: Any, ones: Any, dbias: Any, sizes: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any
) -> None:
    """Write the gradient of the scores of a tile where it belongs in dbias, flat of (B, H, T, S)."""
    at = ((b * sizes.H + h) * sizes.T + t) * sizes.S + j
    from_lanes(w, s, 2 * lanes(w), dbias, at, sizes.S, queries, keys, w, ones)
