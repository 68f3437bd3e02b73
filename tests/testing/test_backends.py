"""`check_backends` on kernels made for the test: other ones that are right pass, wrong ones are named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import errors, kernels
from minitransformer import functional as F
from minitransformer.kernels.attention import reference as attention
from minitransformer.kernels.rowwise import reference as rowwise
from minitransformer.testing import check_backends, strategies
from minitransformer.testing.attention_problem import AttentionProblem
from minitransformer.testing.backends import BackendError

X = np.random.default_rng(0).standard_normal((3, 5))


def module(family: str, name: str, **functions: Any) -> ModuleType:
    """An implementation of a family that is its reference but for `functions`."""
    reference = {"rowwise": rowwise, "attention": attention}[family]
    made = ModuleType(f"minitransformer.kernels.{family}.{name}")
    vars(made).update({n: x for n, x in vars(reference).items() if not n.startswith("__")} | functions)
    return made


@pytest.fixture
def serve() -> Iterator[Callable[..., None]]:
    """Make functions an implementation "other" of a family, and its first choice."""
    families, made = dict(kernels.FAMILIES), []

    def install(family: str, **functions: Any) -> None:
        other = module(family, "other", **functions)
        sys.modules[other.__name__] = other
        made.append(other.__name__)
        kernels.FAMILIES[family] = ("other", "reference")
        kernels._module.cache_clear()

    yield install
    kernels.FAMILIES.clear()
    kernels.FAMILIES.update(families)
    for name in made:
        del sys.modules[name]
    kernels._module.cache_clear()


def backwards_sum(x: np.ndarray) -> np.ndarray:
    """Sums of rows, added one by one from the last."""
    return x[:, ::-1].cumsum(axis=-1)[:, -1:]


def other_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return e / backwards_sum(e)


def other_softmax_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    terms = dout * out
    return terms - out * backwards_sum(terms)


@contextmanager
def served_otherwise() -> Iterator[None]:
    """Softmax and attention with sums in another order."""

    def forward(q: Any, k: Any, v: Any, bias: Any, out: Any, problem: Any) -> Any:
        assert out is None
        out, lse = attention.forward(q[..., ::-1], k[..., ::-1], v[..., ::-1], bias, None, problem)
        return np.ascontiguousarray(out[..., ::-1]), lse

    def backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, *more: Any) -> Any:
        arrays = (x[..., ::-1] for x in (q, k, v))
        g = attention.backward(dout[..., ::-1], dlse, *arrays, bias, out[..., ::-1], lse, *more)
        return g._replace(dq=g.dq[..., ::-1], dk=g.dk[..., ::-1], dv=g.dv[..., ::-1])

    others = {
        "rowwise": {"softmax_forward": other_softmax, "softmax_backward": other_softmax_backward},
        "attention": {"forward": forward, "backward": backward},
    }
    with pytest.MonkeyPatch.context() as patch:
        for family, functions in others.items():
            other = module(family, "turned", **functions)
            patch.setitem(sys.modules, other.__name__, other)
            patch.setitem(kernels.FAMILIES, family, ("turned", "reference"))
        kernels._module.cache_clear()
        yield
    kernels._module.cache_clear()


@given(strategies.arrays(strategies.shapes(min_dims=2, max_dims=3, max_side=9)), st.sampled_from([0, -1]))
def test_no_false_alarm_on_softmax(x: np.ndarray, dim: int) -> None:
    with served_otherwise():
        assert check_backends(F.softmax, x, dim=dim).compared == 4 * x.size


@given(strategies.attention_problems())
def test_no_false_alarm_on_attention(problem: AttentionProblem) -> None:
    options = dict(problem.options)
    mask = [options.pop("attn_mask")] if "attn_mask" in options else []
    with served_otherwise():
        assert check_backends(F.scaled_dot_product_attention, problem.q, problem.k, problem.v, *mask, **options)


def test_the_report_is_a_table(serve: Callable[..., None]) -> None:
    serve("rowwise", softmax_forward=other_softmax, softmax_backward=other_softmax_backward)
    report = check_backends("softmax", X, dim=-1)
    assert report and report.ok and report.compared == 60
    assert [(c.implementation, c.dtype, c.what) for c in report.comparisons] == [
        ("other", dtype, what) for dtype in ("float32", "float64") for what in ("out", "dx")
    ]
    lines = str(report).splitlines()
    assert lines[0] == "check_backends of softmax: passed (60 numbers compared)"
    assert lines[1].split() == ["implementation", "dtype", "array", "error", "plain", "error", "allowed"]
    assert len(lines) == 6 and lines[2].startswith("other")
    assert all(c.error <= c.allowed == pytest.approx(c.allowed) and c.allowed < 1e-5 for c in report.comparisons)


def spoiled(element: tuple[int, int], part: float) -> Callable[[np.ndarray], np.ndarray]:
    def forward(x: np.ndarray) -> np.ndarray:
        out = rowwise.softmax_forward(x)
        out[element] *= 1 + part
        return out

    return forward


@pytest.mark.parametrize("part", [1e-4, np.nan, np.inf])
def test_a_wrong_forward_is_named(serve: Callable[..., None], part: float) -> None:
    serve("rowwise", softmax_forward=spoiled((1, 3), part))
    with pytest.raises(BackendError) as caught:
        check_backends(F.softmax, X)
    assert isinstance(caught.value, AssertionError)
    assert not caught.value.report
    assert "check_backends of softmax: FAILED" in str(caught.value)
    assert "other float32: out[1, 3] is" in str(caught.value)
    assert "other float64: out[1, 3] is" in str(caught.value)


def test_an_error_of_rounding_is_caught_in_float64(serve: Callable[..., None]) -> None:
    """1e-7 is what float32 may do: it passes there, and float64 tells."""
    serve("rowwise", softmax_forward=spoiled((1, 3), 1e-8))
    with pytest.raises(BackendError) as caught:
        check_backends(F.softmax, X)
    assert {c.dtype for c in caught.value.report.comparisons if not c.ok} == {"float64"}


def test_a_sum_in_lower_precision_is_caught(serve: Callable[..., None]) -> None:
    serve("rowwise", softmax_backward=lambda dout, out: rowwise.softmax_backward(dout.astype(np.float16), out))
    with pytest.raises(BackendError, match=r"other float32: dx\["):
        check_backends(F.softmax, X)


def test_a_wrong_gradient_is_named_with_its_axes(serve: Callable[..., None]) -> None:
    def backward(*args: Any) -> Any:
        g = attention.backward(*args)
        g.dk[1, 0, 2, 0] = 7
        return g

    serve("attention", backward=backward)
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 1, 4, 3))
    with pytest.raises(BackendError, match=r"other float32: dkey\[b=1, h=0, s=2, d=0\] is 7, expected"):
        check_backends(F.scaled_dot_product_attention, q, k, v)


def test_wrong_shapes_and_dtypes_are_caught(serve: Callable[..., None]) -> None:
    serve("rowwise", softmax_forward=lambda x: rowwise.softmax_forward(x).astype(np.float64))
    with pytest.raises(BackendError, match=r"out has shape \(3, 5\) and dtype float64, expected \(3, 5\) and float32"):
        check_backends(F.softmax, X)


def test_modules_are_checked_with_their_parameters(serve: Callable[..., None]) -> None:
    serve("rowwise", layer_norm_backward=lambda *args: tuple(-x for x in rowwise.layer_norm_backward(*args)))
    with pytest.raises(BackendError, match=r"dweight\[\d\] is"):
        check_backends(mt.nn.LayerNorm(5), X)


def test_families_with_and_without_another_are_checked_as_served(serve: Callable[..., None]) -> None:
    """No implementation serves both, so the one that would is taken of each."""
    serve("rowwise", softmax_forward=spoiled((0, 0), 1e-3))
    with pytest.raises(BackendError, match=r"as served float32: out\["):
        check_backends(lambda x: F.gelu(F.softmax(x)), X)


def test_elements_beyond_float32_are_left_out(serve: Callable[..., None]) -> None:
    """1e30 squared is no number of float32: neither a failure nor compared."""
    serve("attention")
    q = np.array([1e30, 1]).reshape(2, 1, 1, 1)
    report = check_backends(F.scaled_dot_product_attention, q, q, np.ones((2, 1, 1, 1)))
    assert [c.compared for c in report.comparisons] == [1] * 8
    with pytest.raises(errors.GradientError, match="returned no number that float32 can hold"):
        check_backends(F.scaled_dot_product_attention, q[:1], q[:1], np.ones((1, 1, 1, 1)))


def test_what_compares_nothing_does_not_pass(serve: Callable[..., None]) -> None:
    kernels.FAMILIES["rowwise"] = ("reference",)  # `serve` restores it
    with pytest.raises(errors.GradientError, match="softmax calls kernels of rowwise, which have no implementation"):
        check_backends(F.softmax, X)
    with pytest.raises(errors.GradientError, match="matmul calls no kernel, so it has no implementation besides"):
        check_backends(F.matmul, X, X.T)
    serve("rowwise")
    with pytest.raises(errors.GradientError, match="softmax returned no number that"):
        check_backends(F.softmax, np.zeros((0, 3)))
    with pytest.raises(errors.GradientError, match="none of the 1 inputs of softmax can be differentiated"):
        check_backends(F.softmax, np.arange(3))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="rule is '3x', expected one of"):
        check_backends(F.softmax, X, rule="3x")
    with pytest.raises(errors.ConfigError, match=r"there is no op 'softmx'\. Did you mean 'softmax'\?"):
        check_backends("softmx", X)
    with pytest.raises(errors.ConfigError, match="a Module takes no settings, got"):
        check_backends(mt.nn.LayerNorm(5), X, eps=1)
