"""Tensors as values: what they are made from, what they say, and what they refuse."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.errors import DeviceError, DTypeError, ShapeError


class FakeGPU:
    """What an array on a GPU shows from outside."""

    __cuda_array_interface__ = {"shape": (2,), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012
    __module__ = "torch"

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


class OnlyDLPack:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


# ---- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (1.5, np.float32),
        ([1.0, 2.0], np.float32),
        ([[1, 2.5]], np.float32),
        ([], np.float32),
        (3, np.int64),
        ([1, 2], np.int64),
        (True, np.bool_),
        ([True, False], np.bool_),
        (1j, np.complex128),
        (np.zeros(2), np.float64),
        (np.float64(3), np.float64),
        (np.zeros(2, ">f8"), np.float64),
        (np.zeros(2, ">f4"), np.float32),
        (np.zeros(2, ">i2"), np.int16),
        (np.zeros(2, np.float16), np.float32),
        (np.zeros(2, np.longdouble), np.float32),
        (np.zeros(2, np.float32), np.float32),
        (np.zeros(2, np.uint8), np.uint8),
        (np.zeros(2, np.complex64), np.complex64),
        ([np.zeros(2), np.ones(2)], np.float32),
    ],
)
def test_dtype_of_data(data: Any, expected: Any) -> None:
    t = mt.tensor(data)
    assert t.dtype == expected and t.dtype.isnative
    assert type(t.data) is np.ndarray
    assert t.shape == np.shape(data)
    np.testing.assert_array_equal(t.data, np.asarray(data))


@pytest.mark.parametrize("dtype", ["float64", np.float32, np.dtype(np.int32), bool, float, int])
def test_dtype_overrides(dtype: Any) -> None:
    assert mt.tensor([1.0, 2.0], dtype=dtype).dtype == np.dtype(dtype)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_becomes_an_array() -> None:
    """Whose * is elementwise."""
    matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]])
    for t in (mt.tensor(matrix), mt.Tensor(matrix)):
        assert type(t.data) is np.ndarray and t.dtype == np.float64
        np.testing.assert_array_equal((t * matrix).data, np.asarray(matrix) ** 2)


def test_tensor_copies_and_Tensor_of_an_array_does_not() -> None:
    array = np.zeros(3, np.float32)
    copy, view = mt.tensor(array), mt.Tensor(array)
    array[0] = 1
    assert copy.data[0] == 0 and view.data[0] == 1


def test_tensor_of_a_tensor_is_a_new_leaf() -> None:
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    y = mt.tensor(x * 2.0)
    assert y.is_leaf and not y.requires_grad and y.dtype == np.float32


@pytest.mark.parametrize(
    "array",
    [np.arange(12.0).reshape(3, 4)[:, ::2], np.arange(12.0).reshape(3, 4).T, np.broadcast_to(1.5, (2, 3))],
)
def test_arrays_in_any_layout(array: np.ndarray) -> None:
    readonly = array.view()
    readonly.flags.writeable = False
    for given_array in (array, readonly):
        t = mt.tensor(given_array, requires_grad=True)
        np.testing.assert_array_equal(t.data, array)
        t.data = np.zeros(array.shape)  # it owns its memory
        (mt.Tensor(given_array) * t).sum().backward()
        np.testing.assert_array_equal(t.grad, array)


@pytest.mark.parametrize(
    "data", ["text", ["a", "b"], None, {"a": 1}, np.array([1, None]), 2**70, np.array(["2020-01-01"], "M8[D]")]
)
def test_what_is_not_numeric_is_refused(data: Any) -> None:
    with pytest.raises(DTypeError, match=r"tensor: got data of dtype .*, expected numbers\. Encode it"):
        mt.tensor(data)


def test_ragged_lists_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"tensor: the data is ragged .*\. Pad all rows to one length\."):
        mt.tensor([[1.0], [1.0, 2.0]])


@pytest.mark.parametrize("dtype", ["float16", object, "U3", np.longdouble, "M8[s]"])
def test_unsupported_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(DTypeError, match=r"dtype .* is not supported\. Use float32, float64"):
        mt.tensor([1], dtype=dtype)
    with pytest.raises(DTypeError, match=r"to: dtype .* is not supported\. Use float32"):
        mt.tensor([1]).to(dtype)


MASKED = np.ma.array([1.0, 2.0], mask=[True, False])
USES: dict[str, Callable[[Any], Any]] = {
    "tensor": mt.tensor,
    "add": lambda x: mt.tensor([1.0, 2.0]) + x,
    "where": lambda x: mt.where(np.array([True, False]), x, 0.0),
}


@pytest.mark.parametrize("use", USES)
def test_masked_arrays_are_refused(use: str) -> None:
    with pytest.raises(DTypeError, match=r"got a masked array, whose mask would be lost\. Fill it first"):
        USES[use](MASKED)


@pytest.mark.parametrize("use", USES)
def test_arrays_on_a_gpu_are_refused(use: str) -> None:
    with pytest.raises(DeviceError, match=r"got a torch\.FakeGPU on a GPU, expected an array of NumPy or CuPy\. Conv"):
        USES[use](FakeGPU())


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (object(), "got a builtins.object, expected a Tensor, NumPy array or number"),
        (np.zeros(2, np.float16), "got dtype float16, expected float32, float64, an integer, bool or complex"),
        (np.array(["a"]), "got dtype <U1, expected float32"),
        (OnlyDLPack(np.zeros(2)), r"OnlyDLPack, expected a Tensor, NumPy array or number. Convert it with mt.tensor"),
    ],
)
def test_foreign_operands_are_refused(other: Any, problem: str) -> None:
    with pytest.raises(DTypeError, match="add: .*" + re.escape(problem)):
        mt.tensor([1.0, 2.0]) + other


@pytest.mark.parametrize("other", [None, "text"])
def test_operands_that_python_should_refuse(other: Any) -> None:
    t = mt.tensor([1.0])
    for function in (operator.add, operator.sub, operator.mul, operator.matmul, operator.lt):
        with pytest.raises(TypeError):
            function(t, other)
    assert (t == other) is False and (t != other) is True


@pytest.mark.parametrize("device", ["cuda:0", "tpu", 0])
def test_devices(device: Any) -> None:
    problem = rf"device is {device!r}, expected one of 'cpu', 'cuda', 'simulator'\. Use 'cpu', or 'cuda' where"
    with pytest.raises(DeviceError, match=problem):
        mt.tensor([1.0], device=device)
    if device == "cuda:0":
        with pytest.raises(DeviceError, match=problem):
            mt.tensor([1.0]).to(device)
    t = mt.tensor([1.0], device="cpu")
    assert t.device == "cpu" and t.to("cpu") is t


# ---- data, to, item -------------------------------------------------------------------------------


def test_data_assignment_writes_in_place_and_keeps_the_dtype() -> None:
    t = mt.tensor([1.0, 2.0])
    array = t.data
    t.data = np.array([3.0, 4.0])
    assert t.data is array and t.numpy() is array and t.dtype == np.float32
    np.testing.assert_array_equal(array, [3, 4])
    with pytest.raises(ShapeError, match=r"the new data has shape \(3,\), expected \(2,\)"):
        t.data = np.zeros(3)
    with pytest.raises(DTypeError, match=r"the new data has dtype complex128, expected float32"):
        t.data = np.zeros(2, complex)
    with pytest.raises(DTypeError, match=r"the new data has dtype float64, expected int64"):
        mt.tensor([1, 2]).data = np.zeros(2)


def test_to_casts_with_history() -> None:
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    y = x.to("float64")
    assert y.dtype == np.float64 and x.to(np.float32) is x
    (y * np.array([3.0, 4.0])).sum().backward()
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad, [3, 4])
    assert not x.to("int64").requires_grad
    with pytest.raises(DTypeError, match=r"to: None is neither a device nor a dtype\. Pass 'cpu'"):
        mt.tensor([1.0]).to(None)
    with pytest.raises(DTypeError, match=r"to: 'gpu' is neither a device nor a dtype\. Pass 'cpu'"):
        x.to("gpu")


@pytest.mark.parametrize("data", [2.5, [2.5], [[[2.5]]]])
def test_one_element(data: Any) -> None:
    t = mt.tensor(data)
    assert t.item() == 2.5 and type(t.item()) is float
    assert float(t) == 2.5 and int(t) == 2 and bool(t) is True and not mt.tensor(0)
    assert list(range(9))[mt.tensor(3)] == 3
    with pytest.raises(TypeError):
        operator.index(t)


def test_several_elements_are_no_number() -> None:
    for function in (float, int, bool, lambda t: t.item()):
        with pytest.raises(ShapeError, match=r"item: the tensor has shape \(2,\), expected one element"):
            function(mt.tensor([1.0, 2.0]))


def test_len_and_iteration() -> None:
    t = mt.tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
    assert len(t) == 3
    rows = list(t)
    assert [row.shape for row in rows] == [(2,)] * 3
    rows[1].sum().backward()
    np.testing.assert_array_equal(t.grad, [[0, 0], [1, 1], [0, 0]])
    for function in (len, list):
        with pytest.raises(ShapeError, match=r"len: the tensor is a single number\. Use t\.item\(\)"):
            function(mt.tensor(1.0))


def test_tensors_are_hashed_by_identity() -> None:
    a, b = mt.tensor([1.0]), mt.tensor([1.0])
    assert len({a, b, a}) == 2


def test_repr() -> None:
    x = mt.tensor([1.0, 2.0], requires_grad=True)
    assert repr(x) == "tensor([1., 2.], dtype=float32, requires_grad=True)"
    assert repr(x * 2.0) == "tensor([2., 4.], dtype=float32, requires_grad=True, op=multiply)"
    assert repr(mt.tensor([[1, 2], [3, 4]])) == "tensor([[1, 2],\n        [3, 4]], dtype=int64)"
