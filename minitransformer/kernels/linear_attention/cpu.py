"""Linear attention in Numba: the same functions as `reference.py`, by the sums of `sweep.py`.

A task is a key head with all query heads that share it, and adds in an order of its own: the bits do not depend on
how tasks are spread over threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.linear_attention import reference
from minitransformer.kernels.linear_attention.sweep import (
    DIVIDED,
    MAPPED,
    PLAIN,
    SLOPED,
    WITH_ONE,
    Rows,
    Sides,
    scratch_size,
    sweep,
    upstream,
)
from minitransformer.kernels.simd import REGISTER_BITS
from minitransformer.kernels.simd.tiles import LINE
from minitransformer.threads import split

_SMALL = 1_000_000  # multiplications, a tenth of a millisecond: to hand over less does not pay


@entrance(reference, "BHTD", "BKSD", "BKSE")
def forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, feature_map: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, T, E) and its denominators (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    out, den = np.empty((*q.shape[:3], v.shape[3]), q.dtype), np.empty(q.shape[:3], q.dtype)
    form = PLAIN if feature_map is None else MAPPED
    sides = Sides(_rows(q, k, form), _rows(k, k, form), _rows(v, k, PLAIN), _rows(out, k, DIVIDED))
    _in_tasks(q, k, v, lambda begin, stop: _sweep(q, k, v, out, den, sides, causal, False, begin, stop))
    return out, den


@entrance(reference, "BHTE", "BHTD", "BKSD", "BKSE", "BHTE", "BHT")
def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    den: np.ndarray,
    causal: bool,
    feature_map: str | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk, dv: see the formulas in `reference.py`."""
    dq, dk, dv = (np.empty_like(x) for x in (q, k, v))
    E = v.shape[3]
    h = np.empty((*q.shape[:3], E + 1), q.dtype)
    form, slope = (PLAIN, PLAIN) if feature_map is None else (MAPPED, SLOPED)
    x, y, z = _rows(q, k, form), _rows(k, k, form), _rows(v, k, WITH_ONE)
    dh = _rows(h, k, PLAIN)
    for_dq = Sides(dh, z, y, _rows(dq, k, slope))
    for_dk = Sides(z, dh, x, _rows(dk, k, slope))
    for_dv = Sides(y, x, dh._replace(width=E), _rows(dv, k, PLAIN))
    per_task = q.shape[1] // k.shape[1] * q.shape[2]  # queries

    def run(begin: int, stop: int) -> None:
        flat = (a.reshape(-1) for a in (dout, out, den, h))
        upstream(*flat, E, begin * per_task, stop * per_task)
        _sweep(h, v, k, dq, q, for_dq, causal, False, begin, stop)
        _sweep(v, h, q, dk, k, for_dk, causal, True, begin, stop)
        _sweep(k, q, h, dv, k, for_dv, causal, True, begin, stop)

    _in_tasks(q, k, v, run)
    return dq, dk, dv


def _rows(array: np.ndarray, k: np.ndarray, form: int) -> Rows:
    """Those of a contiguous array, in tasks of a head of k each."""
    _, heads, length, width = array.shape
    return Rows(heads // k.shape[1], length, width, width, form)


def _sweep(
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    out: np.ndarray,
    beside: np.ndarray,
    sides: Sides,
    causal: bool,
    backwards: bool,
    begin: int,
    stop: int,
) -> None:
    size = scratch_size(sides, REGISTER_BITS // 8 // x.itemsize) + LINE // x.itemsize
    sweep(
        np.empty(size, x.dtype), *(a.reshape(-1) for a in (x, y, z, out, beside)), sides, causal, backwards, begin, stop
    )


def _in_tasks(q: np.ndarray, k: np.ndarray, v: np.ndarray, run: Callable[[int, int], None]) -> None:
    """Run all tasks, on several threads if there is so much to do that handing it over pays."""
    tasks = k.shape[0] * k.shape[1]
    if (q.size + k.size) * v.shape[3] < _SMALL:
        run(0, tasks)
    else:
        split(tasks, run)
