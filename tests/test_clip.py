"""Clipping gradients by their norm, tensor by tensor and over one flat array."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.autograd import Parameter
from minitransformer.errors import ConfigError, DTypeError, GradientError
from minitransformer.kernels.optimizer import reference
from minitransformer.nn.clip import clip_grad_norm_
from minitransformer.optim import FlatParameters

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32)


def parameters(shapes: list[tuple[int, ...]], seed: int = 0, dtype: Any = np.float32) -> list[Parameter]:
    random = np.random.default_rng(seed)
    return [Parameter(np.asarray(random.standard_normal(shape), dtype)) for shape in shapes]


@given(shapes=SHAPES, seed=SEEDS, max_norm=st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_keeps_the_direction(
    shapes: list[tuple[int, ...]], seed: int, max_norm: float
) -> None:
    params = parameters(shapes, dtype=np.float64)
    buffer = FlatParameters(params)
    flat = np.random.default_rng(seed).standard_normal(buffer.data.size)
    before = flat.copy()
    for p, view in zip(buffer.params, buffer.views(flat), strict=True):
        p.grad = view.copy()
    norm = clip_grad_norm_(params, max_norm)
    assert norm == pytest.approx(np.linalg.norm(before), rel=1e-12)
    assert reference.clip_(flat, max_norm) == pytest.approx(norm, rel=1e-12)
    for p, view in zip(buffer.params, buffer.views(flat), strict=True):
        np.testing.assert_allclose(p.grad, view, rtol=1e-12)
    assert np.linalg.norm(flat) <= max_norm * (1 + 1e-12)
    np.testing.assert_allclose(flat, before * min(1, max_norm / (norm + 1e-6)), rtol=1e-12)
    if norm + 1e-6 <= max_norm:
        assert flat.tobytes() == before.tobytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_norm_that_is_not_finite_writes_nothing(bad: float, dtype: Any) -> None:
    a, b = parameters([(3,), (2, 2)], dtype=dtype)
    a.grad, b.grad = np.array([1, bad, 2], dtype), np.full((2, 2), 3, dtype)
    flat = np.concatenate([a.grad.ravel(), b.grad.ravel()])
    norms = [clip_grad_norm_([a, b], 0.5), reference.clip_(flat, 0.5)]
    assert not any(map(math.isfinite, norms))
    np.testing.assert_array_equal(a.grad, np.array([1, bad, 2], dtype))
    np.testing.assert_array_equal(b.grad, 3)
    np.testing.assert_array_equal(flat, [1, bad, 2, 3, 3, 3, 3])


def test_clipping_takes_one_tensor_iterators_and_tied_parameters() -> None:
    a, b = parameters([(2,), (2,)])
    a.grad = np.array([3, 4], np.float32)
    assert clip_grad_norm_(a, math.inf) == 5
    assert clip_grad_norm_(iter([a, b, a]), math.inf) == 5
    assert clip_grad_norm_([b], 1.0) == 0
    assert clip_grad_norm_([], 1.0) == 0
    assert reference.clip_factor(0.5, 1.0) == 1
    np.testing.assert_array_equal(a.grad, [3, 4])


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, None])
def test_clipping_to_a_norm_that_makes_no_sense(max_norm: Any) -> None:
    with pytest.raises(ConfigError, match=rf"max_norm is {max_norm}, expected a number above 0"):
        clip_grad_norm_([], max_norm)


def test_clipping_what_is_no_tensor() -> None:
    with pytest.raises(DTypeError, match="got a ndarray, expected Tensors"):
        clip_grad_norm_([np.ones(3)], 1.0)


@pytest.mark.parametrize("layout", ["strided", "reversed", "fortran", "one number"])
def test_gradients_in_any_layout_are_clipped(layout: str) -> None:
    (p,) = parameters([() if layout == "one number" else (3, 2) if layout == "fortran" else (4,)])
    plain = np.arange(1, p.data.size + 1, dtype=np.float32).reshape(p.shape)
    p.grad = {
        "strided": lambda: np.repeat(plain, 2)[::2],
        "reversed": lambda: plain[::-1].copy()[::-1],
        "fortran": lambda: plain.copy("F"),
        "one number": plain.copy,
    }[layout]()
    assert clip_grad_norm_(p, 0.5) == pytest.approx(np.linalg.norm(plain), rel=1e-6)
    np.testing.assert_allclose(p.grad, plain * 0.5 / np.linalg.norm(plain), rtol=1e-5)


def test_a_read_only_gradient_is_measured_but_refused_before_any_is_scaled() -> None:
    a, b = parameters([(2,), (2,)])
    a.grad, b.grad = np.array([3, 0], np.float32), np.array([0, 4], np.float32)
    b.grad.flags.writeable = False
    assert clip_grad_norm_([a, b], 6.0) == 5
    problem = r"a .grad of shape \(2,\) is read-only, and the norm 5 is above 1\. Assign a copy"
    with pytest.raises(GradientError, match=problem):
        clip_grad_norm_([a, b], 1.0)
    np.testing.assert_array_equal(a.grad, [3, 0])


@pytest.mark.parametrize("gradient", [[1.0, 2.0], np.ones(2, np.float16), np.ones(2, int), np.ones(2, complex)])
def test_a_gradient_of_another_kind_is_refused(gradient: Any) -> None:
    (p,) = parameters([(2,)])
    p.grad = gradient
    with pytest.raises(
        DTypeError, match=r"a .grad is \w+, expected a float32 or float64 array. Let backward fill .grad"
    ):
        clip_grad_norm_(p, 1.0)
