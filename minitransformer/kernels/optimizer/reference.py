"""Optimizer kernels in NumPy: the specification. Every array is flat, of one size and one float dtype.

Updates happen in place, over parts that stay in the cache with their scratch: one step reads memory
once. The first `num_decayed` elements are those that weight decay and L1 apply to. Infinity and NaN
travel as values, without warnings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

CHUNK = 32768  # elements: the five float32 arrays of an Adam step then take 640 KiB of cache


def _parts(size: int, num_decayed: int) -> Iterator[tuple[slice, bool]]:
    """Consecutive slices of at most CHUNK elements, and whether all of each one decays."""
    for begin, end, decays in ((0, num_decayed, True), (num_decayed, size, False)):
        for start in range(begin, end, CHUNK):
            yield slice(start, min(start + CHUNK, end)), decays


@np.errstate(all="ignore")
def sgd_step(
    data: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    num_decayed: int,
) -> None:
    """g = gradient + weight_decay data;  velocity = momentum velocity + g;  data -= lr velocity

    With `velocity` None, data -= lr g. A first velocity of zeros gives torch's first step.
    """
    scratch = np.empty(min(CHUNK, data.size), data.dtype)
    for part, decays in _parts(data.size, num_decayed if weight_decay else 0):
        d, g = data[part], gradient[part]
        t = scratch[: d.size]
        if decays:
            np.multiply(d, weight_decay, out=t)
            t += g
            g = t
        if velocity is not None:
            v = velocity[part]
            v *= momentum
            v += g
            g = v
        np.multiply(g, lr, out=t)
        d -= t


def _adam_update(
    d: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    t: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """One part of Adam, with scratch `t`: m, v and then d, from the gradient g.

    d -= lr (m / c1) / (sqrt(v / c2) + eps) with c1 = 1 - beta1^step and c2 = 1 - beta2^step, taken as
    (lr sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)), which needs one pass less.
    """
    np.subtract(g, m, out=t)
    t *= 1 - beta1
    m += t
    np.multiply(g, g, out=t)
    t *= 1 - beta2
    v *= beta2
    v += t
    root = math.sqrt(1 - beta2**step)
    np.sqrt(v, out=t)
    t += eps * root
    np.divide(m, t, out=t)
    t *= lr * root / (1 - beta1**step)
    d -= t


@np.errstate(all="ignore")
def adam_step(
    data: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    num_decayed: int,
    step: int,
) -> None:
    """Adam on gradient + weight_decay data (Kingma and Ba 2015). `step` counts from 1."""
    scratch = np.empty((2, min(CHUNK, data.size)), data.dtype)
    for part, decays in _parts(data.size, num_decayed if weight_decay else 0):
        d, g = data[part], gradient[part]
        s, t = scratch[:, : d.size]
        if decays:
            np.multiply(d, weight_decay, out=s)
            s += g
            g = s
        _adam_update(d, g, first[part], second[part], t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step)


@np.errstate(all="ignore")
def adamw_step(
    data: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    num_decayed: int,
    step: int,
) -> None:
    """data *= 1 - lr weight_decay, then Adam (Loshchilov and Hutter 2019). `step` counts from 1."""
    scratch = np.empty(min(CHUNK, data.size), data.dtype)
    for part, decays in _parts(data.size, num_decayed if weight_decay else 0):
        d, g = data[part], gradient[part]
        if decays:
            d *= 1 - lr * weight_decay
        t = scratch[: d.size]
        _adam_update(d, g, first[part], second[part], t, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step)


@np.errstate(all="ignore")
def squared_norm(flat: np.ndarray) -> float:
    """Sum of squares, in float64 whatever the dtype.

    The order of the additions is fixed by CHUNK alone (pairwise inside a part, parts in order); no BLAS
    takes part, so its number of threads changes no bit.
    """
    scratch = np.empty(min(CHUNK, flat.size), np.float64)
    total = 0.0
    for part, _ in _parts(flat.size, 0):
        x = flat[part]
        t = scratch[: x.size]
        np.copyto(t, x)
        np.multiply(t, t, out=t)
        total += float(np.add.reduce(t))
    return total


def clip_factor(norm: float, max_norm: float) -> float:
    """What scales a gradient of that norm down to `max_norm`, at most 1; 1 too for a norm not finite.

    A NaN or infinite norm has no direction to keep: scaling by it would only spread the damage.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0


def clip_(gradient: np.ndarray, max_norm: float) -> float:
    """Scale `gradient` in place to norm `max_norm` if it is longer; return the norm that it had.

    If that is NaN or infinite, nothing is written.
    """
    norm = math.sqrt(squared_norm(gradient))
    factor = clip_factor(norm, max_norm)
    if factor < 1:
        gradient *= factor
    return norm


@np.errstate(all="ignore")
def add_l1(gradient: np.ndarray, data: np.ndarray, l1: float, num_decayed: int) -> None:
    """gradient += l1 sign(data), the gradient of l1 |data|, over the first `num_decayed` elements."""
    scratch = np.empty(min(CHUNK, num_decayed), data.dtype)
    for part, _ in _parts(num_decayed, 0):
        d = data[part]
        t = scratch[: d.size]
        np.sign(d, out=t)
        t *= l1
        gradient[part] += t
