"""gradcheck passes what is right, and never passes what it cannot check."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from wrong_gradients import findings, normal, op_of

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import nn
from minitransformer.autograd import OPS, Op
from minitransformer.errors import ConfigError, DTypeError, GradientError
from minitransformer.gradients import GradcheckError, gradcheck
from minitransformer.gradients.check import observers


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
    "decoder": (nn.DecoderLayer(2, 2, 3), (normal(1, 2, 2, dtype="f4"), normal(1, 3, 2, dtype="f4"))),
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
