"""Attention backward on a GPU, in two kernels, each of which rebuilds the weights from the log-sum-exp.

    S = Q K^T;  P = exp(S - lse);  dP = dO V^T;  dS = P (m dP - delta), delta = <dO, O> - dlse, m dropout's factors
    dQ = dS K;  dV = (m P)^T dO;  dK = dS^T Q

In one, a block owns a tile of queries and goes over the keys, which gives dQ; in the other it owns keys and goes over
the queries of all heads that share them, which gives dK and dV. S and dP are computed twice, but no number is added
to by two blocks: there are no atomics, and the bits do not depend on their order.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import int64, uint64
from numba.np.numpy_support import from_dtype

from minitransformer.kernels.attention.cuda_rules import NO_QUAD, Parts, bends_scores, rule_code, rules_type
from minitransformer.kernels.attention.cuda_tiles import Tile, U, products
from minitransformer.kernels.attention.layout import BACKWARD_LAYOUTS
from minitransformer.kernels.attention.rules import SIZES
from minitransformer.kernels.gpu.kernel import Kernel


@cache
def queries_kernel(dtype: np.dtype, tile: Tile, parts: Parts) -> Kernel:
    """differentiate(q, k, v, dout, dq, delta, lse, dbias, at, sizes, scale, rules), a block for a tile of queries.

    The grid is (tiles x K x B, D / width). Of `dbias`, flat of (B, H, T, S), it writes what is not 0.
    """
    T = from_dtype(dtype)
    types = *[T[::1]] * 8, BACKWARD_LAYOUTS, SIZES, T, rules_type(T, parts)
    return Kernel(lambda cuda: _queries(cuda, T, tile, parts), types, tile.threads)


@cache
def keys_kernel(dtype: np.dtype, tile: Tile, parts: Parts) -> Kernel:
    """differentiate(q, k, v, dout, dk, dv, delta, lse, at, sizes, scale, rules, run), a block for a tile of keys.

    The grid is (tiles x K x B, the larger of D and E / width). With the rule "sparse", run 1 follows run 0 and adds
    the gradients of far keys.
    """
    T = from_dtype(dtype)
    types = *[T[::1]] * 8, BACKWARD_LAYOUTS, SIZES, T, rules_type(T, parts), int64
    return Kernel(lambda cuda: _keys(cuda, T, tile, parts), types, tile.threads)


def _queries(cuda: Any, T: Any, tile: Tile, parts: Parts) -> Any:
    code, rule = products(cuda, T, tile), rule_code(cuda, T, parts, slopes=True)
    rows, columns, _, width, threads, across = tile
    own_rows, own_columns, own_width = tile.own
    a_size, b_size, w_size, z_size = tile.shared(T.bitwidth // 8)
    scores, outs = own_rows * own_columns, own_rows * own_width
    runs = 2 if "sparse" in parts else 1
    sparse, drops, biased, steep = "sparse" in parts, "dropout" in parts, "bias" in parts, bends_scores(parts)
    never, forever, zero, one = T(-math.inf), T(math.inf), T(0), T(1)

    def differentiate(
        q: Any,
        k: Any,
        v: Any,
        dout: Any,
        dq: Any,
        delta: Any,
        lse: Any,
        dbias: Any,
        at: Any,
        sizes: Any,
        scale: Any,
        rules: Any,
    ) -> None:
        a, b = cuda.shared.array(a_size, T, 16), cuda.shared.array(b_size, T, 16)
        w, z = cuda.shared.array(w_size, T, 16), cuda.shared.array(z_size, T, 16)
        q_places, dout_places = cuda.shared.array(rows, int64), cuda.shared.array(rows, int64)
        heads, queries = cuda.shared.array(rows, int64), cuda.shared.array(rows, int64)
        firsts, ends = cuda.shared.array(rows, int64), cuda.shared.array(rows, int64)
        levels, deltas = cuda.shared.array(rows, T), cuda.shared.array(rows, T)
        s, ds, o = cuda.local.array(scores, T), cuda.local.array(scores, T), cuda.local.array(outs, T)
        slopes, words = cuda.local.array(scores, T), cuda.local.array(5, uint64)
        thread = cuda.threadIdx.x
        row, column = thread // across * own_rows, thread % across * own_columns
        top_row, total, kh, batch = code.block_of(sizes)
        left = cuda.blockIdx.y * width
        code.find_rows(q_places, heads, queries, at.q, top_row, total, batch, kh, sizes)
        code.find_rows(dout_places, heads, queries, at.dout, top_row, total, batch, kh, sizes)
        for r in range(thread, rows, threads):
            n = (batch * sizes.K + kh) * total + min(top_row + r, total - 1)
            # Without any key -inf: then all weights are exp(-inf - inf) = 0.
            levels[U(r)] = lse[U(n)] if lse[U(n)] != never else forever
            deltas[U(r)] = delta[U(n)]
        for i in range(outs):
            o[i] = zero
        words[4] = U(NO_QUAD)
        for run in range(runs):
            start, step = 0, 1
            if sparse and run == 1:
                start, step = rules.origin[U(batch)] + rules.far.first, rules.far.step
            cuda.syncthreads()
            for r in range(thread, rows, threads):
                firsts[U(r)], ends[U(r)] = rule.span(rules, batch, queries[U(r)], run, 0, sizes.S)
            cuda.syncthreads()
            low, high, inner_low, inner_high = code.span_together(firsts, ends)
            for j0 in range(low, high, columns):
                count = high - j0
                k0 = batch * at.k.batch + kh * at.k.head + (start + j0 * step) * at.k.step
                v0 = batch * at.v.batch + kh * at.v.head + (start + j0 * step) * at.v.step
                code.load_columns(z, k, k0, step * at.k.step, count, left, sizes.D)
                code.multiply(s, a, b, q, q_places, k, k0, step * at.k.step, count, sizes.D, scale, one, False)
                cuda.syncthreads()
                code.multiply(ds, a, b, dout, dout_places, v, v0, step * at.v.step, count, sizes.E, one, one, False)
                edge = j0 < inner_low or j0 + columns > inner_high
                for i in range(own_rows):
                    h, t = heads[U(row + i)], queries[U(row + i)]
                    first, end, level = firsts[U(row + i)], ends[U(row + i)], levels[U(row + i)]
                    for j in range(own_columns):
                        n, c = j0 + column + j, i * own_columns + j
                        if edge and (n < first or n >= end):
                            s[c], ds[c] = zero, zero
                        else:
                            key = start + n * step
                            if steep:
                                slopes[c] = rule.slope(rules, s[c], batch, h, t, key)
                            s[c] = T(math.exp(rule.score(rules, s[c], batch, h, t, key) - level))
                for i in range(own_rows):
                    h, t, less = heads[U(row + i)], queries[U(row + i)], deltas[U(row + i)]
                    for j in range(own_columns):
                        n, c = j0 + column + j, i * own_columns + j
                        key = start + n * step
                        if drops:
                            ds[c] *= rule.factor(rules, words, sizes, batch, h, t, key)
                        ds[c] = s[c] * (ds[c] - less)
                        inside = top_row + row + i < total and firsts[U(row + i)] <= n < ends[U(row + i)]
                        if biased and left == 0 and inside:
                            dbias[U(((batch * sizes.H + h) * sizes.T + t) * sizes.S + key)] = ds[c]
                        if steep and ds[c] != zero:  # where it is 0 it stays so, also if the slope is not finite
                            ds[c] *= slopes[c]
                code.put(w, ds)
                cuda.syncthreads()
                code.accumulate(o, w, z)
                cuda.syncthreads()
        for i in range(own_rows):
            if top_row + row + i < total:
                place = batch * at.dq.batch + heads[U(row + i)] * at.dq.head + queries[U(row + i)] * at.dq.step + left
                for j in range(own_width):
                    e = code.column_of(j)
                    if left + e < sizes.D:
                        dq[U(place + e)] = o[i * own_width + j] * scale

    return differentiate


def _keys(cuda: Any, T: Any, tile: Tile, parts: Parts) -> Any:
    code, rule = products(cuda, T, tile), rule_code(cuda, T, parts, slopes=True)
    rows, columns, _, width, threads, across = tile
    own_rows, own_columns, own_width = tile.own
    a_size, b_size, w_size, z_size = tile.shared(T.bitwidth // 8)
    scores, outs = own_rows * own_columns, own_rows * own_width
    sparse, drops, steep = "sparse" in parts, "dropout" in parts, bends_scores(parts)
    never, forever, zero, one = T(-math.inf), T(math.inf), T(0), T(1)

    @cuda.jit(device=True, forceinline=True)
    def give(x: Any, place: Any, o: Any, i: Any, left: Any, end: Any, factor: Any, adds: Any) -> None:
        """Write a row of a thread's numbers, or add it."""
        for j in range(own_width):
            e = left + code.column_of(j)
            if e < end:
                number = o[i * own_width + j] * factor
                x[U(place + e)] = x[U(place + e)] + number if adds else number

    def differentiate(
        q: Any,
        k: Any,
        v: Any,
        dout: Any,
        dk: Any,
        dv: Any,
        delta: Any,
        lse: Any,
        at: Any,
        sizes: Any,
        scale: Any,
        rules: Any,
        run: Any,
    ) -> None:
        a, b = cuda.shared.array(a_size, T, 16), cuda.shared.array(b_size, T, 16)
        w, z = cuda.shared.array(w_size, T, 16), cuda.shared.array(z_size, T, 16)
        k_places, v_places = cuda.shared.array(rows, int64), cuda.shared.array(rows, int64)
        s, ds = cuda.local.array(scores, T), cuda.local.array(scores, T)
        deltas = cuda.local.array(own_columns, T)
        to_k, to_v = cuda.local.array(outs, T), cuda.local.array(outs, T)
        slopes, words = cuda.local.array(scores, T), cuda.local.array(5, uint64)
        thread = cuda.threadIdx.x
        row, column = thread // across * own_rows, thread % across * own_columns
        tiles = cuda.gridDim.x // (sizes.K * sizes.B)
        line, left = cuda.blockIdx.x // tiles, cuda.blockIdx.y * width
        kh, batch = line % sizes.K, line // sizes.K
        n0, stop, start, step = cuda.blockIdx.x % tiles * rows, sizes.S, 0, 1
        if sparse and run == 1:
            n0 += rule.far_before(rules, batch, 0)
            stop = rule.far_before(rules, batch, sizes.S)
            start, step = rules.origin[U(batch)] + rules.far.first, rules.far.step
        if n0 >= stop:
            return
        for r in range(thread, rows, threads):
            key = start + min(n0 + r, stop - 1) * step  # a tile is full, if need be of its last row
            k_places[U(r)] = batch * at.k.batch + kh * at.k.head + key * at.k.step
            v_places[U(r)] = batch * at.v.batch + kh * at.v.head + key * at.v.step
        cuda.syncthreads()
        for i in range(outs):
            to_k[i], to_v[i] = zero, zero
        words[4] = U(NO_QUAD)
        last_key = start + (min(n0 + rows, stop) - 1) * step
        low, high = rule.seen_by(rules, batch, start + n0 * step, last_key, run, sizes.T)
        for h in range(kh * (sizes.H // sizes.K), (kh + 1) * (sizes.H // sizes.K)):
            for t0 in range(low, high, columns):
                count = high - t0
                q0 = batch * at.q.batch + h * at.q.head + t0 * at.q.step
                dout0 = batch * at.dout.batch + h * at.dout.head + t0 * at.dout.step
                code.load_columns(z, dout, dout0, at.dout.step, count, left, sizes.E)
                # Scaled as in the forward, whose log-sum-exp belongs to those very scores.
                code.multiply(s, a, b, k, k_places, q, q0, at.q.step, count, sizes.D, one, scale, False)
                cuda.syncthreads()
                code.multiply(ds, a, b, v, v_places, dout, dout0, at.dout.step, count, sizes.E, one, one, False)
                first, end = rule.span(rules, batch, t0, run, 0, sizes.S)
                last, _ = rule.span(rules, batch, min(t0 + columns, high) - 1, run, 0, sizes.S)
                edge = count < columns or last > n0 or end < n0 + rows  # both ends of spans ascend
                for j in range(own_columns):
                    t = t0 + column + j
                    level, deltas[j], first, end = forever, zero, 0, 0
                    if t < high:
                        at_query = U((batch * sizes.H + h) * sizes.T + t)
                        deltas[j] = delta[at_query]
                        if lse[at_query] != never:
                            level = lse[at_query]
                        if edge:
                            first, end = rule.span(rules, batch, t, run, 0, sizes.S)
                    for i in range(own_rows):
                        n, c = n0 + row + i, i * own_columns + j
                        if edge and (n < first or n >= end):
                            s[c], ds[c] = zero, zero
                        else:
                            key = start + n * step
                            if steep:
                                slopes[c] = rule.slope(rules, s[c], batch, h, t, key)
                            s[c] = T(math.exp(rule.score(rules, s[c], batch, h, t, key) - level))
                for j in range(own_columns):
                    for i in range(own_rows):
                        c, p, kept = i * own_columns + j, s[i * own_columns + j], one
                        if drops:
                            key = start + (n0 + row + i) * step
                            kept = rule.factor(rules, words, sizes, batch, h, t0 + column + j, key)
                        s[c], ds[c] = p * kept, p * (ds[c] * kept - deltas[j])
                        if steep and ds[c] != zero:
                            ds[c] *= slopes[c]
                code.put(w, s)
                cuda.syncthreads()
                code.accumulate(to_v, w, z)
                cuda.syncthreads()
                code.load_columns(z, q, q0, at.q.step, count, left, sizes.D)
                code.put(w, ds)
                cuda.syncthreads()
                code.accumulate(to_k, w, z)
                cuda.syncthreads()
        for i in range(own_rows):
            n = n0 + row + i
            if n < stop:
                key = start + n * step
                give(dk, batch * at.dk.batch + kh * at.dk.head + key * at.dk.step, to_k, i, left, sizes.D, scale, run)
                give(dv, batch * at.dv.batch + kh * at.dv.head + key * at.dv.step, to_v, i, left, sizes.E, one, run)

    return differentiate
