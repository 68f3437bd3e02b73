"""Attention problems: what is drawn, that it shrinks, and that the programs they print give the same numbers."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings

import minitransformer as mt
from minitransformer import errors
from minitransformer import functional as F
from minitransformer.testing import attention_problems
from minitransformer.testing.attention_problem import AttentionProblem

Numbers = dict[str, np.ndarray]


def run(problem: AttentionProblem) -> Numbers:
    """The output, and the gradients of all float arrays."""
    arguments = problem.kwargs
    names = {"query": "q", "key": "k", "value": "v"}
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != bool:
        names["attn_mask"] = "mask"
    leaves = {name: mt.Tensor(arguments[name], requires_grad=True) for name in names}
    out = F.scaled_dot_product_attention(**{**arguments, **leaves})
    gradients = mt.grad(out, list(leaves.values()), problem.dout)
    return {"out": out.numpy(), **dict(zip(names.values(), gradients, strict=True))}


def execute(program: str) -> dict[str, Any]:
    """What a program leaves behind, after a look at what it prints."""
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, "program", "exec"), namespace)
    assert printed.getvalue()
    return namespace


def plain() -> AttentionProblem:
    return AttentionProblem(np.ones((1, 1, 1, 1)), np.ones((1, 1, 2, 1)), np.ones((1, 1, 2, 1)), np.ones((1, 1, 1, 1)))


@given(attention_problems())
def test_every_problem_is_one_of_attention(problem: AttentionProblem) -> None:
    """Rows are empty exactly where `allowed`, which follows from definitions, says so."""
    B, H, T, S = problem.sizes
    assert B <= 2 and H <= 4 and T <= 9 and S <= 9 and problem.q.shape[3] <= 8 and problem.v.shape[3] <= 8
    out, weights = F.scaled_dot_product_attention(**problem.kwargs, need_weights=True)
    assert out.shape == problem.dout.shape
    assert not weights.numpy()[~problem.allowed].any()
    sums = weights.numpy().sum(axis=-1)
    np.testing.assert_allclose(sums, problem.allowed.any(axis=-1), atol=1e-12)


@given(attention_problems(gqa=False, window=False, empty_rows=False, cross=False, max_batch=1))
def test_what_is_switched_off_is_not_drawn(problem: AttentionProblem) -> None:
    assert problem.sizes[0] == 1
    assert problem.k.shape[1] == problem.q.shape[1] and "enable_gqa" not in problem.options
    assert problem.sizes[2] == problem.sizes[3]
    assert "window_size" not in problem.options
    assert problem.allowed.any(axis=-1).all()


@given(attention_problems(empty_rows=False))
def test_without_empty_rows_every_query_has_a_key(problem: AttentionProblem) -> None:
    assert problem.allowed.any(axis=-1).all()


CONDITIONS: list[Callable[[AttentionProblem], Any]] = [
    lambda p: p.options.get("is_causal") and p.options.get("causal_align") == "lower_right",
    lambda p: p.options.get("is_causal") and p.options.get("causal_align") == "upper_left",
    lambda p: p.options.get("window_size") and "attn_mask" in p.options,
    lambda p: p.options.get("key_lengths") is not None and 0 in p.options["key_lengths"],
    lambda p: p.options.get("attn_mask") is not None and p.options["attn_mask"].dtype == float,
    lambda p: p.options.get("enable_gqa") and p.k.shape[1] > 1,
    lambda p: "alibi_slopes" in p.options and "softcap" in p.options,
    lambda p: p.options.get("scale", 1) < 0,
    lambda p: p.q.shape[3] != p.v.shape[3],
    lambda p: p.sizes[2] > p.sizes[3] and p.options == {},
    lambda p: not p.allowed.any(axis=-1).all() and p.allowed.any(),
    lambda p: min(p.k.strides) < 0 and not p.q.flags.c_contiguous,
]


class AllDrawn(Exception):
    """There is nothing left to look for."""


def test_everything_is_drawn() -> None:
    missing = dict(enumerate(CONDITIONS))

    @settings(max_examples=300, database=None, derandomize=True, phases=(Phase.generate,))
    @given(attention_problems())
    def look(problem: AttentionProblem) -> None:
        for number, condition in list(missing.items()):
            if condition(problem):
                del missing[number]
        if not missing:
            raise AllDrawn

    with contextlib.suppress(AllDrawn):
        look()
    assert not missing


@given(attention_problems())
def test_the_program_gives_the_same_bits(problem: AttentionProblem) -> None:
    left = execute(problem.code())
    assert repr(problem).endswith(f"\n\n{problem.code()}>")
    for name, expected in run(problem).items():
        got = left["out"].numpy() if name == "out" else left[name].grad
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(got, expected)
    assert left["q"].data.strides == problem.q.strides or 1 in problem.q.shape


@given(attention_problems())
def test_in_float32_it_is_the_same_problem(problem: AttentionProblem) -> None:
    single = problem.to("float32")
    for name in ("q", "k", "v", "dout"):
        assert getattr(single, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(single, name), getattr(problem, name))
    left = execute(single.code())
    for name, expected in run(single).items():
        np.testing.assert_array_equal(left["out"].numpy() if name == "out" else left[name].grad, expected)


def test_a_failing_test_prints_the_smallest_problem_as_a_program() -> None:
    @settings(max_examples=50, database=None, derandomize=True, phases=(Phase.generate, Phase.shrink))
    @given(attention_problems())
    def fails(problem: AttentionProblem) -> None:
        assert problem.allowed.any(axis=-1).all()

    with pytest.raises(AssertionError) as caught:
        fails()
    note = "\n".join(caught.value.__notes__)
    # With a causal mask in the lower right corner it takes two queries, with a length or a mask one.
    assert re.search(r"<attention problem B=1 H=1 K=1 T=[12] S=1 D=1 Dv=1 float64\n", note)
    assert note.count("mt.Tensor(np.array([[[[0.0]]]]), requires_grad=True)") >= 2
    (call,) = (line for line in note.splitlines() if line.startswith("out = "))
    assert call.startswith("out = F.scaled_dot_product_attention(q, k, v, ")
    assert call.count("=") <= 3  # no option besides those that leave a row empty


def test_arrays_are_locked() -> None:
    problem = plain()
    with pytest.raises(ValueError, match="read-only"):
        problem.q[...] = 2


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="max_len is 0, expected a positive integer"):
        attention_problems(max_len=0)
    with pytest.raises(errors.ConfigError, match="gqa is 1, expected a bool"):
        attention_problems(gqa=1)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match="framework is 'jax', expected one of"):
        plain().code("jax")


def test_what_torch_cannot_do_is_said() -> None:
    problem = AttentionProblem(*[np.ones((1, 1, 1, 1))] * 4, options={"softcap": 2.0})
    assert problem.torch_lacks == "softcap"
    for call in (problem.to_torch, lambda: problem.code("torch")):
        with pytest.raises(errors.ConfigError, match=r"torch's scaled_dot_product_attention has no softcap\."):
            call()
    assert plain().torch_lacks is None


@pytest.mark.peers
@given(attention_problems())
def test_torch_agrees(problem: AttentionProblem) -> None:
    import torch

    if problem.torch_lacks is not None:
        return
    call = problem.to_torch()
    out = torch.nn.functional.scaled_dot_product_attention(**call.kwargs)
    out.backward(call.dout)
    expected = run(problem)
    got = {"out": out.detach(), "q": call.kwargs["query"].grad, "k": call.kwargs["key"].grad}
    got["v"] = call.kwargs["value"].grad
    if "mask" in expected and call.kwargs["attn_mask"].requires_grad:
        got["mask"] = call.kwargs["attn_mask"].grad
    left = execute(problem.code("torch"))
    for name, number in got.items():
        scale = max(1.0, float(abs(expected[name]).max()))
        np.testing.assert_allclose(number.numpy(), expected[name], rtol=0, atol=1e-12 * scale, err_msg=name)
        again = left["out"].detach() if name == "out" else left[name].grad
        np.testing.assert_array_equal(again.numpy(), number.numpy())
