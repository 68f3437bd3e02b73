"""Clipping gradients by their norm, tensor by tensor and over one flat array."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.autograd import Parameter
from minitransformer.errors import ConfigError, DTypeError
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
