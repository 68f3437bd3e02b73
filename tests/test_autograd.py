"""Autograd as a machine: graphs of every form, what is kept and freed, and every refusal."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.autograd import OPS, register
from minitransformer.errors import DTypeError, GradientError, RangeError, ShapeError


def leaf(*shape: int, seed: int = 0) -> mt.Tensor:
    return mt.tensor(np.asarray(np.random.default_rng(seed).standard_normal(shape)), requires_grad=True)


class Kept(NamedTuple):
    x: np.ndarray


Make = Callable[..., Any]


@pytest.fixture
def op() -> Iterator[Make]:
    """Registers an op for one test."""
    names = []

    def make(forward: Any = None, backward: Any = None, many: bool = False) -> Any:
        names.append(f"test_op_{len(names)}")
        return register(
            names[-1],
            forward or (lambda x: (2 * x, Kept(x))),
            backward or (lambda dout, saved: (2 * dout,)),
            many=many,
        )

    yield make
    for name in names:
        del OPS[name]


# ---- graphs ---------------------------------------------------------------------------------------


def test_a_chain_of_100000_ops_runs_differentiates_and_is_freed_without_recursion() -> None:
    x = mt.tensor(1.0, requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y + 0.5
    assert y.item() == 50_001
    y.backward()
    assert x.grad == 1
    del y
    gc.collect()


def test_a_node_runs_once_after_all_its_users() -> None:
    """A ladder of diamonds has 2^60 paths: only a walk over nodes ends."""
    x = mt.tensor(np.float64(1.0), requires_grad=True)
    y = x
    for _ in range(60):
        y = 0.5 * y + 0.25 * y + 0.5 * y
    y.backward()
    assert x.grad == pytest.approx(1.25**60, rel=1e-12)


STEPS = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a - 0.5 * b,
    lambda a, b: (a * b).tanh(),
    lambda a, b: a.sigmoid() / (b * b + 1.0),
    lambda a, b: a @ b,
    lambda a, b: mt.concat(mt.split(mt.concat([a, b]), [1, 2, 1]))[1:3] if len(a) == 2 else a,
    lambda a, b: a[:, ::-1].transpose(0, 1) + b.sum(0),
]


@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_drawn_graphs_match_differences(program: list[tuple[Any, int, int]], seed: int) -> None:
    """Each step takes two of all earlier values, so values are shared, repeated and left unused."""

    def run(arrays: list[np.ndarray]) -> tuple[list[mt.Tensor], mt.Tensor]:
        values = leaves = [mt.tensor(a, requires_grad=True) for a in arrays]
        for step, i, j in program:
            values = [*values, step(values[-1 - i % len(values)], values[-1 - j % len(values)]).tanh()]
        return leaves, (values[-1] * values[len(values) // 2]).sum()

    rng = np.random.default_rng(seed)
    arrays, direction = ([rng.standard_normal((2, 2)) for _ in range(2)] for _ in range(2))
    leaves, loss = run(arrays)
    gradients = mt.grad(loss, leaves)
    h = 1e-6
    low, high = (run([a + s * v for a, v in zip(arrays, direction, strict=True)])[1].item() for s in (-h, h))
    found = sum(float((g * v).sum()) for g, v in zip(gradients, direction, strict=True))
    assert found == pytest.approx((high - low) / (2 * h), rel=1e-5, abs=1e-6)


def test_outputs_that_are_not_used_count_as_zero() -> None:
    x = leaf(6)
    _, middle, _ = mt.split(x, 2)
    (middle * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0, 3, 3, 0, 0])


def test_integer_outputs_of_an_op_need_no_gradient(op: Make) -> None:
    pair = op(lambda x: ((2 * x, np.arange(3)), Kept(x)), lambda douts, saved: (2 * douts[0],), many=True)
    x = leaf(3)
    out, count = pair(x)
    assert out.requires_grad and not count.requires_grad
    out.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])


def test_mixed_precision_gradients_come_in_the_dtype_of_their_tensor() -> None:
    x, y = mt.tensor([1.0, 2.0], requires_grad=True), leaf(2)
    z = x * 2.0
    loss = (z * y).sum()
    assert loss.dtype == np.float64
    dz, dx, dy = mt.grad(loss, [z, x, y])
    assert (dz.dtype, dx.dtype, dy.dtype) == (np.float32, np.float32, np.float64)


# ---- .grad and mt.grad ----------------------------------------------------------------------------


def test_backward_accumulates_and_does_not_change_what_was_there() -> None:
    x = leaf(3)
    (x * 2.0).sum().backward()
    (x * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [5, 5, 5])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_grad_is_an_array_of_the_leaf_at_any_shape(shape: tuple[int, ...]) -> None:
    x = leaf(*shape)
    for times in (1, 2):
        (x * 2.0 + x * x).sum().backward()
        assert type(x.grad) is np.ndarray
        np.testing.assert_allclose(x.grad, times * (2 + 2 * x.data))


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_a_leaf_owns_its_grad(shape: tuple[int, ...], op: Make) -> None:
    """Even where an op hands its upstream gradient on, or one array to two inputs."""
    both = op(lambda a, b: (a + b, Kept(a)), lambda dout, saved: (dout, dout))
    x, y, upstream = leaf(*shape), leaf(*shape), np.ones(shape)
    both(x, y).backward(upstream)
    x.grad[...] = 7
    assert (y.grad == 1).all() and (upstream == 1).all()
    x.backward(upstream)
    assert (x.grad == 8).all()
    upstream[...] = 5
    assert (x.grad == 8).all()


def test_grad_writes_nothing() -> None:
    x, y = leaf(3), leaf(3, seed=1)
    x.grad = np.full(3, 9.0)
    dx, dy = mt.grad((x * y).sum(), [x, y])
    np.testing.assert_array_equal(dx, y.data)
    np.testing.assert_array_equal(dy, x.data)
    assert y.grad is None
    np.testing.assert_array_equal(x.grad, [9, 9, 9])


def test_grad_of_interior_unused_repeated_and_the_output_itself() -> None:
    x, unused = leaf(3), leaf(2, 2)
    middle = x * 2.0
    loss = (middle * middle + x).sum()
    dmiddle, dx, again, dunused, dloss = mt.grad(loss, [middle, x, x, unused, loss])
    np.testing.assert_allclose(dmiddle, 2 * middle.data)
    np.testing.assert_allclose(dx, 8 * x.data + 1)
    np.testing.assert_array_equal(again, dx)
    np.testing.assert_array_equal(dunused, np.zeros((2, 2)))
    assert dloss == 1 and all(type(g) is np.ndarray for g in (dmiddle, dx, dunused, dloss))


def test_grad_of_one_of_several_outputs() -> None:
    a, b = mt.split(leaf(4), 2)
    da, db = mt.grad((a * 3.0).sum(), [a, b])
    np.testing.assert_array_equal(da, [3, 3])
    np.testing.assert_array_equal(db, [0, 0])


def test_grad_of_a_leaf_by_itself() -> None:
    x = leaf(2)
    upstream = np.array([3.0, 4.0])
    (dx,) = mt.grad(x, [x], upstream)
    np.testing.assert_array_equal(dx, upstream)
    assert not np.shares_memory(dx, upstream)


@pytest.mark.parametrize("gradient", [[2.0, 3.0], np.array([2, 3]), mt.tensor([2.0, 3.0])])
def test_upstream_gradient_in_any_clothes(gradient: Any) -> None:
    x = leaf(2)
    (x * 10.0).backward(gradient)
    np.testing.assert_array_equal(x.grad, [20, 30])


# ---- memory ---------------------------------------------------------------------------------------


class Watched(np.ndarray):
    """An array that can be referred to weakly."""


def test_backward_frees_what_each_op_saved_as_it_goes(op: Make) -> None:
    alive: list[int] = []
    arrays: list[weakref.ref] = []

    def forward(x: np.ndarray) -> Any:
        kept = np.ones(3).view(Watched)
        arrays.append(weakref.ref(kept))
        return 2 * x, Kept(kept)

    def backward(dout: np.ndarray, saved: Kept) -> Any:
        alive.append(sum(ref() is not None for ref in arrays))
        return (2 * dout,)

    double = op(forward, backward)
    x = leaf(3)
    y = double(double(double(x))).sum()
    y.backward(retain_graph=True)
    assert alive == [3, 3, 3]
    y.backward()
    assert alive[3:] == [3, 2, 1]
    assert not any(ref() is not None for ref in arrays)


def test_a_graph_dies_with_its_output() -> None:
    x = leaf(3)
    y = x * x
    ref = weakref.ref(y)
    del y
    assert ref() is None
    z = x * 2.0
    ref, loss = weakref.ref(z), (z * z).sum()
    del z
    assert ref() is None  # the graph keeps arrays, not Tensors
    loss.backward()
    np.testing.assert_allclose(x.grad, 8 * x.data)


# ---- refusals -------------------------------------------------------------------------------------


def test_a_failed_backward_leaves_every_grad_unchanged(op: Make) -> None:
    def fail(dout: np.ndarray, saved: Kept) -> Any:
        raise RuntimeError("in backward")

    x, y = leaf(2), leaf(2)
    x.grad = np.array([1.0, 2.0])
    loss = (x * 3.0 + op(backward=fail)(y)).sum()  # x is reached before the failure or after it
    for out in (loss, (op(backward=fail)(y) + x * 3.0).sum()):
        with pytest.raises(RuntimeError, match="in backward"):
            out.backward()
    np.testing.assert_array_equal(x.grad, [1, 2])
    assert y.grad is None


def test_backward_refusals() -> None:
    x = leaf(2, 3)
    with pytest.raises(GradientError, match=r"the output has shape \(2, 3\), expected one number\. Reduce it"):
        (x * 2.0).backward()
    with pytest.raises(ShapeError, match=r"gradient has shape \(3,\), expected \(2, 3\) like the output"):
        (x * 2.0).backward(np.ones(3))
    with pytest.raises(GradientError, match=r"does not depend on anything .* requires_grad=True"):
        mt.tensor(1.0).backward()
    with pytest.raises(GradientError, match="does not depend on anything"), mt.no_grad():
        x.sum().backward()
    for wrong in (mt.tensor(1.0), 1.0):
        with pytest.raises(GradientError, match="grad: input 1 is not a Tensor that requires a gradient"):
            mt.grad(x.sum(), [x, wrong])
    assert x.grad is None


@pytest.mark.parametrize("data", [[1, 2], [True], np.zeros(2, np.uint8)])
def test_integers_have_no_gradient(data: Any) -> None:
    with pytest.raises(DTypeError, match=r"requires_grad: a tensor of dtype \w+ has no gradient, expected float32"):
        mt.tensor(data, requires_grad=True)


def test_only_leaves_can_be_frozen() -> None:
    with pytest.raises(GradientError, match=r"the tensor is the result of an op, expected a leaf\. Use t\.detach"):
        (leaf(1) * 2.0).requires_grad = False


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (lambda d: (d[:1],), r"backward returned a gradient of shape \(1,\) for an input of shape \(3,\)"),
        (lambda d: (None,), r"backward returned no gradient for an input of shape \(3,\)"),
        (lambda d: (), r"input 0 requires a gradient, expected one only for the first 0"),
    ],
)
def test_a_backward_that_returns_the_wrong_thing_is_named(returned: Any, problem: str, op: Make) -> None:
    wrong = op(backward=lambda dout, saved: returned(dout))
    x = leaf(3)
    with pytest.raises(GradientError, match=rf"test_op_0: {problem}"):
        wrong(x).sum().backward()
    assert x.grad is None


def test_an_input_past_the_differentiable_ones_is_named(op: Make) -> None:
    first = op(lambda a, b, c: (a + b + c, Kept(a)), lambda dout, saved: (dout.copy(),))
    with pytest.raises(GradientError, match=r"input 2 requires a gradient, expected one only for the first 1\. Pass"):
        first(leaf(3), mt.tensor(np.ones(3)), leaf(3)).sum().backward()


def test_register_refuses_a_taken_name() -> None:
    with pytest.raises(GradientError, match="an op named 'add' exists already"):
        register("add", lambda x: (x, None), lambda dout, saved: (dout,))
    assert repr(OPS["add"]) == "Op('add')"


@pytest.mark.parametrize("dim", [3, -4])
def test_axes_out_of_range_are_named(dim: int) -> None:
    with pytest.raises(RangeError, match=rf"sum: dim is {dim}, expected -3 to 2 for 3 axes"):
        leaf(2, 3, 4).sum(dim)


@pytest.mark.parametrize("dim", ["0", 1.0, True])
def test_axes_must_be_integers(dim: Any) -> None:
    with pytest.raises(DTypeError, match=r"dim is .*, expected an integer"):
        leaf(2, 3).sum(dim)
