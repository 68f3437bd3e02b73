"""Arrays on a device: CuPy's, and those of the simulator, which are as strict.

Code that serves both is written against NumPy: its functions ask an array's own library (NEP 13 and 18). What NumPy
makes out of nothing has no library to ask, so new arrays come from `np.empty_like` of one that is there, or from here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from minitransformer.errors import DeviceError, require


class SimulatedArray(NDArrayOperatorsMixin):
    """An array of the simulated device. Nothing of it reaches the host unasked, as with CuPy's.

    `get` copies to the host. Arrays of the host take no part in its arithmetic, numbers do. What NumPy would return
    as a number stays an array without axes; to read that as a number is a synchronisation, and counted.
    """

    synchronisations = 0  # in this process: a GPU would have had to finish all its work

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    # What CuPy's arrays have too, and our code uses.
    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    strides = property(lambda self: self.host.strides)
    itemsize = property(lambda self: self.host.itemsize)
    nbytes = property(lambda self: self.host.nbytes)
    flags = property(lambda self: self.host.flags)
    T = property(lambda self: SimulatedArray(self.host.T))
    real = property(lambda self: SimulatedArray(self.host.real))

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
        return SimulatedArray(np.asarray(self.host[_unwrap(index)]))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[_unwrap(index)] = _unwrap(value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _wrap(getattr(ufunc, method)(*_unwrap(inputs), **_unwrap(kwargs)), kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _wrap(func(*_unwrap(args), **_unwrap(kwargs)), kwargs)


def _method(name: str) -> Any:
    def method(self: SimulatedArray, *args: Any, **kwargs: Any) -> Any:
        return _wrap(getattr(self.host, name)(*_unwrap(args), **_unwrap(kwargs)), kwargs)

    method.__name__ = name
    return method


_METHODS = "all", "any", "argmax", "argsort", "astype", "copy", "fill", "max", "mean", "min", "ravel", "reshape"
for _name in (*_METHODS, "squeeze", "sum", "swapaxes", "transpose"):
    setattr(SimulatedArray, _name, _method(_name))


def _unwrap(value: Any) -> Any:
    """The host's memory of simulated arrays, inside of tuples, lists and dictionaries too."""
    if isinstance(value, SimulatedArray):
        return value.host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}")  # what CuPy says
    if isinstance(value, (tuple, list)):
        return type(value)(map(_unwrap, value))
    return {k: _unwrap(v) for k, v in value.items()} if isinstance(value, dict) else value


def _wrap(result: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation returned, on the device; the array that it was told to write to, itself."""
    out = kwargs.get("out")
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    if isinstance(result, (tuple, list)):
        return type(result)(_wrap(r, {}) for r in result)
    return SimulatedArray(np.asarray(result)) if isinstance(result, (np.ndarray, np.generic)) else result


def cupy() -> Any:
    """The library of arrays on a GPU."""
    return require("cupy", extra="cuda", purpose="device cuda")


def on_device(array: Any) -> bool:
    """Whether it is CuPy's, or of the simulator."""
    return isinstance(array, SimulatedArray) or type(array).__module__.partition(".")[0] == "cupy"


def device_of(array: Any) -> str:
    """ "cpu", "cuda" or "simulator"."""
    if isinstance(array, SimulatedArray):
        return "simulator"
    return "cuda" if on_device(array) else "cpu"


def to_host(array: Any) -> np.ndarray:
    """An ndarray with the same numbers: `array` itself if it is one."""
    return array.get() if on_device(array) else array


def like(array: Any, host: np.ndarray) -> Any:
    """The numbers of `host` where `array` is."""
    if isinstance(array, SimulatedArray):
        return SimulatedArray(host.copy())
    if on_device(array):
        return cupy().asarray(host)
    return host


def flat(array: Any) -> Any:
    """One axis over the memory of `array` from its first element to its last, whatever lies between.

    A kernel finds an element by the strides. All of them must be positive or 0.
    """
    if any(stride < 0 for stride in array.strides):
        problem = f"an array has strides {array.strides}, expected none below 0"
        raise DeviceError("kernels.gpu", problem, "Copy it first")
    size, itemsize = array.size, array.itemsize
    extent = 1 + sum((n - 1) * s // itemsize for n, s in zip(array.shape, array.strides, strict=True)) if size else 0
    if isinstance(array, SimulatedArray):
        return SimulatedArray(np.lib.stride_tricks.as_strided(array.host, (extent,), (itemsize,)))
    return cupy().ndarray((extent,), array.dtype, array.data)
