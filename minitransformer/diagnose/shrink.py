"""The smallest call that still goes wrong: arrays are cut in half, axis by axis, for as long as it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitransformer.diagnose.bad_op import REFUSALS, BadOp, has_nan, is_finite


def shrunk(bad: BadOp) -> BadOp:
    """`bad` with smaller arrays that go wrong in the same way: finite inputs stay so, results are not finite.

    Axes that were equally long at first are cut together, since they are mostly the same axis (the T of
    queries and mask); what the op then refuses is not taken. If nothing can be cut, `bad` itself, run again.
    """
    best = bad.run()
    if _fault(best) is None:
        return best
    shapes: list[tuple[int, ...]] = []
    map_arrays(_given(bad), lambda array: shapes.append(array.shape))
    left = {size: size for shape in shapes for size in shape if size > 1}  # by size at first: size now
    while left:
        axis = max(left, key=lambda size: left[size])
        middle = left[axis] // 2
        for half in (slice(middle), slice(middle, None)):
            smaller = _attempt(best, shapes, axis, half)
            if smaller is not None:
                best, left[axis] = smaller, len(range(left[axis])[half])
                break
        else:
            del left[axis]
        left = {size: now for size, now in left.items() if now > 1}
    return best


def _given(bad: BadOp) -> tuple[Any, ...]:
    return bad.inputs, bad.static, bad.douts


def _attempt(bad: BadOp, shapes: Sequence[tuple[int, ...]], axis: int, half: slice) -> BadOp | None:
    """`bad` with that half of every axis that was `axis` long, or None if it then fits no more or goes right."""
    first = iter(shapes)  # map_arrays comes by in the same order each time

    def cut(array: np.ndarray) -> np.ndarray:
        cut = array[tuple(half if n == axis else slice(None) for n in next(first))]
        return np.asarray(cut)  # of an array without axes, a number is what is left

    inputs, static, douts = map_arrays(_given(bad), cut)
    try:
        candidate = bad._replace(inputs=inputs, static=static, douts=douts).run()
    except REFUSALS:
        return None  # the op refuses: these axes do not belong together, or a setting states the size
    return candidate if candidate.blame == bad.blame and _fault(candidate) == _fault(bad) else None


def _fault(bad: BadOp) -> tuple[bool, int] | None:
    """Whether there is NaN, and the first result with it, or else with infinity; None if there is neither."""
    faults = [(not has_nan(x), i) for i, x in enumerate(bad.results) if not is_finite(x)]
    return min(faults, default=None)


def map_arrays(value: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """`value` with `change` applied to every array in it, in tuples, lists and dicts too."""
    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_arrays(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_arrays(item, change) for item in value)
    if isinstance(value, dict):
        return {name: map_arrays(item, change) for name, item in value.items()}
    return value
