"""Sums, means and extremes over axes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minitransformer.autograd import check_axis, register
from minitransformer.checks import check_flag
from minitransformer.errors import ShapeError

Dim = int | tuple[int, ...] | None


class Reduced(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[int, ...]


class Extreme(NamedTuple):
    x: np.ndarray
    out: np.ndarray  # with the reduced axes kept at size 1
    axes: tuple[int, ...]


def _axes(op: str, x: np.ndarray, dim: Dim) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.ndim))
    axes = tuple(check_axis(op, d, x.ndim) for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    if len(set(axes)) != len(axes):
        raise ShapeError(op, f"dim {dim} names an axis twice", "Name every axis once")
    return axes


def _kept(dout: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """`dout` with the reduced axes back at size 1."""
    return dout.reshape([1 if axis in axes else size for axis, size in enumerate(shape)])


def sum_forward(x: np.ndarray, *, dim: Dim = None, keepdim: bool = False) -> tuple[np.ndarray, Reduced]:
    axes = _axes("sum", x, dim)
    return x.sum(axis=axes, keepdims=check_flag("sum", "keepdim", keepdim)), Reduced(x.shape, axes)


def sum_backward(dout: np.ndarray, saved: Reduced) -> tuple[np.ndarray]:
    return (np.broadcast_to(_kept(dout, *saved), saved.shape).copy(),)


def mean_forward(x: np.ndarray, *, dim: Dim = None, keepdim: bool = False) -> tuple[np.ndarray, Reduced]:
    """The mean over `dim`; integers give float32, and no elements give NaN."""
    axes, keepdim = _axes("mean", x, dim), check_flag("mean", "keepdim", keepdim)
    if x.dtype.kind in "iub":
        x = x.astype(np.float32)
    count = x.dtype.type(_count(x.shape, axes))
    return x.sum(axis=axes, keepdims=keepdim) / count, Reduced(x.shape, axes)


def mean_backward(dout: np.ndarray, saved: Reduced) -> tuple[np.ndarray]:
    share = _kept(dout, *saved) / dout.dtype.type(_count(*saved))
    return (np.broadcast_to(share, saved.shape).copy(),)


def _count(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _check_not_empty(op: str, x: np.ndarray, axes: tuple[int, ...]) -> None:
    if _count(x.shape, axes) == 0:
        raise ShapeError(
            op,
            f"no elements to compare over axes {axes} of shape {x.shape}",
            "Reduce axes that hold something",
        )


def max_forward(x: np.ndarray, *, dim: Dim = None, keepdim: bool = False) -> tuple[np.ndarray, Extreme]:
    """The largest element over `dim`. Ties share the gradient equally."""
    axes, keepdim = _axes("max", x, dim), check_flag("max", "keepdim", keepdim)
    _check_not_empty("max", x, axes)
    out = x.max(axis=axes, keepdims=True)
    return (out.copy() if keepdim else out.squeeze(axes)), Extreme(x, out, axes)


def min_forward(x: np.ndarray, *, dim: Dim = None, keepdim: bool = False) -> tuple[np.ndarray, Extreme]:
    """The smallest element over `dim`. Ties share the gradient equally."""
    axes, keepdim = _axes("min", x, dim), check_flag("min", "keepdim", keepdim)
    _check_not_empty("min", x, axes)
    out = x.min(axis=axes, keepdims=True)
    return (out.copy() if keepdim else out.squeeze(axes)), Extreme(x, out, axes)


def extreme_backward(dout: np.ndarray, saved: Extreme) -> tuple[np.ndarray]:
    winners = saved.x == saved.out
    share = _kept(dout, saved.x.shape, saved.axes) / winners.sum(axis=saved.axes, keepdims=True)
    return (np.where(winners, share, 0).astype(dout.dtype),)


register("sum", sum_forward, sum_backward)
register("mean", mean_forward, mean_backward)
register("max", max_forward, extreme_backward)
register("min", min_forward, extreme_backward)
