"""Users' functions in the compiled kernels: as in the reference, whatever else is asked for, or refused aloud."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from guarded import CONTIGUOUS, guarded, needs_guard_pages
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_cpu import OPTIONS, ZERO, arrays, assert_close, both, option

from minitransformer import functional as F
from minitransformer import kernels, masks
from minitransformer.kernels.attention import cpu, reference
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.user_code import Refusal, tile_code
from minitransformer.ops.attention import attention_forward
from minitransformer.testing import gradcheck

DTYPES = [np.float32, np.float64]
Mod = Callable[..., Any]


def capped(x: Any, c: float = 5.0) -> Any:
    return c * np.tanh(x / c)


def in_two_branches(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    if q >= k:
        return s - 0.5 * (q - k)
    return -np.inf


def by_table(s: Any, b: Any, h: Any, q: Any, k: Any, table: Any) -> Any:
    return s + table[h, q - k]


def of_several(
    s: Any, b: Any, h: Any, q: Any, k: Any, ids: Any, on: Any, factor: Any, strength: Any, weights: Any
) -> Any:
    return np.where((ids[q] == ids[k]) & on[b, h], s * factor, s - strength[k] + weights[k, b].real)


def an_integer(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return q - k


TABLE = np.random.default_rng(3).standard_normal((8, 300))
SEVERAL = (
    (np.arange(300) // 7).astype(np.int32),
    np.random.default_rng(4).random((4, 8)) < 0.5,
    np.array(0.5, np.float32),
    np.linspace(0, 1, 600)[::2].astype(np.float32),
    np.random.default_rng(5).standard_normal((5, 300)).T.astype(np.complex64),
)
# score_mod, its derivative if it is given, buffers
MODS: dict[str, tuple[Mod, Mod | None, tuple[np.ndarray, ...]]] = {
    "relative": (lambda s, b, h, q, k: s + 0.1 * (k - q), None, ()),
    "softcap by a helper": (lambda s, b, h, q, k: capped(s), None, ()),
    "derivative given": (
        lambda s, b, h, q, k: capped(s, 2.0) * (h + 1),
        lambda s, b, h, q, k: (1 - np.tanh(s / 2) ** 2) * (h + 1),
        (),
    ),
    "math": (lambda s, b, h, q, k: s * math.exp(-0.01 * abs(q - k)), None, ()),
    "sigmoid": (lambda s, b, h, q, k: 4 / (1 + np.exp(-s)), None, ()),
    "polynomial": (lambda s, b, h, q, k: s**2 * 0.1 - s / (1 + b), None, ()),
    "branches": (in_two_branches, None, ()),
    "table": (by_table, None, (TABLE,)),
    "buffers of all kinds": (of_several, None, SEVERAL),
    "integer": (an_integer, None, ()),
    "divided by zero": (lambda s, b, h, q, k: np.where(q == k, s, s + 1 / (q - k)), None, ()),
    "real part": (lambda s, b, h, q, k: np.where(s.real > 0, s, s * 0.25), None, ()),
    "any argument": (lambda s, *cell: s - cell[3], None, ()),
    "clipped": (lambda s, b, h, q, k: np.clip(s, -1.5, 1.5) + np.sqrt(abs(q - k)), None, ()),
}


def problem_of(name: str, **more: Any) -> Problem:
    mod, grad, buffers = MODS[name]
    return Problem(
        **({"scale": 0.4, "offset": ZERO, "score_mod": mod, "score_mod_grad": grad, "buffers": buffers} | more)
    )


def assert_within_twice(given_: tuple[np.ndarray, ...], bias: Any, problem: Problem) -> None:
    """Compiled, and no further from float64's result than twice the reference is, and some roundings."""
    for slopes in (False, True):
        shape = (*given_[2].shape[:3], given_[3].shape[2])
        assert not isinstance(tile_code(problem, shape, given_[2].dtype, slopes), Refusal)
    ours = both(cpu, given_, bias, problem)
    wide = None if bias is None else bias.astype(np.float64)
    with np.errstate(over="ignore"):  # of scores that the reference masks afterwards
        theirs = both(reference, given_, bias, problem)
        exact = both(reference, tuple(x.astype(np.float64) for x in given_), wide, problem)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        finite = np.isfinite(z)
        x, y, z = x[finite], y[finite], z[finite]
        floor = 64 * np.finfo(x.dtype).eps * max(1.0, float(abs(z).max(initial=0)))
        assert abs(x - z).max(initial=0) <= 2 * abs(y - z).max(initial=0) + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODS)
@given(
    st.tuples(st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2)]), st.integers(0, 70), st.integers(0, 150)),
    st.sampled_from(["nothing", "causal", "lengths", "mask", "softcap"]),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=8)
