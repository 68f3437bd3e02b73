"""What graph and tensors share: the recording flags, the registry, the slots of a tensor, checked inputs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from minitransformer.checks import is_integer, shown
from minitransformer.context import Setting
from minitransformer.errors import (
    AllocationError,
    DeviceError,
    DTypeError,
    MiniTransformerError,
    RangeError,
    ShapeError,
)
from minitransformer.kernels.gpu.arrays import (
    DEVICES,
    check_device,
    device_of,
    free_memory,
    is_array,
    on_device,
    plain,
    to_host,
)

recording: ContextVar[bool] = ContextVar("minitransformer_recording", default=True)
checksums: ContextVar[bool] = ContextVar("minitransformer_checksums", default=False)


class Watcher(Protocol):
    """Sees every call of an op, forward and backward, and the modules it happens in; changes no number."""

    def called(self, op: Any, inputs: Any, arrays: Any, static: dict[str, Any], outputs: Any, node: Any) -> None:
        """`op` was given `inputs` (Tensors among them), as `arrays`; `node` is None where nothing is recorded."""

    def differentiated(self, node: Any, douts: Any, gradients: Any) -> None:
        """`node` turned the gradients of its outputs into those of its inputs."""

    def inside(self, module: Any) -> AbstractContextManager[None]:
        """The forward pass of `module` happens inside."""


watching: ContextVar[Watcher | None] = ContextVar("minitransformer_watching", default=None)

OPS: dict[str, Any] = {}  # name -> Op; filled by `register`

_DTYPES = frozenset("?bBhHiIlLqQfdFD")


def no_grad() -> Any:
    """Context manager (and decorator): ops inside record nothing, their outputs need no gradient."""
    return Setting(recording, False)


def is_grad_enabled() -> bool:
    """Whether ops record their inputs for backward, in this thread and context."""
    return recording.get()


def check_saved_arrays() -> Any:
    """Context manager for debugging: checksum what ops save, and compare it before backward reads it.

    Finds writes that go around the Tensor API, as `t.data[...] = 0` or a write through an old view.
    """
    return Setting(checksums, True)


class TensorBase:
    """The state of a tensor: its array, where it came from, and a version that counts writes."""

    __slots__ = ("__weakref__", "_data", "_index", "_node", "_requires_grad", "_version", "grad")

    _data: np.ndarray
    _node: Any  # graph.Node, None for a leaf
    _index: int  # which output of the node
    _version: list[int]  # shared by all views of one memory
    _requires_grad: bool
    grad: np.ndarray | None


def as_array(op: str, x: Any) -> Any:
    """What an op's forward receives for `x`: an ndarray of a supported dtype, a Python number or None.

    NumPy scalars become Python numbers, so that `x * np.sqrt(d)` does not turn float32 into float64.
    Raises `DTypeError` for anything that would be read wrongly, `DeviceError` for arrays elsewhere.
    """
    if type(x) is np.ndarray and x.dtype.char in _DTYPES and x.dtype.isnative:  # as a rule
        return x
    if isinstance(x, TensorBase):
        return x._data
    if isinstance(x, np.generic) and x.dtype.kind in "biufc":  # first: np.float64 is also a Python float
        return x.item()
    if x is None or isinstance(x, (bool, float, complex)):
        return x
    if isinstance(x, int):
        if not -(2**63) <= x < 2**64:
            raise RangeError(op, f"got {shown(x)}, which does not fit 64 bits", "Pass a float")
        return x
    if isinstance(x, (list, tuple)):
        try:
            x = np.asarray([as_array(op, item) for item in x])
        except MiniTransformerError:
            raise
        except (ValueError, RecursionError):
            raise ShapeError(
                op, "got a list that is ragged or nested too deeply", "Pad all rows to one length"
            ) from None
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(op, "got a masked array, whose mask would be lost", "Fill it first: array.filled(value)")
    if not is_array(x):
        if hasattr(x, "__cuda_array_interface__"):
            raise DeviceError(
                op,
                f"got a {type(x).__module__}.{type(x).__name__} on a GPU, expected an array of NumPy or CuPy",
                "Convert it: cupy.asarray(x)",
            )
        raise DTypeError(
            op,
            f"got a {type(x).__module__}.{type(x).__name__}, expected a Tensor, NumPy array or number",
            "Convert it with mt.tensor(x)",
        )
    if x.dtype.char not in _DTYPES:
        raise DTypeError(
            op,
            f"got dtype {x.dtype}, expected float32, float64, an integer, bool or complex",
            "Convert it with array.astype(...)",
        )
    if on_device(x):
        return x
    x = np.asarray(x)  # subclasses such as np.matrix change what operators mean
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def as_host(op: str, x: Any) -> np.ndarray:
    """`as_array` on the host, for ids, masks, lengths and labels, which are checked there before they are used."""
    return to_host(plain(as_array(op, x)))


def too_large(op: str, error: MemoryError, arrays: Iterable[Any]) -> AllocationError:
    """`error`, which says how much was asked for, with the op and the shapes that led to it."""
    if isinstance(error, AllocationError):
        return error
    given = [array for array in arrays if is_array(array)]
    shapes = ", ".join(str(array.shape) for array in given)
    free = free_memory(given)
    left = "" if free is None else f"; free on the GPU: {free:,} bytes"
    problem = f"there is too little memory: {str(error) or 'no details'}{left}; shapes given: {shapes or 'none'}"
    return AllocationError(op, problem, "Make the batch, the sequence or the model smaller")


def check_dtype(op: str, dtype: Any, otherwise: str = "no dtype", fix: str = "Pass 'float32' or 'float64'") -> np.dtype:
    """`dtype`, by name, type or `np.dtype`, if tensors can have it; `DTypeError` otherwise."""
    try:
        if dtype is None:  # NumPy takes None for float64
            raise TypeError
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses strings
        raise DTypeError(op, f"{shown(dtype)} is {otherwise}", fix) from None
    if found.char not in _DTYPES:
        raise DTypeError(op, f"dtype {found} is not supported", "Use float32, float64, an integer type or bool")
    return found.newbyteorder("=")


def cast(op: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of `array` in `dtype`; `DTypeError` for imaginary parts or NaN that have no place in it."""
    if array.dtype.kind == "c" and dtype.kind != "c":
        raise DTypeError(op, f"{array.dtype} as {dtype} would lose its imaginary part", "Take array.real first")
    if array.dtype.kind in "fc" and dtype.kind in "iu" and not np.isfinite(array).all():
        raise DTypeError(op, f"the data hold NaN or infinity, which {dtype} has not", "Use float32 or float64")
    with np.errstate(all="ignore"):  # too large for float32 is infinity
        return array.astype(dtype)


