"""Tensors among NumPy arrays: arithmetic, conversion, comparison, indexing, reductions, shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.errors import DTypeError, GradientError, RangeError, ShapeError

ARRAYS = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements=st.integers(-9, 9).map(float),
)
FULL = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4),
    elements=st.integers(-9, 9).map(float),
)


class OnlyDLPack:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


# ---- NumPy ----------------------------------------------------------------------------------------

BINARY = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "power": operator.pow,
    "matmul": operator.matmul,
}


@pytest.mark.parametrize("name", BINARY)
def test_arrays_and_tensors_meet_in_a_tensor_with_history(name: str) -> None:
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 1.0], [0.5, 3.0]])
    expected = BINARY[name](a, b)
    for left, right in ((mt.tensor(a), b), (a, mt.tensor(b)), (mt.tensor(a), mt.tensor(b))):
        for t in (left, right):
            if isinstance(t, mt.Tensor):
                t.requires_grad = True
        for out in (BINARY[name](left, right), getattr(np, name)(left, right)):
            assert isinstance(out, mt.Tensor) and out.requires_grad
            np.testing.assert_allclose(out.data, expected, rtol=1e-15)


@pytest.mark.parametrize("scalar", [np.float64(3), np.float32(3), np.int64(3), 3, 3.0, np.array(3.0)])
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "power"])
def test_scalars_keep_float32(name: str, scalar: Any) -> None:
    t = mt.tensor([1.0, 2.0])
    for out, expected in (
        (BINARY[name](t, scalar), BINARY[name](t.data, 3)),
        (BINARY[name](scalar, t), BINARY[name](3.0, t.data)),
    ):
        if not isinstance(scalar, np.ndarray):
            assert out.dtype == np.float32
        np.testing.assert_allclose(out.data, expected, rtol=1e-6)


def test_python_operators_in_place_make_a_new_tensor() -> None:
    x = mt.tensor([1.0], requires_grad=True)
    y = x
    y += 1.0
    y *= np.float32(2)
    assert y is not x and x.item() == 1 and y.item() == 4


@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "tanh", "absolute", "sin", "cos"])
def test_numpy_functions_of_tensors(name: str) -> None:
    x = mt.tensor([0.5, 2.0], requires_grad=True)
    out = getattr(np, name)(x)
    assert isinstance(out, mt.Tensor) and out.requires_grad
    np.testing.assert_allclose(out.data, getattr(np, name)(x.data), rtol=3e-7)
    if hasattr(x, name):
        np.testing.assert_array_equal(getattr(x, name)().data, out.data)


def test_unary_methods() -> None:
    x = mt.tensor([-0.5, 2.0])
    np.testing.assert_array_equal((-x).data, [0.5, -2.0])
    np.testing.assert_array_equal(x.abs().data, [0.5, 2.0])
    np.testing.assert_allclose(x.sigmoid().data, 1 / (1 + np.exp(-x.data)), rtol=1e-6)
    np.testing.assert_array_equal((~(x > 0)).data, [True, False])


@pytest.mark.parametrize(
    "call",
    [
        lambda t: np.arctan(t),
        lambda t: np.add(t, t, out=np.zeros(2, np.float32)),
        lambda t: np.add.reduce(t),
        lambda t: np.multiply.outer(t, t),
        lambda t: np.add(t, 1, where=[True, False]),
        lambda t: operator.iadd(np.zeros(2), t),
    ],
)
def test_other_numpy_calls_are_refused_with_the_way_out(call: Callable[[Any], Any]) -> None:
    with pytest.raises(DTypeError, match=r"numpy\.\w+: Tensors do not take part .* or t\.numpy\(\) for plain numbers"):
        call(mt.tensor([1.0, 2.0]))


def test_conversion_to_arrays() -> None:
    t = mt.tensor([1.0, 2.0], requires_grad=True)
    assert np.shares_memory(np.asarray(t), t.data)
    assert not np.shares_memory(np.array(t), t.data)
    assert np.asarray(t, np.float64).dtype == np.float64
    assert np.asarray([t, t]).shape == (2, 2)


def test_dlpack_both_ways() -> None:
    t = mt.tensor([1.0, 2.0])
    array = np.from_dlpack(t)
    assert np.shares_memory(array, t.data)
    for source in (OnlyDLPack(np.arange(3.0)), OnlyDLPack(np.arange(3))):
        made = mt.tensor(source)
        np.testing.assert_array_equal(made.data, source.array)
        assert not np.shares_memory(made.data, source.array)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(name: str) -> None:
    function = getattr(operator, name)
    a, b = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    for left, right in ((mt.tensor(a), mt.tensor(b)), (mt.tensor(a), b), (a, mt.tensor(b)), (mt.tensor(a), 2)):
        out = function(left, right)
        assert isinstance(out, mt.Tensor) and out.dtype == np.bool_ and not out.requires_grad
        np.testing.assert_array_equal(out.data, function(a, 2 if isinstance(right, int) else b))


def test_logic_on_bools() -> None:
    a, b = mt.tensor([True, True, False]), np.array([True, False, False])
    np.testing.assert_array_equal((a & b).data, a.data & b)
    np.testing.assert_array_equal((a | b).data, a.data | b)
    np.testing.assert_array_equal((a ^ b).data, a.data ^ b)
    np.testing.assert_array_equal((b | a).data, a.data | b)


def test_shapes_that_do_not_broadcast_are_named() -> None:
    a, b = mt.tensor(np.zeros((2, 3))), np.zeros((4,))
    for function in (*(f for name, f in BINARY.items() if name != "matmul"), operator.lt, operator.eq):
        with pytest.raises(ShapeError, match=r"shapes \(2, 3\) and \(4,\) do not broadcast\. Compared from the right"):
            function(a, b)
    with pytest.raises(ShapeError, match=r"matmul: the inner sizes of \(2, 3\) and \(4,\) differ"):
        a @ b


# ---- indexing, reductions, shapes -----------------------------------------------------------------


@given(FULL, st.data())
def test_indexing_is_numpys(x: np.ndarray, data: st.DataObject) -> None:
    index = data.draw(
        hnp.basic_indices(x.shape, allow_newaxis=True) | hnp.integer_array_indices(x.shape) | hnp.arrays(bool, x.shape)
    )
    np.testing.assert_array_equal(mt.tensor(x)[index].data, x[index])
    if isinstance(index, np.ndarray):
        np.testing.assert_array_equal(mt.tensor(x)[mt.tensor(index)].data, x[index])
    written, t = x.copy(), mt.tensor(x)
    written[index], t[index] = 5.0, 5.0
    np.testing.assert_array_equal(t.data, written)


def test_indexing_with_tensors_in_a_tuple() -> None:
    x = np.arange(12.0).reshape(3, 4)
    got = mt.tensor(x)[mt.tensor([0, 2]), mt.tensor([1, 1])]
    np.testing.assert_array_equal(got.data, [1, 9])


@pytest.mark.parametrize("index", [3, (0, 0, 0), "a", 1.0, np.array([9])])
def test_wrong_indices_are_refused(index: Any) -> None:
    with pytest.raises(RangeError, match=r"getitem: the index does not fit shape \(3, 2\) \(.*\)\. Check"):
        mt.tensor(np.zeros((3, 2)))[index]


@given(ARRAYS, st.booleans(), st.data())
def test_reductions_are_numpys(x: np.ndarray, keepdim: bool, data: st.DataObject) -> None:
    some = st.integers(-x.ndim, x.ndim - 1)
    dim = data.draw(st.none() | some | st.lists(st.integers(0, x.ndim - 1), unique=True).map(tuple)) if x.ndim else None
    t = mt.tensor(x)
    np.testing.assert_allclose(t.sum(dim, keepdim).data, x.sum(axis=dim, keepdims=keepdim), rtol=1e-12)
    count = x.size if dim is None else int(np.prod([x.shape[d] for d in np.atleast_1d(dim).astype(int)]))
    if count:
        np.testing.assert_allclose(t.mean(dim, keepdim).data, x.mean(axis=dim, keepdims=keepdim), rtol=1e-12)
        np.testing.assert_array_equal(t.max(dim, keepdim).data, x.max(axis=dim, keepdims=keepdim))
        np.testing.assert_array_equal(t.min(dim, keepdim).data, x.min(axis=dim, keepdims=keepdim))
    else:
        with pytest.raises(ShapeError, match=r"max: no elements to compare over axes"):
            t.max(dim)
        assert np.isnan(t.mean(dim).data).all()


@given(FULL, st.data())
def test_argmax_is_numpys(x: np.ndarray, data: st.DataObject) -> None:
    dim = data.draw(st.none() | st.integers(-x.ndim, x.ndim - 1))
    got = mt.tensor(x).argmax(dim)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got.data, x.argmax(axis=dim))


@pytest.mark.parametrize("data", [[1, 2, 4], [True, False, True]])
def test_reductions_of_integers_and_bools(data: Any) -> None:
    t = mt.tensor(data)
    assert t.sum().dtype == np.int64 and t.sum().item() == sum(data)
    assert t.mean().dtype == np.float32 and t.mean().item() == pytest.approx(np.mean(data))
    assert t.max().item() == max(data)


def test_ties_share_the_gradient() -> None:
    x = mt.tensor([3.0, 1.0, 3.0], requires_grad=True)
    np.testing.assert_array_equal(mt.grad(x.max(), [x])[0], [0.5, 0, 0.5])
    np.testing.assert_array_equal(mt.grad(x.min(), [x])[0], [0, 1, 0])
    y = mt.tensor([3.0, 2.0, 0.0], requires_grad=True)
    for function, dx in ((mt.maximum, [0.5, 0, 1]), (mt.minimum, [0.5, 1, 0])):
        got, dy = mt.grad(function(x, y).sum(), [x, y])
        np.testing.assert_array_equal(got, dx)
        np.testing.assert_array_equal(dy, 1 - np.array(dx))


def test_an_axis_named_twice_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"sum: dim \(0, -2\) names an axis twice"):
        mt.tensor(np.zeros((2, 3))).sum((0, -2))


@given(ARRAYS, st.data())
def test_shape_operations_are_numpys(x: np.ndarray, data: st.DataObject) -> None:
    t = mt.tensor(x)
    dims = tuple(data.draw(st.permutations(range(x.ndim))))
    np.testing.assert_array_equal(t.permute(*dims).data, x.transpose(dims))
    np.testing.assert_array_equal(t.permute(dims).data, x.transpose(dims))
    np.testing.assert_array_equal(t.reshape(x.shape[::-1]).data, x.reshape(x.shape[::-1]))
    np.testing.assert_array_equal(F.expand(t, (2, *x.shape)).data, np.broadcast_to(x, (2, *x.shape)))
    if x.ndim:
        a, b = (data.draw(st.integers(-x.ndim, x.ndim - 1)) for _ in range(2))
        np.testing.assert_array_equal(t.transpose(a, b).data, x.swapaxes(a, b))
        np.testing.assert_array_equal(mt.concat([t, t, t], a).data, np.concatenate([x, x, x], a))
        size = data.draw(st.integers(1, 5))
        pieces = mt.split(t, size, a)
        np.testing.assert_array_equal(mt.concat(pieces, a).data, x)
        assert all(p.shape[a] == size for p in pieces[:-1]) and len(pieces) == max(-(-x.shape[a] // size), 1)
    axis = data.draw(st.integers(-x.ndim - 1, x.ndim))
    np.testing.assert_array_equal(mt.stack([t, t], axis).data, np.stack([x, x], axis))
    np.testing.assert_array_equal(mt.where(x > 0, t, -1.0).data, np.where(x > 0, x, -1.0))


def test_reshape_takes_sizes_or_a_shape_and_works_one_out() -> None:
    t = mt.tensor(np.arange(6))
    assert t.reshape(2, -1).shape == t.reshape((2, 3)).shape == t.reshape([2, 3]).shape == (2, 3)
    assert np.shares_memory(t.reshape(2, 3).data, t.data)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.reshape(4, 2), ShapeError, r"reshape: 6 elements of shape \(2, 3\) do not fit \(4, 2\)"),
        (lambda t: t.permute(0, 0), ShapeError, r"permute: dims are \(0, 0\), expected each of 2 axes once"),
        (lambda t: F.expand(t, (3, 3)), ShapeError, r"expand: shape \(2, 3\) does not broadcast to \(3, 3\)"),
        (lambda t: mt.concat([]), ShapeError, "concat: got no tensors, expected at least one"),
        (lambda t: mt.concat([t, t[:, :2]]), ShapeError, r"concat: shapes \(2, 3\), \(2, 2\) differ outside axis 0"),
        (lambda t: mt.concat([t, t[0]]), ShapeError, "differ outside axis 0"),
        (lambda t: mt.stack([t, t[0]]), ShapeError, r"stack: got shapes .*, expected one or more equal shapes"),
        (lambda t: mt.stack([]), ShapeError, r"stack: got shapes \[\]"),
        (lambda t: mt.split(t, 0), RangeError, "split: the piece size is 0, expected at least 1"),
        (lambda t: mt.split(t, [1, 2]), ShapeError, r"split: sizes \[1, 2\] sum to 3, expected 2 for axis 0"),
        (lambda t: mt.split(t, [3, -1]), ShapeError, r"split: sizes \[3, -1\] sum to 2"),
        (lambda t: mt.where(t, t, t), DTypeError, r"where: the condition is not a bool array\. Compare first"),
        (lambda t: mt.where(t > 0, t, np.zeros(2)), ShapeError, r"where: condition \(2, 3\), a \(2, 3\) and b \(2,\)"),
        (lambda t: mt.einsum("ij,jk->ik", t, t), ShapeError, r"einsum: index 'j' has sizes 3 and 2"),
        (lambda t: mt.einsum("ii->i", t), ShapeError, "repeats an index within one term"),
        (lambda t: mt.einsum("...i->i", t), DTypeError, "holds something else than letters"),
        (lambda t: mt.einsum("ij->k", t), ShapeError, "has a result index that no input has"),
        (lambda t: mt.einsum("ijk->i", t), ShapeError, r"does not fit shapes \[\(2, 3\)\]"),
        (lambda t: mt.matmul(t, 2.0), ShapeError, r"matmul: an operand is a single number.*Use \*"),
        (lambda t: mt.matmul(np.ones((4, 2, 2)), np.ones((3, 2, 2))), ShapeError, "the leading axes of .* do not"),
    ],
)
def test_shape_errors_name_the_op_and_the_way_out(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(mt.tensor(np.zeros((2, 3))))


def test_views_share_memory_and_backward_gives_each_its_own() -> None:
    x = mt.tensor(np.arange(6.0), requires_grad=True)
    view = x.reshape(2, 3).transpose(0, 1)[1:]
    assert np.shares_memory(view.data, x.data)
    dview, dx = mt.grad(view.sum(), [view, x])
    assert not np.shares_memory(dview, dx)


def test_setitem_broadcasts_and_takes_tensors() -> None:
    t = mt.tensor(np.zeros((2, 3)))
    t[:, 1:] = mt.tensor([1.0, 2.0])
    t[t == 0] = -1.0
    np.testing.assert_array_equal(t.data, [[-1, 1, 2], [-1, 1, 2]])
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    with mt.no_grad():
        x[0] = 5.0
    np.testing.assert_array_equal(x.data, [5, 2])
    result = x.exp()
    with pytest.raises(GradientError, match="setitem: writing into a tensor with a gradient history"), mt.no_grad():
        result[0] = 1.0