def test_drawn_problems_by_the_2x_rule(name: str, dtype: Any, sizes: Any, beside: str, seed: int) -> None:
    B, (H, K), T, S = sizes
    rng = np.random.default_rng(seed)
    more: dict[str, Any] = {
        "nothing": {},
        "causal": {"causal": True, "offset": np.array([S - T])},  # with T > S, rows without keys
        "lengths": {"key_lengths": rng.integers(0, S + 1, B)},
        "mask": {"mask": rng.random((B, 1, T, S)) < rng.random()},
        "softcap": {"softcap": 3.0},
    }[beside]
    assert_within_twice(arrays(B, H, K, T, S, 5, 6, dtype), None, problem_of(name, **more))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mod", ["softcap by a helper", "derivative given", "table"])
@pytest.mark.parametrize("name", OPTIONS)
def test_beside_every_option(name: str, mod: str, dtype: Any) -> None:
    bias, problem = option(name, dtype)
    score_mod, grad, buffers = MODS[mod]
    problem = problem._replace(score_mod=score_mod, score_mod_grad=grad, buffers=buffers)
    given_ = arrays(2, 4, 2, 70, 70, 12, 20, dtype)
    (_, _), saved = attention_forward(*given_[2:], bias, problem=problem)
    assert saved.kernel is cpu
    assert_within_twice(given_, bias, problem)


BANDS: dict[str, Callable[[Any, Any], Any]] = {
    "causal": lambda q, k: k <= q,
    "band": lambda q, k: abs(q - k) < 20,
    "blocks": lambda q, k: (q // 64 + k // 64) % 2 == 0,
    "rows without keys": lambda q, k: (q // 40) % 2 == 0,
    "columns": lambda q, k: k // 50 == 1,
    "nothing": lambda q, k: q < 0,
    "all": lambda q, k: q >= 0,
    "far right": lambda q, k: k == 299,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BANDS)
def test_masks_that_leave_tiles_empty_or_full(name: str, dtype: Any) -> None:
    q, k = np.ogrid[:200, :300]
    mask = np.broadcast_to(BANDS[name](q, k), (200, 300))
    given_ = arrays(2, 2, 1, 200, 300, 6, 6, dtype)
    bias = option("bias of queries", dtype)[1] and np.linspace(-1, 1, 300).astype(dtype)
    for added, problem in ((None, Problem(0.4, ZERO, mask=mask)), (bias, problem_of("relative", mask=mask))):
        assert_close(both(cpu, given_, added, problem), both(reference, given_, added, problem))


@pytest.mark.parametrize("name", ["table", "derivative given", "real part"])
def test_gradients_through_the_op(name: str) -> None:
    _, _, q, k, v = arrays(1, 2, 2, 5, 6, 3, 2)
    mod, grad, buffers = MODS[name]

    def attend(q: Any, k: Any, v: Any) -> Any:
        mask = masks.causal(align="lower_right")
        return F.flex_attention(q, k, v, mod, mask, score_mod_grad=grad, buffers=buffers, need_lse=True)

    with kernels.use_backend("cpu"):
        gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_threads(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = arrays(2, 4, 2, 70, 130, 12, 20, dtype)
    problem = problem_of("table", causal=True, mask=np.random.default_rng(0).random((70, 130)) < 0.7)
    found = []
    for parts in ([(0, 4)], [(3, 4), (1, 3), (0, 1)]):

        def split(count: int, run: Callable[[int, int], None], parts: Any = parts) -> None:
            for begin, stop in parts:
                run(begin, stop)

        monkeypatch.setattr(cpu, "split", split)
        monkeypatch.setattr(cpu, "_SMALL", 0)
        found.append([x.tobytes() for x in both(cpu, given_, None, problem)])
    assert found[0] == found[1]


@needs_guard_pages
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", CONTIGUOUS)
def test_nothing_is_touched_beyond_the_arrays(layout: str, dtype: Any) -> None:
    given_ = arrays(2, 4, 2, 70, 70, 5, 7, dtype)
    of_sizes = (SEVERAL[0][:70], SEVERAL[1][:2, :4], SEVERAL[2], SEVERAL[3][:70], SEVERAL[4][:70, :2])
    problem = problem_of("buffers of all kinds", buffers=of_sizes, mask=np.random.default_rng(0).random((70, 70)) < 0.7)
    expected = both(cpu, given_, None, problem)
    there = problem._replace(**guarded({"buffers": of_sizes, "mask": problem.mask}, CONTIGUOUS[layout]))
    for x, y in zip(both(cpu, guarded(given_, CONTIGUOUS[layout]), None, there), expected, strict=True):
        np.testing.assert_array_equal(x, y)
