"""Compiled attention against the reference: every option, every size, the same bits however tasks are spread."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from against_reference import assembly
from guarded import CONTIGUOUS, guarded, needs_guard_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer import functional as F
from minitransformer import kernels
from minitransformer.errors import ShapeError
from minitransformer.kernels.attention import cpu, reference
from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.kernels.simd.tiles import ROWS
from minitransformer.ops.attention import attention_forward
from minitransformer.random import DrawKey
from minitransformer.testing import check_backends, gradcheck, strategies
from minitransformer.testing.attention_problem import AttentionProblem

DTYPES = [np.float32, np.float64]
ZERO = np.zeros(1, np.int64)
KEY = DrawKey(seed=2**40 + 3, step=7, site=2**31 + 5, first_row=4)


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def arrays(B: int, H: int, K: int, T: int, S: int, D: int, E: int, dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    """dout, dlse, q, k, v"""
    shapes = (B, H, T, E), (B, H, T), (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes))


def both(module: Any, given_: tuple[np.ndarray, ...], bias: np.ndarray | None, problem: Problem) -> list[np.ndarray]:
    """out, lse, dq, dk, dv and dbias, all by one implementation."""
    dout, dlse, q, k, v = given_
    out, lse = module.forward(q, k, v, bias, None, problem)
    gradients = module.backward(dout, dlse, q, k, v, bias, out, lse, None, None, None, problem)
    return [out, lse, *(g for g in gradients if g is not None)]


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], factor: float = 64) -> None:
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        finite = y[np.isfinite(y)]
        scale = max(1.0, float(abs(finite).max(initial=0)))
        np.testing.assert_allclose(x, y, rtol=0, atol=factor * float(np.finfo(y.dtype).eps) * scale)


@given(strategies.attention_problems(max_len=40, max_dim=20))
@settings(deadline=None)
def test_drawn_problems_by_the_2x_rule(problem: AttentionProblem) -> None:
    options = dict(problem.options)
    mask = [options.pop("attn_mask")] if "attn_mask" in options else []
    arrays = problem.q, problem.k, problem.v
    report = check_backends(F.scaled_dot_product_attention, *arrays, *mask, need_lse=True, **options)
    assert {c.implementation for c in report.comparisons} == {"cpu"}


def heads_of(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    """Heads (B, count, T, D) of an array (B, T, heads, D), as a view."""
    return rows[:, :, first : first + count].transpose(0, 2, 1, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 5, 16, 33])
@pytest.mark.parametrize("step", [1, -1])
def test_heads_that_are_parts_of_a_wider_array(step: int, D: int, dtype: Any) -> None:
    """Read and written where they lie, with the bits of arrays of their own, and nothing beside them is touched."""
    B, H, K, T = 2, 4, 2, 35
    packed = normal(B, T, H + 2 * K, D, dtype=dtype)[:, ::step]
    q, k, v = heads_of(packed, 0, H), heads_of(packed, H, K), heads_of(packed, H + K, K)
    problem = Problem(D**-0.5, ZERO, causal=True)
    merged = np.full((B, T, H + 1, D), 7, dtype)[:, ::step]
    dpacked = np.full((B, T, H + 2 * K + 1, D), 7, dtype)[:, ::step]
    dout, dlse = heads_of(normal(B, T, H, D, seed=1, dtype=dtype)[:, ::step], 0, H), normal(B, H, T, dtype=dtype)
    out, lse = cpu.forward(q, k, v, None, heads_of(merged, 0, H), problem)
    assert out.base is not None and np.shares_memory(out, merged)
    targets = heads_of(dpacked, 0, H), heads_of(dpacked, H, K), heads_of(dpacked, H + K, K)
    found = cpu.backward(dout, dlse, q, k, v, None, out, lse, *targets, problem)
    own = tuple(np.ascontiguousarray(x) for x in (dout, dlse, q, k, v))
    for a, b in zip(both(cpu, own, None, problem), [out, lse, found.dq, found.dk, found.dv], strict=True):
        assert a.tobytes() == b.tobytes()
    for target, gradient in zip(targets, found, strict=False):
        assert np.shares_memory(target, gradient)
    assert (merged[:, :, H:] == 7).all() and (dpacked[:, :, H + 2 * K :] == 7).all()


def test_an_array_to_write_to_must_be_writable_rows() -> None:
    q, k, v = (normal(1, 2, 3, 4, seed=n) for n in range(3))
    locked = np.empty((1, 2, 3, 4))
    locked.flags.writeable = False
    for out in (locked, np.empty((1, 2, 4, 3)).swapaxes(2, 3), np.empty((1, 2, 3, 5))):
        with pytest.raises(ShapeError, match=r"^kernels\.forward: got arrays|^kernels\.forward: an array to write to"):
            cpu.forward(q, k, v, None, out, Problem(1.0, ZERO))


# B, H, K, T, S, D, E: below, at and above lanes, tiles and blocks of either dtype, and other odd ones.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 31, 63, 7, 9),
    (1, 2, 2, 32, 64, 16, 32),
    (1, 3, 1, 33, 65, 33, 17),
    (1, 1, 1, 5, 300, 3, 130),
    (1, 1, 1, 130, 129, 256, 1),
    (1, 1, 1, 300, 300, 20, 20),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_by_the_2x_rule(sizes: tuple[int, ...], causal: bool) -> None:
    _, _, q, k, v = arrays(*sizes)
    align = "lower_right" if causal else None
    options = {"is_causal": causal, "causal_align": align, "enable_gqa": True, "need_lse": True}
    assert check_backends(F.scaled_dot_product_attention, q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(0, 2, 1, 3, 3, 4, 4), (2, 2, 1, 0, 3, 4, 4), (2, 2, 1, 3, 0, 4, 4), (1, 2, 2, 3, 3, 4, 0)], ids=str
)
def test_nothing_to_attend_to(sizes: tuple[int, ...], dtype: Any) -> None:
    given_ = arrays(*sizes, dtype=dtype)
    bias = normal(*sizes[:2], *sizes[3:5], dtype=dtype)
    for problem, added in ((Problem(0.5, ZERO, causal=True), None), (Problem(0.5, ZERO, softcap=2.0), bias)):
        assert_close(both(cpu, given_, added, problem), both(reference, given_, added, problem))


B, H, K, T, S = 2, 4, 2, 70, 70
RANDOM = np.random.default_rng(1)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "window to the left": {"window": (9, None), "causal": True},
    "first keys": {"sparse": Sparse(range(3), left=9), "causal": True},
    "strided": {"sparse": Sparse(range(4, 2**48, 5), block=5), "causal": True},
    "strided and all around": {"sparse": Sparse(range(1, 60, 7), left=3, block=2), "window": (50, 6)},
    "strided from origins on": {
        "sparse": Sparse(range(2, 2**48, 3), block=3, origin=np.array([-7, 11])),
        "causal": True,
        "key_lengths": np.array([60, 70]),
    },
    "every key is far": {"sparse": Sparse(range(0, 2**48, 1), block=1), "causal": True},
    "no key is far": {"sparse": Sparse(range(0), left=4), "offset": np.array([-30, 5])},
    "lengths": {"key_lengths": np.array([13, 66])},
    "a row without keys": {"key_lengths": np.array([0, 70]), "causal": True},
    "offset": {"offset": np.array([-30, 5]), "causal": True},
    "documents": {"documents": np.repeat([0, 1, 2], [3, 40, 27])},
    "documents in pieces": {"documents": np.arange(T) % 3, "causal": True},
    "mask": {"mask": RANDOM.random((B, 1, T, S)) < 0.4},
    "mask of few": {"mask": RANDOM.random((H, T, S)) < 0.02, "window": (None, 30)},
    "key mask": {"mask": RANDOM.random((B, 1, 1, S)) < 0.5, "causal": True},
    "broadcast mask": {"mask": np.broadcast_to(RANDOM.random((1, H, T, 1)) < 0.5, (B, H, T, S))},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": np.array([0.5, 1.0, 0.0, 0.03]), "causal": True, "offset": np.array([3, 0])},
    "bias": {"bias": normal(B, H, T, S)},
    "bias of keys": {"bias": np.where(RANDOM.random((B, 1, 1, S)) < 0.5, -np.inf, 0.5)},
    "bias of queries": {"bias": normal(T, 1), "softcap": 2.0},
    "dropout": {"dropout_p": 0.3, "dropout_key": KEY},
    "dropout and all": {
        "dropout_p": 0.6,
        "dropout_key": KEY,
        "causal": True,
        "window": (50, None),
        "mask": RANDOM.random((T, S)) < 0.8,
        "softcap": 3.0,
        "alibi_slopes": np.array([0.5, 1.0, 0.0, 0.03]),
        "bias": normal(H, 1, S),
        "key_lengths": np.array([60, 70]),
    },
    "sparse and all": {
        "sparse": Sparse(range(2, 2**48, 4), left=1, block=4, origin=np.array([3, -5])),
        "dropout_p": 0.6,
        "dropout_key": KEY,
        "causal": True,
        "window": (50, None),
        "mask": RANDOM.random((T, S)) < 0.8,
        "softcap": 3.0,
        "alibi_slopes": np.array([0.5, 1.0, 0.0, 0.03]),
        "bias": normal(H, 1, S),
        "key_lengths": np.array([60, 70]),
    },
    "first keys and all": {
        "sparse": Sparse(range(17), left=1),
        "dropout_p": 0.6,
        "dropout_key": KEY,
        "causal": True,
        "mask": RANDOM.random((B, 1, 1, S)) < 0.5,
        "score_mod": lambda score, b, h, q, k: score - 0.01 * (k - q) + 0.1 * h,
        "bias": normal(H, T, S),
    },
}


def option(name: str, dtype: Any) -> tuple[np.ndarray | None, Problem]:
    settings_ = {"scale": 0.4, "offset": ZERO, **OPTIONS[name]}
    bias = settings_.pop("bias", None)
    return None if bias is None else bias.astype(dtype), Problem(**settings_)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_served_and_agrees(name: str, dtype: Any) -> None:
    given_ = arrays(B, H, K, T, S, 12, 20, dtype)
    bias, problem = option(name, dtype)
    (_, _), saved = attention_forward(*given_[2:], bias, problem=problem)
    assert saved.kernel is cpu
    assert_close(both(cpu, given_, bias, problem), both(reference, given_, bias, problem))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "dropout and all", "sparse and all"])
def test_the_bits_do_not_depend_on_how_tasks_are_spread(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = arrays(B, H, K, T, S, 12, 20, dtype)
    bias, problem = option(name, dtype)
    whole = both(cpu, given_, bias, problem)

    def backwards(count: int, run: Callable[[int, int], None]) -> None:
        assert count == B * K
        for begin, stop in ((3, 4), (1, 3), (0, 1)):
            run(begin, stop)

    monkeypatch.setattr(cpu, "split", backwards)
    monkeypatch.setattr(cpu, "_SMALL", 0)
    assert [x.tobytes() for x in both(cpu, given_, bias, problem)] == [x.tobytes() for x in whole]


@given(st.integers(1, 70), st.integers(1, 140), st.integers(1, 40), st.sampled_from(DTYPES))
@settings(deadline=None)
def test_a_causal_query_does_not_see_the_future(T: int, S: int, t: int, dtype: Any) -> None:
    _, _, q, k, v = arrays(1, 1, 1, T, S, 5, 6, dtype)
    problem = Problem(1.0, np.array([S - T]), causal=True)
    t = min(t, T) - 1
    seen = max(0, t + S - T + 1)
    out, lse = cpu.forward(q, k, v, None, None, problem)
    k[:, :, seen:], v[:, :, seen:] = 50, -50
    out2, lse2 = cpu.forward(q, k, v, None, None, problem)
    np.testing.assert_array_equal(out[0, 0, : t + 1], out2[0, 0, : t + 1])
    np.testing.assert_array_equal(lse[0, 0, : t + 1], lse2[0, 0, : t + 1])


def test_gradients_of_the_compiled_op() -> None:
    _, _, q, k, v = arrays(1, 2, 1, 5, 6, 3, 2)
    mask = np.array([[True, True, False, True, True, True]])

    def attend(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=True, causal_align="lower_right", softcap=1.5, enable_gqa=True, need_lse=True
        )

    with kernels.use_backend("cpu"):
        gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_and_infinity_go_where_they_go_in_the_reference(where: str, value: float, dtype: Any) -> None:
    given_ = arrays(1, 2, 1, 40, 150, 6, 6, dtype)
    given_[{"dout": 0, "q": 2, "k": 3, "v": 4}[where]][0, 0, 17, 2] = value
    problem = Problem(1.0, ZERO)
    with np.errstate(all="ignore"):
        expected = both(reference, given_, None, problem)
    for x, y in zip(both(cpu, given_, None, problem), expected, strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        np.testing.assert_array_equal(np.isinf(x), np.isinf(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_apart(dtype: Any) -> None:
    """The largest score grows from block to block, falls, and some are beyond what exp can hold."""
    given_ = arrays(1, 1, 1, 40, 400, 4, 4, dtype)
    given_[3][0, 0, :, 0] *= np.linspace(-60, 60, 400) ** 2 / 30
    given_[3][0, 0, 390] = -1e4
    problem = Problem(1.0, ZERO)
    ours, theirs = both(cpu, given_, None, problem), both(reference, given_, None, problem)
    exact = both(reference, tuple(x.astype(np.float64) for x in given_), None, problem)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        floor = 64 * np.finfo(dtype).eps * abs(z).max()
        assert abs(x - z).max() <= 2 * abs(y - z).max() + floor


def test_masks_are_true_infinities() -> None:
    """A finite minimum would not exclude beside scores that are as low."""
    q = np.full((1, 1, 1, 1), -3e38, np.float32)
    k, v = np.ones((1, 1, 2, 1), np.float32), np.array([[[[1.0], [2.0]]]], np.float32)
    out, lse = cpu.forward(q, k, v, None, None, Problem(1.0, ZERO, mask=np.array([True, False])))
    assert out.item() == 1 and lse.item() == np.float32(-3e38)


def test_no_scores_are_kept() -> None:
    """Scratch memory is a few tiles, whatever the length."""
    from minitransformer.kernels.attention import forward
    from minitransformer.kernels.attention.rules import Sizes

    sizes = Sizes(1, 1, 1, 100_000, 100_000, 64, 64)
    assert forward.scratch_size(sizes, 16) < 20_000


@needs_guard_pages
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", CONTIGUOUS)
@pytest.mark.parametrize("name", ["causal", "dropout and all", "sparse and all"])
def test_nothing_is_touched_beyond_the_arrays(name: str, layout: str, dtype: Any) -> None:
    given_ = arrays(B, H, K, T, S, 5, 7, dtype)
    bias, problem = option(name, dtype)
    expected = both(cpu, given_, bias, problem)
    there, bias = guarded(given_, CONTIGUOUS[layout]), guarded(bias, CONTIGUOUS[layout])
    problem = problem._replace(
        **guarded({n: x for n, x in problem._asdict().items() if n == "mask"}, CONTIGUOUS[layout])
    )
    for x, y in zip(both(cpu, there, bias, problem), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the names of x86 instructions")
def test_products_and_functions_run_on_whole_registers() -> None:
    kernels = assembly("attention")
    assert sorted(name for name, _ in kernels) == [
        f"attention.{name}"
        for name in ("backward.differentiate", "backward.differentiate", "forward.attend", "forward.attend")
    ]
    for _, text in kernels:
        code = re.split(r"^_?mt_product_[0-9]+x2_v[0-9]+f32:$", text, flags=re.M)[1]
        code = re.split(r"^_?[A-Za-z]\w*:$", code, flags=re.M)[0]  # to the next function
        assert len(re.findall(r"\bvfmadd\d+ps\b", code)) == 2 * ROWS
        assert re.findall(r"\bvmov\w+\s.*\(%rsp\)", code) == []  # nothing is spilled
        assert re.findall(r"\b(?:exp|log|tanh)f?\b", text) == []
