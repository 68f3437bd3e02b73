"""Attention forward: tiles of 2 L queries, which lie in the lanes of registers, against blocks of keys.

For a tile, S^T = K Q^T (keys x queries), P^T = exp(S^T - m) with m the largest score of each query so far, and
O^T += V^T P^T, where m grows after O^T and the sums l of P^T are scaled down (the online softmax of Milakov and
Gimelshein 2018, in tiles as in Dao et al. 2022). With queries in lanes no step adds or compares across lanes, keys
and values are read as they lie, and scratch memory does not grow with the sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float64, int64, none, void

from minitransformer.kernels.attention.few import FEW, few_scores, few_sums
from minitransformer.kernels.attention.layout import LAYOUTS, row_of
from minitransformer.kernels.attention.rules import REACH, SIZES, Sizes, rules_type
from minitransformer.kernels.attention.tile_rules import (
    change_scores,
    cut,
    draw_factors,
    fill_spans,
    masked_part,
    span_together,
    split_spans,
)
from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.simd import exp_low, lanes, load, log, select_less, splat, store, store_some, zeros
from minitransformer.kernels.simd.tiles import first_line, from_lanes, product, routine, to_lanes

KEYS = 128  # of a block: its scores stay in the first cache, and m rarely changes between blocks


@routine
def _largest(w: Any, s: Any, keys: Any, start: Any) -> Any:
    """The largest score of each lane, and of `start`; NaN is passed over, as its exp tells of it."""
    step, a = 2 * lanes(w), start
    b, c, d = a, a, a  # four at a time: one would wait for itself
    for i in range(0, keys - 3, 4):
        w0, w1 = load(w, s + i * step), load(w, s + (i + 1) * step)
        w2, w3 = load(w, s + (i + 2) * step), load(w, s + (i + 3) * step)
        a, b = select_less(a, w0, w0, a), select_less(b, w1, w1, b)
        c, d = select_less(c, w2, w2, c), select_less(d, w3, w3, d)
    for i in range(keys // 4 * 4, keys):
        w0 = load(w, s + i * step)
        a = select_less(a, w0, w0, a)
    a, c = select_less(a, b, b, a), select_less(c, d, d, c)
    return select_less(a, c, c, a)


@routine
def _weigh(w: Any, s: Any, keys: Any, m: Any, l: Any, o: Any, width: Any, is_first: Any) -> None:
    """Turn one register of scores of each key into weights exp(s - m), and bring m, l and O^T up to date."""
    W, never, zero = 2 * lanes(w), splat(w.dtype.type(-np.inf)), zeros(w)
    old = never if is_first else load(w, m)
    top = _largest(w, s, keys, old)
    shift = select_less(never, top, top, zero)  # without any key yet: exp(-inf - 0) = 0
    total = zero
    for at in range(s, s + keys * W, W):
        p = exp_low(load(w, at) - shift)
        store(w, at, p)
        total = total + p
    store(w, m, top)
    if is_first:
        store(w, l, total)
    else:
        shrink = exp_low(old - shift)
        store(w, l, load(w, l) * shrink + total)
        for at in range(o, o + width * W, W):
            store(w, at, load(w, at) * shrink)


def scratch_size(sizes: Sizes, lanes: int) -> int:
    """How many numbers of scratch memory `attend` needs."""
    return (5 + 3 * KEYS + sizes.D + sizes.E + 2 * lanes) * 2 * lanes


def attend(
    w: Any,
    spans: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    at: Any,
    reach: Any,
    sizes: Any,
    scale: Any,
    rules: Any,
    parts: Any,
    begin: Any,
    stop: Any,
) -> None:
    """The tasks from `begin` to `stop` of parts x B x K: one key head, and all query heads that share it.

    Each part attends to its own keys, as if it were B more batch rows of `out` and `lse`.
    """
    T, L = q.dtype.type, lanes(q)
    W, D, E, S = 2 * L, sizes.D, sizes.E, sizes.S
    group = sizes.H // sizes.K
    m = first_line(w)
    l, inverse, bounds, s = m + W, m + 2 * W, m + 3 * W, m + 5 * W
    f = s + KEYS * W
    x = f + KEYS * W
    qt = f if rules is None else x + KEYS * W
    o = qt + (D + L) * W
    for task in range(begin, stop):
        row, kh = task // sizes.K, task % sizes.K
        b, part = row % sizes.B, row // sizes.B
        fill_spans(spans, reach, b, sizes.T, S * part // parts, S * (part + 1) // parts)
        runs = 1
        if rules is not None and rules.far.step:
            runs = 2
            split_spans(spans, rules, b, sizes)
        for h in range(kh * group, (kh + 1) * group):
            for t in range(0, sizes.T, W):
                queries = min(W, sizes.T - t)
                query = (row * sizes.H + h) * sizes.T + t  # the tile's first among all
                registers = (queries + L - 1) // L
                q0, few = row_of(at.q, b, h, t), queries <= FEW
                if not few:
                    to_lanes(q, q0, at.q.step, queries, D, w, qt, W, T(scale))
                first = True
                for run in range(runs):  # near keys, then far ones
                    start, step, u = 0, 1, t
                    if rules is not None and run == 1:
                        start, step, u = rules.origin[b] + rules.far.first, rules.far.step, sizes.T + t
                    one = span_together(spans, u, min(L, queries))
                    two = span_together(spans, u + L, queries - L) if registers > 1 else one
                    low, high = min(one[0], two[0]), max(one[1], two[1])
                    for block in range(low, high, KEYS):
                        j, keys, masked = block, min(KEYS, high - block), False
                        key = start + j * step
                        if rules is not None:
                            key, keys, masked = masked_part(rules, b, h, t, queries, step, key, keys)
                            if keys == 0:
                                continue
                            j = (key - start) // step
                        k0, v0 = row_of(at.k, b, kh, key), row_of(at.v, b, kh, key)
                        k_step, v_step = at.k.step * step, at.v.step * step
                        side = keys if step == 1 else 1  # keys side by side, as rules take them
                        if few:
                            few_scores(q, q0, at.q.step, queries, k, k0, k_step, keys, D, T(scale), w, s)
                        else:
                            product(k, k0, k_step, 1, w, qt, W, w, s, W, D, keys, registers, False)
                        if rules is not None:
                            for i in range(0, keys, side):
                                to, at_key = s + i * W, key + i * step
                                change_scores(w, to, 0, False, f, x, masked, rules, b, h, t, queries, at_key, side)
                        for r in range(registers):
                            c, own = r * L, one if r == 0 else two
                            if j < own[2] or j + keys > own[3]:
                                cut(w, s + c, bounds + c, spans, u + c, queries - c, j, keys, own[2], own[3])
                            _weigh(w, s + c, keys, m + c, l + c, o + c, E, first)
                        if rules is not None and rules.dropout:
                            for i in range(0, keys, side):
                                draw_factors(w, f + i * W, rules, sizes, b, h, t, queries, key + i * step, side)
                            for n in range(0, keys * W, L):
                                store(w, s + n, load(w, s + n) * load(w, f + n))
                        if few:
                            few_sums(w, s, queries, v, v0, v_step, keys, E, o, bounds, not first)
                        else:
                            product(v, v0, 1, v_step, w, s, W, w, o, W, keys, E, registers, not first)
                        first = False
                if first:  # nothing to attend to
                    w[m : m + W] = -np.inf
                    w[l : l + W] = 0
                    w[o : o + E * W] = 0
                for c in range(0, queries, L):
                    total = load(w, l + c)
                    unit = splat(T(1))
                    store(w, inverse + c, unit / select_less(zeros(w), total, total, unit))
                    store_some(lse, query + c, min(L, queries - c), load(w, m + c) + log(total))
                from_lanes(w, o, W, out, row_of(at.out, row, h, t), at.out.step, queries, E, w, inverse)


def _signature(T: Any, rules: Any) -> Any:
    x = T[::1]
    return void(x, int64[::1], x, x, x, x, x, LAYOUTS, REACH, SIZES, float64, rules, int64, int64, int64)


plain = kernel(lambda T: _signature(T, none))(attend)
ruled = kernel(lambda T: _signature(T, rules_type(T)))(attend)
