"""Checks of the numbers that optimizers and schedules are made with."""

from __future__ import annotations

import math
from numbers import Integral, Real

from minitransformer.errors import ConfigError


def check_number(op: str, name: str, value: float, below: float = math.inf) -> float:
    """`value` as a float in [0, below), or `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < below:
        bound = "finite" if below == math.inf else f"below {below:g}"
        raise ConfigError(op, f"{name} is {value!r}, expected a number from 0, {bound}", f"Choose another {name}")
    return float(value)


def check_count(op: str, name: str, value: int, least: int = 0) -> int:
    """`value` as an int from `least`, or `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(op, f"{name} is {value!r}, expected an integer from {least}", f"Choose another {name}")
    return int(value)


def check_at_most(op: str, name: str, value: float, limit_name: str, limit: float) -> None:
    """`ConfigError` if `value` is above `limit`."""
    if value > limit:
        raise ConfigError(
            op,
            f"{name} is {value}, expected at most {limit}, the {limit_name}",
            f"Lower {name} or raise {limit_name}",
        )
