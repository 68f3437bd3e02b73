"""Attention backward, on the tiles of the forward: queries in lanes, weights rebuilt from the log-sum-exp.

For a tile of queries and a block of keys (all transposed, keys x queries):

    S = K Q^T;  P = exp(S - lse);  dP = V dO^T;  dS = P (m dP - delta), delta = <dO, O> - dlse, m dropout's factors
    dQ^T += K^T dS;  dV += (m P) dO;  dK += dS Q

A task owns a key head. It adds up its dK and dV over tiles and query heads in a fixed order: the bits do not depend
on how tasks are spread over threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float64, int64, none, void

from minitransformer.kernels.attention.layout import BACKWARD_LAYOUTS, row_of
from minitransformer.kernels.attention.rules import REACH, SIZES, Sizes, rules_type
from minitransformer.kernels.attention.tile_rules import (
    change_scores,
    cut,
    draw_factors,
    fill_spans,
    keep_dbias,
    masked_part,
    span_together,
    split_spans,
)
from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.simd import (
    exp_low,
    fma,
    lanes,
    load,
    load_up_to,
    select_less,
    splat,
    store,
    store_up_to,
    sum_lanes,
    zeros,
)
from minitransformer.kernels.simd.tiles import first_line, from_lanes, product, routine, to_lanes

KEYS = 64  # of a block: its scores and their gradients stay in the first cache


def scratch_size(sizes: Sizes, lanes: int) -> int:
    """How many numbers of scratch memory `differentiate` needs."""
    D, E = (-(-n // lanes) * lanes for n in (sizes.D, sizes.E))
    tile = 6 + 5 * KEYS + 3 * (sizes.D + sizes.E + 2 * lanes)
    return tile * 2 * lanes + 2 * lanes * (D + E) + sizes.S * (D + E)


@routine
def _pad(A: Any, a: Any, lda: Any, rows: Any, columns: Any, w: Any, x: Any, width: Any) -> None:
    """Copy rows to scratch memory, with zeros up to `width`, a multiple of L."""
    L = lanes(A)
    for r in range(rows):
        for c in range(0, width, L):
            store(w, x + r * width + c, load_up_to(A, a + r * lda + c, columns - c))


@routine
def _unpad(w: Any, x: Any, width: Any, A: Any, a: Any, lda: Any, rows: Any, columns: Any, factor: Any) -> None:
    """The way back."""
    L = lanes(A)
    by = splat(factor)
    for r in range(rows):
        for c in range(0, width, L):
            store_up_to(A, a + r * lda + c, columns - c, load(w, x + r * width + c) * by)


@routine
def _dot(A: Any, a: Any, B: Any, b: Any, size: Any) -> Any:
    """The sum of the products of `size` numbers, from position a of A and b of B on."""
    L = lanes(A)
    total = zeros(A)
    for i in range(0, size, L):
        total = fma(load_up_to(A, a + i, size - i), load_up_to(B, b + i, size - i), total)
    return sum_lanes(total)


def differentiate(
    w: Any,
    spans: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    dout: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    dlse: Any,
    lse: Any,
    dbias: Any,
    at: Any,
    reach: Any,
    sizes: Any,
    scale: Any,
    rules: Any,
    begin: Any,
    stop: Any,
) -> None:
    """The tasks from `begin` to `stop` of B x K: one key head, and all query heads that share it."""
    T, L = q.dtype.type, lanes(q)
    W, D, E, S = 2 * L, sizes.D, sizes.E, sizes.S
    group = sizes.H // sizes.K
    D_wide, E_wide = (D + L - 1) // L * L, (E + L - 1) // L * L
    delta = first_line(w)
    level, scales, ones, bounds, s = delta + W, delta + 2 * W, delta + 3 * W, delta + 4 * W, delta + 6 * W
    ds = s + KEYS * W
    slope = ds + KEYS * W
    f = slope + KEYS * W
    x = f + KEYS * W
    qt = x + KEYS * W
    gt = qt + D_wide * W
    dqt = gt + E_wide * W
    q_rows = dqt + D_wide * W
    g_rows = q_rows + W * D_wide
    dk_rows = g_rows + W * E_wide
    dv_rows = dk_rows + S * D_wide
    nothing = zeros(w)
    w[scales : scales + W] = scale
    w[ones : ones + W] = 1
    for task in range(begin, stop):
        b, kh = task // sizes.K, task % sizes.K
        fill_spans(spans, reach, b, sizes.T, 0, S)
        runs = 1
        if rules is not None and rules.far.step:
            runs = 2
            split_spans(spans, rules, b, sizes)
        w[dk_rows : dk_rows + S * (D_wide + E_wide)] = 0
        for h in range(kh * group, (kh + 1) * group):
            for t in range(0, sizes.T, W):
                queries = min(W, sizes.T - t)
                query = (b * sizes.H + h) * sizes.T + t  # the tile's first among all
                q0, g0, dq0 = row_of(at.q, b, h, t), row_of(at.dout, b, h, t), row_of(at.dq, b, h, t)
                registers = (queries + L - 1) // L
                to_lanes(q, q0, at.q.step, queries, D, w, qt, W, T(scale))
                to_lanes(dout, g0, at.dout.step, queries, E, w, gt, W, T(1))
                if D_wide > D:
                    _pad(q, q0, at.q.step, queries, D, w, q_rows, D_wide)
                if E_wide > E:
                    _pad(dout, g0, at.dout.step, queries, E, w, g_rows, E_wide)
                w[delta : delta + 2 * W] = 0
                for n in range(queries):
                    same = _dot(dout, row_of(at.dout, b, h, t + n), out, row_of(at.out, b, h, t + n), E)
                    w[delta + n] = same - dlse[query + n]
                    # Without any key -inf: then all weights are exp(-inf - inf) = 0.
                    w[level + n] = lse[query + n] if lse[query + n] != -np.inf else T(np.inf)
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
                        product(k, k0, k_step, 1, w, qt, W, w, s, W, D, keys, registers, False)
                        product(v, v0, v_step, 1, w, gt, W, w, ds, W, E, keys, registers, False)
                        if rules is not None:
                            for i in range(0, keys, side):
                                to, keep, at_key = s + i * W, slope + i * W, key + i * step
                                change_scores(w, to, keep, True, f, x, masked, rules, b, h, t, queries, at_key, side)
                        if rules is not None and rules.dropout:
                            for i in range(0, keys, side):
                                draw_factors(w, f + i * W, rules, sizes, b, h, t, queries, key + i * step, side)
                        for r in range(registers):
                            c, own = r * L, one if r == 0 else two
                            if j < own[2] or j + keys > own[3]:
                                cut(w, s + c, bounds + c, spans, u + c, queries - c, j, keys, own[2], own[3])
                            known, less = load(w, level + c), load(w, delta + c)
                            for n in range(c, keys * W, W):
                                p, dp = exp_low(load(w, s + n) - known), load(w, ds + n)
                                if rules is not None and rules.dropout:
                                    m = load(w, f + n)
                                    store(w, s + n, p * m)
                                    dp = dp * m
                                else:
                                    store(w, s + n, p)
                                store(w, ds + n, p * (dp - less))
                        if rules is not None:
                            if rules.bias.size:
                                keep_dbias(w, ds, ones, dbias, sizes, b, h, t, queries, key, step, keys, run == 1)
                            if rules.softcap != 0 or rules.score_mod != 0:
                                for n in range(ds, ds + keys * W, L):
                                    g = load(w, n)  # where it is 0 it stays so, whatever the slope of an infinite score
                                    steep = g * load(w, n + slope - ds)
                                    store(w, n, select_less(g, nothing, steep, select_less(nothing, g, steep, g)))
                        product(k, k0, 1, k_step, w, ds, W, w, dqt, W, keys, D, registers, not first)
                        first = False
                        dk_j, dk_step = dk_rows + key * D_wide, step * D_wide
                        dv_j, dv_step = dv_rows + key * E_wide, step * E_wide
                        if D_wide > D:
                            product(w, ds, W, 1, w, q_rows, D_wide, w, dk_j, dk_step, queries, keys, D_wide // L, True)
                        else:
                            product(w, ds, W, 1, q, q0, at.q.step, w, dk_j, dk_step, queries, keys, D // L, True)
                        if E_wide > E:
                            product(w, s, W, 1, w, g_rows, E_wide, w, dv_j, dv_step, queries, keys, E_wide // L, True)
                        else:
                            product(w, s, W, 1, dout, g0, at.dout.step, w, dv_j, dv_step, queries, keys, E // L, True)
                if first:
                    w[dqt : dqt + D * W] = 0
                from_lanes(w, dqt, W, dq, dq0, at.dq.step, queries, D, w, scales)
        _unpad(w, dk_rows, D_wide, dk, row_of(at.dk, b, kh, 0), at.dk.step, S, D, T(scale))
        _unpad(w, dv_rows, E_wide, dv, row_of(at.dv, b, kh, 0), at.dv.step, S, E, T(1))


def _signature(T: Any, rules: Any) -> Any:
    return void(T[::1], int64[::1], *[T[::1]] * 11, BACKWARD_LAYOUTS, REACH, SIZES, float64, rules, int64, int64)


plain = kernel(lambda T: _signature(T, none))(differentiate)
ruled = kernel(lambda T: _signature(T, rules_type(T)))(differentiate)
