"""What graph and tensors share: the recording flags, the registry, the slots of a tensor, checked inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from minitransformer.errors import DeviceError, DTypeError, RangeError

recording: ContextVar[bool] = ContextVar("minitransformer_recording", default=True)
checksums: ContextVar[bool] = ContextVar("minitransformer_checksums", default=False)

OPS: dict[str, Any] = {}  # name -> Op; filled by `register`

_DTYPES = frozenset("?bBhHiIlLqQfdFD")


@contextmanager
def _set(flag: ContextVar[bool], value: bool) -> Iterator[None]:
    token = flag.set(value)
    try:
        yield
    finally:
        flag.reset(token)


def no_grad() -> Any:
    """Context manager (and decorator): ops inside record nothing, their outputs need no gradient."""
    return _set(recording, False)


def is_grad_enabled() -> bool:
    """Whether ops record their inputs for backward, in this thread and context."""
    return recording.get()


def check_saved_arrays() -> Any:
    """Context manager for debugging: checksum what ops save, and compare it before backward reads it.

    Finds writes that go around the Tensor API, as `t.data[...] = 0` or a write through an old view.
    """
    return _set(checksums, True)


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
    if isinstance(x, TensorBase):
        return x._data
    if isinstance(x, np.generic) and x.dtype.kind in "biufc":  # first: np.float64 is also a Python float
        return x.item()
    if x is None or isinstance(x, (bool, int, float, complex)):
        return x
    if isinstance(x, (list, tuple)):
        x = np.asarray([as_array(op, item) for item in x])
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(op, "got a masked array, whose mask would be lost", "Fill it first: array.filled(value)")
    if not isinstance(x, np.ndarray):
        if hasattr(x, "__cuda_array_interface__"):
            raise DeviceError(
                op,
                f"got a {type(x).__module__}.{type(x).__name__} on a GPU, expected arrays on 'cpu'",
                "Copy it to the host first",
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
    x = np.asarray(x)  # subclasses such as np.matrix change what operators mean
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array whose memory `array` looks into."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def check_dtype(op: str, dtype: np.dtype) -> None:
    if dtype.char not in _DTYPES:
        raise DTypeError(op, f"dtype {dtype} is not supported", "Use float32, float64, an integer type or bool")


def check_device(op: str, device: str | None) -> None:
    """`DeviceError` unless `device` is one this version has."""
    if device not in (None, "cpu"):
        raise DeviceError(op, f"device {device!r} is not available in this version, expected 'cpu'", "Use 'cpu'")


def dtype_named(target: Any) -> np.dtype | None:
    """The dtype that `to(target)` asks for; None if `target` is the device where everything is already."""
    if isinstance(target, str) and target.split(":")[0] in ("cpu", "cuda"):
        check_device("to", target)
        return None
    try:
        if target is None:  # NumPy takes None for float64
            raise TypeError
        return np.dtype(target)
    except TypeError:
        raise DTypeError(
            "to", f"{target!r} is neither a device nor a dtype", "Pass 'cpu', 'float32' or 'float64'"
        ) from None


def check_axis(op: str, dim: Any, ndim: int) -> int:
    """`dim` as a non-negative axis of an array with `ndim` axes; `RangeError` or `DTypeError` otherwise."""
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
        raise DTypeError(op, f"dim is {dim!r}, expected an integer", "Pass the number of an axis")
    if not -ndim <= dim < ndim:
        raise RangeError(
            op,
            f"dim is {dim}, expected {-ndim} to {ndim - 1} for {ndim} axes",
            "Count axes from 0 or from -1",
        )
    return int(dim) % ndim
