"""Attention forward on a GPU: a block owns a tile of queries and goes over the keys, as `forward.py` does on a CPU.

The rows of a block's tile are queries of all the heads that share a key head, one head after another, so that a few
queries of many heads fill a tile too. Scores and weights of a tile are in registers; the weights, transposed, pass
through shared memory to be multiplied with the values. A thread adds up its own weights and what its neighbours have
only in the end, but the largest score so far is that of all threads of a row.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import int64, uint64
from numba.np.numpy_support import from_dtype

from minitransformer.kernels.attention.cuda_rules import NO_QUAD, Parts, is_plain, rule_code, rules_type
from minitransformer.kernels.attention.cuda_tiles import Tile, U, products
from minitransformer.kernels.attention.layout import LAYOUT, LAYOUTS
from minitransformer.kernels.attention.rules import SIZES
from minitransformer.kernels.gpu.kernel import Kernel


@cache
def forward_kernel(dtype: np.dtype, tile: Tile, parts: Parts, resident: bool) -> Kernel:
    """attend(q, k, v, out, lse, at, sizes, scale, rules, pieces) over (tiles x K x B x pieces, E / width) blocks.

    Each of the pieces attends to its own keys, as if it were B more batch rows of `out` and `lse`. `resident` if heads
    are no wider than the tile's depth: its queries then stay in shared memory.
    """
    T = from_dtype(dtype)
    x = T[::1]
    types = x, x, x, x, x, LAYOUTS, SIZES, T, rules_type(T, parts), int64
    return Kernel(lambda cuda: _build(cuda, T, tile, parts, resident), types, tile.threads)


@cache
def merge_kernel(dtype: np.dtype, threads: int) -> Kernel:
    """merge(outs, lses, out, lse, at, sizes, pieces), a block for each query of a head.

    Attention to all keys from that to the keys of each piece: `outs` (pieces, B, H, T, E), `lses` (pieces, B, H, T).
    """
    T = from_dtype(dtype)
    x = T[::1]
    return Kernel(lambda cuda: _merge(cuda, T), (x, x, x, x, LAYOUT, SIZES, int64), threads)


def _merge(cuda: Any, T: Any) -> Any:
    never, zero, one = T(-math.inf), T(0), T(1)

    def merge(outs: Any, lses: Any, out: Any, lse: Any, at: Any, sizes: Any, pieces: Any) -> None:
        line, lines = cuda.blockIdx.x, cuda.gridDim.x
        top, total = never, zero
        for piece in range(pieces):
            level = lses[U(piece * lines + line)]
            if level > top:
                top = level
        shift = top if top > never else zero
        for piece in range(pieces):
            total += T(math.exp(lses[U(piece * lines + line)] - shift))
        total = total if total != zero else one
        b, h, t = line // sizes.T // sizes.H, line // sizes.T % sizes.H, line % sizes.T
        place = b * at.batch + h * at.head + t * at.step
        for e in range(cuda.threadIdx.x, sizes.E, cuda.blockDim.x):
            number = zero
            for piece in range(pieces):
                n = piece * lines + line
                number += T(math.exp(lses[U(n)] - shift)) * outs[U(n * sizes.E + e)]
            out[U(place + e)] = number / total
        if cuda.threadIdx.x == 0:
            lse[U(line)] = top + T(math.log(total))

    return merge


def _build(cuda: Any, T: Any, tile: Tile, parts: Parts, resident: bool) -> Any:
    code, rule = products(cuda, T, tile), rule_code(cuda, T, parts, slopes=False)
    rows, columns, _, width, threads, across = tile
    own_rows, own_columns, own_width = tile.own
    a_size, b_size, w_size, z_size = tile.shared(T.bitwidth // 8)
    scores, outs = own_rows * own_columns, own_rows * own_width
    runs = 2 if "sparse" in parts else 1
    sparse, drops, ruled = "sparse" in parts, "dropout" in parts, not is_plain(parts)
    doublings = across.bit_length() - 1
    never, zero, one = T(-math.inf), T(0), T(1)

    def attend(
        q: Any, k: Any, v: Any, out: Any, lse: Any, at: Any, sizes: Any, scale: Any, rules: Any, pieces: Any
    ) -> None:
        a, b = cuda.shared.array(a_size, T, 16), cuda.shared.array(b_size, T, 16)
        w, z = cuda.shared.array(w_size, T, 16), cuda.shared.array(z_size, T, 16)
        places, heads = cuda.shared.array(rows, int64), cuda.shared.array(rows, int64)
        queries = cuda.shared.array(rows, int64)
        firsts, ends = cuda.shared.array(rows, int64), cuda.shared.array(rows, int64)
        s, o = cuda.local.array(scores, T), cuda.local.array(outs, T)
        m, l = cuda.local.array(own_rows, T), cuda.local.array(own_rows, T)
        words = cuda.local.array(5, uint64)
        thread = cuda.threadIdx.x
        row, column = thread // across * own_rows, thread % across * own_columns
        top_row, total, kh, line = code.block_of(sizes)  # line: the batch row of `out` and `lse`
        batch, piece = line % sizes.B, line // sizes.B
        left = cuda.blockIdx.y * width
        code.find_rows(places, heads, queries, at.q, top_row, total, batch, kh, sizes)
        cuda.syncthreads()
        if resident:
            code.transpose_rows(a, q, places, 0, sizes.D, scale)
        for i in range(own_rows):
            m[i], l[i] = never, zero
        for i in range(outs):
            o[i] = zero
        words[4] = U(NO_QUAD)
        for run in range(runs):
            start, step = 0, 1
            if sparse and run == 1:
                start, step = rules.origin[U(batch)] + rules.far.first, rules.far.step
                cuda.syncthreads()
            low, high = sizes.S * piece // pieces, sizes.S * (piece + 1) // pieces
            for r in range(thread, rows, threads):
                firsts[U(r)], ends[U(r)] = rule.span(rules, batch, queries[U(r)], run, low, high)
            cuda.syncthreads()
            low, high, inner_low, inner_high = code.span_together(firsts, ends)
            for j0 in range(low, high, columns):
                count = high - j0
                k0 = batch * at.k.batch + kh * at.k.head + (start + j0 * step) * at.k.step
                v0 = batch * at.v.batch + kh * at.v.head + (start + j0 * step) * at.v.step
                code.load_columns(z, v, v0, step * at.v.step, count, left, sizes.E)
                code.multiply(s, a, b, q, places, k, k0, step * at.k.step, count, sizes.D, scale, one, resident)
                edge = j0 < inner_low or j0 + columns > inner_high
                if ruled or edge:
                    for i in range(own_rows):
                        h, t = heads[U(row + i)], queries[U(row + i)]
                        first, end = firsts[U(row + i)], ends[U(row + i)]
                        for j in range(own_columns):
                            n = j0 + column + j
                            if n < first or n >= end:
                                s[i * own_columns + j] = never
                            else:
                                key = start + n * step
                                s[i * own_columns + j] = rule.score(rules, s[i * own_columns + j], batch, h, t, key)
                for i in range(own_rows):
                    top = m[i]
                    for j in range(own_columns):
                        if s[i * own_columns + j] > top:  # NaN is passed over, as its exp tells of it
                            top = s[i * own_columns + j]
                    for e in range(doublings):
                        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, 1 << e)
                        if other > top:
                            top = other
                    shift = top if top > never else zero  # without any key yet: exp(-inf - 0) = 0
                    shrink, added = T(math.exp(m[i] - shift)), zero
                    for j in range(own_columns):
                        p = T(math.exp(s[i * own_columns + j] - shift))
                        added += p
                        s[i * own_columns + j] = p
                    m[i], l[i] = top, l[i] * shrink + added
                    for j in range(own_width):
                        o[i * own_width + j] *= shrink
                if drops:
                    for i in range(own_rows):
                        h, t = heads[U(row + i)], queries[U(row + i)]
                        for j in range(own_columns):
                            key = start + (j0 + column + j) * step
                            s[i * own_columns + j] *= rule.factor(rules, words, sizes, batch, h, t, key)
                code.put(w, s)
                cuda.syncthreads()
                code.accumulate(o, w, z)
                cuda.syncthreads()
        for i in range(own_rows):
            weight = l[i]
            for e in range(doublings):
                weight += cuda.shfl_xor_sync(0xFFFFFFFF, weight, 1 << e)
            weight = weight if weight != zero else one
            if top_row + row + i < total:
                if left == 0 and column == 0:
                    lse[U((line * sizes.K + kh) * total + top_row + row + i)] = m[i] + T(math.log(weight))
                h, t = heads[U(row + i)], queries[U(row + i)]
                place = line * at.out.batch + h * at.out.head + t * at.out.step + left
                for j in range(own_width):
                    e = code.column_of(j)
                    if left + e < sizes.E:
                        out[U(place + e)] = o[i * own_width + j] / weight

    return attend
