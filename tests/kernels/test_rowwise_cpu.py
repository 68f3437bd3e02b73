"""The compiled row kernels against their reference."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

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

from minitransformer.kernels.rowwise import cpu, reference


class Draw(NamedTuple):
    """What a call is made of: N rows of C numbers, of a size, around a number."""

    N: int
    C: int
    seed: int
    size: float
    middle: float

    def __call__(self, axes: str, which: int = 0) -> np.ndarray:
        rng = np.random.default_rng([self.seed, which])
        return rng.standard_normal([getattr(self, axis) for axis in axes])

    @property
    def x(self) -> np.ndarray:
        return (self.size * self("NC") + self.middle).astype(np.float32).astype(np.float64)


SIZES = st.integers(0, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 300])
draws = st.builds(
    Draw,
    N=st.integers(0, 12) | st.sampled_from([17, 33]),
    C=SIZES.filter(bool),
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1.0, 1e-3, 30.0]),
    middle=st.sampled_from([0.0, 1.0, -20.0]),
)


def probabilities(d: Draw) -> np.ndarray:
    return reference.softmax_forward(d.x)


def normed(d: Draw) -> tuple[np.ndarray, ...]:
    """x and weight, mean, rstd"""
    _, mean, rstd = reference.layer_norm_forward(d.x, None, None, 1e-5)
    return d.x, d("C", 1), mean, rstd


def classes(d: Draw, smoothing: float = 0.0) -> tuple[Any, ...]:
    rng = np.random.default_rng(d.seed)
    targets, valid = rng.integers(0, d.C, d.N), rng.random(d.N) < 0.8
    return d.x, np.where(valid, targets, -100), valid, smoothing


def classes_backward(d: Draw, smoothing: float = 0.0) -> tuple[Any, ...]:
    logits, targets, valid, _ = classes(d)
    lse = reference.cross_entropy_forward(logits, targets, valid, 0.0)[1]
    return d("N", 1), logits, targets, valid, lse, smoothing


# By function: its arguments, and which are written to.
CALLS: dict[str, list[tuple[Callable[[Draw], tuple[Any, ...]], tuple[int, ...]]]] = {
    "softmax_forward": [(lambda d: (d.x,), ())],
    "softmax_backward": [(lambda d: (d("NC", 1), probabilities(d)), ())],
    "log_softmax_forward": [(lambda d: (d.x,), ())],
    "log_softmax_backward": [(lambda d: (d("NC", 1), reference.log_softmax_forward(d.x)), ())],
    "layer_norm_forward": [
        (lambda d: (d.x, d("C", 1), d("C", 2), 1e-5), ()),
        (lambda d: (d.x, None, None, 1e-3), ()),
    ],
    "add_residual": [
        (lambda d: (d.x, d("NC", 1), d("C", 2)), (0,)),
        (lambda d: (d.x, d("NC", 1), None), (0,)),
    ],
    "add_layer_norm": [
        (lambda d: (d.x, d("NC", 1), d("C", 2), d("C", 3), d("C", 4), 1e-5), (0,)),
        (lambda d: (d.x, d("NC", 1), None, None, None, 1e-3), (0,)),
    ],
    "layer_norm_backward": [
        (lambda d: (d("NC", 2), *normed(d)), ()),
        (lambda d: (d("NC", 2), d.x, None, *normed(d)[2:]), ()),
    ],
    "layer_norm_backward_add": [
        (lambda d: (d("NC", 2), *normed(d), d("NC", 3)), (5,)),
        (lambda d: (d("NC", 2), d.x, None, *normed(d)[2:], d("NC", 3)), (5,)),
    ],
    "rms_norm_forward": [(lambda d: (d.x, d("C", 1), 1e-5), ()), (lambda d: (d.x, None, 1e-3), ())],
    "rms_norm_backward": [
        (lambda d: (d("NC", 2), d.x, d("C", 1), reference.rms_norm_forward(d.x, None, 1e-5)[1]), ()),
        (lambda d: (d("NC", 2), d.x, None, reference.rms_norm_forward(d.x, None, 1e-5)[1]), ()),
    ],
    "cross_entropy_forward": [(classes, ()), (lambda d: classes(d, 0.1), ())],
    "cross_entropy_backward": [(classes_backward, ()), (lambda d: classes_backward(d, 0.1), ())],
    "column_sum": [(lambda d: (d("NC"),), ())],
    "embedding_backward": [(lambda d: (d("NC"), np.random.default_rng(d.seed).integers(0, 5, d.N), 5), ())],
}
functions = pytest.mark.parametrize("name", CALLS)


def test_every_function_has_calls() -> None:
    assert CALLS.keys() == set(cpu.__all__)


@functions
@given(draws)
@example(Draw(0, 3, 0, 1.0, 0.0))
@example(Draw(1, 1, 0, 1.0, 0.0))
@example(Draw(2, 10_000, 0, 1.0, 5.0))
@example(Draw(300, 3, 0, 1.0, 0.0))
def test_errors(name: str, draw: Draw) -> None:
    for make, _ in CALLS[name]:
        check_errors(cpu, reference, name, make(draw))


@functions
@given(
    draws,
    st.lists(
        st.tuples(st.integers(0), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30])), min_size=1, max_size=3
    ),
)
def test_nan_and_infinities(name: str, draw: Draw, special: list[tuple[int, float]]) -> None:
    # Infinity times exp(-90) is NaN where that is 0 already, as it is with float32.
    draw = draw._replace(N=max(draw.N, 1), size=min(draw.size, 1.0))
    for make, _ in CALLS[name]:
        args = make(draw)
        matrices = [x for x in args if isinstance(x, np.ndarray) and x.ndim == 2]
        for position, value in special:
            matrix = matrices[position % len(matrices)]
            matrix.flat[position % matrix.size] = value
        check_special(cpu, reference, name, args)


@functions
def test_a_row_of_the_same_numbers(name: str) -> None:
    """Of zeros, of numbers whose exponentials would overflow, and of minus infinities."""
    for value in (0.0, 1e4, -1e4, -math.inf):
        for make, _ in CALLS[name]:
            args = make(Draw(3, 37, 0, 1.0, 0.0))
            for x in args:
                if isinstance(x, np.ndarray) and x.ndim == 2:
                    x[1] = value
            check_special(cpu, reference, name, args)


@functions
@pytest.mark.parametrize("shape", [(3, 5), (9, 70)])
def test_layouts(name: str, shape: tuple[int, int]) -> None:
    for make, written in CALLS[name]:
        check_layouts(cpu, name, make(Draw(*shape, 0, 1.0, 0.0)), written)


@functions
def test_what_does_not_fit_is_refused(name: str) -> None:
    for make, _ in CALLS[name]:
        check_refusals(cpu, name, make(Draw(3, 5, 0, 1.0, 0.0)))


@functions
def test_floats_of_two_dtypes_are_served_by_the_reference(name: str) -> None:
    for make, _ in CALLS[name]:
        check_mixed(cpu, reference, name, make(Draw(3, 5, 0, 1.0, 0.0)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_integers_of_any_dtype(dtype: Any) -> None:
    dout, ids = np.arange(12.0).reshape(4, 3), np.array([2, 0, 2, 1])
    expected = [[3, 4, 5], [9, 10, 11], [6, 8, 10]]
    np.testing.assert_array_equal(cpu.embedding_backward(dout, ids.astype(dtype), 3), expected)
    losses, _ = cpu.cross_entropy_forward(dout, ids.astype(dtype), np.ones(4, bool), 0.0)
    assert losses.tolist() == reference.cross_entropy_forward(dout, ids, np.ones(4, bool), 0.0)[0].tolist()


def test_rows_that_do_not_count_are_zero_whatever_they_hold() -> None:
    logits = np.full((2, 3), math.nan)
    logits[1] = 0
    valid = np.array([False, True])
    losses, lse = cpu.cross_entropy_forward(logits, np.array([-100, 1]), valid, 0.1)
    assert losses[0] == 0 and losses[1] == pytest.approx(math.log(3))
    dlogits = cpu.cross_entropy_backward(np.ones(2), logits, np.array([-100, 1]), valid, lse, 0.1)
    assert not dlogits[0].any() and dlogits[1].sum() == pytest.approx(0, abs=1e-15)


def test_the_mean_of_large_numbers_that_differ_little() -> None:
    """The first mean is off by some roundings of 10,000; the deviations correct it."""
    x = (1e4 + np.random.default_rng(0).standard_normal((4, 999))).astype(np.float32)
    _, mean, rstd = cpu.layer_norm_forward(x, None, None, 0.0)
    np.testing.assert_allclose(mean, x.mean(axis=1, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(rstd, 1 / x.std(axis=1, dtype=np.float64), rtol=1e-6)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the names of x86 instructions")
def test_every_kernel_computes_on_whole_registers() -> None:
    found = machine_code("rowwise")
    assert len(found) == 14
    for name, (packed, called) in found.items():
        assert packed >= 1 and not called, name
