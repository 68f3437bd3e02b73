"""Attention of a few queries to many keys: lanes along the heads, and keys in parts that are merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minitransformer import functional as F
from minitransformer.kernels.attention import cpu, few, reference
from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.kernels.attention.rules import Sizes
from minitransformer.random import DrawKey
from minitransformer.testing import check_backends

DTYPES = [np.float32, np.float64]
ZERO = np.zeros(1, np.int64)
KEY = DrawKey(seed=3, step=2, site=5, first_row=1)
B, H, K, S = 2, 4, 2, 1100
RANDOM = np.random.default_rng(2)
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"causal": True, "offset": np.array([S - 3, 600])},
    "window within a part": {"window": (40, 0), "offset": np.array([S - 3, 500])},
    "first keys": {"sparse": Sparse(range(3), left=40), "causal": True, "offset": np.array([S - 3, 500])},
    "strided": {
        "sparse": Sparse(range(7, 2**48, 8), block=8, origin=np.array([-5, 9])),
        "mask": RANDOM.random((B, 1, 1, S)) < 0.5,
        "offset": np.array([S - 3, 500]),
    },
    "lengths": {"key_lengths": np.array([0, 700])},
    "mask": {"mask": RANDOM.random((B, 1, 3, S)) < 0.4},
    "mask of nothing in the first part": {"mask": np.broadcast_to(np.arange(S) > 800, (1, 1, 1, S))},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": np.array([0.5, 0.0, 0.01, 0.1]), "offset": np.array([S, 3])},
    "bias": {"bias": RANDOM.standard_normal((B, H, 3, S))},
    "dropout": {"dropout_p": 0.3, "dropout_key": KEY},
    "a function": {"score_mod": lambda score, b, h, q, k: score - 0.01 * (k - q) + 0.1 * h},
}


def draw(T: int, D: int, E: int, dtype: Any, seed: int = 0) -> tuple[np.ndarray, ...]:
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E)
    return tuple(np.random.default_rng([seed, *s]).standard_normal(s).astype(dtype) for s in shapes)


def problem_of(name: str, T: int) -> tuple[np.ndarray | None, Problem]:
    options = {"scale": 0.3, "offset": ZERO, **OPTIONS[name]}
    bias = options.pop("bias", None)
    if options.get("mask") is not None and options["mask"].shape[2] > 1:
        options["mask"] = options["mask"][:, :, :T]
    return None if bias is None else bias[:, :, :T], Problem(**options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_agrees_with_the_reference(name: str, T: int, dtype: Any) -> None:
    q, k, v = draw(T, 20, 13, dtype)
    bias, problem = problem_of(name, T)
    if bias is not None:
        bias = bias.astype(dtype)
    assert few.parts_of(Sizes(B, H, K, T, S, 20, 13)) == 2
    for ours, plain in zip(
        cpu.forward(q, k, v, bias, None, problem), reference.forward(q, k, v, bias, None, problem), strict=True
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, plain, rtol=0, atol=64 * np.finfo(dtype).eps * max(1, abs(plain[1:]).max()))


@given(
    T=st.integers(1, 3),
    S=st.integers(0, 700) | st.sampled_from([1023, 1024, 1025, 3000]),
    D=st.integers(1, 70),
    E=st.integers(0, 70),
    group=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@example(T=1, S=4100, D=32, E=64, group=1, seed=0)
@settings(deadline=None)
def test_drawn_sizes_by_the_2x_rule(T: int, S: int, D: int, E: int, group: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal(s) for s in ((1, group, T, D), (1, 1, S, D), (1, 1, S, E)))
    assert check_backends(F.scaled_dot_product_attention, q, k, v, enable_gqa=True, need_lse=True)


@pytest.mark.parametrize("name", ["causal", "lengths", "dropout"])
def test_the_bits_do_not_depend_on_how_tasks_are_spread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(2, 20, 13, np.float32)
    bias, problem = problem_of(name, 2)
    whole = cpu.forward(q, k, v, bias, None, problem)

    def backwards(count: int, run: Callable[[int, int], None]) -> None:
        assert count == 2 * B * K
        for begin, stop in ((5, 8), (4, 5), (0, 4)):
            run(begin, stop)

    monkeypatch.setattr(cpu, "split", backwards)
    monkeypatch.setattr(cpu, "_SMALL", 0)
    for x, y in zip(cpu.forward(q, k, v, bias, None, problem), whole, strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("at", [0, 600, 1099])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_go_where_they_go_in_the_reference(value: float, at: int) -> None:
    q, k, v = draw(1, 16, 16, np.float32)
    k[1, 0, at, 3] = value
    v[0, 1, at, 2] = value
    problem = Problem(0.3, ZERO)
    with np.errstate(all="ignore"):
        ours, plain = (module.forward(q, k, v, None, None, problem) for module in (cpu, reference))
    for x, y in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        np.testing.assert_array_equal(np.isinf(x), np.isinf(y))


def test_written_where_it_is_asked_for() -> None:
    q, k, v = draw(1, 8, 8, np.float32)
    wide = np.full((B, 1, H + 1, 8), 7, np.float32)
    out = wide[:, :, :H].transpose(0, 2, 1, 3)
    found, _ = cpu.forward(q, k, v, None, out, Problem(0.3, ZERO))
    assert found is out and (wide[:, :, H] == 7).all()
    np.testing.assert_array_equal(out, cpu.forward(q, k, v, None, None, Problem(0.3, ZERO))[0])


def test_many_heads_are_work_enough() -> None:
    parts = [few.parts_of(Sizes(1, heads, heads, 1, 8192, 64, 64)) for heads in (1, 2, 3, 8, 9)]
    assert parts == [8, 4, 2, 1, 1]
    assert few.parts_of(Sizes(0, 1, 1, 1, 8192, 64, 64)) == 1
    assert few.parts_of(Sizes(1, 1, 1, 17, 8192, 64, 64)) == 1
