"""Which implementation of a kernel family serves an array.

Kernels take arrays and return arrays. A family is a folder with one module per implementation, all
with the same functions: `reference.py` in NumPy (the specification, complex-clean) and, where it is worth
it, `cpu.py` in Numba and `cuda.py` in numba.cuda. The array decides: complex arrays are served by the reference,
those on a GPU by `cuda.py`, all others by the first in `FAMILIES`. `use_backend` overrides that for tests and study.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from minitransformer.checks import shown
from minitransformer.context import Setting
from minitransformer.errors import ConfigError, nearest

# Implementations of each family in order of preference; the reference is always last.
FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": ("cpu", "cuda", "reference"),
    "decode": ("cpu", "reference"),
    "linear_attention": ("cpu", "cuda", "reference"),
    "optimizer": ("cpu", "cuda", "reference"),
    "pointwise": ("cpu", "cuda", "reference"),
    "rowwise": ("cpu", "cuda", "reference"),
}

# Called with the name of every kernel that is about to be compiled, which takes seconds; the command line says so.
announcers: list[Callable[[str], object]] = []

_backend: ContextVar[str | None] = ContextVar("minitransformer_backend", default=None)
_used: ContextVar[set[str] | None] = ContextVar("minitransformer_families_used", default=None)


def use_backend(name: str) -> Setting[str | None]:
    """Serve every call inside from the implementation `name`, and complex arrays from the reference.

    Raises `ConfigError` if no family has that implementation. A call of a family that lacks it raises too:
    served by another, its result would pass for one of `name`.
    """
    if not isinstance(name, str) or not any(name in family for family in FAMILIES.values()):
        known = {implementation for family in FAMILIES.values() for implementation in family}
        raise ConfigError(
            "use_backend",
            f"{shown(name)} is no implementation of any kernel in this version, expected one of {sorted(known)}",
            nearest(str(name), known),
        )
    return Setting(_backend, name)


def families_used() -> Setting[Any]:
    """The names of the families whose kernels are called inside: a set, filled as they are."""
    return Setting(_used, set())


def host_implementations(family: str) -> tuple[str, ...]:
    """The implementations of `family` that serve arrays of the host, in order of preference."""
    return tuple(name for name in FAMILIES[family] if name != "cuda")


def serve(family: str, *arrays: np.ndarray) -> ModuleType:
    """The module of `family` that serves `arrays`; `ConfigError` if `use_backend` asks for one that it lacks."""
    implementations = FAMILIES[family]
    if (used := _used.get()) is not None:
        used.add(family)
    name = _backend.get() or implementations[0]
    for array in arrays:
        if not isinstance(array, np.ndarray):
            name = "cuda"  # nothing else can read it
        elif array.dtype.kind == "c":
            name = "reference"  # complex numbers exist for the complex-step check alone
    if name not in implementations:
        problem = f"has no implementation {name!r} in this version, expected one of {list(implementations)}"
        fix = "Call it outside of use_backend: the fastest that there is then serves it"
        raise ConfigError(family, problem, fix if name == _backend.get() else "Move the arrays with .to('cpu')")
    return _module(family, name)


@cache
def _module(family: str, name: str) -> ModuleType:
    return import_module(f"minitransformer.kernels.{family}.{name}")
