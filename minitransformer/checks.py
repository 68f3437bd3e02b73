"""Checks of settings: what is no array. Each returns the value in its plain type, or raises `ConfigError`.

Whatever is passed, a check ends in its own message: arrays are not compared, huge integers not converted,
and long values not printed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from minitransformer.errors import AllocationError, ConfigError
from minitransformer.memory import total_memory

A = TypeVar("A")

_SMALL = 1 << 20  # bytes that every machine has: to ask for its memory takes longer than to fill them


def shown(value: Any) -> str:
    """`value` as a message shows it: `repr`, but short."""
    if hasattr(value, "shape") and not isinstance(value, np.generic):
        return f"a {type(value).__name__} of shape {value.shape}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy, which bools and time differences are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def is_number(value: Any, least: float = -math.inf, below: float = math.inf) -> bool:
    """Whether `value` is a real number in [least, below) and finite. Bools are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or isinstance(value, np.timedelta64):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return math.isfinite(number) and least <= number < below


def check_size(op: str, **sizes: Any) -> None:
    """`ConfigError` unless every size is a positive integer."""
    for name, size in sizes.items():
        if not is_integer(size) or size < 1:
            raise ConfigError(op, f"{name} is {shown(size)}, expected a positive integer", "Pass such a number")


def check_count(op: str, name: str, value: Any, least: int = 0) -> int:
    """`value` as an int from `least`."""
    if not is_integer(value) or not least <= value < 2**63:
        most = ", below 2**63" if is_integer(value) and value > 0 else ""
        raise ConfigError(op, f"{name} is {shown(value)}, expected an integer from {least}{most}", f"Change {name}")
    return int(value)


def check_number(op: str, name: str, value: Any, least: float = 0, below: float = math.inf) -> float:
    """`value` as a finite float in [least, below)."""
    if not is_number(value, least, below):
        bound = "finite" if below == math.inf else f"below {below:g}"
        start = "a number" if least == -math.inf else f"a number from {least:g}"
        raise ConfigError(op, f"{name} is {shown(value)}, expected {start}, {bound}", f"Change {name}")
    return float(value)


def check_at_most(op: str, name: str, value: float, limit_name: str, limit: float) -> None:
    """`ConfigError` if `value` is above `limit`."""
    if value > limit:
        raise ConfigError(
            op,
            f"{name} is {value}, expected at most {limit}, the {limit_name}",
            f"Lower {name} or raise {limit_name}",
        )


def check_flag(op: str, name: str, value: Any) -> bool:
    """`value` as a bool; numbers and arrays are none."""
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(op, f"{name} is {shown(value)}, expected a bool", "Pass a bool")
    return bool(value)


def check_choice(op: str, name: str, value: Any, choices: Collection[str | None]) -> None:
    """`ConfigError` unless `value` is one of `choices`."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ConfigError(op, f"{name} is {shown(value)}, expected one of {tuple(choices)}", "Pass one of them")


def check_function(op: str, name: str, value: Any, signature: str) -> None:
    """`ConfigError` unless `value` can be called."""
    if not callable(value):
        problem = f"{name} is {shown(value)}, expected a function {signature}"
        raise ConfigError(op, problem, "Pass the function itself")


def allocate(op: str, what: str, shape: Sequence[int], dtype: npt.DTypeLike, make: Callable[[], A]) -> A:
    """`make()`, which allocates `what` of `shape`: `AllocationError` if the machine has not that much memory.

    Refused before anything is allocated, because a system that promises more than it has kills processes
    later; and without asking, where even the promise is refused.
    """
    size = math.prod(int(n) for n in shape) * np.dtype(dtype).itemsize
    if size < _SMALL:
        return make()
    most = total_memory()
    if (most is None or size <= most) and size < 2**63:
        try:
            return make()
        except MemoryError:
            pass
    there = f"the machine has {most / 2**30:.1f} GiB" if most is not None and size > most else "there is not so much"
    sizes = ", ".join(shown(int(n)) for n in shape)
    problem = f"{what} of shape ({sizes}) {np.dtype(dtype)} needs {readable(size)}, {there}"
    raise AllocationError(op, problem, "Choose smaller sizes")


def readable(size: int) -> str:
    """Bytes in the largest unit that they fill: `3.6 TiB`."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(max(size.bit_length() - 1, 0) // 10, len(units))
    return f"{size / 1024**power:.{power and 1}f} {units[power]}" if power < len(units) else "over 1024 PiB"


def path_of(op: str, name: str, value: Any) -> str:
    """`value`, a str or path, as a str that the system can take."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or "\0" in text or not text:
        raise ConfigError(op, f"{name} is {shown(value)}, expected a path", "Name a folder")
    return text
