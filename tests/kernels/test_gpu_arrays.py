"""Arrays of the simulated device compute as NumPy's, and are as strict as CuPy's; what stands before GPU kernels."""

from __future__ import annotations

import operator
import re
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from minitransformer.errors import DeviceError, DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import SimulatedArray, device_of, flat, like, on_device, to_host
from minitransformer.kernels.gpu.entrance import entrance

ARRAYS = npst.arrays(np.float64, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
                     elements=st.floats(-8, 8, width=16))  # fmt: skip
needs_cupy = pytest.mark.skipif(
    find_spec("cupy") is None, reason='needs CuPy, not a GPU: pip install "minitransformer[cuda]"'
)

# --- as NumPy --------------------------------------------------------------------------------------------

UNARY = {
    "operators": lambda x: -x + 2 * x / 4 - x**2 // 3,
    "comparison": lambda x: (x > 0) & (x <= 3) | (x == -1),
    "functions": lambda x: np.tanh(np.exp(x)) + np.sqrt(np.abs(x)),
    "where": lambda x: np.where(x > 0, x, 0.0),
    "several results": lambda x: np.modf(x),
    "list of arrays": lambda x: np.concatenate([x.ravel(), x.ravel()]),
    "split": lambda x: np.split(np.stack([x, x]), 2),
    "new": lambda x: np.zeros_like(x, shape=(2, x.size), dtype=np.float32),
    "sum": lambda x: x.sum(axis=-1, keepdims=True) if x.ndim else x.sum(),
    "reductions": lambda x: (x.all(), x.any(), np.sum(x), np.add.reduce(x, axis=None)),
    "mean": lambda x: (x + x.size).mean() if x.size else x,
    "methods": lambda x: x.reshape(-1).astype(np.float32).copy(),
    "views": lambda x: (x.T, x.real, x.transpose(), x[None].squeeze(0), x[None].swapaxes(0, -1)),
    "index": lambda x: (x[...], x[None, ..., None]),
    "by booleans": lambda x: x[x > 0],
    "by integers": lambda x: x.reshape(-1)[np.argsort(x.reshape(-1))],
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape)),
    "einsum": lambda x: np.einsum("...,...->...", x, x),
    "matmul": lambda x: x.reshape(-1, 1) @ x.reshape(1, -1),
}


