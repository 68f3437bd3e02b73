"""Users' mask and score functions: one meaning however they are written, and their derivative."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import DTypeError, GradientError, ShapeError
from minitransformer.kernels.attention.mods import evaluate_mask, evaluate_score, score_derivative

SIZES = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5))
MASK_MODS = {
    "causal": (lambda b, h, q, k: q >= k and True, lambda b, h, q, k: q >= k),
    "branch": (
        lambda b, h, q, k: k < 2 if q % 2 else not k > h,
        lambda b, h, q, k: np.where(q % 2 == 1, k < 2, ~(k > h)),
    ),
    "math": (lambda b, h, q, k: math.sqrt(q + b) >= k, lambda b, h, q, k: np.sqrt(q + b) >= k),
    "constant": (lambda b, h, q, k: bool(min(q, 0)), lambda b, h, q, k: False),
    "one axis": (lambda b, h, q, k: True if h else False, lambda b, h, q, k: h > 0),  # noqa: SIM210
}
SCORE_MODS = {
    "softcap": (
        lambda s, b, h, q, k: 5 * math.tanh(s / 5),
        lambda s, b, h, q, k: 5 * np.tanh(s / 5),
        lambda s, q, k: 1 / np.cosh(s / 5) ** 2,
    ),
    "alibi": (
        lambda s, b, h, q, k: s - abs(q - k) * 0.5 if h else s,
        lambda s, b, h, q, k: s - np.where(h > 0, abs(q - k) * 0.5, 0),
        lambda s, q, k: np.ones_like(s),
    ),
    "relu": (
        lambda s, b, h, q, k: max(s, 0),
        lambda s, b, h, q, k: np.where(s.real > 0, s, 0),
        lambda s, q, k: (s > 0) * 1.0,
    ),
    "per key": (
        lambda s, b, h, q, k: s * s * k if q > 0 else s,
        lambda s, b, h, q, k: np.where(q > 0, s * s * k, s),
        lambda s, q, k: np.where(q > 0, 2 * s * k, 1),
    ),
    "constant": (lambda s, b, h, q, k: 2 if q >= k else 1, lambda s, b, h, q, k: 1 + (q >= k), np.zeros_like),
}


def scores_of(sizes: tuple[int, ...], seed: int = 0, dtype: str = "float64") -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=sizes) * 3
    scores[..., ::3] = 0.0  # on the kink of relu
    return scores.astype(dtype)


@given(SIZES, st.sampled_from(sorted(MASK_MODS)))
def test_scalar_and_array_style_masks_agree_with_a_loop(sizes: tuple[int, ...], name: str) -> None:
    scalar, array = MASK_MODS[name]
    expected = np.zeros(sizes, bool)
    for cell in np.ndindex(*sizes):
        expected[cell] = scalar(*cell)
    for mod in (scalar, array):
        allowed = evaluate_mask(mod, *sizes)
        assert (allowed.dtype, allowed.shape) == (bool, sizes)
        assert not allowed.flags.writeable
        np.testing.assert_array_equal(allowed, expected)


@given(SIZES, st.sampled_from(sorted(SCORE_MODS)), st.sampled_from(["float32", "float64"]), st.integers(0, 9))
def test_scalar_and_array_style_scores_agree(sizes: tuple[int, ...], name: str, dtype: str, seed: int) -> None:
    scalar, array, _ = SCORE_MODS[name]
    scores = scores_of(sizes, seed, dtype)
    one, other = (evaluate_score(mod, scores) for mod in (scalar, array))
    assert one.dtype == other.dtype == scores.dtype
    assert one.shape == other.shape == sizes
    np.testing.assert_allclose(one, other, rtol=1e-6)


@given(SIZES, st.sampled_from(sorted(SCORE_MODS)), st.sampled_from(["float32", "float64"]), st.integers(0, 9))
def test_derivative_is_the_analytic_one(sizes: tuple[int, ...], name: str, dtype: str, seed: int) -> None:
    _, mod, analytic = SCORE_MODS[name]
    scores = scores_of(sizes, seed, dtype)
    derivative = score_derivative(mod, scores)
    assert (derivative.dtype, derivative.shape) == (scores.dtype, sizes)
    _, _, q, k = np.ogrid[tuple(map(slice, sizes))]
    expected = analytic(scores) if name == "constant" else analytic(scores, q, k)
    np.testing.assert_allclose(derivative, expected, rtol=1e-6 if dtype == "float32" else 1e-12)


@given(SIZES)
def test_derivative_of_scalar_style_code(sizes: tuple[int, ...]) -> None:
    scores = scores_of(sizes)
    relu, _, slope = SCORE_MODS["relu"]
    smooth = scores != 0
    np.testing.assert_array_equal(score_derivative(relu, scores)[smooth], slope(scores, 0, 0)[smooth])


def test_a_mask_takes_memory_for_the_axes_it_looks_at() -> None:
    assert evaluate_mask(lambda b, h, q, k: q >= k, 1000, 1000, 100, 100).strides[:2] == (0, 0)


def test_buffers_are_passed_on() -> None:
    table = np.arange(12.0).reshape(3, 4)
    ids = np.array([0, 0, 1, 1])
    allowed = evaluate_mask(lambda b, h, q, k, ids: ids[q] == ids[k], 1, 1, 4, 4, (ids,))
    np.testing.assert_array_equal(allowed[0, 0], ids[:, None] == ids)
    scores = scores_of((1, 3, 2, 4))
    out = evaluate_score(lambda s, b, h, q, k, table: s + table[h, k], scores, (table,))
    np.testing.assert_array_equal(out, scores + table[:, None])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 2, 3)])
def test_code_that_writes_into_its_arguments_changes_nothing(sizes: tuple[int, ...]) -> None:
    def double(s: np.ndarray, b: int, h: int, q: int, k: int) -> np.ndarray:
        s *= 2
        return s if q >= k else s + 1  # refuses arrays, after having written

    scores = scores_of(sizes, 1)
    before = scores.copy()
    _, _, q, k = np.ogrid[tuple(map(slice, sizes))]
    np.testing.assert_array_equal(evaluate_score(double, scores), 2 * before + (q < k))
    np.testing.assert_array_equal(scores, before)


def test_results_are_never_views_of_buffers() -> None:
    bias = np.zeros((1, 1, 2, 2))
    evaluate_score(lambda s, b, h, q, k, bias: bias, bias + 1, (bias,))[...] = 7
    assert not bias.any()


def test_complex_scores_stay_complex() -> None:
    scores = scores_of((1, 2, 2, 2)) + 1j
    np.testing.assert_array_equal(evaluate_score(lambda s, b, h, q, k: s * s, scores), scores * scores)
    assert evaluate_score(lambda s, b, h, q, k: 1.5, scores).dtype == np.complex128


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 2, 3)])
@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: abs(s),
        lambda s, b, h, q, k: s + 0.1 * s.real,
        lambda s, b, h, q, k: 1e-6 * abs(s) if q >= 0 else s,
        lambda s, b, h, q, k: np.sign(s),
    ],
    ids=["abs", "real part", "small scalar abs", "sign"],
)
def test_code_that_is_not_complex_clean_is_refused(mod: Callable[..., object], sizes: tuple[int, ...]) -> None:
    scores = np.linspace(1, 3, math.prod(sizes)).reshape(sizes)
    with pytest.raises(
        GradientError,
        match=r"score_mod: the complex step of <lambda> gives the derivative .*score_mod_grad\.",
    ):
        score_derivative(mod, scores)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 2, 3)])
@pytest.mark.parametrize("function", [math.tanh, math.exp, np.floor, float])
@pytest.mark.parametrize("action", ["ignore", "error"])  # math on a complex NumPy scalar only warns
def test_functions_of_real_numbers_are_refused(
    function: Callable[[object], float], sizes: tuple[int, ...], action: Literal["ignore", "error"]
) -> None:
    refused = pytest.raises(GradientError, match=r"numpy\.tanh \(not math\.tanh\) .*, or give score_mod_grad\.")
    with warnings.catch_warnings(), refused:
        warnings.simplefilter(action, np.exceptions.ComplexWarning)
        score_derivative(lambda s, b, h, q, k: function(s / 5), np.full(sizes, 1.25))


@pytest.mark.parametrize("score", [0.0, 5.0, -5.0, -np.inf, 1e-7])
def test_a_kink_under_a_sample_is_no_evidence(score: float) -> None:
    scores = np.full((1, 1, 2, 2), score)
    slope = score_derivative(lambda s, b, h, q, k: np.clip(np.maximum(s, 0), 0, 5), scores)
    assert set(slope.ravel().tolist()) <= {0.0, 1.0}


def test_jumps_and_sharp_bends_are_no_evidence() -> None:
    scores = np.linspace(-1e-6, 1e-6, 64).reshape(1, 1, 8, 8)
    steep = score_derivative(lambda s, b, h, q, k: np.tanh(1e6 * s), scores)
    np.testing.assert_allclose(steep, 1e6 / np.cosh(1e6 * scores) ** 2, rtol=1e-12)
    assert not score_derivative(lambda s, b, h, q, k: np.where(s > 0, 1.0, 0.0), scores).any()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 2, 3)])
@pytest.mark.parametrize(
    ("mod", "kind"),
    [
        (lambda b, h, q, k: (q >= k) * 1, "int64"),
        (lambda b, h, q, k: None, "NoneType"),
        (lambda b, h, q, k: 0.5 if q >= k else 1.0, "float64"),
    ],
)
def test_masks_must_be_bool(mod: Callable[..., object], kind: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(DTypeError, match=f"mask_mod: <lambda> returned {kind}, expected bool. Return a comp"):
        evaluate_mask(mod, *sizes)


@pytest.mark.parametrize("result", [True, None, "x", 1j])
def test_scores_must_be_numbers(result: object) -> None:
    with pytest.raises(DTypeError, match=r"score_mod: <lambda> returned \w+, expected float64 as its scores"):
        evaluate_score(lambda s, b, h, q, k: result, scores_of((1, 1, 2, 2)))


def test_shapes_must_be_of_the_cells() -> None:
    with pytest.raises(ShapeError, match=r"shape \(3,\), expected one that broadcasts to \(1, 1, 2, 3\)"):
        evaluate_mask(lambda b, h, q, k: np.ones(3, bool), 1, 1, 2, 3)
    with pytest.raises(ShapeError, match=r"shape \(1, 1, 2, 4\), expected one that broadcasts"):
        evaluate_mask(lambda b, h, q, k: np.ones((1, 1, 2, 4), bool), 1, 1, 2, 3)
    with pytest.raises(ShapeError, match="mask_mod: <lambda> returned an array for one cell"):
        evaluate_mask(lambda b, h, q, k: np.ones(3, bool) if q >= k else np.ones(2, bool), 1, 1, 2, 3)


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, ZeroDivisionError])
def test_errors_of_the_function_surface(error: type[Exception]) -> None:
    def mod(b: int, h: int, q: int, k: int) -> bool:
        raise error("mine")

    with pytest.raises(error, match="mine") as caught:
        evaluate_mask(mod, 1, 1, 2, 2)
    assert caught.value.__context__ is None


def test_a_derivative_wrong_between_the_lowest_and_the_highest_scores_is_found() -> None:
    scores = np.linspace(-2, 2, 41).reshape(1, 1, 1, 41)
    with pytest.raises(GradientError, match="the complex step of <lambda> gives the derivative"):
        score_derivative(lambda s, b, h, q, k: np.where(abs(s.real) < 1, abs(s) * 2, s), scores)
