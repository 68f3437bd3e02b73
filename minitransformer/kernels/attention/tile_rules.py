"""What the rules of an attention call do to a tile of its scores.

A tile of scores stands at w[s], a row of 2 L lanes for each key, a lane for each query: `queries` of them from
query t of head h and batch row b on, `keys` keys from key j on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from minitransformer.kernels.philox import philox
from minitransformer.kernels.simd import exp_low, lanes, load, select_less, splat, store, tanh
from minitransformer.kernels.simd.registers import intrinsic, pointer_to
from minitransformer.kernels.simd.tiles import from_lanes, routine, to_lanes

_PART = 16  # keys: what is masked at the ends of a tile is left out by so many


@routine
def fill_spans(spans: Any, reach: Any, b: Any, T: Any, low: Any, high: Any) -> None:
    """First key and end of the keys from `low` to `high` of each query of batch row b.

    Of a query without any they are `high` and 0, so that they widen no tile.
    """
    offset = reach.offset[b if reach.offset.size > 1 else 0]
    end = min(high, reach.lengths[b]) if reach.lengths.size else high
    starts, ends = reach.starts, reach.ends
    for t in range(T):
        first, last = max(t + offset - reach.left, low), min(t + offset + reach.right + 1, end)
        if starts.size:
            first, last = max(first, starts[t]), min(last, ends[t])
        spans[2 * t] = first if first < last else high
        spans[2 * t + 1] = last if first < last else 0


@routine
def split_spans(spans: Any, rules: Any, b: Any, sizes: Any) -> None:
    """Cut those spans down to near keys, and put behind them, T further on, the spans of far keys, in their numbers."""
    T, never, far, origin = sizes.T, sizes.S, rules.far, rules.origin[b]
    for t in range(T):
        first, last = spans[2 * t], spans[2 * t + 1]
        position = t + rules.offset[b] - origin
        own = position // far.block * far.block - far.left + origin
        near = max(first, own)
        spans[2 * t] = near if near < last else never
        spans[2 * t + 1] = last if near < last else 0
        begin, end = _far_before(far, first - origin), _far_before(far, min(last, own) - origin)
        spans[2 * (T + t)] = begin if begin < end else far.total
        spans[2 * (T + t) + 1] = end if begin < end else 0


@routine
def _far_before(far: Any, position: Any) -> Any:
    """How many far keys come before a position."""
    return min(max((position - far.first + far.step - 1) // far.step, 0), far.total)


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
def allowed_cells(rules: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any) -> Any:
    """Whether the mask allows no cell of a tile (0), some (1) or all (2)."""
    stride_b, stride_h, stride_t, stride_s = rules.mask_strides
    start = b * stride_b + h * stride_h + t * stride_t + j * stride_s
    rows, columns, total = queries if stride_t else 1, keys if stride_s else 1, 0
    for q in range(rows):
        row = np.uint64(start + q * stride_t)  # unsigned, as a position that may be negative keeps LLVM from lanes
        for i in range(columns):
            total += rules.mask[row + np.uint64(i)]
        if 0 < total < (q + 1) * columns:
            return 1
    return 2 if total else 0


@routine
def masked_part(rules: Any, b: Any, h: Any, t: Any, queries: Any, step: Any, j: Any, keys: Any) -> Any:
    """The first key and the number of keys of a tile without its empty ends, and whether they are to be masked.

    Only keys side by side are looked at.
    """
    if not rules.mask.size:
        return j, keys, False
    if step > 1:
        return j, keys, True
    cells = allowed_cells(rules, b, h, t, queries, j, keys)
    if cells == 0:
        return j, 0, False
    if cells == 1:
        while keys > _PART and allowed_cells(rules, b, h, t, queries, j + keys - _PART, _PART) == 0:
            keys -= _PART
        while keys > _PART and allowed_cells(rules, b, h, t, queries, j, _PART) == 0:
            j, keys = j + _PART, keys - _PART
    return j, keys, cells == 1


@routine
def apply_mask(
    w: Any, s: Any, f: Any, x: Any, rules: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any
) -> None:
    """-inf where the mask does not allow; the memory of a tile at `f` and at `x` is overwritten."""
    T, L = w.dtype.type, lanes(w)
    W = 2 * L
    stride_b, stride_h, stride_t, stride_s = rules.mask_strides
    start = b * stride_b + h * stride_h + t * stride_t + j * stride_s
    if stride_t == 0:  # a mask of keys: the same for all queries
        for i in range(keys):
            if not rules.mask[start + i * stride_s]:
                w[s + i * W : s + i * W + W] = -np.inf
        return
    for q in range(queries):
        row, at = np.uint64(start + q * stride_t), np.uint64(x + q * keys)
        if stride_s == 0:
            for i in range(keys):
                w[at + np.uint64(i)] = rules.mask[row]
        else:
            for i in range(keys):
                w[at + np.uint64(i)] = rules.mask[row + np.uint64(i)]
    to_lanes(w, x, keys, queries, keys, w, f, W, T(1))
    half, never = splat(T(0.5)), splat(T(-np.inf))
    for at in range(0, keys * W, L):
        store(w, s + at, select_less(load(w, f + at), half, never, load(w, s + at)))


@routine
def change_scores(
    w: Any,
    s: Any,
    slope: Any,
    keeps_slope: Any,
    f: Any,
    x: Any,
    masked: Any,
    rules: Any,
    b: Any,
    h: Any,
    t: Any,
    queries: Any,
    j: Any,
    keys: Any,
) -> None:
    """Softcap, ALiBi, the user's function, bias and, if `masked`, the mask.

    The derivative of the first and the third is kept at w[slope] if `keeps_slope`, where there is one of them. The
    memory of a tile at `f` and at `x` is overwritten.
    """
    T, L = w.dtype.type, lanes(w)
    W = 2 * L
    if rules.softcap != 0:
        cap, one, four = splat(T(rules.softcap)), splat(T(1)), splat(T(4))
        for at in range(0, keys * W, L):
            score = load(w, s + at) / cap
            store(w, s + at, cap * tanh(score))
            if keeps_slope:  # 1 - tanh(x)**2, without the loss of its bits near 1: 4 e / (1 + e)**2, e = exp(-2 |x|)
                opposite = splat(T(0)) - score
                below = select_less(score, opposite, score, opposite)
                e = exp_low(below + below)
                store(w, (slope if rules.score_mod == 0 else f) + at, four * e / ((one + e) * (one + e)))
    if rules.slopes.size:
        slope_of_head, first = rules.slopes[h], t + rules.offset[b] - j
        for i in range(keys):
            row = np.uint64(s + i * W)
            for q in range(queries):
                w[row + np.uint64(q)] -= T(slope_of_head * abs(first + q - i))
    if rules.score_mod != 0:
        if _call(rules.score_mod, w, s, slope, b, h, t, queries, j, keys, rules.buffers) != 0:
            rules.failed[0] = 1
        if keeps_slope and rules.softcap != 0:
            for at in range(0, keys * W, L):
                store(w, slope + at, load(w, slope + at) * load(w, f + at))
    if rules.bias.size:
        stride_b, stride_h, stride_t, stride_s = rules.bias_strides
        start = b * stride_b + h * stride_h + t * stride_t + j * stride_s
        if stride_s == 0:
            for i in range(keys):
                for q in range(queries):
                    w[s + i * W + q] += rules.bias[start + q * stride_t]
        else:
            to_lanes(rules.bias, start, stride_t, queries, keys, w, f, W, T(1))
            for at in range(0, keys * W, L):
                store(w, s + at, load(w, s + at) + load(w, f + at))
    if masked:
        apply_mask(w, s, f, x, rules, b, h, t, queries, j, keys)


@intrinsic
def _call_code(
    typingctx: Any,
    address: Any,
    w: Any,
    s: Any,
    slope: Any,
    b: Any,
    h: Any,
    t: Any,
    queries: Any,
    j: Any,
    keys: Any,
    buffers: Any,
) -> Any:
    """Call a user's code, see `user_code`: a function compiled by Numba, whose status is 0 unless it raised."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, w, s, slope, *integers, buffers = args
        scores, slopes = (pointer_to(context, builder, sig.args[1], w, at) for at in (s, slope))
        numbers = pointer_to(context, builder, sig.args[-1], buffers, integers[0].type(0))
        result = cgutils.alloca_once(builder, ir.IntType(64))
        exception = cgutils.alloca_once(builder, ir.IntType(8).as_pointer())
        given = [result, exception, scores, slopes, *integers, numbers]
        code = ir.FunctionType(ir.IntType(32), [x.type for x in given]).as_pointer()
        return builder.call(builder.inttoptr(address, code), given)

    i = types.intp
    return types.int32(types.int64, w, i, i, i, i, i, i, i, i, buffers), emit


_call: Any = _call_code  # it is called without the typing context


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
    w: Any,
    s: Any,
    ones: Any,
    dbias: Any,
    sizes: Any,
    b: Any,
    h: Any,
    t: Any,
    queries: Any,
    key: Any,
    step: Any,
    keys: Any,
    adds: Any,
) -> None:
    """Write the gradient of the scores of a tile where it belongs in dbias, flat of (B, H, T, S), or add it.

    Far keys of one query may be near ones of another in its tile, so that both of their tiles have the cell.
    """
    W, at = 2 * lanes(w), ((b * sizes.H + h) * sizes.T + t) * sizes.S + key
    if not adds:
        from_lanes(w, s, W, dbias, at, sizes.S, queries, keys, w, ones)
    else:
        for q in range(queries):
            for i in range(keys):
                dbias[at + q * sizes.S + i * step] += w[s + i * W + q]