def host(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(map(host, result))
    assert isinstance(result, SimulatedArray)
    return result.host


def same(a: Any, b: Any) -> None:
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        b = np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


@pytest.mark.parametrize("function", UNARY.values(), ids=UNARY)
@given(ARRAYS)
def test_operations_are_those_of_numpy(function: Any, x: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        same(host(function(SimulatedArray(x.copy()))), function(x))


@given(ARRAYS, st.sampled_from([operator.add, operator.mul, operator.lt, np.maximum, np.arctan2]), st.data())
def test_of_two_arrays_and_of_numbers(x: np.ndarray, function: Any, data: st.DataObject) -> None:
    y = data.draw(npst.arrays(np.float64, x.shape, elements=st.floats(-8, 8, width=16)))
    number = data.draw(st.sampled_from([2, 0.5, np.float32(3), np.int64(-1), True]))
    for a, b in ((SimulatedArray(x), SimulatedArray(y)), (SimulatedArray(x), number), (number, SimulatedArray(y))):
        same(host(function(a, b)), function(*(v.host if isinstance(v, SimulatedArray) else v for v in (a, b))))


@given(ARRAYS)
def test_attributes(x: np.ndarray) -> None:
    s = SimulatedArray(x)
    for name in ("shape", "dtype", "ndim", "size", "strides", "itemsize", "nbytes"):
        assert getattr(s, name) == getattr(x, name)
    assert s.flags == (x.flags.c_contiguous, x.flags.f_contiguous, x.flags.owndata)
    assert repr(s) == f"SimulatedArray({x!r})"
    if x.ndim:
        assert len(s) == len(x)


def test_what_is_written_arrives() -> None:
    x, y = (SimulatedArray(np.arange(6.0).reshape(2, 3)) for _ in range(2))
    x[0] = y[1]
    x[:, 2] = 9
    assert np.add(x, y, out=y) is y
    view = y.reshape(6)
    view += 1
    y[1].fill(7)
    np.testing.assert_array_equal(x.host, [[3, 4, 9], [3, 4, 9]])
    np.testing.assert_array_equal(y.host, [[4, 6, 12], [7, 7, 7]])
    np.copyto(x, y)
    np.testing.assert_array_equal(x.host, y.host)


# --- as strict as CuPy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [np.ones(3), np.ones(()), np.float64(1) + np.zeros((1,))])
def test_arrays_of_the_host_take_no_part(other: Any) -> None:
    x = SimulatedArray(np.arange(3.0))

    def assign() -> None:
        x[...] = other

    def index() -> None:
        x[other.astype(int)]

    for mixed in (lambda: x + other, lambda: other + x, lambda: np.where(x > 0, x, other), assign, index,
                  lambda: np.concatenate([x, other.ravel()]), lambda: np.add(x, 1, out=other)):  # fmt: skip
        with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
            mixed()


def test_nothing_becomes_an_array_of_the_host_unasked() -> None:
    x = SimulatedArray(np.arange(3.0))
    for convert in (np.asarray, np.array, lambda x: np.asarray(x, np.float32), lambda x: np.ones(3) @ np.asarray(x)):
        with pytest.raises(TypeError, match=r"^Implicit conversion to a NumPy array is not allowed\. Use `\.get\(\)`$"):
            convert(x)
    for number in (float, int, bool):
        with pytest.raises(ValueError):
            number(x)


def test_synchronisations_are_counted() -> None:
    x, before = SimulatedArray(np.arange(3.0)), SimulatedArray.synchronisations

    def count() -> int:
        return SimulatedArray.synchronisations - before

    total = (x * 2 + x[1]).sum()
    x[0] = total
    assert isinstance(total, SimulatedArray) and total.ndim == 0 and count() == 0
    assert (float(total), int(total), bool(total), total.item()) == (9, 9, True, 9.0)
    assert count() == 4
    copy = x.get()
    copy[0] = 5
    assert count() == 5 and x.host[0] == 9


@needs_cupy
def test_all_that_is_offered_is_cupys() -> None:
    import cupy

    offered = {name for name in vars(SimulatedArray) if not name.startswith("__")} - {"host", "synchronisations"}
    assert len(offered) > 20 and {name for name in offered if not hasattr(cupy.ndarray, name)} == set()
    for name in SimulatedArray(np.zeros(1)).flags._fields:
        assert hasattr(cupy._core.flags.Flags, name)
    assert (cupy.ndarray.__name__, cupy.ndarray.__module__) == ("ndarray", "cupy")  # as `on_device` knows it


# --- between host and device -----------------------------------------------------------------------------


@given(ARRAYS)
def test_there_and_back(x: np.ndarray) -> None:
    device = like(SimulatedArray(np.zeros(1)), x)
    assert (device_of(device), device_of(x)) == ("simulator", "cpu")
    assert on_device(device) and not on_device(x)
    np.testing.assert_array_equal(to_host(device), x)
    assert to_host(x) is x and like(x, x) is x
    device[...] = 99
    assert 99 not in x


@given(st.data())
def test_flat_has_the_same_elements_at_the_same_strides(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.float64, np.int64]))
    x = np.arange(3 * 4 * 5, dtype=dtype).reshape(3, 4, 5)
    view = x.transpose(data.draw(st.permutations(range(3))))
    for axis in range(3):
        start, step = data.draw(st.integers(0, view.shape[axis])), data.draw(st.integers(1, 3))
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
    if data.draw(st.booleans()):
        view = np.broadcast_to(view, (2, *view.shape))
    vector = flat(SimulatedArray(view))
    assert vector.dtype == dtype and vector.ndim == 1 and vector.flags.c_contiguous
    steps = [stride // view.itemsize for stride in view.strides]
    for index in np.ndindex(view.shape):
        assert vector[sum(map(operator.mul, index, steps))].item() == view[index]
    if view.size:  # the last element is the last one
        assert vector.size == 1 + sum((n - 1) * step for n, step in zip(view.shape, steps, strict=True))
        assert np.shares_memory(vector.host, view)
    else:
        assert vector.size == 0


def test_flat_takes_no_negative_strides() -> None:
    problem = r"^kernels.gpu: an array has strides \(-8,\), expected none below 0\. Copy it first\.$"
    with pytest.raises(ShapeError, match=problem):
        flat(SimulatedArray(np.arange(3.0)[::-1]))


# --- the entrance ----------------------------------------------------------------------------------------


@entrance("NC", "C", "*", "*", "N!", "NC~")
def probe(*arrays: Any, twice: bool = False) -> Any:
    return arrays[:-1] if twice else arrays


def good(dtype: Any = np.float32) -> list[Any]:
    shapes = (3, 2), (2,), (4, 1), (4, 1), (3,), (3, 2)
    return [SimulatedArray(np.ones(shape, dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_that_fit_pass_as_they_are(dtype: Any) -> None:
    arrays = good(dtype)
    arrays[5] = SimulatedArray(np.ones((3, 5), dtype)[:, 1:3])
    arrays[1] = None
    assert all(got is given for got, given in zip(probe(*arrays, "more"), [*arrays, "more"], strict=True))
    assert probe(*arrays, "more", twice=True) == (*arrays,)
    assert probe.__name__ == "probe"


def test_others_come_as_a_copy() -> None:
    arrays = good(np.float64)
    arrays[0] = SimulatedArray(np.arange(6, dtype=np.float32).reshape(2, 3).T)
    arrays[1] = SimulatedArray(np.arange(2, dtype=np.int16))
    arrays[2] = SimulatedArray(np.zeros((4, 1), bool))
    arrays[5] = SimulatedArray(np.arange(12.0).reshape(3, 4)[:, ::2])
    got = probe(*arrays)
    assert [x.dtype for x in got] == [np.float64, np.int64, bool, *[np.float64] * 3]
    for x, y in zip(got, arrays, strict=True):
        assert x.flags.c_contiguous
        np.testing.assert_array_equal(x.host, y.host)
    assert [x is y for x, y in zip(got, arrays, strict=True)] == [False, False, True, True, True, False]


def test_what_does_not_fit_is_refused() -> None:
    def refused(position: int, wrong: Any, error: type[Exception], message: str) -> None:
        arrays = good()
        arrays[position] = wrong
        with pytest.raises(error) as caught:
            probe(*arrays)
        assert str(caught.value) == f"kernels.probe: {message}"

    def ones(*shape: int, dtype: Any = np.float32) -> SimulatedArray:
        return SimulatedArray(np.ones(shape, dtype))

    devices = "got arrays on cpu and simulator, expected all of them on one GPU. Move them with .to(device)."
    refused(1, np.ones(2, np.float32), DeviceError, devices)
    for dtype, names in ((np.float16, "float16, float32"), (np.complex128, "complex128, float32")):
        fix = "Convert them, or compute on the CPU."
        refused(1, ones(2, dtype=dtype), DTypeError, f"got {names}, expected float32 or float64. {fix}")
    for position, wrong, shapes in (
        (0, ones(3), "(3,) and (2,) and (4, 1) and (4, 1) and (3,) and (3, 2)"),
        (1, ones(3), "(3, 2) and (3,) and (4, 1) and (4, 1) and (3,) and (3, 2)"),
        (3, ones(4), "(3, 2) and (2,) and (4, 1) and (4,) and (3,) and (3, 2)"),
    ):
        expected = "expected NC, C, *, *, N, NC. The same letter must be the same size."
        refused(position, wrong, ShapeError, f"got arrays of shapes {shapes}, {expected}")
    for wrong, found in (
        (ones(6)[::2], "float32 with strides (8,), expected float32"),
        (ones(3, dtype=np.int32), "int32 with strides (4,), expected int64"),
    ):
        refused(4, wrong, ShapeError, f"an array to write to is {found} without gaps. Pass a new array.")
    found = "float32 with strides (4,), expected float64"  # the widest dtype among them
    with pytest.raises(ShapeError, match=re.escape(f"an array to write to is {found} without gaps")):
        probe(*good(np.float64)[:4], good()[4], good()[5])
    with pytest.raises(DeviceError, match=r"^kernels.probe: got arrays on cpu, expected all of them on one GPU"):
        probe(*(x.host for x in good()))


@pytest.mark.parametrize("shape", [0, ()])
def test_shapes_that_cupy_takes_for_none_are_refused(shape: Any) -> None:
    x = SimulatedArray(np.ones((2, 3)))
    for function in (np.empty_like, np.zeros_like, np.ones_like, partial(np.full_like, fill_value=1)):
        with pytest.raises(ValueError, match=r"CuPy takes shape=.* of \w+_like for none: pass \(0,\), or reshape"):
            function(x, shape=shape)
    assert np.empty_like(x, shape=(0,)).shape == (0,)