def check_arrays(op: str, **arrays: Any) -> None:
    """`DTypeError` unless every value is an array: numbers and None are taken only where they make sense."""
    for name, array in arrays.items():
        if not is_array(array):
            raise DTypeError(op, f"{name} is {shown(array)}, expected an array", "Convert it with mt.tensor(x)")


def target_named(target: Any) -> str | np.dtype:
    """The device or the dtype that `to(target)` asks for."""
    if isinstance(target, str) and target.split(":")[0] in DEVICES:
        return check_device("to", target)
    return check_dtype("to", target, "neither a device nor a dtype", "Pass 'cpu', 'cuda', 'float32' or 'float64'")


def check_same_device(op: str, name: str, array: Any, expected: str) -> None:
    """`DeviceError` unless `array` is on the device `expected`."""
    if device_of(array) != expected:
        problem = f"{name} is on {device_of(array)!r}, the other arrays on {expected!r}"
        raise DeviceError(op, problem, "Move it: t.to(device)")


def check_axis(op: str, dim: Any, ndim: int) -> int:
    """`dim` as a non-negative axis of an array with `ndim` axes; `RangeError` or `DTypeError` otherwise."""
    if not is_integer(dim):
        raise DTypeError(op, f"dim is {shown(dim)}, expected an integer", "Pass the number of an axis")
    if not -ndim <= dim < ndim:
        raise RangeError(
            op,
            f"dim is {dim}, expected {-ndim} to {ndim - 1} for {ndim} axes",
            "Count axes from 0 or from -1",
        )
    return int(dim) % ndim
