"""Linear attention on arrays of a device against its reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from against_reference import cast, check_errors, check_refusals, outcome
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import CALLS
from on_simulator import check_arrays, simulated

from minitransformer.kernels.linear_attention import cuda, reference

gpu = simulated(cuda)
functions = pytest.mark.parametrize("name", ["forward", "backward"])
LENGTHS = st.integers(0, 9) | st.sampled_from([cuda.CHUNK - 1, cuda.CHUNK, cuda.CHUNK + 1, 3 * cuda.CHUNK + 5])


def calls(name: str) -> list[tuple[Any, ...]]:
    return [args for args, _ in CALLS["linear_attention"][name](np.random.default_rng(0), np.float64)]


def drawn(T: int, S: int, causal: bool, feature_map: str | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of a forward and of its backward."""
    rng = np.random.default_rng([T, S])
    dout, q, k, v = cast(tuple(rng.standard_normal((2, 2, n, w)) for n, w in ((T, 3), (T, 4), (S, 4), (S, 3))), float)
    if feature_map is None:
        q, k = abs(q) + 0.1, abs(k) + 0.1
    k, v = k[:, :1], v[:, :1]
    out, den = reference.forward(q, k, v, causal, feature_map)
    return (q, k, v, causal, feature_map), (dout, q, k, v, out, den, causal, feature_map)


@functions
def test_errors(name: str) -> None:
    for args in calls(name):
        check_errors(gpu, reference, name, args)


@given(LENGTHS, LENGTHS, st.booleans(), st.sampled_from(["elu", None]))
def test_errors_of_any_length(T: int, S: int, causal: bool, feature_map: str | None) -> None:
    forward, backward = drawn(T, T if causal else S, causal, feature_map)
    check_errors(gpu, reference, "forward", forward)
    check_errors(gpu, reference, "backward", backward)


@functions
@pytest.mark.parametrize("causal", [False, True])
def test_arrays_of_any_layout_dtype_and_device(name: str, causal: bool) -> None:
    args = drawn(7, 7, causal, "elu")[name == "backward"]
    check_arrays(cuda, name, args)
    check_refusals(gpu, name, args)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(3))
def test_causal_nan_reaches_what_follows_and_little_before(where: int, value: float) -> None:
    """`where`: q, k or v. Before it only the tokens of its chunk, which multiply it by 0."""
    forward, _ = drawn(3 * cuda.CHUNK, 3 * cuda.CHUNK, True, "elu")
    at = cuda.CHUNK + 9
    forward[where][:, :, at, 2] = value
    ours, theirs = (~np.isfinite(outcome(m.forward, cast(forward, np.float64))[0]) for m in (gpu, reference))
    np.testing.assert_array_equal(ours[:, :, at:], theirs[:, :, at:])
    assert theirs[:, :, at].any() and not theirs[:, :, :at].any() and not ours[:, :, : cuda.CHUNK].any()
