"""Strategies for shapes, arrays, tensors and masks.

A few numbers are drawn, and a fixed pattern makes an array of them: drawing every element of an attention
problem is refused by Hypothesis's health check, and what a drawn seed makes does not shrink. Everything shrinks
to small shapes, zeros, and arrays that lie in memory as NumPy makes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minitransformer.autograd import Tensor
from minitransformer.checks import check_choice, shown
from minitransformer.errors import ConfigError, DTypeError
from minitransformer.testing.layouts import lay_out

Shape = tuple[int, ...]

_FLOATS = st.sampled_from([np.dtype(np.float64), np.dtype(np.float32)])
_VARIED = st.sampled_from([False, True, True, True])
_PLACES = st.integers(0, 2**16)
_SOME_PLACES = st.lists(_PLACES, max_size=3)
_SHARES = st.sampled_from([1.0, 0.7, 0.3])
_STEPS = (1, 2, -1, -2)


def shapes(
    *, min_dims: int = 1, max_dims: int = 4, min_side: int = 1, max_side: int = 5
) -> st.SearchStrategy[tuple[int, ...]]:
    """Tuples of `min_dims` to `max_dims` sizes; with min_side=0 also shapes of arrays without elements."""
    return st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def _broadcastable(draw: st.DrawFn, count: int, full: st.SearchStrategy[Shape]) -> tuple[Shape, ...]:
    whole = draw(full)
    found = []
    for _ in range(count):
        first = draw(st.integers(0, len(whole)))
        ones = draw(st.integers(0, 2 ** (len(whole) - first) - 1))  # a bit for each axis that is left
        found.append(tuple(1 if ones >> axis & 1 else n for axis, n in enumerate(whole[first:])))
    return tuple(found)


def broadcastable_shapes(
    count: int = 2, *, max_dims: int = 4, min_side: int = 1, max_side: int = 5
) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """`count` shapes that NumPy broadcasts to one: each may lack leading axes and have others of length 1."""
    full = shapes(min_dims=0, max_dims=max_dims, min_side=min_side, max_side=max_side)
    return _broadcastable(count, full)


def arrays(
    shape: Any = None,
    dtype: Any = None,
    *,
    min_value: float = -8,
    max_value: float = 8,
    extremes: bool = False,
    layouts: bool = True,
) -> st.SearchStrategy[np.ndarray]:
    """Arrays of floats, integers or bools in [min_value, max_value], without NaN, infinities and subnormals.

    `shape` and `dtype` are fixed or strategies; by default `shapes()`, and float64 or float32. `extremes` adds
    the largest and the smallest normal numbers of either sign, whatever the bounds. With `layouts` the arrays
    lie in memory in any way: Fortran's order and all others, gaps, backwards, repeated by a stride of 0, and
    some are read-only. Raises `DTypeError` or `ConfigError` for a dtype or bounds that hold no numbers.
    """
    if not min_value <= max_value or not math.isfinite(max_value - min_value):
        problem = f"the bounds are {shown(min_value)} and {shown(max_value)}, expected finite and ascending ones"
        raise ConfigError("arrays", problem, "Give min_value <= max_value")
    if isinstance(dtype, st.SearchStrategy):
        dtype = dtype.map(lambda kind: _check_dtype(kind, min_value, max_value))
    elif dtype is not None:
        dtype = _check_dtype(dtype, min_value, max_value)
    shape = shapes() if shape is None else _strategy(shape if isinstance(shape, st.SearchStrategy) else tuple(shape))
    dtypes: Any = _FLOATS if dtype is None else _strategy(dtype)
    return _arrays(shape, dtypes, min_value, max_value, extremes, layouts)


def _check_dtype(dtype: Any, low: float, high: float) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype.kind not in "fiub":
        raise DTypeError("arrays", f"dtype is {dtype}, expected floats, integers or bool", "Pass such a dtype")
    if dtype.kind in "iu" and math.ceil(low) > math.floor(high):
        raise ConfigError("arrays", f"there is no integer from {low} to {high}", "Widen the bounds")
    return dtype


def _strategy(value: Any) -> st.SearchStrategy[Any]:
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


@st.composite
def _arrays(
    draw: st.DrawFn,
    shape: st.SearchStrategy[Shape],
    dtype: st.SearchStrategy[np.dtype],
    min_value: float,
    max_value: float,
    extremes: bool,
    layouts: bool,
) -> np.ndarray:
    values = draw_values(draw, draw(shape), draw(dtype), min_value, max_value, extremes)
    if layouts:
        values = draw_layout(draw, values, repeat=True)
        if draw(st.booleans()):
            values.flags.writeable = False
    return values


def draw_values(
    draw: st.DrawFn,
    shape: Shape,
    dtype: np.dtype,
    low: float = -8,
    high: float = 8,
    extremes: bool = False,
    salt: int = 0,
) -> np.ndarray:
    """An array whose numbers shrink to 0, or what is nearest to it. Another `salt` has another fixed pattern.

    A few numbers are drawn. A pattern spreads them, the first one first, and mostly gives each float a weight,
    so that hardly two are the same; two more numbers may be put at drawn places.
    """
    size = math.prod(shape)
    if not size:
        return np.zeros(shape, dtype)
    pools, spikes = _numbers(dtype, low, high, extremes)
    rng = np.random.default_rng(salt)
    places, weights = rng.integers(0, 2**32, size), rng.integers(128, 1025, size) / 1024
    places[0], weights[0] = 0, 1
    pool = draw(pools)
    flat: np.ndarray = np.array(pool, np.float64 if dtype.kind == "f" else np.int64)[places % len(pool)]
    if dtype.kind == "f" and draw(_VARIED):
        zero = min(max(low, 0.0), high)
        flat = zero + (flat - zero) * weights
    for index, value in draw(spikes):
        flat[index % size] = value
    values = flat.astype(dtype).reshape(shape)
    if dtype.kind == "f":
        values[abs(values) < np.finfo(dtype.type).tiny] = 0  # a weight can make a subnormal number
    return values


@cache  # a strategy made in every draw takes longer than the draw
def _numbers(
    dtype: np.dtype, low: float, high: float, extremes: bool
) -> tuple[st.SearchStrategy[list[Any]], st.SearchStrategy[list[tuple[int, Any]]]]:
    """Some numbers, and some with a place each."""
    number: st.SearchStrategy[Any]
    if dtype.kind == "f":
        kind: Any = dtype.type
        width: Any = 8 * dtype.itemsize
        number = st.floats(float(kind(low)), float(kind(high)), width=width, allow_subnormal=False)
        if math.ceil(low) <= high:  # whole numbers are simpler
            number = st.integers(math.ceil(low), math.floor(high)).map(float) | number
        if extremes:
            largest, smallest = float(np.finfo(kind).max), float(np.finfo(kind).tiny)
            number |= st.sampled_from([largest, -largest, smallest, -smallest])
    elif dtype.kind == "b":
        number = st.integers(0, 1)
    else:
        number = st.integers(math.ceil(low), math.floor(high))
    return st.lists(number, min_size=1, max_size=8), st.lists(st.tuples(_PLACES, number), max_size=2)


def draw_layout(draw: st.DrawFn, values: np.ndarray, *, repeat: bool = False) -> np.ndarray:
    """`values` laid out in memory in any way; with `repeat` one axis may have stride 0, and repeats its first entry."""
    ndim = values.ndim
    if not ndim or not draw(st.booleans()):
        return values
    order, left, rest = [], list(range(ndim)), draw(st.integers(0, math.factorial(ndim) - 1))
    for n in range(ndim, 0, -1):
        rest, index = divmod(rest, n)
        order.append(left.pop(index))
    code = draw(st.just(0) | st.integers(0, len(_STEPS) ** ndim - 1))  # one draw instead of one an axis
    steps = [_STEPS[code // len(_STEPS) ** axis % len(_STEPS)] for axis in range(ndim)]
    if repeat and (axis := draw(st.integers(-3 * ndim, ndim - 1))) >= 0:
        steps[axis] = 0
    return lay_out(values, order, steps)


def tensors(
    shape: Any = None, dtype: Any = None, *, requires_grad: bool = True, **options: Any
) -> st.SearchStrategy[Tensor]:
    """Tensors of floats; shape, dtype and `options` as in `arrays`."""
    return arrays(shape, dtype, **options).map(lambda array: Tensor(array, requires_grad=requires_grad))


def attention_masks(
    shape: Any = None,
    *,
    kinds: Collection[str] = ("bool", "float"),
    empty_rows: bool = True,
) -> st.SearchStrategy[np.ndarray]:
    """Masks for scores of `shape` (B, H, T, S), fixed or a strategy, that broadcast to it from two to four axes.

    Of `kinds` "bool" (True = may attend) and "float" (added: -inf blocks, other cells have finite numbers). They
    shrink to masks that block nothing. With `empty_rows`, some queries may attend to nothing.
    """
    for kind in kinds:
        check_choice("attention_masks", "kinds", kind, ("bool", "float"))
    if not kinds:
        raise ConfigError("attention_masks", "kinds is empty, expected 'bool', 'float' or both", "Name one")
    if shape is None:
        shape = shapes(min_dims=4, max_dims=4)
    return _masks(_strategy(shape), tuple(kinds), empty_rows)


@st.composite
def _masks(draw: st.DrawFn, shape: st.SearchStrategy[Shape], kinds: tuple[str, ...], empty_rows: bool) -> np.ndarray:
    may = draw_allowed(draw, draw_mask_shape(draw, draw(shape)), empty_rows)
    return may if draw(st.sampled_from(kinds)) == "bool" else draw_additive(draw, may)


def draw_mask_shape(draw: st.DrawFn, scores: Shape) -> Shape:
    """A shape of two to four axes that broadcasts to that of the scores."""
    scores = scores[-draw(st.integers(2, 4)) :]
    ones = draw(st.integers(0, 2 ** len(scores) - 1))  # a bit for each axis
    return tuple(1 if ones >> axis & 1 else n for axis, n in enumerate(scores))


def draw_allowed(draw: st.DrawFn, shape: Shape, empty_rows: bool) -> np.ndarray:
    """A bool mask that shrinks to all True."""
    may = np.ones(shape, bool)
    size = may.size
    share = draw(_SHARES) if size else 1.0
    may.flat[:] = np.random.default_rng(0).random(size) < share
    for index in draw(_SOME_PLACES) if size else ():
        may.flat[index % size] ^= True
    rows = may.reshape(-1, shape[-1]) if size else may.reshape(0, 1)
    if empty_rows and size:
        for row in draw(_SOME_PLACES):
            rows[row % len(rows)] = False
    elif size:
        rows[~rows.any(axis=1), 0] = True
    return may


def draw_additive(draw: st.DrawFn, may: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
    """A float mask that is -inf where a bool mask is False.

    Attention refuses one of only 0 and 1, which could be meant as a bool mask: its ones become 2.
    """
    added = np.where(may, draw_values(draw, may.shape, np.dtype(dtype), salt=9), -np.inf).astype(dtype)
    return np.where(added == 1, added.dtype.type(2), added) if np.isin(added, (0, 1)).all() else added
