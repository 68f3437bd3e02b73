"""What ops ask of an array's own library, recorded on the simulated GPU, is there in CuPy, with these arguments.

CuPy can be asked without a GPU: only its functions' names and parameters are looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.autograd import OPS
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.testing.calls import CALLS

cupy = pytest.importorskip("cupy", reason='needs CuPy: pip install "minitransformer[cuda]"')


@contextmanager
def recorded() -> Iterator[tuple[dict[str, tuple[Any, Any]], set[tuple[str, str]]]]:
    """The functions of NumPy that are called with simulated arrays inside, and the ufuncs with the method used."""
    functions: dict[str, tuple[Any, Any]] = {}
    ufuncs: set[tuple[str, str]] = set()
    function, ufunc = SimulatedArray.__array_function__, SimulatedArray.__array_ufunc__

    def record_function(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        functions[f"{func.__name__}({', '.join(sorted(kwargs))})/{len(args)}"] = (func.__name__, (args, kwargs))
        return function(self, func, types, args, kwargs)

    def record_ufunc(self: Any, ufunc_: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        ufuncs.add((ufunc_.__name__, method))
        return ufunc(self, ufunc_, method, *inputs, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(SimulatedArray, "__array_function__", record_function)
    patch.setattr(SimulatedArray, "__array_ufunc__", record_ufunc)
    try:
        yield functions, ufuncs
    finally:
        patch.undo()


def test_what_ops_ask_for_is_in_cupy() -> None:
    with recorded() as (functions, ufuncs):
        for name in sorted(CALLS.keys() - {"cast", "move"}):
            for seed in range(3):
                arrays, static = CALLS[name](np.random.default_rng([seed, *name.encode()]))
                inputs = [
                    mt.tensor(x, requires_grad=True, device="simulator")
                    if isinstance(x, np.ndarray) and x.dtype.kind == "f"
                    else x
                    for x in arrays
                ]
                out = OPS[name](*inputs, **static)
                sum((o * o).sum() for o in (out if OPS[name].many else (out,))).backward()
    missing = []
    for shown, (name, (args, kwargs)) in functions.items():
        if not hasattr(cupy, name):
            missing.append(shown)
            continue
        try:
            inspect.signature(getattr(cupy, name)).bind(*args, **kwargs)
        except TypeError as error:
            missing.append(f"{shown}: {error}")
    missing += [f"{name}.{method}" for name, method in ufuncs if method != "__call__" or not hasattr(cupy, name)]
    assert not missing and len(functions) > 10 and len(ufuncs) > 10
