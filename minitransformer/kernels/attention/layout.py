"""Where the rows of queries, keys and values lie: heads that are parts of one wider array need no copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int64, types

from minitransformer.kernels.simd.tiles import routine


class Layout(NamedTuple):
    """Row t of head h of batch row b begins at position b batch + h head + t step."""

    batch: int
    head: int
    step: int


LAYOUT = types.NamedUniTuple(int64, len(Layout._fields), Layout)


class Layouts(NamedTuple):
    """Those of the arrays of a forward."""

    q: Layout
    k: Layout
    v: Layout
    out: Layout


LAYOUTS = types.NamedUniTuple(LAYOUT, len(Layouts._fields), Layouts)


class BackwardLayouts(NamedTuple):
    """Those of the arrays of a backward."""

    q: Layout
    k: Layout
    v: Layout
    out: Layout
    dout: Layout
    dq: Layout
    dk: Layout
    dv: Layout


BACKWARD_LAYOUTS = types.NamedUniTuple(LAYOUT, len(BackwardLayouts._fields), BackwardLayouts)


def lay_out(array: np.ndarray) -> tuple[np.ndarray, Layout]:
    """The first row of `array` (B, H, T, D), whose numbers must lie side by side, and where all its rows are.

    A kernel goes on from the first row to all others, so `array` must live as long as the call.
    """
    batch, head, step, _ = array.strides
    size = array.itemsize
    return array[0, 0, 0] if array.size else array.reshape(-1), Layout(batch // size, head // size, step // size)


@routine
def row_of(layout: Any, b: Any, h: Any, t: Any) -> Any:
    """The position where row t of head h of batch row b begins."""
    return b * layout.batch + h * layout.head + t * layout.step
