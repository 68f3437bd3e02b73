"""The flat buffer: parameters become views of it, and what cannot be flattened is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.autograd import Parameter, Tensor
from minitransformer.errors import ConfigError, DTypeError, ShapeError
from minitransformer.optim import SGD, AdamW, FlatParameters

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32)


def parameters(shapes: list[tuple[int, ...]], seed: int = 0, dtype: Any = np.float32) -> list[Parameter]:
    random = np.random.default_rng(seed)
    return [Parameter(np.asarray(random.standard_normal(shape), dtype)) for shape in shapes]


@given(SHAPES, SEEDS)
def test_parameters_keep_their_values_and_become_views(shapes: list[tuple[int, ...]], seed: int) -> None:
    params = parameters(shapes, seed)
    values = [p.data.copy() for p in params]
    flat = FlatParameters(params)
    for p, value in zip(params, values, strict=True):
        assert p.data.shape == value.shape
        np.testing.assert_array_equal(p.data, value)
    assert flat.params == (
        *[p for p in params if p.ndim >= 2],
        *[p for p in params if p.ndim < 2],
    )
    assert flat.data.size == sum(v.size for v in values)
    assert flat.num_decayed == sum(v.size for v in values if v.ndim >= 2)
    flat.data[...] = np.arange(flat.data.size)
    np.testing.assert_array_equal(np.concatenate([p.data.ravel() for p in flat.params]), flat.data)
    other = np.zeros_like(flat.data)
    for p, view in zip(flat.params, flat.views(other), strict=True):
        assert view.shape == p.shape
        view[...] = 1
    assert np.all(other == 1)


def test_a_parameter_given_twice_is_held_once() -> None:
    a, b = parameters([(2, 3), (2, 3)])
    assert FlatParameters([a, b, a]).params == (a, b)


def test_frozen_parameters_stay_where_they_are() -> None:
    a, b = parameters([(2, 3), (2, 3)])
    b.requires_grad = False
    home = b.data
    optimizer = AdamW([a, b], 0.1, weight_decay=0.5)
    before = home.copy()
    optimizer.step(np.ones_like(optimizer.flat.data))
    assert b.data is home
    np.testing.assert_array_equal(home, before)


def test_gradients_survive_the_move() -> None:
    (p,) = parameters([(2, 3)])
    p.grad = np.ones((2, 3), np.float32)
    before = p.data.copy()
    SGD([p], 0.5).step()
    np.testing.assert_array_equal(p.data, before - np.float32(0.5))


@pytest.mark.parametrize("dtype", [np.int64, np.complex128])
def test_parameters_of_another_kind_are_refused(dtype: Any) -> None:
    odd = Parameter(np.ones(3, dtype), requires_grad=dtype == np.complex128)
    with pytest.raises((DTypeError, ConfigError), match=r"expected float32 or float64|none of the 1"):
        SGD([odd], 0.1)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ConfigError, "none of the 0 parameters requires a gradient"),
        ([Parameter(np.ones(2), requires_grad=False)], ConfigError, "none of the 1 parameters requires"),
        (Parameter(np.ones((2, 2))), DTypeError, "params is a Parameter, expected an iterable"),
        (3, DTypeError, "params is a int, expected an iterable"),
        ([Tensor(np.ones(2), True)], DTypeError, "item 0 of params is a Tensor, expected a Parameter"),
        ([{"params": []}], DTypeError, "item 0 of params is a dict, expected a Parameter"),
        (
            [Parameter(np.ones(2)), Parameter(np.ones((3, 1), np.float32))],
            DTypeError,
            r"a parameter of shape \(3, 1\) is float32, expected float64 like the first",
        ),
    ],
)
def test_what_cannot_be_flattened_is_refused(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlatParameters(params)


def test_refused_parameters_are_left_alone() -> None:
    good, odd = Parameter(np.ones(2)), Parameter(np.ones(2, np.float32))
    homes = good.data, odd.data
    with pytest.raises(DTypeError):
        SGD([good, odd], 0.1)
    with pytest.raises(ConfigError):
        SGD([good], -1)
    assert good.data is homes[0]
    assert odd.data is homes[1]


@pytest.mark.parametrize("buffer", [np.zeros(5), np.zeros((6, 1)), np.zeros(12)[::2]])
def test_views_of_a_buffer_that_does_not_fit(buffer: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"expected \(6,\), contiguous"):
        FlatParameters([Parameter(np.ones((2, 3)))]).views(buffer)
