"""Arrays laid out in memory in any way, and as text that makes them again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_WIDTH = 100  # of a line of text


def lay_out(values: np.ndarray, order: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """An array equal to `values` whose axes lie in memory as told.

    `order` lists the axes from the slowest to the fastest: (0, 1) is C's order, (1, 0) Fortran's. `steps` has
    one number an axis: 1 is dense, 2 leaves gaps, -1 runs backwards, 0 repeats the first entry (whose
    values then stand in place of all others, and the result is read-only). Gaps hold NaN, the largest integer
    or True: what reads them, shows.
    """
    fillers: dict[str, Any] = {"f": np.nan, "c": np.nan, "b": True}
    filler = fillers[values.dtype.kind] if values.dtype.kind in fillers else np.iinfo(values.dtype).max
    sides = [n * abs(step) if step else min(n, 1) for n, step in zip(values.shape, steps, strict=True)]
    stored = np.full([sides[axis] for axis in order], filler, values.dtype)
    index = (..., *(slice(None, None, step or None) for step in steps))
    view = stored.transpose(np.argsort(np.asarray(order, int)))[index]
    view[...] = values[tuple(slice(None) if step else slice(0, 1) for step in steps)]
    return view if all(steps) else np.broadcast_to(view, values.shape)


def layout_of(x: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The `order` and `steps` with which `lay_out` makes an array like `x`.

    Exact for what `lay_out` made, up to axes of length 1, whose stride means nothing; other strides that
    are no multiples of what lies inside them are rounded.
    """
    order = sorted(range(x.ndim), key=lambda axis: (-abs(x.strides[axis]), axis))
    steps, unit = [1] * x.ndim, x.itemsize
    for axis in reversed(order):
        if x.shape[axis] > 1 and x.size:
            stride = x.strides[axis]
            steps[axis] = stride and (max(abs(stride) // unit, 1) if stride > 0 else -max(abs(stride) // unit, 1))
            unit *= x.shape[axis] * max(abs(steps[axis]), 1) if stride else 1
    return tuple(order), tuple(steps)


def array_text(x: np.ndarray, indent: str = "") -> str:
    """A NumPy expression for the values of `x`, exact, in C's order: `np.array([0.5, -np.inf])`."""
    dtype = "" if x.dtype in (np.float64, np.int64, bool) else f", np.{x.dtype}"
    flat = x.ravel()
    if not x.size or (x.size > 4 and len({flat[i].tobytes() for i in range(x.size)}) == 1):
        kind = "" if x.dtype == np.float64 else f", {'bool' if x.dtype == bool else f'np.{x.dtype}'}"
        if not x.size or flat[0].tobytes() == x.dtype.type(0).tobytes():
            return f"np.zeros({x.shape}{kind})"
        return f"np.full({x.shape}, {_number(flat[0])}{dtype})"
    return f"np.array({_nested(x, f'{indent}    ')}{dtype})"


def _nested(x: np.ndarray, indent: str) -> str:
    """The elements as nested lists, on one line if they fit."""
    if x.ndim == 0:
        return _number(x[()])
    items = [_nested(part, f"{indent}    ") for part in x]
    line = f"[{', '.join(items)}]"
    if len(line) + len(indent) <= _WIDTH and "\n" not in line:
        return line
    return f"[\n{_lines(items, indent)}\n{indent[4:]}]"


def _lines(items: Iterable[str], indent: str) -> str:
    """Items one after another, with line breaks where a line is full."""
    lines = [indent]
    for item in items:
        if "\n" in item or len(lines[-1]) + len(item) + 2 > _WIDTH:
            lines.append(indent)
        lines[-1] += f"{item}, "
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _number(x: Any) -> str:
    """The shortest text that gives this number again when Python reads it and NumPy rounds it to its dtype."""
    if x.dtype.kind == "f":
        if not np.isfinite(x):
            return "np.nan" if np.isnan(x) else f"{'-' * bool(x < 0)}np.inf"
        short = str(x)
        return short if x.dtype.type(float(short)) == x else repr(float(x))
    return str(x)
