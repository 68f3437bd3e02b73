"""gradcheck passes what is right, names what is wrong, and never passes what it has not compared."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import nn
from minitransformer.autograd import OPS, Op
from minitransformer.errors import ConfigError, DTypeError, GradientError
from minitransformer.gradients import Function, GradcheckError, gradcheck
from minitransformer.gradients.check import observers
from minitransformer.kernels import FAMILIES

RNG = np.random.default_rng(4)


def normal(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def findings(fn: Any, *inputs: Any, **options: Any) -> str:
    """The report on something that is wrong, without its first line."""
    report = gradcheck(fn, inputs, raise_exception=False, **options)
    assert not report.ok
    assert not report
    return str(report).partition("\n")[2]


# --- what is right ---------------------------------------------------------------------------------------


def linear_forward(x: Any, w: Any) -> Any:
    return x @ w.T, (x, w)


def linear_backward(dout: Any, saved: Any) -> Any:
    x, w = saved
    return dout @ w, dout.T @ x


RIGHT: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "function": (lambda a, b: F.softmax(a @ b, -1), (normal(3, 4), normal(4, 2))),
    "function of tensors": (lambda a: a.exp() * 2, (mt.tensor([1.0, 2.0, 3.0], requires_grad=True),)),
    "several outputs": (lambda x: (x.tanh(), x.sum(0)), (normal(3, 2),)),
    "an output that depends on nothing": (lambda x: (x.tanh(), mt.tensor([1.0])), (normal(2, 2),)),
    "op": (OPS["matmul"], (normal(2, 3), normal(3, 2))),
    "op with settings": (partial(OPS["softmax"], dim=0), (normal(3, 2),)),
    "op with several outputs": (partial(OPS["split"], sizes=2, dim=0), (normal(5, 2),)),
    "pair": ((linear_forward, linear_backward), (normal(2, 3), normal(4, 3))),
    "linear": (nn.Linear(3, 4), (normal(2, 3, dtype="f4"),)),
    "attention": (nn.MultiHeadAttention(4, 2), (normal(1, 3, 4, dtype="f4"),)),
    "decoder": (nn.DecoderLayer(4, 2, 6), (normal(1, 2, 4, dtype="f4"), normal(1, 3, 4, dtype="f4"))),
    "embedding": (nn.Embedding(5, 3), (np.array([[1, 4, 1]]),)),
    "dropout": (nn.Dropout(0.5), (normal(4, 4),)),
    "masked": (lambda q: F.scaled_dot_product_attention(q, q, q, np.tri(3, k=-1) > 0), (normal(1, 2, 3, 4),)),
}


@pytest.mark.parametrize("mode", ["full", "directional", None])
@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name: str, method: str, mode: str | None) -> None:
    fn, inputs = RIGHT[name]
    report = gradcheck(fn, inputs, method=method, mode=mode)
    assert report
    assert (report.method, report.kinks, report.notes) == (method, 0, [])
    assert report.mode == (mode or report.mode)
    assert report.compared >= 1
    assert report.worst < 1


def test_float32_is_held_to_its_own_accuracy() -> None:
    def scaled(factor: float) -> Op:
        return Op("scaled", lambda x: (x * 3, None), lambda dout, saved: (dout * np.asarray(3 * factor, dout.dtype),))

    x = normal(5, dtype=np.float32)
    assert gradcheck(scaled(1), x)
    assert not gradcheck(scaled(1 + 1e-4), x, raise_exception=False)
    assert not gradcheck(scaled(1 + 1e-11), x.astype(np.float64), raise_exception=False)


def test_only_tensors_that_require_a_gradient_are_differentiated() -> None:
    loses = lambda a, b: a * b.detach()  # noqa: E731
    fixed, free = mt.tensor([1.0, 2.0]), mt.tensor([3.0, 4.0], requires_grad=True)
    assert gradcheck(loses, (free, fixed))
    assert "the gradient of b is wrong in all 2 elements" in findings(loses, fixed.numpy(), free.numpy())


def test_a_module_keeps_its_parameters_and_their_gradients() -> None:
    layer = nn.Linear(2, 2)
    arrays = [p.data for p in layer.parameters()]
    layer(mt.tensor(normal(1, 2, dtype="f4"))).sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    copies = [g.copy() for g in gradients if g is not None]
    assert gradcheck(layer, normal(3, 2, dtype="f4"))
    assert all(
        p.data is array and p.grad is g for p, array, g in zip(layer.parameters(), arrays, gradients, strict=True)
    )
    assert all((g == copy).all() for g, copy in zip(gradients, copies, strict=True))


def test_the_wrong_parameter_of_a_module_is_named() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            self.scale, self.shift = mt.Parameter(normal(3)), mt.Parameter(normal(3))

        def forward(self, x: mt.Tensor) -> mt.Tensor:
            return x * self.scale.detach() + self.shift

    text = findings(Layer(), normal(2, 3))
    assert text.startswith("the gradient of scale is wrong in all 3 elements\n  dscale[")
    assert text.endswith("  it is 0 everywhere: the backward lost this argument, or returns it as a constant")


# --- what is wrong looks like something ------------------------------------------------------------------


def op_of(spoil: Callable[[np.ndarray], np.ndarray]) -> Op:
    """x^3, and its gradient spoilt."""
    return Op("cube", lambda x: (x**3, x), lambda dout, x: (spoil(3 * x * x * dout),))


def zero_at(index: Any) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(g: np.ndarray) -> np.ndarray:
        g[index] = 0
        return g

    return spoil


ROWS = np.array([1.0, 2.0, 5.0])[:, None]
PATTERNS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "it is -1 times the numeric one everywhere: the sign": (lambda g: -g, ""),
    "it is 2 times the numeric one everywhere: 2 or the root of the size 4 of axis 1": (lambda g: 2 * g, ""),
    "it is 0.5 times the numeric one everywhere: 1/2 or 1 / the root of the size 4 of axis 1": (lambda g: g / 2, ""),
    "it is 0.57735 times the numeric one everywhere: 1 / the root of the size 3 of axis 0": (
        lambda g: g / math.sqrt(3),
        "",
    ),
    "it is -12 times the numeric one everywhere: minus the number 12 of elements": (lambda g: -12 * g, ""),
    "it is 0.9 times the numeric one everywhere": (lambda g: 0.9 * g, ""),
    "it is 0 everywhere: the backward lost this argument, or returns it as a constant": (np.zeros_like, ""),
    "the analytic gradient is not finite": (lambda g: g * math.nan, ""),
    "it is the numeric one in reverse order": (lambda g: g.ravel()[::-1].reshape(g.shape), ""),
    "it is the numeric one, moved by 1 along axis 1": (lambda g: np.roll(g, 1, 1), ""),
    "it is the numeric one, moved by -1 along axis 0": (lambda g: np.roll(g, -1, 0), ""),
    "only at 2 of axis 0, where it is 0": (zero_at(2), "the gradient of x is wrong in 4 of 12 elements\n"),
    "only at 0, 3 of axis 1, where it is 0": (zero_at(np.s_[:, [0, 3]]), ""),
    "off by factors of their own along axis 0: 1, 2, 5": (lambda g: g * ROWS, ""),
}


@pytest.mark.parametrize("mode", ["full", "directional"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str, mode: str) -> None:
    spoil, begin = PATTERNS[pattern]
    text = findings(op_of(spoil), normal(3, 4) + 2, mode=mode)
    assert text.startswith(begin or "the gradient of x is wrong in ")
    assert f"\n  {pattern}" in text
    if not pattern.startswith("it is 0.9"):
        return
    assert text.splitlines()[-1] == f"  {pattern}"  # and no guess where it comes from


def test_a_transposed_gradient() -> None:
    x = normal(3, 3)
    text = findings(op_of(lambda g: g.swapaxes(0, 1).copy()), x)
    assert text.endswith("\n  it is the transpose of the numeric one")


def test_zeros_where_there_should_be_none_and_the_other_way_round() -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1.0]])
    assert "it is 0 in 4 of 12 elements where it should not be" in findings(op_of(lambda g: g * mask), normal(3, 4))
    leaks = Op("masked", lambda x: (x * mask, None), lambda dout, saved: (dout * 1,))
    assert "it is not 0 in 4 of 12 elements where it should be, as where a mask hides" in findings(leaks, normal(3, 4))


def test_elements_of_attention_are_named_by_their_axes() -> None:
    def attention(q: mt.Tensor, k: mt.Tensor, v: mt.Tensor) -> mt.Tensor:
        heads = [F.scaled_dot_product_attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1]) for h in (0, 1)]
        lost = F.scaled_dot_product_attention(q[:, 2:], k[:, 2:].detach(), v[:, 2:])
        return mt.concat([*heads, lost], 1)

    q, k, v = (normal(1, 3, 4, 2) for _ in range(3))
    text = findings(attention, q, k, v)
    assert text.startswith("the gradient of k is wrong in 8 of 24 elements\n  dk[b=0, h=2, s=")
    assert text.endswith("\n  only at 2 of h, where it is 0")


def test_a_gradient_left_in_the_broadcast_shape() -> None:
    add = Op("add_bias", lambda x, b: (x + b, None), lambda dout, saved: (dout * 1, dout * 1))
    assert findings(add, normal(4, 3), normal(3)) == (
        "the gradient of b has shape (4, 3), expected (3,): it was not summed over the axes that the input was "
        "broadcast along"
    )


@pytest.mark.parametrize(
    ("gradients", "problem"),
    [
        (lambda d: (d * 1,), "backward returns no gradient for b"),
        (lambda d: (d * 1, None), "backward returns no gradient for b"),
        (lambda d: (d[:1] * 1, d * 1), "the gradient of a has shape (1,), expected (3,)"),
        (lambda d: (d.astype("f4"), d * 1), "the gradient of a is float32, expected float64 as its input"),
    ],
)
def test_gradients_of_another_kind(gradients: Any, problem: str) -> None:
    op = Op("add", lambda a, b: (a + b, None), lambda dout, saved: gradients(dout))
    assert findings(op, normal(3), normal(3)) == problem


def test_a_backward_that_is_not_linear_in_its_upstream_gradient() -> None:
    op = Op("cube", lambda x: (x**3, x), lambda dout, x: (3 * x * x * dout * abs(dout),))
    assert "the gradient of x is not linear in the upstream gradient" in findings(op, normal(3))


# --- manners ---------------------------------------------------------------------------------------------


def draws(dout: np.ndarray) -> tuple[np.ndarray]:
    return (dout * (1 + 1e-14 * RNG.random()),)


MANNERS: dict[str, Op] = {
    "the input x was written to": Op("op", lambda x: (np.sin(x, out=x) * 1, np.cos(x)), lambda d, c: (d * c,)),
    "the upstream gradient of output 0 was written to": Op(
        "op", lambda x: (x * 2, None), lambda d, _: (np.multiply(d, 2, out=d) * 1,)
    ),
    "dx shares memory with an upstream gradient": Op("op", lambda x: (x * 1, None), lambda d, _: (d,)),
    "dx shares memory with an input": Op("op", lambda x: ((x * x / 2), x), lambda d, x: (np.multiply(d, x, out=x),)),
    "db and da share memory: writing into one changes the other": Op(
        "op", lambda a, b: (a + b, None), lambda d, _: (d * 1,) * 2
    ),
    "two runs give different gradients: backward depends on something else than its inputs": Op(
        "op", lambda x: (x * 1, None), lambda d, _: draws(d)
    ),
    "it refuses read-only arrays in Fortran's order, with gaps, backwards, (ValueError: output array is read-only)": Op(
        "op", lambda x: (x.__iadd__(0) * 1, None), lambda d, _: (d * 1,)
    ),
    "read-only arrays in Fortran's order, with gaps, backwards, give other outputs": Op(
        "op",
        lambda x: (np.frombuffer(x.base if x.base is not None else x).reshape(-1)[: x.size] * 1.0, None),
        lambda d, _: (d * 1,),
    ),
}


@pytest.mark.parametrize("problem", MANNERS)
def test_manners(problem: str) -> None:
    op = MANNERS[problem]
    inputs = (normal(3), normal(3)) if "db" in problem else (normal(3),)
    assert problem in findings(op, *inputs).splitlines()


def test_a_forward_that_draws_is_noticed() -> None:
    rng = np.random.default_rng(0)
    text = findings(lambda x: x * rng.standard_normal(), normal(4), method="central")
    assert "two runs give different outputs: it depends on something else than its inputs" in text


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fast_forward_that_is_wrong_is_compared_with_the_reference(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = import_module("minitransformer.kernels.rowwise.reference")
    fast = ModuleType(f"minitransformer.kernels.rowwise.fast_{dtype}")
    fast.__dict__.update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
    right = fast.softmax_forward
    monkeypatch.setitem(sys.modules, fast.__name__, fast)
    monkeypatch.setitem(FAMILIES, "rowwise", (f"fast_{dtype}", "reference"))
    assert gradcheck(partial(OPS["softmax"], dim=-1), normal(2, 3, dtype=dtype))
    fast.softmax_forward = lambda x: right(x) + np.asarray(1e-3, x.dtype)
    text = findings(partial(OPS["softmax"], dim=-1), normal(2, 3, dtype=dtype))
    assert text.splitlines()[-1] == "output 0 differs from that of the reference kernels: the forward is wrong"


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


# --- what cannot be checked never passes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "inputs", "error", "message"),
    [
        (3, (1.0,), DTypeError, "got a int, expected a function, Module, Op, or a pair (forward, backward)"),
        (lambda x: 1.0, normal(2), DTypeError, "<lambda> returned a float, expected a Tensor or a tuple of Tensors"),
        (lambda x: None, normal(2), DTypeError, "<lambda> returned a NoneType, expected"),
        (lambda x: (x, 3), normal(2), DTypeError, "<lambda> returned a int, expected"),
        (lambda x: x > 0, normal(2), DTypeError, "<lambda> returned bool, expected floats"),
        (lambda x: x.detach() * 2, normal(2), GradientError, "no output of <lambda> depends on an input that"),
        (lambda x: x, np.arange(3), GradientError, "none of the 1 inputs of <lambda> can be differentiated"),
        (lambda x: x, (), GradientError, "none of the 0 inputs of <lambda> can be differentiated"),
        (lambda x: x, mt.tensor([1, 2]), GradientError, "none of the 1 inputs of <lambda> can be differentiated"),
        (lambda x: x.log(), np.array([-1.0, 1]), GradientError, "<lambda> is NaN at these inputs. Move"),
        (lambda x: x.log(), np.array([0.0]), GradientError, "no output of <lambda> is finite at these inputs"),
        (lambda x: x * 2, normal(0, 3), GradientError, "<lambda> returned no number. Give it inputs of at least"),
        (lambda x: x.sum(), normal(0), GradientError, "nothing of <lambda> could be compared. Give inputs"),
        ((lambda x: x, lambda d, s: d), normal(2), DTypeError, "<lambda> returned no pair (out, saved). Return"),
        (lambda x: x.log(), np.array([1e-9]), GradientError, "<lambda> is NaN"),
    ],
)
def test_what_cannot_be_checked_is_an_error(fn: Any, inputs: Any, error: type[Exception], message: str) -> None:
    if isinstance(inputs, np.ndarray) and inputs.size and 0 < inputs[0:1].max() < 1e-6:
        with pytest.raises(
            error, match=r"^gradcheck: <lambda> is finite at x, and not 1e-06 beside it\. Move the inputs"
        ):
            gradcheck(fn, inputs, method="central")
        return
    with pytest.raises(error) as caught:
        gradcheck(fn, inputs)
    assert str(caught.value).startswith(f"gradcheck: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "forward"}, "method is 'forward', expected one of ('complex', 'central')"),
        ({"mode": "fast"}, "mode is 'fast', expected one of ('full', 'directional', None)"),
        ({"on_kink": "ignore"}, "on_kink is 'ignore', expected one of ('skip', 'raise')"),
        ({"directions": 0}, "directions is 0, expected an integer from 1"),
        ({"eps": -1}, "eps is -1, expected a number of at least 0"),
        ({"rtol": math.inf}, "rtol is inf, expected a number of at least 0"),
        ({"atol": "1"}, "atol is '1', expected a number of at least 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        gradcheck(F.relu, normal(2), **options)
    assert str(error.value).startswith(f"gradcheck: {message}")


def test_the_error_is_an_assertion_and_carries_the_report() -> None:
    with pytest.raises(AssertionError) as error:
        gradcheck(op_of(lambda g: 2 * g), normal(3))
    assert isinstance(error.value, GradcheckError)
    assert str(error.value) == str(error.value.report)
    first, second, third, fourth = str(error.value).splitlines()
    assert first == "gradcheck of cube: FAILED (complex step, full, 9 numbers compared)"
    assert second == "the gradient of x is wrong in all 3 elements"
    assert third.startswith("  dx[")
    assert third.endswith(", ratio 2")
    assert fourth == "  it is 2 times the numeric one everywhere: 2"


def test_observers_see_every_report() -> None:
    seen: list[Any] = []
    observers.append(seen.append)
    try:
        gradcheck(F.relu, normal(2))
        gradcheck(op_of(lambda g: -g), normal(2), raise_exception=False)
    finally:
        observers.remove(seen.append)
    assert [report.ok for report in seen] == [True, False]


def test_a_large_gradient_is_sampled() -> None:
    spoil = zero_at(np.s_[:, 7])
    text = findings(op_of(spoil), normal(1000, 10))
    assert "only at 7 of axis 1, where it is 0" in text
    assert "note: 1024 of the 10000 elements of dx were looked at" in text


# --- what passed once, and must not ----------------------------------------------------------------------


def seeded(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


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
