"""Laws of the softmax: limits, linearity, shifts, convexity, empty rows, masks, log-sum-exp."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from minitransformer.testing.laws.law import law
from minitransformer.testing.laws.problem import Problem
from minitransformer.testing.laws.trial import EVERY_OPTION, MASKS, POSITIONS, SCORES, Trial


@law(
    "L10",
    "options at their limits are no options",
    "window_size",
    "softcap",
    "alibi_slopes",
    "attn_mask",
    "additive_mask",
    "scale",
)
def limits(trial: Trial) -> None:
    """A window >= S, a softcap c -> infinity, slopes 0, a bias 0, a mask of True, scale 1/sqrt(D) = without."""
    names = ("window_size", "softcap", "alibi_slopes", "additive_mask", "attn_mask", "scale")
    name = trial.one_of(*((n, n) for n in names))
    others = {"attn_mask", "additive_mask"} if "mask" in name else {name}
    context = [o for o in EVERY_OPTION if o not in others and o != "key_lengths"]
    p = trial.problem(*context, square=True)
    _, H, T, S = p.sizes
    values: dict[str, Any] = {
        "window_size": trial.draw(st.tuples(*[st.sampled_from([S, None, S + 3])] * 2)),
        "softcap": 1e9,
        "alibi_slopes": np.zeros(H),
        "additive_mask": np.zeros((1, 1, T, S), p.q.dtype),
        "attn_mask": np.ones((1, 1, T, S), bool),
        "scale": p.q.shape[3] ** -0.5,
    }
    option = "attn_mask" if name == "additive_mask" else name
    trial.same(trial.run(p.having(**{option: values[name]})), trial.run(p), p)


@law("L11", "the output is linear in the values")
def linear(trial: Trial) -> None:
    """attention(q, k, a v + b v') = a attention(q, k, v) + b attention(q, k, v')

    So are dq and dk, and dv is the same for all v.
    """
    p = trial.problem(*EVERY_OPTION)
    a, b = trial.draw(st.tuples(*[st.sampled_from([1, 2, -1, 0.5])] * 2))
    other = p.with_(v=trial.values()(p.v.shape))
    first, second = trial.run(p), trial.run(other)
    got = trial.run(p.with_(v=p.v.dtype.type(a) * p.v + p.v.dtype.type(b) * other.v))
    size = p.with_(v=abs(a * p.v) + abs(b * other.v))
    trial.equal("out", got.out, a * first.out + b * second.out, size)
    if got.dq is not None and first.dq is not None and second.dq is not None:
        trial.equal("dq", got.dq, a * first.dq + b * second.dq, size)
    if got.dk is not None and first.dk is not None and second.dk is not None:
        trial.equal("dk", got.dk, a * first.dk + b * second.dk, size)
    if got.dv is not None and first.dv is not None:
        trial.equal("dv", got.dv, first.dv, size)


@law("L12", "a constant added to all scores of a query is invisible")
def shift(trial: Trial) -> None:
    """softmax(s_t + c_t) = softmax(s_t): with a bias c_t, and with k + u for one vector u, for c_t = q_t u."""
    if trial.one_of((False, ""), (True, "additive_mask")):
        p = trial.problem(*EVERY_OPTION, sure=["additive_mask"])
        mask = p.options["attn_mask"]
        constants = trial.values()((*mask.shape[:3], 1)) * 4
        shifted = p.having(attn_mask=mask + constants)
    else:  # not with a softcap, which is no constant then
        p = trial.problem(*(o for o in EVERY_OPTION if o != "softcap"))
        B, K, _, D = p.k.shape
        shifted = p.with_(k=p.k + trial.values()((B, K, 1, D)))
    size = p.with_(k=abs(p.k) + abs(shifted.k))
    if "attn_mask" in p.options and p.options["attn_mask"].dtype != bool:
        size = size.having(attn_mask=abs(p.options["attn_mask"]) + abs(shifted.options["attn_mask"]))
    trial.same(trial.run(shifted), trial.run(p), size)


@law("L13", "outputs lie among the values that may be seen")
def convex(trial: Trial) -> None:
    """min_s <c, v_s> <= <c, y_t> <= max_s <c, v_s> over the allowed s, for every vector c; at any scale. Forward."""
    p = trial.problem(*EVERY_OPTION)
    if trial.can("scale"):
        p = p.having(scale=trial.draw(st.sampled_from([1.0, 50.0, 0.0, -1.0])))
    Dv = p.v.shape[3]
    directions = np.concatenate([np.eye(Dv), trial.values()((Dv, 1))], 1)  # (Dv, Dv + 1)
    out = trial.forward(p) @ directions  # (B, H, T, n)
    seen = np.repeat(p.v @ directions, p.q.shape[1] // p.k.shape[1], 1)[:, :, None]  # (B, H, 1, S, n)
    may = p.allowed[..., None]
    low = np.where(may, seen, np.inf).min(3)
    high = np.where(may, seen, -np.inf).max(3)
    slack = 64 * float(np.finfo(p.q.dtype).eps) * float(abs(p.v).max()) * float(abs(directions).sum(0).max())
    trial.within("<c, out>", out, np.clip(out, low, high), slack)


@law("L14", "the weights asked for are those of the output", "need_weights")
def weights(trial: Trial) -> None:
    """Asking for w changes no y; w >= 0, exactly 0 where masked; sum_s w_ts = 1; sum_s w_ts v_s = y_t. Forward."""
    p = trial.problem(*EVERY_OPTION)
    plain = trial.forward(p)
    out, w = trial.forward(p.having(need_weights=True))
    trial.equal("out", out, plain, p)
    trial.zero("weights", w * ~p.allowed)
    trial.zero("weights", np.minimum(w, 0))
    trial.equal("weights", w.sum(-1, keepdims=True), np.ones((*w.shape[:3], 1)), p, bitwise=False)
    group = p.q.shape[1] // p.k.shape[1]
    trial.equal("out", w @ np.repeat(p.v, group, 1), out, p, bitwise=False)


@law("L15", "a query that may see nothing gives 0", "attn_mask", "key_lengths", "is_causal lower_right cross")
def empty_rows(trial: Trial) -> None:
    """No allowed s for t: exactly y_t = 0 and dq_t = 0, and dy_t reaches no dk and dv. w_t = 0, lse_t = -inf."""
    way = trial.one_of(
        ("attn_mask", "attn_mask"),
        ("additive_mask", "additive_mask"),
        ("key_lengths", "key_lengths"),
        *((("is_causal", "lower_right"),) if trial.can("is_causal", "cross") else ()),
    )
    p = _with_empty_rows(trial, way)
    empty = ~p.allowed.any(-1, keepdims=True)  # (B, H, T, 1)
    run = trial.run(p)
    trial.zero("out", run.out * empty)
    trial.zero("dq", None if run.dq is None else run.dq * empty)
    only = trial.run(p.with_(dout=np.where(empty, p.dout, 0)))
    for name, g in (("dq", only.dq), ("dk", only.dk), ("dv", only.dv)):
        trial.zero(name, g)
    if trial.can("need_weights"):
        trial.zero("weights", trial.forward(p.having(need_weights=True))[1] * empty)
    if trial.can("need_lse"):
        lse = trial.forward(p.having(need_lse=True))[1]
        trial.within("lse", lse, np.where(empty.reshape(lse.shape), -np.inf, lse), 0.0)


def _with_empty_rows(trial: Trial, way: str) -> Problem:
    if way == "is_causal":
        p = trial.problem(*SCORES, least=2)
        return p.take(s=slice(trial.draw(st.integers(1, p.q.shape[2] - 1)))).having(
            is_causal=True, causal_align="lower_right"
        )
    p = trial.problem(*SCORES)
    B, _, T, S = p.sizes
    if way == "key_lengths":
        lengths = np.array(trial.draw(st.lists(st.integers(0, S), min_size=B, max_size=B)))
        lengths[trial.draw(st.integers(0, B - 1))] = 0
        return p.having(key_lengths=lengths)
    blocked = trial.cells((B, 1, T, 1))
    blocked.flat[trial.draw(st.integers(0, B * T - 1))] = True
    may = np.broadcast_to(~blocked, (B, 1, T, S)).copy()
    return p.having(attn_mask=may if way == "attn_mask" else np.where(may, 0.25, -np.inf).astype(p.q.dtype))


@law("L16", "a bool mask is the bias 0 or -inf", "attn_mask additive_mask")
def bool_mask(trial: Trial) -> None:
    """attention(q, k, v, m) = attention(q, k, v, where(m, 0, -inf))"""
    context = (*SCORES, "key_lengths", *POSITIONS)
    p = trial.problem(*context, sure=["attn_mask"])
    bias = np.where(p.options["attn_mask"], 0.0, -np.inf).astype(p.q.dtype)
    trial.same(trial.run(p.having(attn_mask=bias)), trial.run(p), p)


@law("L21", "parts of the keys merge by their log-sum-exp", "need_lse")
def split(trial: Trial) -> None:
    """y = sum_i exp(l_i - l) y_i and l = log sum_i exp(l_i) over parts i of the keys. Forward."""
    p = trial.problem(*SCORES, *MASKS[:2], square=not trial.can("cross"), least=1 if trial.can("cross") else 2)
    S = p.k.shape[2]
    out, lse = trial.forward(p.having(need_lse=True))
    cut = trial.draw(st.integers(1, S))
    parts = [p.take(s=slice(cut)), p.take(s=slice(cut, None))][: 1 + (cut < S)]
    runs = [trial.forward(part.having(need_lse=True)) for part in parts]
    merged = np.logaddexp.reduce([part for _, part in runs])
    trial.equal("lse", merged, lse, p)
    trial.equal("out", sum(y * np.exp(part - lse)[..., None] for y, part in runs), out, p)
