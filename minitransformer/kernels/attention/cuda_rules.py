"""What the options of an attention call mean to a cell of its scores, as code for a GPU.

The rules are those of `rules.py`. A call's set of `parts`, the names of the rules that it has, is compiled into the
kernels, so that what a call does not ask for costs it nothing. What kernels are given of the others is 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import boolean, float64, int64, types, uint64

from minitransformer.kernels.attention.cuda_tiles import U
from minitransformer.kernels.attention.cuda_user import Mods, change, derivative, mods_of
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.rules import FAR, Far, Sizes, far_of, reach_of
from minitransformer.kernels.gpu.arrays import like, to_host
from minitransformer.kernels.philox import philox

# Names of rules, and the functions of the user if there are any.
Parts = frozenset[str | Mods]

# The first six leave a query an interval of keys, or two. "offsets" is for positions that differ between batch rows.
ALL_PARTS: Parts = frozenset(
    ("offsets", "left", "right", "lengths", "documents", "sparse", "softcap", "alibi", "mask", "bias", "dropout")
)
NO_QUAD = 2**64 - 1


class Rules(NamedTuple):
    """The arrays and numbers of a call's rules; masks and biases have strides in elements for B, H, T and S."""

    offset: Any  # int64, or (B,) of them: query t is at position t + offset
    left: int  # keys to the left of its position that a query reaches
    right: int
    lengths: Any  # (B,) int64
    starts: Any  # (T,) int64: of the query's document
    ends: Any  # (T,) int64
    far: Far
    origin: Any  # (B,) int64
    softcap: float
    slopes: Any  # (H,) float64
    mask: Any  # bool
    mask_strides: tuple[int, int, int, int]
    bias: Any
    bias_strides: tuple[int, int, int, int]
    drop_below: int  # words below this are dropped
    kept: float  # factor of what is kept
    draw: tuple[int, ...]  # row, site, step and the two words of the seed
    buffers: tuple[Any, ...]  # of the functions of the user


_ARRAYS = {
    "offsets": ("offset",),
    "lengths": ("lengths",),
    "documents": ("starts", "ends"),
    "sparse": ("origin",),
    "alibi": ("slopes",),
    "mask": ("mask",),
    "bias": ("bias",),
}


def rules_type(T: Any, parts: Parts) -> Any:
    """Numba's type of `Rules` for scores of type T."""
    given = {field for part, fields in _ARRAYS.items() if part in parts for field in fields}
    elements = {"slopes": float64, "mask": boolean, "bias": T}
    strides = types.UniTuple(int64, 4)
    others = {
        "far": FAR,
        "softcap": T,
        "mask_strides": strides,
        "bias_strides": strides,
        "drop_below": uint64,
        "kept": T,
        "draw": types.UniTuple(uint64, 5),
        "buffers": types.Tuple(() if (mods := _mods_in(parts)) is None else mods.buffers),
    }
    fields = [elements.get(f, int64)[::1] if f in given else others.get(f, int64) for f in Rules._fields]
    return types.NamedTuple(fields, Rules)


def rules_of(problem: Problem, bias: Any, q: Any, sizes: Sizes, slopes: bool) -> tuple[Parts, Rules]:
    """The parts of `problem` and its numbers, its arrays on the device of q, for kernels with or without `slopes`.

    `ConfigError` or `GradientError` for a `score_mod` that is not fit, see `cuda_user.mods_of`.
    """
    mods, buffers = mods_of(problem, q, (sizes.B, sizes.H, sizes.T, sizes.S), slopes)
    fields = "offset", "key_lengths", "documents"
    positions: Any = {name: to_host(x) for name in fields if (x := getattr(problem, name)) is not None}
    reach = reach_of(problem._replace(**positions))
    documents, mask, sparse = positions.get("documents"), problem.mask, problem.sparse
    if documents is not None and not reach.starts.size:  # they are no intervals
        same = documents[:, None] == documents
        mask = same if mask is None else like(q, same) & _there(q, mask, np.bool_)
    origin = None if sparse is None else np.broadcast_to(to_host(sparse.origin), (sizes.B,))
    seed, step, site, row = problem.dropout_key or (0, 0, 0, 0)
    offsets = set(reach.offset.tolist())
    given = {
        "offsets": len(offsets) > 1,
        "left": problem.window[0] is not None,
        "right": problem.causal or problem.window[1] is not None,
        "lengths": problem.key_lengths is not None,
        "documents": reach.starts.size > 0,
        "sparse": sparse is not None,
        "softcap": problem.softcap != 0,
        "alibi": problem.alibi_slopes is not None,
        "mask": mask is not None,
        "bias": bias is not None,
        "dropout": problem.dropout_p > 0,
    }
    flat_mask, mask_strides = _spread(q, mask, np.bool_)
    flat_bias, bias_strides = _spread(q, bias, q.dtype)
    rules = Rules(
        offset=_there(q, reach.offset, np.int64) if len(offsets) > 1 else min(offsets, default=0),
        left=reach.left,
        right=reach.right,
        lengths=_there(q, reach.lengths, np.int64) if given["lengths"] else 0,
        starts=_there(q, reach.starts, np.int64) if given["documents"] else 0,
        ends=_there(q, reach.ends, np.int64) if given["documents"] else 0,
        far=Far(0, 1, 0, 1, 0) if sparse is None else far_of(sparse),
        origin=0 if origin is None else _there(q, origin, np.int64),
        softcap=problem.softcap,
        slopes=_there(q, problem.alibi_slopes, np.float64) if given["alibi"] else 0,
        mask=flat_mask,
        mask_strides=mask_strides,
        bias=flat_bias,
        bias_strides=bias_strides,
        drop_below=round(problem.dropout_p * 2**32),
        kept=1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0,
        draw=(row, site, step, seed & 0xFFFFFFFF, seed >> 32),
        buffers=buffers,
    )
    names = frozenset(name for name, there in given.items() if there)
    return names if mods is None else names | {mods}, rules


