"""Laws of what may be seen: the future, a cache, padding, packing, and rotated positions."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from minitransformer.testing.laws.law import law
from minitransformer.testing.laws.problem import Problem
from minitransformer.testing.laws.trial import EVERY_OPTION, POSITIONS, SCORES, Run, Trial


@law("L1", "the future does not leak", "is_causal", "attn_mask")
def no_future_leak(trial: Trial) -> None:
    """Causal: whatever stands after position t, y_1 ... y_t are the same, and their gradient there is 0.

    Exact: y_i for i <= t; dq_i = dk_j = dv_j = 0 for i, j > t if dy_i = 0 for i > t.
    """
    if trial.can("is_causal"):
        p = trial.problem(*EVERY_OPTION, sure=["is_causal"], least=2)
    else:
        p = _causal_by_mask(trial.problem(*SCORES, square=True, least=2))
    _, _, T, S = p.sizes
    t = trial.draw(st.integers(0, T - 2))
    own = t + (p.options.get("key_lengths", np.array([S])) - T if _lower_right(p) else np.array([0]))  # (B or 1,)
    future = (np.arange(S) > own[:, None])[:, None, :, None]  # (B or 1, 1, S, 1)
    later = (np.arange(T) > t)[:, None]  # (T, 1)
    p = p.with_(dout=np.where(later, 0, p.dout))
    changed = p.with_(
        q=np.where(later, 7 - p.q, p.q), k=np.where(future, 7 - p.k, p.k), v=np.where(future, 7 - p.v, p.v)
    )
    masks = {"out": ~later, "dq": ~later, "dk": ~future, "dv": ~future}
    before, after = trial.run(p), trial.run(changed)
    trial.same(after.map(lambda n, x: x * masks[n]), before.map(lambda n, x: x * masks[n]), p)
    for name, where in (("dq", later), ("dk", future), ("dv", future)):
        g = getattr(after, name)
        trial.zero(name, None if g is None else g * where)


@law("L2", "prefill and decoding with a cache is the full pass", "is_causal lower_right cross", "attn_mask cross")
def cache(trial: Trial) -> None:
    """Causal: y[a:b] = attention(q[a:b], k[:b], v[:b]) for every chunk [a, b) of the positions.

    The causal corner of a chunk is the lower right one. dk and dv are sums over the chunks.
    """
    flags = trial.can("is_causal", "lower_right")
    if flags and trial.one_of((True, "lower_right"), (False, "attn_mask")):
        context = (*SCORES, "attn_mask", "additive_mask", "window_size", "alibi_slopes")
        p = trial.problem(*context, sure=["is_causal"], square=True, least=2)
        chunked = p.having(causal_align="lower_right")
    else:
        p = chunked = _causal_by_mask(trial.problem(*SCORES, square=True, least=2))
    whole = trial.run(p)
    outs, dqs, dk, dv = [], [], np.zeros_like(p.k), np.zeros_like(p.v)
    for a, b in _pieces(trial, p.q.shape[2]):
        run = trial.run(chunked.take(t=slice(a, b), s=slice(b)))
        outs.append(run.out)
        if run.dq is not None and run.dk is not None and run.dv is not None:
            dqs.append(run.dq)
            dk[:, :, :b] += run.dk
            dv[:, :, :b] += run.dv
    out, dq = np.concatenate(outs, 2), np.concatenate(dqs or outs, 2)
    trial.same(Run(out, dq, dk, dv) if dqs else Run(out, None, None, None), whole, p)


@law("L3", "masked keys behind the others change nothing", "attn_mask cross", "key_lengths cross")
def appended_keys(trial: Trial) -> None:
    """attention(q, [k, k'], [v, v'], k' masked) = attention(q, k, v), and exactly dk' = dv' = 0."""
    by_mask = trial.one_of((True, "attn_mask"), (False, "key_lengths"))
    context = (*SCORES, "attn_mask", "additive_mask") + (() if by_mask else ("key_lengths",))
    positions = POSITIONS if trial.can("upper_left") else ()
    p = trial.problem(*context, *positions, sure=["attn_mask"] if by_mask else [], corners=["upper_left"])
    B, _, _, S = p.sizes
    n, values = trial.draw(st.integers(1, 3)), trial.values()
    k, v = (np.concatenate([x, 10 * values((*x.shape[:2], n, x.shape[3]))], 2) for x in (p.k, p.v))
    longer = p.with_(k=k, v=v)
    if not p.options.keys().isdisjoint(POSITIONS):
        longer = longer.having(causal_align="upper_left")
    if not by_mask:
        longer = longer.having(key_lengths=p.options.get("key_lengths", np.full(B, S)))
    if "attn_mask" in p.options:
        mask = p.options["attn_mask"]
        blocked = False if mask.dtype == bool else -np.inf
        more = np.full((*mask.shape[:3], n), blocked if by_mask else 1, mask.dtype)
        longer = longer.having(attn_mask=np.concatenate([mask, more], 3))
    got = trial.run(longer)
    trial.same(got.map(lambda name, x: x[:, :, :S] if name in ("dk", "dv") else x), trial.run(p), longer)
    for name, g in (("dk", got.dk), ("dv", got.dv)):
        trial.zero(name, None if g is None else g[:, :, S:])


@law("L4", "padding left or right is no padding", "attn_mask", "key_lengths")
def padding(trial: Trial) -> None:
    """Rows of different lengths in one padded batch = each row alone; exactly dk = dv = 0 at the padding.

    Left: the mask blocks the padding. Right: the mask, or key_lengths.
    """
    way = trial.one_of(("right by mask", "attn_mask"), ("left by mask", "attn_mask"), ("right", "key_lengths"))
    positions: tuple[str, ...] = POSITIONS
    if way == "right":  # a window could leave a query in the padding without any key
        positions = ("is_causal", "alibi_slopes") if trial.can("upper_left") else ()
    p = trial.problem(*SCORES, *positions, square=True, least=2)
    B, _, T, _ = p.sizes
    lengths = np.array(trial.draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    place = np.arange(T)
    real = place >= T - lengths[:, None] if way == "left by mask" else place < lengths[:, None]  # (B, T)
    p = p.with_(dout=np.where(real[:, None, :, None], p.dout, 0))
    if way == "right":
        padded = p.having(key_lengths=lengths)
        if not p.options.keys().isdisjoint(POSITIONS):
            padded = padded.having(causal_align="upper_left")
    else:  # queries in the padding see everything, so that no row is empty: empty rows are L15
        padded = p.having(attn_mask=real[:, None, None, :] | ~real[:, None, :, None])
    got = trial.run(padded)
    for b in range(B):
        at = np.flatnonzero(real[b])
        alone = trial.run(p.take(b=[b], t=at, s=at))
        trial.same(got.map(lambda name, x, b=b, at=at: x[[b]][:, :, at]), alone, p)  # type: ignore[misc]
    for name, g in (("dk", got.dk), ("dv", got.dv)):
        trial.zero(name, None if g is None else g * ~real[:, None, :, None])


@law("L5", "packed documents are separate documents", "cu_seqlens", "attn_mask")
def packing(trial: Trial) -> None:
    """Several documents in one row, kept apart by cu_seqlens or a mask of blocks = each document alone."""
    by_mask = trial.one_of((False, "cu_seqlens"), (True, "attn_mask"))
    p = trial.problem(*SCORES, *POSITIONS, square=True, least=2).take(b=[0])
    T = p.q.shape[2]
    pieces = _pieces(trial, T)
    if by_mask:
        document = np.repeat(np.arange(len(pieces)), [b - a for a, b in pieces])
        packed = p.having(attn_mask=(document[:, None] == document)[None, None])
    else:
        packed = p.having(cu_seqlens=np.array([0, *(b for _, b in pieces)]))
    got = trial.run(packed)
    for a, b in pieces:
        alone = trial.run(p.take(t=slice(a, b), s=slice(a, b)))
        trial.same(got.map(lambda name, x, a=a, b=b: x[:, :, a:b]), alone, p)  # type: ignore[misc]


@law("L17", "rotated positions count by their distance", "rope_positions")
def rope(trial: Trial) -> None:
    """attention at positions (m, n) = attention at positions (m + c, n + c)."""
    p = trial.problem(*EVERY_OPTION, even=True)
    _, _, T, S = p.sizes
    place = st.integers(0, 20)
    first, second = (np.array(trial.draw(st.lists(place, min_size=n, max_size=n))) for n in (T, S))
    c = trial.draw(st.integers(1, 50))
    here = trial.run(p.having(rope_positions=(first, second)))
    there = trial.run(p.having(rope_positions=(first + c, second + c)))
    # An angle is rounded as the position that it is a multiple of.
    trial.same(there, here, p.with_(q=p.q * 8, k=p.k * 8))


def _causal_by_mask(p: Problem) -> Problem:
    T, S = p.sizes[2:]
    return p.having(attn_mask=np.tril(np.ones((1, 1, T, S), bool)))


def _lower_right(p: Problem) -> bool:
    return p.options.get("causal_align") == "lower_right"


def _pieces(trial: Trial, T: int) -> list[tuple[int, int]]:
    """[0, T) cut at one place or more."""
    cuts = sorted(trial.draw(st.sets(st.integers(1, T - 1), min_size=1, max_size=3)))
    return list(zip([0, *cuts], [*cuts, T], strict=True))
