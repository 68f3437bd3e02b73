"""Where gradcheck could be fooled: kinks, complex steps and differences, and what passed it once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from wrong_gradients import findings, normal, op_of, seeded

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import nn
from minitransformer.autograd import Op
from minitransformer.errors import DTypeError, GradientError
from minitransformer.gradients import Function, gradcheck

# --- kinks, complex step, differences --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["complex", "central"])
def test_kinks_are_left_out_or_raised(method: str) -> None:
    x = np.array([-1.0, 0.0, 2.0])
    report = gradcheck(F.relu, x, method=method)
    assert report.kinks == (0 if method == "complex" else 1)
    assert findings(F.relu, x, method=method, on_kink="raise") == (
        "x[1] lies on a kink: there is no gradient to compare with"
    )
    assert gradcheck(F.relu, x + 0.5, method=method, on_kink="raise")


def test_ties_share_their_gradient() -> None:
    tied = np.array([1.0, 3.0, 3.0])
    assert gradcheck(lambda x: x.max(), tied)
    assert findings(lambda x: x.max(), tied, on_kink="raise").count("lies on a kink") == 2


def test_a_kink_does_not_excuse_a_gradient_beyond_both_slopes() -> None:
    op = Op("relu", lambda x: (np.maximum(x.real, 0), x), lambda d, x: (np.where(x >= 0, 2.0, 0.0) * d,))
    assert "dx[1]" in findings(op, np.array([-1.0, 0.0]), method="central")
    kind = Op("relu", lambda x: (np.maximum(x.real, 0), x), lambda d, x: (np.where(x > 0, d, 0.3 * d * (x == 0)),))
    assert gradcheck(kind, np.array([-1.0, 0.0]), method="central").kinks == 1


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: np.abs(x) * x, "its complex step disagrees with differences: something drops imaginary parts"),
        (lambda x: np.real(x) ** 2, "its complex step disagrees with differences: something drops imaginary parts"),
        (lambda x: np.array([math.sin(v) for v in x]), "it refuses complex numbers ("),
        (lambda x: np.sin(x.astype(np.float64)), "it refuses complex numbers (ComplexWarning: "),
    ],
)
def test_functions_not_made_for_complex_numbers_are_differenced(forward: Any, reason: str) -> None:
    slope = {0: lambda x: 2 * abs(x), 1: lambda x: 2 * x}.get(
        0 if "abs" in forward.__code__.co_names else 1 if "real" in forward.__code__.co_names else 2, np.cos
    )
    report = gradcheck((lambda x: (forward(x), x), lambda d, x: (d * slope(x),)), normal(3) + 3)
    assert report.method == "central"
    assert report.notes[0].startswith(f"central differences, because {reason}")
    wrong = (lambda x: (forward(x), x), lambda d, x: (1.01 * d * slope(x),))
    assert "it is 1.01 times the numeric one everywhere" in findings(wrong, normal(3) + 3)


def test_other_frameworks_functions_are_taken_as_they_are() -> None:
    pull = lambda x: ((np.sin(x),), lambda douts: (douts[0] * np.cos(x),))  # noqa: E731
    fn = Function("sine", ("angle",), lambda x: (np.sin(x),), pull, takes_complex=False)
    assert gradcheck(fn, normal(3)).method == "central"
    wrong = fn._replace(pull=lambda x: ((np.sin(x),), lambda douts: (-douts[0] * np.cos(x),)))
    assert findings(wrong, normal(3)).startswith("the gradient of angle is wrong in all 3 elements")


# --- what passed once, and must not ----------------------------------------------------------------------


def test_the_upstream_gradient_is_not_the_input_of_a_user_who_begins_at_seed_0_too() -> None:
    transposed = lambda d, s: (d @ s[1].T, (s[0].T @ d).T.copy())  # noqa: E731
    product = lambda x, w: (x @ w, (x, w))  # noqa: E731
    assert not gradcheck((product, transposed), (seeded(8, 16), seeded(16, 16, seed=4)), raise_exception=False)
    for backward in (lambda d, x: (x.copy(),), lambda d, x: (d * d,)):
        assert not gradcheck((lambda x: (x * 1, x), backward), (seeded(5, 10),), raise_exception=False)


@pytest.mark.parametrize("excess", [1e-6, 1e-3, 0.1, 10, -1])
def test_a_bend_is_no_kink(excess: float) -> None:
    def backward(d: Any, x: Any) -> Any:
        n = np.sqrt((x * x).sum(-1, keepdims=True))
        return ((d / n - x * (d * x).sum(-1, keepdims=True) / n**3) * (1 + excess),)

    fn = (lambda x: (x / np.sqrt((x * x).sum(-1, keepdims=True)), x), backward)
    report = gradcheck(fn, (seeded(3, 4),), raise_exception=False)
    assert not report
    assert report.kinks == 0


def test_a_minimum_is_no_kink() -> None:
    fn = (lambda x: ((x * x).sum(), x), lambda d, x: (0 * x * d,))
    with pytest.raises(GradientError):  # refused as too small, or found wrong
        gradcheck(fn, (seeded(5) * 1e-7,))
    assert not gradcheck(fn, (seeded(5) * 1e-4,), raise_exception=False)


def test_where_every_element_is_on_a_kink_nothing_was_compared() -> None:
    with pytest.raises(GradientError, match="every element of the inputs of relu lies on a kink"):
        gradcheck(F.relu, np.zeros(3), method="central")


def test_the_input_of_a_module_is_checked_beside_its_parameters() -> None:
    op = Op("lin", lambda x, w: (x @ w, (x, w)), lambda d, s: (3 * d @ s[1].T, s[0].T @ d))

    class Layer(nn.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(normal(3, 3))

        def forward(self, x: Any) -> Any:
            return op(x, self.weight)

    assert findings(Layer(), normal(4, 3)).startswith("the gradient of x is wrong in all 12 elements")


def test_small_terms_without_an_imaginary_part_are_noticed() -> None:
    forward = lambda x: (x**3 + 1e-5 * np.abs(x), x)  # noqa: E731
    assert not gradcheck((forward, lambda d, x: (3 * x * x * d,)), (seeded(6),), raise_exception=False)
    assert gradcheck((forward, lambda d, x: ((3 * x * x + 1e-5 * np.sign(x)) * d,)), (seeded(6),)).method == "central"


def test_buffers_made_like_one_input_hold_what_comes_of_another() -> None:
    def forward(x: Any, w: Any) -> Any:
        out = np.empty_like(x)
        for i in range(len(x)):
            out[i] = x[i] * w
        return out, (x, w)

    report = gradcheck((forward, lambda d, s: (d * s[1], (d * s[0]).sum(0))), (seeded(4, 3), seeded(3, seed=1)))
    assert report.method == "complex"


def test_imaginary_parts_dropped_on_the_way_to_float32_are_noticed() -> None:
    fn = (lambda a: (np.exp(a.real).astype(np.float32), a), lambda d, a: (d * np.exp(a),))
    assert gradcheck(fn, (seeded(5).astype(np.float32),)).method == "central"


def test_a_complex_step_that_is_not_finite_is_replaced() -> None:
    fn = (lambda x: (1 / (1 + np.exp(-x)), x), lambda d, x: (d * np.exp(x) / (1 + np.exp(x)) ** 2,))
    with np.errstate(over="ignore", invalid="ignore"):
        report = gradcheck(fn, (np.array([-800.0, 0.3]),))
    assert (report.method, report.notes) == ("central", ["central differences, because its complex step is not finite"])


def test_beside_a_pole_the_complex_step_is_trusted() -> None:
    fn = (lambda x: (1 / x, x), lambda d, x: (-d / x**2,))
    assert gradcheck(fn, (np.array([1e-10, 1.0]),), atol=1e-6).method == "complex"


@pytest.mark.parametrize("limit", [1.0, 5.0])
@pytest.mark.parametrize("mode", ["full", "directional"])
def test_hidden_clipping_is_not_linear(limit: float, mode: str) -> None:
    for clipped in (lambda d: np.clip(d, -limit, limit), lambda d: d / max(1, np.linalg.norm(d) / limit)):
        fn = (lambda x: (np.sin(x), x), lambda d, x, clipped=clipped: (np.cos(x) * clipped(d),))
        assert not gradcheck(fn, (seeded(6),), mode=mode, raise_exception=False)
    signed = (lambda x: (np.sin(x), x), lambda d, x: (np.cos(x) * (abs(d) if np.count_nonzero(d) == 1 else d),))
    assert not gradcheck(signed, (seeded(6),), mode="full", raise_exception=False)


def test_of_two_that_tie_only_one_may_have_the_whole_gradient() -> None:
    fn = (lambda x: (x.max(), x), lambda d, x: (d * (x == x.max()),))
    for method in ("complex", "central"):
        assert not gradcheck(fn, (np.array([1.0, 3, 3, 0]),), method=method, raise_exception=False)


def test_derivatives_too_small_to_tell_are_refused() -> None:
    fn = (lambda x: (1e-14 * (x * x).sum(), x), lambda d, x: (4e-14 * x * d,))
    with pytest.raises(GradientError, match=r"cannot be told from rounding .*Scale the function, or pass atol"):
        gradcheck(fn, (seeded(3),))
    assert not gradcheck(fn, (seeded(3),), atol=0, raise_exception=False)


def test_half_precision_is_refused_by_name() -> None:
    fn = (lambda x: (x * 1, x), lambda d, x: (d * 1,))
    with pytest.raises(DTypeError, match=r"an input is float16, expected float32 or float64\. Convert it"):
        gradcheck(fn, (seeded(3).astype(np.float16),))


def test_one_element_of_many_is_not_called_a_factor() -> None:
    def spoil(g: np.ndarray) -> np.ndarray:
        g[7] *= 1.001
        return g

    text = findings(op_of(spoil), normal(30) + 3, mode="directional")
    assert text.startswith("the gradient of x is wrong in 1 of 30 elements\n  dx[7]: ")
    assert "ratio 1 +0.001" in text
    assert "only at 7 of axis 0" in text
