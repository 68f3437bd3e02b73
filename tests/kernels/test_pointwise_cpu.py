"""The compiled elementwise kernels against their reference."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from against_reference import (
    check_errors,
    check_layouts,
    check_mixed,
    check_refusals,
    check_special,
    machine_code,
)
from hypothesis import example, given
from hypothesis import strategies as st

from minitransformer.kernels.pointwise import cpu, reference
from minitransformer.random import DrawKey, keep_mask

Make = Callable[[np.random.Generator, tuple[int, ...], float], tuple[Any, ...]]


def numbers(rng: np.random.Generator, shape: tuple[int, ...], size: float = 1.0) -> np.ndarray:
    return np.asarray(size * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)


def inputs(count: int) -> Make:
    """Arrays of one shape, the first `count - 1` of them as gradients are."""
    return lambda rng, shape, size: (*(numbers(rng, shape) for _ in range(count - 1)), numbers(rng, shape, size))


def outputs(function: Any) -> Make:
    return lambda rng, shape, size: (numbers(rng, shape), np.asarray(function(numbers(rng, shape, size))))


def rows(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    return numbers(rng, (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1), size)


KEY = DrawKey(2**63 + 12345678901, 2**32 - 1, 2**31 + 7, 5)

# By function: its arguments, and which are written to.
CALLS: dict[str, list[tuple[Make, tuple[int, ...]]]] = {
    "gelu_forward": [(inputs(1), ())],
    "gelu_backward": [(inputs(2), ())],
    "gelu_tanh_forward": [(inputs(1), ())],
    "gelu_tanh_backward": [(inputs(2), ())],
    "add_bias_gelu_tanh": [
        (lambda rng, shape, size: (x := rows(rng, shape, size), numbers(rng, x.shape[1:])), ()),
        (lambda rng, shape, size: (rows(rng, shape, size), None), ()),
    ],
    "gelu_tanh_bias_backward": [
        (lambda rng, s, size: (rows(rng, s, 1.0), x := rows(rng, s, size), numbers(rng, x.shape[1:])), (0,)),
        (lambda rng, shape, size: (rows(rng, shape, 1.0), rows(rng, shape, size), None), (0,)),
    ],
    "relu_forward": [(inputs(1), ())],
    "relu_backward": [(outputs(reference.relu_forward), ())],
    "sigmoid_forward": [(inputs(1), ())],
    "sigmoid_backward": [(outputs(reference.sigmoid_forward), ())],
    "tanh_forward": [(inputs(1), ())],
    "tanh_backward": [(outputs(np.tanh), ())],
    "silu_forward": [(inputs(1), ())],
    "silu_backward": [(inputs(2), ())],
    "swiglu_forward": [(lambda rng, shape, size: (numbers(rng, shape, size), numbers(rng, shape)), ())],
    "swiglu_backward": [
        (lambda rng, shape, size: (numbers(rng, shape), numbers(rng, shape, size), numbers(rng, shape)), ())
    ],
    "dropout_forward": [(lambda rng, shape, size: (numbers(rng, shape, size), 0.3, KEY), ())],
    "dropout_backward": [(lambda rng, shape, size: (numbers(rng, shape), rng.random(shape) < 0.7, 1 / 0.7), ())],
}
functions = pytest.mark.parametrize("name", CALLS)
seeds = st.integers(0, 2**32).map(np.random.default_rng)
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 300))


def test_every_function_has_calls() -> None:
    assert CALLS.keys() == set(cpu.__all__) - {"erf"}


@functions
@given(seeds, shapes, st.sampled_from([1.0, 1e-3, 4.0]))
@example(np.random.default_rng(0), (2000,), 4.0)
@example(np.random.default_rng(0), (70, 33), 1.0)
def test_errors(name: str, rng: np.random.Generator, shape: tuple[int, ...], size: float) -> None:
    for make, _ in CALLS[name]:
        check_errors(cpu, reference, name, make(rng, shape, size))


@functions
def test_numbers_far_out(name: str) -> None:
    """Where sigmoids and tails of the normal distribution are 0 or 1."""
    for make, _ in CALLS[name]:
        args = make(np.random.default_rng(0), (400,), 1.0)
        far = next(x for x in args[::-1] if isinstance(x, np.ndarray) and x.size == 400 and x.dtype.kind == "f")
        if name not in ("sigmoid_backward", "tanh_backward"):
            far.reshape(-1)[:] = np.linspace(-90, 90, 400).astype(np.float32)
        check_errors(cpu, reference, name, args)


@functions
def test_nan_and_infinities(name: str) -> None:
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -30.0, 300.0]
    for make, _ in CALLS[name]:
        for position in range(
            sum(isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in make(np.random.default_rng(0), (40,), 1.0))
        ):
            args = make(np.random.default_rng(0), (40,), 1.0)
            floats = [x for x in args if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
            floats[position].reshape(-1)[3:35:4] = values
            check_special(cpu, reference, name, args)


@functions
@pytest.mark.parametrize("shape", [(3, 5), (5, 70)])
def test_layouts(name: str, shape: tuple[int, int]) -> None:
    for make, written in CALLS[name]:
        check_layouts(cpu, name, make(np.random.default_rng(0), shape, 1.0), written)


@functions
def test_what_does_not_fit_is_refused(name: str) -> None:
    for make, _ in CALLS[name]:
        check_refusals(cpu, name, make(np.random.default_rng(0), (3, 5), 1.0))


@functions
def test_floats_of_two_dtypes_are_served_by_the_reference(name: str) -> None:
    for make, _ in CALLS[name]:
        check_mixed(cpu, reference, name, make(np.random.default_rng(0), (3, 5), 1.0))


@functions
def test_a_single_number(name: str) -> None:
    """Without an axis, as ops pass it; GELU's reference wants one, and gets it from the op."""
    if "gelu" not in name:
        for make, _ in CALLS[name]:
            check_errors(cpu, reference, name, make(np.random.default_rng(0), (), 1.0))


@given(
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple) | st.tuples(st.integers(0, 3), st.integers(1020, 2060)),
    p=st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 1 - 1e-12]),
    key=st.builds(
        DrawKey,
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
    ),
)
def test_dropout_draws_the_mask_of_random(shape: tuple[int, ...], p: float, key: DrawKey) -> None:
    x = np.full(shape, math.nan, np.float32)
    out, keep = cpu.dropout_forward(x, p, key)
    np.testing.assert_array_equal(keep, keep_mask(shape, p, key))
    assert keep.dtype == np.bool_ and keep.shape == shape
    np.testing.assert_array_equal(np.isnan(out), keep)  # what is dropped is 0, NaN too


def test_the_normal_distribution_is_as_good_as_rounding() -> None:
    """Against the C library's erfc; GELU(x) / x is the distribution function."""
    for dtype in (np.float32, np.float64):
        x = np.concatenate([np.linspace(-14, 14, 20_001), 2.0 ** np.arange(-30, 6)]).astype(dtype)
        x = x[x != 0]
        exact = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x])
        got = cpu.gelu_forward(x).astype(np.float64) / x
        assert abs(got - exact).max() <= 1.5 * np.finfo(dtype).eps
        near = abs(x) < 4  # the tail, too, is right in its own size
        assert (abs(got - exact) / exact)[near].max() <= 12 * np.finfo(dtype).eps


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the names of x86 instructions")
def test_every_kernel_computes_on_whole_registers() -> None:
    found = machine_code("pointwise")
    assert len(found) == 18
    for name, (packed, called) in found.items():
        assert packed >= 1 and not called, name
