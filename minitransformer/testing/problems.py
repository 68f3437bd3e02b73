"""The strategy of attention problems."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from minitransformer.checks import check_flag, check_size
from minitransformer.testing.arrays import draw_additive, draw_allowed, draw_layout, draw_mask_shape, draw_values
from minitransformer.testing.attention_problem import AttentionProblem

# Each drawn by itself, mostly absent, and drawn always: what is left out then leaves the rest as it is.
_MAYBE = st.sampled_from([False, False, True])
_SCALES = st.sampled_from([*[None] * 6, 1.0, 0.3, 0.0, -0.5])
_SLOPES = st.sampled_from([*[None] * 6, 1.0, 0.25, 4.0])
_SOFTCAPS = st.sampled_from([*[None] * 6, 1.0, 0.25, 30.0])


def attention_problems(
    max_batch: int = 2,
    max_heads: int = 4,
    max_len: int = 9,
    max_dim: int = 8,
    gqa: bool = True,
    window: bool = True,
    empty_rows: bool = True,
    cross: bool = True,
) -> st.SearchStrategy[AttentionProblem]:
    """Calls of attention with any options, in float64, shrinking to one number each and no option.

    Without `gqa` every query head has its own key head, without `window` no window is drawn, without `empty_rows`
    every query may attend to something, and without `cross` there are as many keys as queries. Drawn are
    causal masks and their alignment, windows, bool and float masks, key lengths, ALiBi slopes, softcap and scale,
    the values and an upstream gradient, and how the arrays lie in memory. There is no dropout.
    """
    check_size("attention_problems", max_batch=max_batch, max_heads=max_heads, max_len=max_len, max_dim=max_dim)
    for name, value in (("gqa", gqa), ("window", window), ("empty_rows", empty_rows), ("cross", cross)):
        check_flag("attention_problems", name, value)
    return _problems(max_batch, max_heads, max_len, max_dim, gqa, window, empty_rows, cross)


@st.composite
def _problems(
    draw: st.DrawFn,
    max_batch: int,
    max_heads: int,
    max_len: int,
    max_dim: int,
    gqa: bool,
    window: bool,
    empty_rows: bool,
    cross: bool,
) -> AttentionProblem:
    B, K, T = draw(st.integers(1, max_batch)), draw(st.integers(1, max_heads)), draw(st.integers(1, max_len))
    H = K * draw(st.integers(1, max_heads // K)) if gqa else K
    S = draw(st.integers(1, max_len)) if cross else T
    D, Dv = draw(st.integers(1, max_dim)), draw(st.integers(1, max_dim))
    arrays = []
    for salt, shape in enumerate([(B, H, T, D), (B, K, S, D), (B, K, S, Dv), (B, H, T, Dv)]):
        # Numbers of float32, so that the problem is the same in both precisions.
        values = draw_values(draw, shape, np.dtype(np.float32), salt=salt).astype(np.float64)
        arrays.append(draw_layout(draw, values))
    options = _draw_options(draw, (B, H, T, S), window, empty_rows)
    if H != K:
        options["enable_gqa"] = True
    q, k, v, dout = arrays
    problem = AttentionProblem(q, k, v, dout, options)
    return problem if empty_rows else _without_empty_rows(problem)


def _draw_options(draw: st.DrawFn, sizes: tuple[int, int, int, int], window: bool, empty_rows: bool) -> dict[str, Any]:
    B, H, T, S = sizes
    options: dict[str, Any] = {"scale": draw(_SCALES), "is_causal": draw(_MAYBE) or None, "softcap": draw(_SOFTCAPS)}
    if (slope := draw(_SLOPES)) is not None:
        options["alibi_slopes"] = slope * 0.5 ** np.arange(H)
    align = draw(st.sampled_from(["lower_right", "upper_left"]))
    if window and draw(_MAYBE):
        reach = st.none() | st.integers(0, max(T, S))
        options["window_size"] = (draw(reach), draw(reach))
    if draw(_MAYBE):
        lengths = [draw(st.integers(0 if empty_rows else 1, S)) for _ in range(B)]
        options["key_lengths"] = np.array(lengths)
    if draw(_MAYBE):
        mask = draw_allowed(draw, draw_mask_shape(draw, sizes), empty_rows)
        if draw(st.booleans()):
            mask = draw_additive(draw, mask, np.float32).astype(np.float64)
        options["attn_mask"] = mask
    options = {name: value for name, value in options.items() if value is not None}
    positional = {"is_causal", "window_size", "alibi_slopes"} & options.keys()
    if positional and (T != S or "key_lengths" in options):
        options["causal_align"] = align
    return options


def _without_empty_rows(problem: AttentionProblem) -> AttentionProblem:
    """The problem without what leaves queries without keys, and with its mask opened where it would."""
    options = dict(problem.options)
    mask = options.pop("attn_mask", None)
    bare = AttentionProblem(problem.q, problem.k, problem.v, problem.dout, options)
    for name in ("window_size", "is_causal"):
        if not bare.allowed.any(axis=-1).all():
            options.pop(name, None)
    if mask is None:
        return bare
    left = bare.allowed & (mask if mask.dtype == bool else ~np.isneginf(mask))
    rows = ~left.any(axis=-1, keepdims=True)  # (B, H, T, 1)
    rows = rows.any(axis=tuple(range(4 - mask.ndim)))
    rows = rows.any(axis=tuple(axis for axis, n in enumerate(mask.shape[:-1]) if n == 1), keepdims=True)
    options["attn_mask"] = mask | rows if mask.dtype == bool else np.where(rows & np.isneginf(mask), 0.5, mask)
    return AttentionProblem(problem.q, problem.k, problem.v, problem.dout, options)
