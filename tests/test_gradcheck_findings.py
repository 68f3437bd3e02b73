"""What is wrong is named by gradcheck: how the gradient differs, and what the backward does to its arrays."""

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
from wrong_gradients import RNG, findings, normal, op_of, zero_at

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import nn
from minitransformer.autograd import OPS, Op
from minitransformer.gradients import gradcheck
from minitransformer.kernels import FAMILIES

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


def test_a_large_gradient_is_sampled() -> None:
    spoil = zero_at(np.s_[:, 7])
    text = findings(op_of(spoil), normal(1000, 10))
    assert "only at 7 of axis 1, where it is 0" in text
    assert "note: 1024 of the 10000 elements of dx were looked at" in text


def test_the_wrong_parameter_of_a_module_is_named() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            self.scale, self.shift = mt.Parameter(normal(3)), mt.Parameter(normal(3))

        def forward(self, x: mt.Tensor) -> mt.Tensor:
            return x * self.scale.detach() + self.shift

    text = findings(Layer(), normal(2, 3))
    assert text.startswith("the gradient of scale is wrong in all 3 elements\n  dscale[")
    assert text.endswith("  it is 0 everywhere: the backward lost this argument, or returns it as a constant")


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
