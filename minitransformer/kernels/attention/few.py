"""Products for a few queries: lanes hold numbers of a head, not queries, of which most lanes would be empty.

Scores and weights lie as in the tiles of `forward.py`, W = 2 L apart from key to key, so all rules apply to them as
they are. Four keys at once: they share what is read of the query, and their sums do not wait for each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.kernels.attention.rules import Sizes
from minitransformer.kernels.simd import broadcast, fma, lanes, load, load_up_to, store, sum_lanes, zeros
from minitransformer.kernels.simd.tiles import routine

FEW = 2  # queries of a tile: for more of them whole tiles are faster
_PART = 512  # keys at least of a part that is a task of its own
_QUERIES = 16  # at most of a call whose keys are attended to in parts: more of them are work enough
_TASKS = 8  # enough for the threads of a laptop


@routine
def few_scores(
    q: Any,
    q0: Any,
    q_step: Any,
    queries: Any,
    k: Any,
    k0: Any,
    step: Any,
    keys: Any,
    D: Any,
    scale: Any,
    w: Any,
    s: Any,
) -> None:
    """w[s + i W + r] = scale q_r . k_i, and 0 in the other lanes of the register, which belong to no query."""
    L = lanes(w)
    W, zero = 2 * L, zeros(w)
    for i in range(keys):
        store(w, s + i * W, zero)
    for r in range(queries):
        row = q0 + r * q_step
        for i in range(0, keys - 3, 4):
            at, to = k0 + i * step, s + i * W + r
            a, b, c, d = zero, zero, zero, zero
            for n in range(0, D - L + 1, L):
                x = load(q, row + n)
                a, b = fma(load(k, at + n), x, a), fma(load(k, at + step + n), x, b)
                c, d = fma(load(k, at + 2 * step + n), x, c), fma(load(k, at + 3 * step + n), x, d)
            if D % L:
                n = D // L * L
                x = load_up_to(q, row + n, D - n)
                a, b = fma(load_up_to(k, at + n, D - n), x, a), fma(load_up_to(k, at + step + n, D - n), x, b)
                at = at + 2 * step + n
                c, d = fma(load_up_to(k, at, D - n), x, c), fma(load_up_to(k, at + step, D - n), x, d)
            w[to], w[to + W] = sum_lanes(a) * scale, sum_lanes(b) * scale
            w[to + 2 * W], w[to + 3 * W] = sum_lanes(c) * scale, sum_lanes(d) * scale
        for i in range(keys // 4 * 4, keys):
            a = zero
            for n in range(0, D, L):
                a = fma(load_up_to(k, k0 + i * step + n, D - n), load_up_to(q, row + n, D - n), a)
            w[s + i * W + r] = sum_lanes(a) * scale


@routine
def few_sums(
    w: Any, s: Any, queries: Any, v: Any, v0: Any, step: Any, keys: Any, E: Any, o: Any, x: Any, adds: Any
) -> None:
    """o[e W + r] (+)= sum_i w[s + i W + r] v_i[e]; a register's memory at `x` is overwritten."""
    L = lanes(w)
    W, zero = 2 * L, zeros(w)
    if not adds:
        for e in range(E):
            store(w, o + e * W, zero)
    for r in range(queries):
        for n in range(0, E, L):
            a, b, c, d = zero, zero, zero, zero
            at, of, left = v0 + n, s + r, E - n
            for i in range(0, keys - 3, 4):
                y, z = at + i * step, of + i * W
                a = fma(broadcast(w, z), load_up_to(v, y, left), a)
                b = fma(broadcast(w, z + W), load_up_to(v, y + step, left), b)
                c = fma(broadcast(w, z + 2 * W), load_up_to(v, y + 2 * step, left), c)
                d = fma(broadcast(w, z + 3 * W), load_up_to(v, y + 3 * step, left), d)
            for i in range(keys // 4 * 4, keys):
                a = fma(broadcast(w, of + i * W), load_up_to(v, at + i * step, left), a)
            store(w, x, (a + b) + (c + d))
            for e in range(min(L, left)):
                to = o + (n + e) * W + r
                w[to] = w[to] + w[x + e]


def parts_of(sizes: Sizes) -> int:
    """In how many parts the keys are attended to: more than one where few queries of few heads would
    leave cores idle.

    It depends on the call alone, so the bits do not depend on the number of threads.
    """
    if sizes.T > _QUERIES or not sizes.B * sizes.K:
        return 1
    return max(1, min(sizes.S // _PART, _TASKS // (sizes.B * sizes.K)))


def merge(outs: np.ndarray, lses: np.ndarray, out: np.ndarray, lse: np.ndarray) -> None:
    """Attention to all keys from that to the keys of each part: `outs` (P, B, H, T, E) and `lses` (P, B, H, T)."""
    with np.errstate(all="ignore"):
        top = lses.max(axis=0)
        top[top == -np.inf] = 0  # without any key
        weights = np.exp(lses - top)
        total = weights.sum(axis=0)
        lse[...] = top + np.log(total)
        total[total == 0] = 1
        np.einsum("pbht,pbhte->bhte", weights / total, outs, out=out)
