"""A user's function as Numba is to see it, and the key by which what was compiled is found again.

Compiled code keeps what the function reads around it (closures, globals, defaults) as it was. So all of that is in
the key, and what can change without being seen, such as an array or a list, is refused.
"""

from __future__ import annotations

import dis
import math
from collections.abc import Callable, Iterator
from functools import cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np
from numba.core.dispatcher import Dispatcher

from minitransformer.kernels.attention.user_math import exchanged

_SCALARS = (bool, int, float, complex, str, type(None), np.number, np.bool_)
_LIBRARIES = ("numpy", "math", "builtins", "_operator")
# What only compiled code calls needs no way in from Python or C, which takes time to compile.
ONLY_COMPILED: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


class Unfit(Exception):
    """What a function is or reads cannot be compiled; the message says what."""


def _plain(mod: Any) -> FunctionType:
    function = mod.py_func if isinstance(mod, Dispatcher) else mod
    if not isinstance(function, FunctionType):
        raise Unfit(f"it is a {type(mod).__name__}, not a function of Python")
    return function


@cache
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """The names of the globals that a function reads, and those inside it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (name for const in code.co_consts if isinstance(const, CodeType) for name in _globals_of(const))
    return tuple(sorted(names.union(inner)))


def _surroundings(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names and values of all that it reads beside its arguments and Python's own functions."""
    around = function.__globals__
    yield from ((name, around[name]) for name in _globals_of(function.__code__) if name in around)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            raise Unfit(f"{name} has no value yet") from None


def key_of(mod: Any, within: tuple[Any, ...] = ()) -> Any:
    """Equal for functions that compute the same: of one code, with the same values around it.

    Raises `Unfit` where that cannot be told. `within` are the functions around this one.
    """
    if mod is None:
        return None
    function = _plain(mod)
    if function in within:  # it calls itself
        return function.__name__
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items())
    values = [*_surroundings(function), *(("a default", value) for value in defaults)]
    inner = (*within, function)
    return function.__code__, tuple((name, _value_key(name, value, inner)) for name, value in values)


def _value_key(name: str, value: Any, within: tuple[Any, ...]) -> Any:
    if isinstance(value, _SCALARS):
        return type(value), repr(value)  # 0.0 is not -0.0, and 1 not True
    if isinstance(value, tuple):
        return tuple(_value_key(name, item, within) for item in value)
    if isinstance(value, (FunctionType, Dispatcher)) and not _is_of_library(value):
        return key_of(value, within)
    if isinstance(value, (np.ufunc, BuiltinFunctionType, type)) or _is_of_library(value):
        return value
    if isinstance(value, ModuleType) and value in (np, math):
        return value
    raise Unfit(f"it reads {name}, a {type(value).__name__}, which may change unseen")


def _is_of_library(value: Any) -> bool:
    module = getattr(value, "__module__", None)
    return callable(value) and isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


def translated(mod: Any, dtype: np.dtype) -> Any:
    """The function for Numba to compile, its helpers too, with our functions in the place of some of NumPy's."""
    # Divided as in NumPy, bounds checked as in Python.
    njit = numba.njit(error_model="numpy", boundscheck=True, forceinline=True, **ONLY_COMPILED)
    return rebuilt(mod, njit, *exchanged(dtype))


def rebuilt(mod: Any, jit: Callable[[Any], Any], modules: dict[Any, Any], functions: dict[Any, Any]) -> Any:
    """The function and its helpers, each passed through `jit`, with what is to stand in the place of others."""
    done: dict[FunctionType, Any] = {}

    def translate(function: FunctionType) -> Any:
        around: dict[str, Any] = {}
        cells = tuple(CellType() for _ in function.__closure__ or ())
        new = FunctionType(function.__code__, around, function.__name__, function.__defaults__, cells)
        new.__kwdefaults__ = function.__kwdefaults__
        done[function] = jit(new)
        values = {name: exchange(value) for name, value in _surroundings(function)}
        around.update({name: values[name] for name in _globals_of(function.__code__) if name in values})
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            cell.cell_contents = values[name]
        return done[function]

    def exchange(value: Any) -> Any:
        if isinstance(value, ModuleType):
            return modules.get(value, value)
        if isinstance(value, Dispatcher):
            value = value.py_func
        if isinstance(value, FunctionType) and not _is_of_library(value):
            return done[value] if value in done else translate(value)
        return functions.get(value, value) if callable(value) else value

    return translate(_plain(mod))
