"""Laws of independence and order: rows, heads and keys."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from minitransformer.testing.laws.law import law
from minitransformer.testing.laws.trial import EVERY_OPTION, SCORES, Trial


@law("L6", "rows of a batch do not see each other")
def rows(trial: Trial) -> None:
    """attention(q, k, v)[b] = attention(q[b], k[b], v[b])"""
    p = trial.problem(*EVERY_OPTION, rows=2)
    whole = trial.run(p)
    for b in range(p.q.shape[0]):
        alone = trial.run(p.take(b=[b]))
        trial.same(whole.map(lambda name, x, b=b: x[[b]]), alone, p)  # type: ignore[misc]


@law("L7", "the order of keys does not matter, that of queries is kept")
def order(trial: Trial) -> None:
    """Without positions: attention(q[r], k[p], v[p]) = attention(q, k, v)[r] for permutations r and p."""
    p = trial.problem(*SCORES, "attn_mask", "additive_mask", least=2)
    _, _, T, S = p.sizes
    r, s = (np.array(trial.draw(st.permutations(range(n)))) for n in (T, S))
    orders = {"out": r, "dq": r, "dk": s, "dv": s}
    expected = trial.run(p).map(lambda name, x: x[:, :, orders[name]])
    trial.same(trial.run(p.take(t=r, s=s)), expected, p)


@law("L8", "heads are interchangeable")
def heads(trial: Trial) -> None:
    """attention(q[:, h], k[:, h], v[:, h]) = attention(q, k, v)[:, h] for a permutation h of the heads.

    Where a group shares a key head, dk and dv are sums over it, which another order rounds differently.
    """
    p = trial.problem(*EVERY_OPTION, heads=2)
    H, K = p.q.shape[1], p.k.shape[1]
    keys = np.array(trial.draw(st.permutations(range(K))))
    inside = np.array(trial.draw(st.permutations(range(H // K))))
    queries = (keys[:, None] * (H // K) + inside).ravel()
    orders = {"out": queries, "dq": queries, "dk": keys, "dv": keys}
    expected = trial.run(p).map(lambda name, x: x[:, orders[name]])
    got = trial.run(p.take(h=queries, kv=keys))
    trial.same(got._replace(dk=None, dv=None), expected, p)
    trial.same(got, expected, p, bitwise=trial.bitwise and list(inside) == sorted(inside))


@law("L9", "shared key heads are repeated key heads", "enable_gqa")
def groups(trial: Trial) -> None:
    """attention(q, k, v, enable_gqa) = attention(q, repeat(k), repeat(v)); dk and dv are sums over a group."""
    p = trial.problem(*EVERY_OPTION, sure=["enable_gqa"])
    H, K = p.q.shape[1], p.k.shape[1]

    def summed(name: str, x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], K, H // K, *x.shape[2:]).sum(2) if name in ("dk", "dv") else x

    repeated = p.take(kv=np.repeat(np.arange(K), H // K)).without("enable_gqa")
    trial.same(trial.run(p), trial.run(repeated).map(summed), p)
