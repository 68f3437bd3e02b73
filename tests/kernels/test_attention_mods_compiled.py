"""Which of users' functions are compiled into the kernels, what becomes of the others, and what is remembered."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from test_attention_cpu import ZERO, arrays, assert_close, both
from test_attention_mods import DTYPES, TABLE, Mod, problem_of

from minitransformer.errors import DTypeError, GradientError, ShapeError
from minitransformer.kernels.attention import cpu, reference, user_code
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.user_code import Refusal, tile_code

# --- what is not compiled --------------------------------------------------------------------------------


class Doubled:
    """A function that is no function of Python's."""

    __name__ = "Doubled"

    def __call__(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return 2 * s


NOT_COMPILED: dict[str, tuple[Mod, str]] = {
    "a generator": (lambda s, b, h, q, k: s + sum(x for x in (q, k)), "yield"),
    "an array around it": (lambda s, b, h, q, k: s + TABLE[0, k], "it reads TABLE, a ndarray, which may change unseen"),
    "a method of arrays": (lambda s, b, h, q, k: s.astype(float), "Unknown attribute 'astype' of type float64"),
    "an object": (Doubled(), "it is a Doubled, not a function of Python"),
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_what_numba_refuses_is_served_by_the_reference_and_said_once(name: str) -> None:
    mod, reason = NOT_COMPILED[name]
    given_ = arrays(1, 2, 1, 3, 4, 2, 2)
    problem = Problem(1.0, ZERO, score_mod=mod)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        first = cpu.forward(*given_[2:], None, None, problem)
        cpu.forward(*given_[2:], None, None, problem)
    (warning,) = caught
    text = str(warning.message)
    assert warning.category is RuntimeWarning
    assert text.startswith(
        f"flex_attention: {mod.__name__} is not compiled, so attention runs many times slower in NumPy ("
    )
    assert reason in text and "\n" not in text and "buffers" in text and len(text) < 600
    for x, y in zip(first, reference.forward(*given_[2:], None, None, problem), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_derivative_that_numba_refuses_leaves_the_forward_compiled() -> None:
    given_ = arrays(1, 2, 1, 3, 4, 2, 2)
    problem = Problem(1.0, ZERO, score_mod=lambda s, b, h, q, k: s if s > 0 else s * 0.5)
    out, lse = cpu.forward(*given_[2:], None, None, problem)
    with pytest.warns(RuntimeWarning, match=r"<lambda> is not compiled, .*gt.*complex.* give score_mod_grad"):
        gradients = cpu.backward(*given_, None, out, lse, None, None, None, problem)
    expected = both(reference, given_, None, problem)
    assert_close([out, lse, *gradients[:3]], expected)
    with_grad = problem._replace(score_mod_grad=lambda s, b, h, q, k: 1.0 if s > 0 else 0.5)
    assert_close(both(cpu, given_, None, with_grad), expected)


@pytest.mark.parametrize(
    ("mod", "error", "message"),
    [
        (lambda s, b, h, q, k: q >= k, DTypeError, "<lambda> returned bool, expected float64 as its scores"),
        (lambda s, b, h, q, k: None, DTypeError, "<lambda> returned NoneType, expected float64"),
        (lambda s, b, h, q, k: np.ones(3), ShapeError, r"returned shape \(3,\), expected one that broad"),
        (lambda s, b, h, q, k: s + 1j, DTypeError, "returned complex128, expected float64"),
    ],
)
def test_results_that_are_no_scores_are_refused_as_in_the_reference(mod: Mod, error: Any, message: str) -> None:
    given_ = arrays(1, 2, 1, 3, 4, 2, 2)
    with pytest.raises(error, match=message):
        cpu.forward(*given_[2:], None, None, Problem(1.0, ZERO, score_mod=mod))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: abs(s) * 2,
        lambda s, b, h, q, k: s + 0.1 * s.real,
        lambda s, b, h, q, k: math.tanh(s / 5),
        lambda s, b, h, q, k: np.abs(s) if q > k else s,
    ],
    ids=["abs", "real part", "math", "in a branch"],
)
def test_a_complex_step_that_drops_the_imaginary_part_is_refused(mod: Mod, dtype: Any) -> None:
    given_ = arrays(1, 2, 1, 30, 40, 2, 2, dtype)
    problem = Problem(1.0, ZERO, score_mod=mod)
    out, lse = cpu.forward(*given_[2:], None, None, problem)
    with pytest.raises(GradientError, match=r"score_mod: .*, or give score_mod_grad\."):
        cpu.backward(*given_, None, out, lse, None, None, None, problem)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_the_function_surface(dtype: Any) -> None:
    def raising(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if q == 17 and k == 23:
            raise KeyError("mine")
        return s

    given_ = arrays(1, 1, 1, 30, 40, 2, 2, dtype)
    with pytest.raises(KeyError, match="mine"):
        cpu.forward(*given_[2:], None, None, Problem(1.0, ZERO, score_mod=raising))
    beyond = problem_of("table", buffers=(np.zeros((1, 20)),))
    with pytest.raises(IndexError):
        cpu.forward(*given_[2:], None, None, beyond)


# --- what is remembered ----------------------------------------------------------------------------------


SLOPE = 0.5


def with_a_global(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s - SLOPE * abs(q - k)


def test_functions_are_told_apart_by_all_that_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(slope: float) -> Mod:
        return lambda s, b, h, q, k: s - slope * abs(q - k)

    given_ = arrays(1, 1, 1, 9, 9, 2, 2)
    mods = [of(0.5), of(1.0), of(-0.0), of(0.0), lambda s, b, h, q, k, slope=2.0: s - slope * abs(q - k)]
    problems = [Problem(1.0, ZERO, score_mod=mod) for mod in mods]
    for problem in problems:
        assert_close(both(cpu, given_, None, problem), both(reference, given_, None, problem))
    for slope in (0.5, 0.75):
        monkeypatch.setitem(globals(), "SLOPE", slope)
        problem = Problem(1.0, ZERO, score_mod=with_a_global)
        assert_close(both(cpu, given_, None, problem), both(reference, given_, None, problem))


def test_a_function_that_is_made_anew_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    build = user_code._build
    monkeypatch.setattr(user_code, "_build", lambda *args: built.append(args) or build(*args))

    def of(slope: float) -> Mod:
        return lambda s, b, h, q, k: s - slope * abs(q - k) - 1

    for slope in (0.5, 0.5, 1.0, 0.5):
        tile_code(Problem(1.0, ZERO, score_mod=of(slope)), (1, 1, 4, 4), np.dtype(np.float64), False)
    assert len(built) == 2


def test_few_functions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "_MOST", 3)

    def of(slope: float) -> Mod:
        return lambda s, b, h, q, k: s - slope

    codes = [
        tile_code(Problem(1.0, ZERO, score_mod=of(x)), (1, 1, 4, 4), np.dtype(np.float64), False) for x in range(5)
    ]
    assert len(user_code._known) <= 3
    cells = tuple(np.zeros((4, 1), np.int64))
    for x, code in enumerate(codes):  # one that was forgotten lives as long as it is in use
        assert not isinstance(code, Refusal) and code is not None
        np.testing.assert_array_equal(user_code._run(code.address, np.ones(1), cells, code.buffers)[0], 1 - x)