def _there(q: Any, array: Any, dtype: Any) -> Any:
    """The numbers of an array, which may be the host's, side by side on the device of q."""
    if isinstance(array, np.ndarray):
        return like(q, np.ascontiguousarray(array, dtype))
    return array if array.dtype == dtype and array.flags.c_contiguous else array.astype(dtype, order="C")


def _spread(q: Any, array: Any, dtype: Any) -> tuple[Any, tuple[int, int, int, int]]:
    """The elements of an array that broadcasts to (B, H, T, S), each once, and the strides of those four axes."""
    if array is None:
        return 0, (0, 0, 0, 0)
    array = array[(np.newaxis,) * (4 - array.ndim)]
    array = _there(q, array[tuple(slice(1 if stride == 0 else None) for stride in array.strides)], dtype)
    steps = [0 if n == 1 else stride // array.itemsize for n, stride in zip(array.shape, array.strides, strict=True)]
    return array.reshape(-1), (steps[0], steps[1], steps[2], steps[3])


def is_plain(parts: Parts) -> bool:
    """Whether there is no more to a cell than whether its key is in the interval of its query."""
    return parts <= {"offsets", "left", "right", "lengths", "documents", "sparse"}


def bends_scores(parts: Parts) -> bool:
    """Whether the derivative of scores is other than 1."""
    return "softcap" in parts or _mods_in(parts) is not None


def _mods_in(parts: Parts) -> Mods | None:
    return next((part for part in parts if isinstance(part, Mods)), None)


class RuleCode(NamedTuple):
    """Device functions for `Rules`, of query t of head h and batch row b, and a key."""

    far_before: Any  # (rules, b, position) -> how many far keys come before a position
    span: Any  # (rules, b, t, run, low, high) -> first and end of the keys from low to high that it may attend to
    seen_by: Any  # (rules, b, first, last, run, T) -> first and end of the queries that may attend to any of such keys
    reaches: Any  # (rules, b, t, key, S) -> whether it is in the spans of that query
    score: Any  # (rules, score, b, h, t, key) -> the score after softcap, ALiBi, the user's function, bias and mask
    slope: Any  # (rules, score, b, h, t, key) -> its derivative before the bias
    factor: Any  # (rules, words, sizes, b, h, t, key) -> 0, or what dropout multiplies by; `words` is a thread's own


def rule_code(cuda: Any, T: Any, parts: Parts, slopes: bool) -> RuleCode:
    """For kernels with or without slopes. "sparse" makes two runs: of near keys, and of the numbers of far ones."""
    offsets, left, right, lengths = (name in parts for name in ("offsets", "left", "right", "lengths"))
    documents, sparse, softcap, alibi = (name in parts for name in ("documents", "sparse", "softcap", "alibi"))
    masked, biased = "mask" in parts, "bias" in parts
    never, zero, one, two, four = T(-math.inf), T(0), T(1), T(2), T(4)
    mods = _mods_in(parts)
    modded = mods is not None
    changed: Any = None if mods is None else change(cuda, T, mods)
    slope_of_change: Any = derivative(cuda, T, mods) if mods is not None and slopes else None
    draw_words = cuda.jit(device=True, forceinline=True)(philox)

    @cuda.jit(device=True, forceinline=True)
    def offset_of(rules: Any, b: Any) -> Any:
        if offsets:
            return rules.offset[U(b)]
        return rules.offset

    @cuda.jit(device=True, forceinline=True)
    def far_before(rules: Any, b: Any, position: Any) -> Any:
        far = rules.far
        return min(max((position - rules.origin[U(b)] - far.first + far.step - 1) // far.step, 0), far.total)

    @cuda.jit(device=True, forceinline=True)
    def span(rules: Any, b: Any, t: Any, run: Any, low: Any, high: Any) -> Any:
        position, first, end = t + offset_of(rules, b), low, high
        if left:
            first = max(first, position - rules.left)
        if right:
            end = min(end, position + rules.right + 1)
        if lengths:
            end = min(end, rules.lengths[U(b)])
        if documents:
            first, end = max(first, rules.starts[U(t)]), min(end, rules.ends[U(t)])
        if sparse:
            far, origin = rules.far, rules.origin[U(b)]
            near = (position - origin) // far.block * far.block - far.left + origin
            if run == 0:
                first = max(first, near)
            else:
                first, end = far_before(rules, b, first), far_before(rules, b, min(end, near))
        return first, end

    @cuda.jit(device=True, forceinline=True)
    def seen_by(rules: Any, b: Any, first: Any, last: Any, run: Any, T: Any) -> Any:
        offset, begin, end = offset_of(rules, b), 0, T
        if left:
            end = min(end, last + rules.left - offset + 1)
        if right:
            begin = max(begin, first - rules.right - offset)
        if lengths and first >= rules.lengths[U(b)]:
            end = 0
        if documents:
            begin, end = max(begin, rules.starts[U(first)]), min(end, rules.ends[U(last)])
        if sparse:
            far, origin = rules.far, rules.origin[U(b)]
            if run == 0:
                end = min(end, ((last - origin + far.left) // far.block + 1) * far.block + origin - offset)
            else:
                begin = max(begin, ((first - origin + far.left) // far.block + 1) * far.block + origin - offset)
        return begin, end

    @cuda.jit(device=True, forceinline=True)
    def reaches(rules: Any, b: Any, t: Any, key: Any, S: Any) -> Any:
        first, end = span(rules, b, t, 0, 0, S)
        reached = first <= key < end
        if sparse and not reached:
            first, end = span(rules, b, t, 1, 0, S)
            n = far_before(rules, b, key)
            reached = first <= n < end and far_before(rules, b, key + 1) > n
        return reached

    @cuda.jit(device=True, forceinline=True)
    def before_functions(rules: Any, x: Any, b: Any, h: Any, t: Any, key: Any) -> Any:
        if softcap:
            x = rules.softcap * T(math.tanh(x / rules.softcap))
        if alibi:
            x -= T(rules.slopes[U(h)] * abs(t + offset_of(rules, b) - key))
        return x

    @cuda.jit(device=True, forceinline=True)
    def score(rules: Any, x: Any, b: Any, h: Any, t: Any, key: Any) -> Any:
        if masked:
            at = rules.mask_strides
            if not rules.mask[U(b * at[0] + h * at[1] + t * at[2] + key * at[3])]:
                return never
        x = before_functions(rules, x, b, h, t, key)
        if modded:
            x = changed(x, b, h, t, key, rules.buffers)
        if biased:
            at = rules.bias_strides
            x += rules.bias[U(b * at[0] + h * at[1] + t * at[2] + key * at[3])]
        return x

    @cuda.jit(device=True, forceinline=True)
    def slope(rules: Any, x: Any, b: Any, h: Any, t: Any, key: Any) -> Any:
        steepness = one
        if modded:
            steepness = slope_of_change(before_functions(rules, x, b, h, t, key), b, h, t, key, rules.buffers)
        if softcap:  # 1 - tanh(x)**2, without the loss of its bits near 1: 4 e / (1 + e)**2 with e = exp(-2 |x|)
            e = T(math.exp(-two * abs(x / rules.softcap)))
            steepness *= four * e / ((one + e) * (one + e))
        return steepness

    @cuda.jit(device=True, forceinline=True)
    def factor(rules: Any, words: Any, sizes: Any, b: Any, h: Any, t: Any, key: Any) -> Any:
        at = (h * sizes.T + t) * sizes.S + key
        quad, lane = U(at // 4), at % 4
        if words[4] != quad:  # keys side by side share what is drawn
            row, site, step, low, high = rules.draw
            words[0], words[1], words[2], words[3] = draw_words(quad, U(row) + U(b), U(site), U(step), U(low), U(high))
            words[4] = quad
        word = words[0]
        if lane == 1:
            word = words[1]
        elif lane == 2:
            word = words[2]
        elif lane == 3:
            word = words[3]
        return zero if word < U(rules.drop_below) else rules.kept

    return RuleCode(far_before, span, seen_by, reaches, score, slope, factor)
