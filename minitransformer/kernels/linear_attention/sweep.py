"""The one sum of linear attention, which its forward makes once and its backward three times.

    out_t = sum_s (x_t . y_s) z_s,    s over all rows of y and z, or s <= t, or s >= t

Over all rows, the state sum_s y_s z_s^T comes first, then out = x state. Over s <= t, tokens go in chunks, with the
state of the chunks before:

    out = [x | tril(x y^T)] [state; z],    then state += y^T z

s >= t is the same with time running backwards. Scratch memory is a few chunks and the state, whatever the length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import boolean, int64, types, void

from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.simd import (
    constant,
    exp_low,
    first_lanes,
    fma,
    lanes,
    load,
    load_up_to,
    select_less,
    splat,
    store,
    store_up_to,
    sum_lanes,
    zeros,
)
from minitransformer.kernels.simd.tiles import ROWS, first_line, product, routine, to_lanes

CHUNK = 32  # tokens, a multiple of a register

# What becomes of rows when they are read or written.
PLAIN = 0
MAPPED = 1  # read: phi of them
WITH_ONE = 2  # read: a 1 at their end
SLOPED = 3  # written: times the slope of phi at the same rows of `beside`
DIVIDED = 4  # written: by sum_s x_t . y_s, which goes to `beside`


class Rows(NamedTuple):
    """Rows of `width` numbers, `step` apart in memory: `length` a head, and `heads` of them a task."""

    heads: int
    length: int
    width: int
    step: int
    form: int


class Sides(NamedTuple):
    x: Rows
    y: Rows
    z: Rows
    out: Rows


_ROWS = types.NamedUniTuple(int64, len(Rows._fields), Rows)
_SIDES = types.NamedUniTuple(_ROWS, len(Sides._fields), Sides)


def scratch_size(sides: Sides, lanes: int) -> int:
    """How many numbers of scratch memory `sweep` needs, which it uses from the first cache line on."""
    X = sides.x.width + 1  # with a 1 at the end, if at all
    X_wide, Z_wide = (-(-n // lanes) * lanes for n in (X, sides.z.width))
    return (X + 2 * CHUNK) * Z_wide + (3 * CHUNK + 1) * X_wide + CHUNK + CHUNK * (X + CHUNK)


@routine
def _phi(x: Any) -> Any:
    """elu(x) + 1"""
    return select_less(constant(x, 0.0), x, x + constant(x, 1.0), exp_low(x))


@routine
def _slope(x: Any) -> Any:
    return select_less(constant(x, 0.0), x, constant(x, 1.0), exp_low(x))


@routine
def _place(rows: Any, head: Any, t: Any, backwards: Any) -> Any:
    """Where row t of a head begins, in the order of the sweep, and how far the next one is."""
    if backwards:
        return (head * rows.length + rows.length - 1 - t) * rows.step, -rows.step
    return (head * rows.length + t) * rows.step, rows.step


@routine
def _read(A: Any, rows: Any, head: Any, t: Any, count: Any, backwards: Any, w: Any, to: Any, ld: Any) -> None:
    """`count` rows of A from row t on to scratch memory, where what follows a row is overwritten."""
    L, width = lanes(A), rows.width
    a, step = _place(rows, head, t, backwards)
    for r in range(count):
        for c in range(0, width, L):
            x = load_up_to(A, a + r * step + c, width - c)
            store(w, to + r * ld + c, _phi(x) if rows.form == MAPPED else x)
        if rows.form == WITH_ONE:
            w[to + r * ld + width] = 1


@routine
def _add_up(w: Any, rows: Any, count: Any, width: Any, to: Any) -> None:
    """Rows summed from the first to each, and to what was the last sum before, which stands in front of them."""
    for c in range(0, width, lanes(w)):
        before, total = load(w, to - width + c), zeros(w)
        for r in range(count):
            total = total + load(w, rows + r * width + c)  # by itself: before may be so large that bits get lost
            store(w, to + r * width + c, before + total)
        store(w, to - width + c, before + total)


@routine
def _dot(w: Any, a: Any, b: Any, size: Any) -> Any:
    total = zeros(w)
    for i in range(0, size, lanes(w)):
        total = fma(load_up_to(w, a + i, size - i), load_up_to(w, b + i, size - i), total)
    return sum_lanes(total)


@routine
def _write(
    w: Any, at: Any, ld: Any, den: Any, A: Any, beside: Any, rows: Any, head: Any, t: Any, count: Any, backwards: Any
) -> None:
    """The way back. If the rows are divided, then by the numbers from w[den] on."""
    L, width = lanes(A), rows.width
    a, step = _place(rows, head, t, backwards)
    for r in range(count):
        place, number = a + r * step, w[den + r]
        by = splat(number)
        if rows.form == DIVIDED:
            beside[head * rows.length + t + r] = number
        for c in range(0, width, L):
            x = load(w, at + r * ld + c)
            if rows.form == SLOPED:
                x = x * _slope(load_up_to(beside, place + c, width - c))
            elif rows.form == DIVIDED:
                x = x / by if number != 0 else zeros(w)
            store_up_to(A, place + c, width - c, x)


@routine
def _weigh(w: Any, x: Any, X: Any, yt: Any, state: Any, out: Any, width: Any, count: Any, with_state: Any) -> None:
    """Rows of out from [x | tril(x y^T)] [state; z], or with the second half alone added to them.

    Rows of x are X numbers, behind which there is room for the products; z follows the state, `width` numbers a row.
    """
    L, step = lanes(w), X + CHUNK
    start = 0 if with_state else X
    for r in range(0, count, ROWS):
        rows = min(ROWS, count - r)
        row, end = x + r * step, r + rows
        registers = (end + L - 1) // L
        product(w, row, step, 1, w, yt, CHUNK, w, row + X, step, X, rows, registers, False)
        for n in range(r, end):  # of those products, the ones with later rows go
            for c in range((n + 1) // L * L, registers * L, L):
                p = x + n * step + X + c
                store(w, p, first_lanes(n + 1 - c, load(w, p), zeros(w)))
        B, C = state + start * width, out + r * width
        product(w, row + start, step, 1, w, B, width, w, C, width, X - start + end, rows, width // L, not with_state)


@kernel(lambda T: void(*[T[::1]] * 6, _SIDES, boolean, boolean, int64, int64))
def sweep(
    w: Any,
    x: Any,
    y: Any,
    z: Any,
    out: Any,
    beside: Any,
    sides: Any,
    causal: Any,
    backwards: Any,
    begin: Any,
    stop: Any,
) -> None:
    """The tasks from `begin` to `stop`: a key head each, with all query heads that share it.

    Either x and out have those query heads, or y and z, which are then summed over.
    """
    T, L = x.dtype.type, lanes(x)
    X = sides.x.width + (1 if sides.x.form == WITH_ONE else 0)
    X_wide, Z_wide = (X + L - 1) // L * L, (sides.z.width + L - 1) // L * L
    x_step, divided = X + CHUNK, sides.out.form == DIVIDED
    state = first_line(w)  # (X, Z_wide)
    z_rows = state + X * Z_wide  # (CHUNK, Z_wide), as are the next
    o_rows = z_rows + CHUNK * Z_wide
    yt = o_rows + CHUNK * Z_wide  # (X_wide, CHUNK)
    y_rows = yt + CHUNK * X_wide  # (CHUNK, X_wide)
    sums = y_rows + (CHUNK + 1) * X_wide  # (CHUNK, X_wide), and in front of it the sum of y before the chunk
    den = sums + CHUNK * X_wide  # (CHUNK,)
    x_rows = den + CHUNK  # (CHUNK, X + CHUNK)
    for task in range(begin, stop):
        w[state:z_rows] = 0
        w[sums - X_wide : sums] = 0
        if not causal:
            for h in range(task * sides.y.heads, (task + 1) * sides.y.heads):
                for s in range(0, sides.y.length, CHUNK):
                    n = min(CHUNK, sides.y.length - s)
                    _read(y, sides.y, h, s, n, backwards, w, y_rows, X_wide)
                    _read(z, sides.z, h, s, n, backwards, w, z_rows, Z_wide)
                    product(w, y_rows, 1, X_wide, w, z_rows, Z_wide, w, state, Z_wide, n, X, Z_wide // L, True)
                    if divided:
                        _add_up(w, y_rows, n, X_wide, sums)
        for t in range(0, sides.x.length, CHUNK):
            n = min(CHUNK, sides.x.length - t)
            for i in range(sides.x.heads):
                h = task * sides.x.heads + i
                _read(x, sides.x, h, t, n, backwards, w, x_rows, x_step)
                if not causal:
                    product(w, x_rows, x_step, 1, w, state, Z_wide, w, o_rows, Z_wide, X, n, Z_wide // L, False)
                for j in range(sides.y.heads if causal else 0):
                    if i == 0 or sides.y.heads > 1:
                        _read(y, sides.y, task * sides.y.heads + j, t, n, backwards, w, y_rows, X_wide)
                        _read(z, sides.z, task * sides.y.heads + j, t, n, backwards, w, z_rows, Z_wide)
                        to_lanes(w, y_rows, X_wide, n, X, w, yt, CHUNK, T(1))
                        if divided:
                            _add_up(w, y_rows, n, X_wide, sums)
                    _weigh(w, x_rows, X, yt, state, o_rows, Z_wide, n, j == 0)
                    if i == sides.x.heads - 1:  # no head is left that wants the state as it was
                        product(w, y_rows, 1, X_wide, w, z_rows, Z_wide, w, state, Z_wide, n, X, Z_wide // L, True)
                if divided:
                    for r in range(n):
                        w[den + r] = _dot(w, x_rows + r * x_step, sums + (r if causal else -1) * X_wide, X)
                _write(w, o_rows, Z_wide, den, out, beside, sides.out, h, t, n, backwards)


@kernel(lambda T: void(*[T[::1]] * 4, int64, int64, int64))
def upstream(dout: Any, out: Any, den: Any, h: Any, E: Any, begin: Any, stop: Any) -> None:
    """h = (dout, -<dout, out>) / den, rows from `begin` to `stop`: the gradient of a numerator and its denominator."""
    L, nothing = lanes(h), zeros(h)
    for n in range(begin, stop):
        o, to = n * E, n * (E + 1)
        by, total = splat(den[n]), nothing
        for c in range(0, E, L):
            g = load_up_to(dout, o + c, E - c)
            total = fma(g, load_up_to(out, o + c, E - c), total)
            store_up_to(h, to + c, E - c, g / by if den[n] != 0 else nothing)
        h[to + E] = -sum_lanes(total) / den[n] if den[n] != 0 else 0
