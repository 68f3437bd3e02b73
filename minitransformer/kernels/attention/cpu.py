"""Attention in Numba: see `forward.py` and `backward.py`. The same functions as `reference.py`.

The arrays T x S of scores and weights are never made, except where they are what is asked for (`weights_forward`,
`weights_backward`). A call with a `score_mod` is served by the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer.kernels.attention import backward as _backward
from minitransformer.kernels.attention import forward as _forward
from minitransformer.kernels.attention import reference
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.reference import Gradients, allowed, weights_backward, weights_forward
from minitransformer.kernels.attention.rules import Sizes, reach_of, rules_of
from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.simd import REGISTER_BITS
from minitransformer.threads import split

__all__ = ["allowed", "backward", "forward", "weights_backward", "weights_forward"]

_LINE = 64  # bytes of a cache line
_SMALL = 1_000_000  # multiplications of a forward, a tenth of a millisecond


@entrance(reference, "BHTD", "BKSD", "BKSE", "*")
def forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None, problem: Problem
) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, T, E) and lse (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    if problem.score_mod is not None:
        return reference.forward(q, k, v, bias, problem)
    sizes = _sizes(q, v)
    rules = rules_of(problem, bias, sizes, q.dtype)
    kernel = _forward.plain if rules is None else _forward.ruled
    out, lse = np.empty((*q.shape[:3], sizes.E), q.dtype), np.empty(q.shape[:3], q.dtype)
    arrays = [x.reshape(-1) for x in (q, k, v, out, lse)]
    settings = reach_of(problem), sizes, float(problem.scale), rules

    def run(begin: int, stop: int) -> None:
        kernel(*_scratch(_forward.scratch_size, sizes, q.dtype), *arrays, *settings, begin, stop)

    _split(sizes, run)
    return out, lse


@entrance(reference, "BHTE", "BHT", "BHTD", "BKSD", "BKSE", "*", "BHTE", "BHT")
def backward(
    dout: np.ndarray,
    dlse: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray,
    lse: np.ndarray,
    problem: Problem,
) -> Gradients:
    """dq, dk, dv and, if there is a bias, dbias (B, H, T, S)."""
    if problem.score_mod is not None:
        return reference.backward(dout, dlse, q, k, v, bias, out, lse, problem)
    sizes = _sizes(q, v)
    rules = rules_of(problem, bias, sizes, q.dtype)
    kernel = _backward.plain if rules is None else _backward.ruled
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    # What is never computed has no gradient.
    dbias = np.zeros((*q.shape[:3], sizes.S) if bias is not None else 0, q.dtype)
    arrays = [x.reshape(-1) for x in (dout, dlse, q, k, v, out, lse, dq, dk, dv, dbias)]
    settings = reach_of(problem), sizes, float(problem.scale), rules

    def run(begin: int, stop: int) -> None:
        kernel(*_scratch(_backward.scratch_size, sizes, q.dtype), *arrays, *settings, begin, stop)

    _split(sizes, run)
    return Gradients(dq, dk, dv, None if bias is None else dbias)


def _split(sizes: Sizes, run: Callable[[int, int], None]) -> None:
    """Run all tasks, on several threads if there is so much to do that handing it over pays."""
    tasks = sizes.B * sizes.K
    if sizes.B * sizes.H * sizes.T * sizes.S * (sizes.D + sizes.E) < _SMALL:
        run(0, tasks)
    else:
        split(tasks, run)


def _sizes(q: np.ndarray, v: np.ndarray) -> Sizes:
    B, H, T, D = q.shape
    return Sizes(B, H, v.shape[1], T, v.shape[2], D, v.shape[3])


def _scratch(size_of: Any, sizes: Sizes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised memory: numbers that begin where a cache line does, and the queries' spans."""
    memory = np.empty(size_of(sizes, REGISTER_BITS // 8 // dtype.itemsize) * dtype.itemsize + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : memory.size - _LINE + start].view(dtype), np.empty(2 * sizes.T, np.int64)
