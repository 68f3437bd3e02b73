"""Dropout with counter-based numbers: the mask is a function of its address, not of call order."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import register
from minitransformer.checks import is_number, shown
from minitransformer.errors import ConfigError
from minitransformer.ops.activation import check_float
from minitransformer.random import DrawKey


class Dropped(NamedTuple):
    keep: np.ndarray  # bool, the shape of x
    scale: float
    kernel: ModuleType


def check_rate(op: str, p: float) -> float:
    """`p` as a float in [0, 1), or `ConfigError`."""
    if not is_number(p, 0, 1):
        raise ConfigError(op, f"the dropout rate is {shown(p)}, expected a number in [0, 1)", "0 turns dropout off")
    return float(p)


def dropout_forward(x: np.ndarray, *, p: float, key: DrawKey) -> tuple[np.ndarray, Dropped]:
    """x / (1 - p) where kept, 0 elsewhere (Srivastava et al. 2014); axis 0 is the batch row."""
    check_float("dropout", x=x)
    p = check_rate("dropout", p)
    kernel = kernels.serve("pointwise", x)
    out, keep = kernel.dropout_forward(x, p, key)
    return out, Dropped(keep, 1 / (1 - p), kernel)


def dropout_backward(dout: np.ndarray, saved: Dropped) -> tuple[np.ndarray]:
    return (saved.kernel.dropout_backward(dout, saved.keep, saved.scale),)


register("dropout", dropout_forward, dropout_backward)
