"""The functions of a `cuda.py` for arrays of the host, served by the simulated device; and what arrays they take."""

from __future__ import annotations

from functools import wraps
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from against_reference import cast, is_float, outcome

from minitransformer.errors import DeviceError, ShapeError
from minitransformer.kernels.gpu.arrays import SimulatedArray, to_host
from minitransformer.kernels.gpu.simulator import thread_order


def simulated(module: ModuleType) -> Any:
    """Its public functions; they take and return ndarrays, and write into those they are given.

    Each call runs the threads in another order: the same bits twice, and nothing depends on it. None may wait for the
    device.
    """
    orders = count()
    return SimpleNamespace(**{name: _there_and_back(getattr(module, name), orders) for name in module.__all__})


def _there_and_back(function: Any, orders: count[int]) -> Any:
    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        there = [SimulatedArray(x) if isinstance(x, np.ndarray) else x for x in args]  # the memory is that of the host
        before = SimulatedArray.synchronisations
        with thread_order(next(orders)):
            result = function(*there, **settings)
        assert SimulatedArray.synchronisations == before, f"{function.__name__} waits for the device"
        return tuple(map(to_host, result)) if isinstance(result, tuple) else to_host(result)

    return call


def check_arrays(cuda: ModuleType, name: str, args: tuple[Any, ...], written: int | None = None) -> None:
    """Arrays in any layout give the same bits, of two dtypes those of the wider, and none may be on the host.

    What is written to, argument `written`, must lie as the kernel writes it.
    """
    function = getattr(simulated(cuda), name)
    expected = outcome(function, cast(args, np.float32))
    arrays = [i for i, x in enumerate(args) if isinstance(x, np.ndarray) and i != written]
    for layout in (np.asfortranarray, _gaps, _backwards):
        given = [layout(x) if i in arrays else x for i, x in enumerate(cast(args, np.float32))]
        _same(outcome(function, given), expected)
    if written is not None:
        given = cast(args, np.float32)
        given[written] = _gaps(given[written])
        with pytest.raises(ShapeError, match=rf"kernels.{name}: an array to write to is float32 with strides"):
            function(*given)
    floats = [i for i, x in enumerate(args) if is_float(x)]
    results = len(expected) - len(floats)
    wide = outcome(function, cast(args, np.float64))[:results]
    for i in floats if len(floats) > 1 and written is None else ():
        given = cast(args, np.float32)
        given[i] = given[i].astype(np.float64)
        _same(outcome(function, given)[:results], wide)
    with pytest.raises(DeviceError, match=rf"kernels.{name}: got arrays on cpu, expected all of them on one GPU"):
        getattr(cuda, name)(*args)


def _same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


def _gaps(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 2, axis=-1)[..., ::2]


def _backwards(x: np.ndarray) -> np.ndarray:
    return x[::-1].copy()[::-1]
