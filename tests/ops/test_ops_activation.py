"""Activations and softmax: values at the ends of the number line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError
from minitransformer.kernels.pointwise.reference import erf

INF, NAN = np.inf, np.nan
GRID = np.concatenate([np.linspace(-7, 7, 20001), [0.46875, -0.46875, 4.0, -4.0, 6.0, 1e-300, 5e-324, 1e-8]])
DTYPES = [np.float32, np.float64]


def values(function: Any, data: Any, dtype: Any = np.float64, **options: Any) -> np.ndarray:
    out = function(np.asarray(data, dtype), **options)
    assert out.dtype == dtype
    return out.data


# ---- erf --------------------------------------------------------------------------------------------


def test_erf_to_a_few_units_in_the_last_place() -> None:
    expected = np.array([math.erf(x) for x in GRID])
    np.testing.assert_allclose(erf(GRID), expected, rtol=1e-15, atol=0)


def test_erf_in_float32() -> None:
    x = GRID.astype(np.float32)
    assert erf(x).dtype == np.float32
    np.testing.assert_allclose(erf(x), [math.erf(v) for v in x], rtol=5e-7, atol=1e-38)


def test_erf_at_the_ends() -> None:
    got = erf(np.array([INF, -INF, NAN, 0.0, -0.0, 1e308, -1e308, 1e30]))
    np.testing.assert_array_equal(got, [1, -1, NAN, 0, 0, 1, -1, 1])
    assert np.signbit(got[4]) and not np.signbit(got[3])


@given(st.floats(-1e3, 1e3))
def test_erf_is_odd(x: float) -> None:
    assert erf(np.array([-x]))[0] == -erf(np.array([x]))[0]


def test_erf_by_complex_step_has_the_gaussian_as_derivative() -> None:
    slope = erf(GRID + 1e-20j).imag / 1e-20
    expected = 2 / math.sqrt(math.pi) * np.exp(-GRID * GRID)
    inside = abs(GRID) <= 6  # beyond, erf is 1 to rounding, and the exact slope below 1e-15
    np.testing.assert_allclose(slope[inside], expected[inside], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(slope[~inside], expected[~inside], atol=1e-14)


# ---- elementwise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (F.relu, [INF, 0, NAN, 1e30, 0, 0]),
        (F.sigmoid, [1, 0, NAN, 1, 0, 0.5]),
        (F.tanh, [1, -1, NAN, 1, -1, 0]),
        (F.silu, [INF, NAN, NAN, 1e30, 0, 0]),  # -inf * 0, as in torch
        (F.gelu, [INF, NAN, NAN, 1e30, 0, 0]),
    ],
)
def test_activations_at_the_ends(function: Any, expected: list[float], dtype: Any) -> None:
    got = values(function, [INF, -INF, NAN, 1e30, -1e30, 0.0], dtype)
    np.testing.assert_array_equal(got, np.array(expected, dtype))


def test_activations_by_their_formulas() -> None:
    x = np.linspace(-8, 8, 401)
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    np.testing.assert_allclose(values(F.gelu, x), x * phi, rtol=1e-12, atol=1e-14)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(values(F.gelu, x, approximate="tanh"), tanh, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(values(F.sigmoid, x), 1 / (1 + np.exp(-x)), rtol=1e-12)
    np.testing.assert_allclose(values(F.silu, x), x / (1 + np.exp(-x)), rtol=1e-12)
    np.testing.assert_array_equal(values(F.relu, x), np.maximum(x, 0))
    np.testing.assert_allclose(F.swiglu(x, x[::-1].copy()).data, x / (1 + np.exp(-x)) * x[::-1], rtol=1e-12)


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_large_numbers_and_its_gradient(form: str, dtype: Any) -> None:
    x = mt.tensor(np.array([1e3, -1e3, 30.0, -30.0], dtype), requires_grad=True)
    out = F.gelu(x, approximate=form)
    np.testing.assert_allclose(out.data, [1e3, 0, 30, 0], atol=1e-30)
    np.testing.assert_allclose(mt.grad(out.sum(), [x])[0], [1, 0, 1, 0], atol=1e-30)


def test_relu_has_slope_0_at_0() -> None:
    x = mt.tensor([0.0, -0.0], requires_grad=True)
    np.testing.assert_array_equal(mt.grad(F.relu(x).sum(), [x])[0], [0, 0])


# ---- softmax ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_softmax_rows_sum_to_1_and_shift_freely(row: list[float], shift: float) -> None:
    x = np.array([row])
    p = F.softmax(x).data
    assert p.min() >= 0
    assert p.sum() == pytest.approx(1, rel=1e-14)
    small = np.clip(x, -100, 100)
    np.testing.assert_allclose(F.softmax(small + shift).data, F.softmax(small).data, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(np.exp(F.log_softmax(x).data), p, rtol=1e-13, atol=1e-300)


def test_softmax_by_its_formula_along_each_axis() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    for dim in range(-3, 3):
        p = np.exp(x) / np.exp(x).sum(dim, keepdims=True)
        np.testing.assert_allclose(F.softmax(x, dim).data, p, rtol=1e-14)
        np.testing.assert_allclose(F.log_softmax(x, dim).data, np.log(p), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_at_the_ends(dtype: Any) -> None:
    rows = [[0, -INF, -INF], [1e30, 0, -1e30], [1e30, 1e30, 0], [-1e30, -1e30, -1e30]]
    expected = [[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3]
    np.testing.assert_allclose(values(F.softmax, rows, dtype), np.array(expected, dtype), rtol=1e-6)
    for row in ([-INF, -INF, -INF], [INF, 0, 0], [NAN, 0, 0]):
        assert np.isnan(values(F.softmax, [row], dtype)).all()
    got = values(F.log_softmax, [[0, -INF], [1e30, 0]], dtype)
    np.testing.assert_array_equal(got, np.array([[0, -INF], [0, -1e30]], dtype))


# ---- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "silu", "gelu", "softmax", "log_softmax"])
@pytest.mark.parametrize("data", [np.arange(3), np.array([True]), 2.0, None])
def test_numbers_without_a_fraction_are_refused(name: str, data: Any) -> None:
    with pytest.raises(DTypeError, match=rf"{name}: x has dtype .*, expected float32 or float64\. Convert it"):
        getattr(F, name)(data)


def test_wrong_arguments() -> None:
    x = np.ones((2, 3))
    with pytest.raises(ConfigError, match="gelu: approximate is 'erf', expected one of"):
        F.gelu(x, approximate="erf")
    with pytest.raises(ShapeError, match=r"swiglu: gate has shape \(2, 3\), up \(3,\), expected equal"):
        F.swiglu(x, np.ones(3))
    with pytest.raises(RangeError, match=r"softmax: dim is 2, expected -2 to 1 for 2 axes"):
        F.softmax(x, 2)
