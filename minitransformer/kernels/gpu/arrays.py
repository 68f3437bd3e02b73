"""Arrays on a device: CuPy's, and those of the simulator, which are as strict.

Code that serves both is written against NumPy: its functions ask an array's own library (NEP 13 and 18). What NumPy
makes out of nothing has no library to ask, so new arrays come from `np.empty_like` of one that is there, or from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from minitransformer.checks import shown
from minitransformer.errors import DeviceError, MissingExtraError, ShapeError, require

_COMPARISONS = np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal


class Flags(NamedTuple):
    """What CuPy tells of how an array lies in memory."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class SimulatedArray(NDArrayOperatorsMixin):
    """An array of the simulated device. Nothing of it reaches the host unasked, as with CuPy's.

    `get` copies to the host. Arrays of the host take no part in its arithmetic, numbers do. What NumPy would return
    as a number stays an array without axes; to read that as a number is a synchronisation, and counted.
    """

    synchronisations = 0  # in this process: a GPU would have had to finish all its work

    def __init__(self, host: np.ndarray, base: SimulatedArray | None = None) -> None:
        self.host, self.base = host, base

    # What CuPy's arrays have too, and our code uses.
    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    strides = property(lambda self: self.host.strides)
    itemsize = property(lambda self: self.host.itemsize)
    nbytes = property(lambda self: self.host.nbytes)
    flags = property(lambda self: Flags(*(getattr(self.host.flags, name) for name in Flags._fields)))
    T = property(lambda self: _wrap(self.host.T, (self,), {}))
    real = property(lambda self: _wrap(self.host.real, (self,), {}))

    def get(self) -> np.ndarray:
        """A copy on the host."""
        SimulatedArray.synchronisations += 1
        return self.host.copy()

    def item(self) -> Any:
        """The one element as a Python number."""
        SimulatedArray.synchronisations += 1
        return self.host.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __len__(self) -> int:
        return len(self.host)

    def __repr__(self) -> str:
        return f"SimulatedArray({self.host!r})"

    def __getitem__(self, index: Any) -> SimulatedArray:
        return _wrap(self.host[_unwrap(index)], (self,), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[_unwrap(index)] = _unwrap(value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc in _COMPARISONS:  # NumPy's numbers come to these as arrays without axes, which CuPy takes too
            inputs = tuple(x[()] if isinstance(x, np.ndarray) else x for x in inputs)
        return _wrap(getattr(ufunc, method)(*_unwrap(inputs), **_unwrap(kwargs)), inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("shape") in (0, ()):
            raise ValueError(f"CuPy takes shape={kwargs['shape']} of {func.__name__} for none: pass (0,), or reshape")
        return _wrap(func(*_unwrap(args), **_unwrap(kwargs)), args, kwargs)


def _method(name: str) -> Any:
    def method(self: SimulatedArray, *args: Any, **kwargs: Any) -> Any:
        return _wrap(getattr(self.host, name)(*_unwrap(args), **_unwrap(kwargs)), (self,), kwargs)

    method.__name__ = name
    return method


_METHODS = "all", "any", "argmax", "argsort", "astype", "copy", "fill", "max", "mean", "min", "ravel", "reshape"
for _name in (*_METHODS, "squeeze", "sum", "swapaxes", "transpose"):
    setattr(SimulatedArray, _name, _method(_name))


def _unwrap(value: Any) -> Any:
    """The host's memory of simulated arrays, inside of tuples, lists and dictionaries too."""
    if isinstance(value, SimulatedArray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")  # what CuPy says
    if isinstance(value, (tuple, list)):
        return type(value)(map(_unwrap, value))
    return {k: _unwrap(v) for k, v in value.items()} if isinstance(value, dict) else value


def _wrap(result: Any, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation made of the arrays `given`, on the device; the array that it was told to write to, itself."""
    out = kwargs.get("out")
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    if isinstance(result, (tuple, list)):
        return type(result)(_wrap(r, given, {}) for r in result)
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    result = np.asarray(result)
    for x in given:
        if isinstance(x, SimulatedArray) and np.may_share_memory(x.host, result):
            return SimulatedArray(result, x if x.base is None else x.base)
    return SimulatedArray(result)


def cupy() -> Any:
    """The library of arrays on a GPU."""
    return require("cupy", extra="cuda", purpose="device cuda")


@cache
def _check_cuda() -> None:
    """`MissingExtraError` or `DeviceError` unless CuPy, numba-cuda and a GPU can be used."""
    library = cupy()
    require("numba_cuda", extra="cuda", purpose="device cuda")
    try:
        count = library.cuda.runtime.getDeviceCount()
    except library.cuda.runtime.CUDARuntimeError as error:
        problem = f"no GPU can be used ({error})"
        raise DeviceError("device cuda", problem, "Install a driver for CUDA, or use device='cpu'") from None
    if not count:
        raise DeviceError("device cuda", "this machine has no GPU that can be used", "Use device='cpu'")


DEVICES = "cpu", "cuda", "simulator"


def check_device(op: str, device: Any) -> str:
    """`device`; `DeviceError` or `MissingExtraError` unless it is one of `DEVICES` and can be used here."""
    if not isinstance(device, str) or device not in DEVICES:
        problem = f"device is {shown(device)}, expected one of {', '.join(map(repr, DEVICES))}"
        raise DeviceError(op, problem, "Use 'cpu', or 'cuda' where there is a GPU")
    if device == "cuda":
        _check_cuda()
    return device


def resolve_device(op: str, device: str) -> str:
    """`device`, and for "auto" the GPU if one can be used, else the CPU."""
    if device != "auto":
        return check_device(op, device)
    try:
        return check_device(op, "cuda")
    except (DeviceError, MissingExtraError):
        return "cpu"


def on_device(array: Any) -> bool:
    """Whether it is CuPy's, or of the simulator."""
    kind = type(array)
    return kind is SimulatedArray or (kind.__name__ == "ndarray" and kind.__module__ == "cupy")


def is_array(x: Any) -> bool:
    """Whether it is an array, wherever it is."""
    return isinstance(x, np.ndarray) or on_device(x)


def plain(x: Any, dtype: Any = None) -> Any:
    """What arithmetic returned as an array, in `dtype` if one is given: NumPy makes numbers of arrays without axes."""
    if isinstance(x, (np.ndarray, np.generic)) or not on_device(x):
        return np.asarray(x, dtype)
    return x if dtype is None or x.dtype == dtype else x.astype(dtype)


def is_writable(array: Any) -> bool:
    """Whether it may be written to; on a GPU nothing is locked."""
    return bool(getattr(array.flags, "writeable", True))


def contiguous(x: Any, dtype: Any = None) -> Any:
    """`x`, of at least one axis, in C's order, in `dtype` if one is given; itself if it is so."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x, dtype)
    return x if x.flags.c_contiguous and dtype in (None, x.dtype) else x.astype(dtype or x.dtype, order="C")


def zeros(shape: tuple[int, ...], x: Any, dtype: Any = None) -> Any:
    """Zeros where `x` is, in its dtype if none is given."""
    if shape or isinstance(x, np.ndarray):
        return np.zeros_like(x, dtype, shape=shape)
    return np.zeros_like(x, dtype, shape=(1,)).reshape(())  # CuPy would take an empty shape for none given


def device_of(array: Any) -> str:
    """The one of `DEVICES` where `array` is."""
    if isinstance(array, SimulatedArray):
        return "simulator"
    return "cuda" if on_device(array) else "cpu"


def free_memory(arrays: Sequence[Any]) -> int | None:
    """Bytes that can still be allocated on the GPU, if one of `arrays` is there: its own and those CuPy keeps."""
    if not any(device_of(array) == "cuda" for array in arrays):
        return None
    unused: int = cupy().get_default_memory_pool().free_bytes()
    return unused + cupy().cuda.runtime.memGetInfo()[0]


def to_host(array: Any) -> np.ndarray:
    """An ndarray with the same numbers: `array` itself if it is one."""
    return array.get() if on_device(array) else array


def move(array: Any, device: str) -> Any:
    """The same numbers on `device`: `array` itself if it is there."""
    if device_of(array) == device:
        return array
    host = to_host(array)
    if device == "cpu":
        return host
    return SimulatedArray(host.copy()) if device == "simulator" else cupy().asarray(host)


def like(array: Any, host: Any) -> Any:
    """The numbers of `host` where `array` is."""
    return move(host, device_of(array))


def flat(array: Any) -> Any:
    """One axis over the memory of `array` from its first element to its last, whatever lies between.

    A kernel finds an element by the strides. All of them must be positive or 0.
    """
    if any(stride < 0 for stride in array.strides):
        problem = f"an array has strides {array.strides}, expected none below 0"
        raise ShapeError("kernels.gpu", problem, "Copy it first")
    size, itemsize = array.size, array.itemsize
    extent = 1 + sum((n - 1) * s // itemsize for n, s in zip(array.shape, array.strides, strict=True)) if size else 0
    if isinstance(array, SimulatedArray):
        return SimulatedArray(np.lib.stride_tricks.as_strided(array.host, (extent,), (itemsize,)))
    return cupy().ndarray((extent,), array.dtype, array.data)
