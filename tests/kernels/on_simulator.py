"""The functions of a `cuda.py` for arrays of the host: each call goes to the simulated device and back."""

from __future__ import annotations

from functools import wraps
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

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
        there = [SimulatedArray(np.copy(x, order="K")) if isinstance(x, np.ndarray) else x for x in args]
        before = SimulatedArray.synchronisations
        with thread_order(next(orders)):
            result = function(*there, **settings)
        assert SimulatedArray.synchronisations == before, f"{function.__name__} waits for the device"
        for here, x in zip(args, there, strict=True):
            if isinstance(here, np.ndarray) and here.flags.writeable:
                here[...] = x.host
        return tuple(map(to_host, result)) if isinstance(result, tuple) else to_host(result)

    return call
