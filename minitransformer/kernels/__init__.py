"""Which implementation of a kernel family serves an array.

Kernels take arrays and return arrays. A family is a folder with one module per implementation, all
with the same functions: `reference.py` in NumPy (the specification, complex-clean), later `cpu.py` in
Numba and `cuda.py`. The array decides: complex arrays and families without a fast module are served by
the reference. `use_backend` overrides for tests and study.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np

from minitransformer.errors import ConfigError, nearest

# Implementations of each family in order of preference; the reference is always last.
FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": ("reference",),
    "optimizer": ("reference",),
    "pointwise": ("reference",),
    "rowwise": ("reference",),
}

_backend: ContextVar[str | None] = ContextVar("minitransformer_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside from the implementation `name`; `ConfigError` if no family has it."""
    known = {implementation for family in FAMILIES.values() for implementation in family}
    if name not in known:
        raise ConfigError(
            "use_backend",
            f"{name!r} is no implementation of any kernel in this version, expected one of {sorted(known)}",
            nearest(name, known),
        )
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def serve(family: str, *arrays: np.ndarray) -> ModuleType:
    """The module of `family` that serves `arrays`."""
    implementations = FAMILIES[family]
    name = _backend.get()
    for array in arrays:
        if array.dtype.kind == "c":
            name = "reference"  # complex numbers exist for the complex-step check alone
    return _module(family, name if name in implementations else implementations[0])


@cache
def _module(family: str, name: str) -> ModuleType:
    return import_module(f"minitransformer.kernels.{family}.{name}")
