"""Compiled linear attention against its reference: every size, the same bits however tasks are spread."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from against_reference import (
    cast,
    check_errors,
    check_layouts,
    check_mixed,
    check_refusals,
    machine_code,
)
from guarded import CONTIGUOUS, needs_guard_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.kernels.linear_attention import cpu, reference
from minitransformer.kernels.simd.tiles import ROWS
from minitransformer.threads import get_num_threads, set_num_threads

DTYPES = [np.float32, np.float64]
Arguments = tuple[Any, ...]


def arguments(
    B: int, H: int, K: int, T: int, S: int, D: int, E: int, causal: bool, feature_map: str | None, size: float = 1.0
) -> tuple[Arguments, Arguments]:
    """Those of a forward and of its backward, float64 of float32 values."""
    rng = np.random.default_rng([B, H, K, T, S, D, E])
    shapes = (B, H, T, E), (B, H, T, D), (B, K, S, D), (B, K, S, E)
    dout, q, k, v = (rng.standard_normal(shape) for shape in shapes)
    if feature_map is None:
        q, k = abs(q) + 0.1, abs(k) + 0.1
    dout, q, k, v = cast((dout, size * q, k, v), np.float64)
    forward = q, k, v, causal, feature_map
    out, den = reference.forward(*forward)
    return forward, (dout, *forward[:3], out, den, causal, feature_map)


def both(module: Any, forward: Arguments, backward: Arguments, dtype: Any) -> list[np.ndarray]:
    """out, den, dq, dk, dv by one implementation."""
    q, k, v, causal, feature_map = cast(forward, dtype)
    with np.errstate(all="ignore"):
        out, den = module.forward(q, k, v, causal, feature_map)
        gradients = module.backward(backward[0].astype(dtype), q, k, v, out, den, causal, feature_map)
    return [out, den, *gradients]


LENGTHS = st.integers(0, 40) | st.sampled_from([63, 64, 65, 100])
WIDTHS = st.integers(0, 20) | st.sampled_from([32, 33])


@given(st.integers(0, 2), st.integers(1, 2), st.integers(1, 3), LENGTHS, LENGTHS, WIDTHS, WIDTHS, st.data())
@settings(deadline=None)
def test_errors_by_the_2x_rule(B: int, K: int, group: int, T: int, S: int, D: int, E: int, data: st.DataObject) -> None:
    causal, feature_map = data.draw(st.booleans()), data.draw(st.sampled_from(["elu", None]))
    size = data.draw(st.sampled_from([1.0, 8.0]))
    forward, backward = arguments(B, K * group, K, T, T if causal else S, D, E, causal, feature_map, size)
    check_errors(cpu, reference, "forward", forward)
    check_errors(cpu, reference, "backward", backward)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sums_by_the_2x_rule(causal: bool) -> None:
    forward, backward = arguments(1, 1, 1, 3000, 3000, 3, 2, causal, "elu")
    check_errors(cpu, reference, "forward", forward)
    check_errors(cpu, reference, "backward", backward)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_layouts_dtypes_and_refusals(name: str, causal: bool) -> None:
    given_ = arguments(2, 4, 2, 35, 35, 5, 7, causal, "elu")[name == "backward"]
    check_layouts(cpu, name, given_, ())
    check_refusals(cpu, name, given_)
    check_mixed(cpu, reference, name, given_)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_bits_do_not_depend_on_how_tasks_are_spread(
    causal: bool, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = arguments(2, 4, 2, 70, 70, 12, 20, causal, "elu")
    whole = [x.tobytes() for x in both(cpu, *calls, dtype)]

    def backwards(count: int, run: Callable[[int, int], None]) -> None:
        assert count == 4
        for begin, stop in ((3, 4), (1, 3), (0, 1)):
            run(begin, stop)

    monkeypatch.setattr(cpu, "_SMALL", 0)
    threads = get_num_threads()
    try:
        for n in (1, 2, 3):
            set_num_threads(n)
            assert [x.tobytes() for x in both(cpu, *calls, dtype)] == whole
    finally:
        set_num_threads(threads)
    monkeypatch.setattr(cpu, "split", backwards)
    assert [x.tobytes() for x in both(cpu, *calls, dtype)] == whole


def test_small_calls_stay_on_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def split(count: int, run: Callable[[int, int], None]) -> None:
        counts.append(count)
        run(0, count)

    monkeypatch.setattr(cpu, "split", split)
    both(cpu, *arguments(2, 4, 2, 5, 5, 4, 4, True, "elu"), np.float32)
    assert counts == []
    both(cpu, *arguments(2, 4, 2, 400, 400, 16, 16, True, "elu"), np.float32)
    assert counts == [4, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_nan_and_infinity_go_where_they_go_in_the_reference(where: int, value: float, dtype: Any) -> None:
    """`where`: dout, q, k or v."""
    forward, backward = arguments(1, 2, 1, 40, 70, 6, 5, False, "elu")
    (backward[0], *forward[:3])[where][0, 0, 17, 2] = value
    for x, y in zip(*(both(module, forward, backward, dtype) for module in (cpu, reference)), strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        np.testing.assert_array_equal(np.isinf(x), np.isinf(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", range(3))
def test_causal_nan_reaches_what_follows_and_little_before(where: int, dtype: Any) -> None:
    """`where`: q, k or v. Before it only the tokens of its tile, which multiply it by 0."""
    forward, backward = arguments(1, 1, 1, 100, 100, 6, 5, True, "elu")
    at = 75
    forward[where][0, 0, at, 2] = math.nan
    ours, theirs = (both(module, forward, backward, dtype) for module in (cpu, reference))
    for x, y in zip(ours[:3], theirs[:3], strict=True):  # out, den and dq, which sum over the past
        ours_lost, lost = (np.isnan(a).reshape(100, -1).any(axis=1) for a in (x, y))
        np.testing.assert_array_equal(ours_lost[at:], lost[at:])
        assert not lost[:at].any() and not ours_lost[: at - ROWS + 1].any()
    assert np.isnan(theirs[0]).any()


def test_what_follows_in_time_is_not_read() -> None:
    """Causal gradients of a key that no query follows, but its own."""
    forward, backward = arguments(1, 1, 1, 65, 65, 3, 2, True, None)
    _, _, _, dk, dv = both(cpu, forward, backward, np.float64)
    q, k, v = (x[0, 0] for x in forward[:3])
    h = backward[0][0, 0, -1] / backward[5][0, 0, -1]
    np.testing.assert_allclose(dv[0, 0, -1], (q[-1] @ k[-1]) * h, rtol=1e-13)
    inner = h @ (v[-1] - backward[4][0, 0, -1])
    np.testing.assert_allclose(dk[0, 0, -1], inner * q[-1], rtol=1e-12)


def test_the_map_where_it_bends() -> None:
    """phi(0) is 1 from both sides, -0 is 0, and what is far below has no weight."""
    x = np.array([0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, -700.0, -5000.0, 1e30]).reshape(-1, 1, 1, 1)
    for module in (cpu, reference):
        _, den = module.forward(np.zeros_like(x), x, x, False, "elu")
        expected = [1, 1, 1, 1, 4, math.exp(-3), math.exp(-700), 0, 1e30]
        np.testing.assert_allclose(den[:, 0, 0], expected, rtol=1e-14)


@needs_guard_pages
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_scratch_memory_is_large_enough(causal: bool, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made inside ends at a page that nobody may touch."""
    for widths in ((1, 1), (33, 5), (32, 64)):
        calls = arguments(1, 2, 1, 70, 70, *widths, causal, "elu")
        expected = both(cpu, *calls, dtype)
        with monkeypatch.context() as patch:
            put = CONTIGUOUS["ends at a guard"]
            patch.setattr(np, "empty", lambda shape, dtype, put=put: put(np.zeros(shape, dtype), True))
            got = both(cpu, *calls, dtype)
        assert [x.tobytes() for x in got] == [x.tobytes() for x in expected]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the names of x86 instructions")
def test_every_kernel_computes_on_whole_registers() -> None:
    found = machine_code("linear_attention")
    assert sorted(found) == ["linear_attention.sweep.sweep", "linear_attention.sweep.upstream"]
    for name, (packed, called) in found.items():
        assert packed >= 1 and not called, name
