"""Wrong gradients, and what gradcheck says of them: what its tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer.autograd import Op
from minitransformer.gradients import gradcheck

RNG = np.random.default_rng(4)


def normal(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def seeded(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def findings(fn: Any, *inputs: Any, **options: Any) -> str:
    """The report on something that is wrong, without its first line."""
    report = gradcheck(fn, inputs, raise_exception=False, **options)
    assert not report.ok
    assert not report
    return str(report).partition("\n")[2]


def op_of(spoil: Callable[[np.ndarray], np.ndarray]) -> Op:
    """x^3, and its gradient spoilt."""
    return Op("cube", lambda x: (x**3, x), lambda dout, x: (spoil(3 * x * x * dout),))


def zero_at(index: Any) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(g: np.ndarray) -> np.ndarray:
        g[index] = 0
        return g

    return spoil
