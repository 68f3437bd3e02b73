"""Products of tiles, which all of attention's GPU kernels are made of.

A block of threads owns the `rows` of a tile of scores and goes over its `columns`, tile by tile. In a forward, rows
are queries and columns keys; where a block owns keys, it is the other way round. A thread has a few rows and a few
columns, whose numbers are in its registers. What is multiplied lies in shared memory, transposed, so that each thread
reads its rows, and its columns, side by side: 16 bytes at once. Reading is unsigned for that, as an index that may be
negative is split up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

U = np.uint64  # an index

_TOGETHER = 8  # numbers of one row that threads side by side read: 32 bytes, stored transposed without conflicts
_WIDE = 16  # bytes
_LOADS = 8  # of a thread under way at once
FEW = 16  # rows of a small tile


class Tile(NamedTuple):
    """How a block divides its work; rows x depth, columns x depth and columns x width are multiples of `threads`."""

    rows: int
    columns: int
    depth: int  # of the heads of queries, keys and their like: so much is in shared memory at once
    width: int  # of what a block adds up, values or gradients
    threads: int
    across: int  # threads that share a row, a power of 2

    @property
    def own(self) -> tuple[int, int, int]:
        """Rows, columns and width of one thread."""
        return self.rows * self.across // self.threads, self.columns // self.across, self.width // self.across

    def pitches(self, itemsize: int) -> tuple[int, int]:
        """How far apart transposed rows and columns lie: some further than need be, against bank conflicts."""
        return self.rows + _WIDE // itemsize, self.columns + _WIDE // itemsize

    def shared(self, itemsize: int) -> tuple[int, int, int, int]:
        """The sizes of shared memory for transposed rows and columns, weights, and what they are multiplied with."""
        row_pitch, column_pitch = self.pitches(itemsize)
        return self.depth * row_pitch, self.depth * column_pitch, self.columns * row_pitch, self.columns * self.width


# In the simulator an access to memory takes some 10 us.
_TOY = Tile(rows=8, columns=4, depth=4, width=4, threads=8, across=2)


def forward_tile(dtype: np.dtype, rows: int, heads: int, width: int, plain: bool, simulated: bool) -> Tile:
    """For so many rows, heads so wide and values so wide, without or with rules that change single cells.

    These tiles leave everything in registers and 48 KiB of shared memory; they were not chosen by time.
    """
    if simulated:
        return _TOY
    few, double = rows <= FEW, dtype.itemsize == 8
    width = _padded(width, 64 if double else 128)
    if few or double:
        return Tile(16 if few else 32, 32, 16 if double else 32, width, 64, 8)
    resident = heads <= 64 and width <= 64
    return Tile(64, 32, _padded(heads, 64) if resident else 32, width, 64 if resident and plain else 128, 8)


def backward_tile(dtype: np.dtype, width: int, plain: bool, simulated: bool) -> Tile:
    """For heads and values of at most that width."""
    if simulated:
        return _TOY
    if dtype.itemsize == 8:
        return Tile(32, 32, 16, _padded(width, 64), 128, 8)
    narrow = plain and width <= 64
    return Tile(64, 32, 16 if width <= 16 else 32, _padded(width, 128), 128 if narrow else 256, 8 if narrow else 16)


def _padded(width: int, most: int) -> int:
    """The least width of a tile that has room for that one, up to `most`."""
    return next((n for n in (16, 32, 64, 128) if width <= n < most), most)


class Products(NamedTuple):
    """Device functions of a tile. Arrays named a, b, w and z are shared, s and o a thread's own."""

    transpose_rows: Any  # (a, x, places, start, width, factor)
    load_columns: Any  # (z, y, place, step, count, start, width)
    multiply: Any  # (s, a, b, x, places, y, place, step, count, end, factor, column_factor, loaded)
    put: Any  # (w, s)
    accumulate: Any  # (o, w, z)
    column_of: Any  # (i) -> the column of the i-th of a thread's numbers of a row of o
    block_of: Any  # (sizes) -> first row, rows there are, key head and batch row of a block that owns queries
    find_rows: Any  # (places, heads, queries, layout, first, total, b, kh, sizes): where those queries are
    span_together: Any  # (firsts, ends) -> columns that any of the rows has, and those that all have: two intervals


def products(cuda: Any, T: Any, tile: Tile) -> Products:
    """Those functions for Numba's type T."""
    rows, columns, depth, width, threads, across = tile
    own_rows, own_columns, own_width = tile.own
    row_pitch, column_pitch = tile.pitches(T.bitwidth // 8)
    together, side = min(_TOGETHER, depth), min(own_width, _WIDE * 8 // T.bitwidth)
    row_cells, column_cells, plain_cells = rows * depth, columns * depth, columns * width
    row_loads, column_loads, plain_loads = (min(n // threads, _LOADS) for n in (row_cells, column_cells, plain_cells))
    zero = T(0)

    @cuda.jit(device=True, forceinline=True)
    def transpose_rows(a: Any, x: Any, places: Any, start: Any, end: Any, factor: Any) -> None:
        """a[d, r] = factor x[places[r] + start + d], 0 from start + d = `end` on."""
        for first in range(cuda.threadIdx.x, row_cells, threads * row_loads):
            for i in range(row_loads):
                n = first + i * threads
                r, d = n // together % rows, n // (together * rows) * together + n % together
                number = zero
                if start + d < end:
                    number = x[U(places[U(r)] + start + d)] * factor
                a[U(d * row_pitch + r)] = number

    @cuda.jit(device=True, forceinline=True)
    def transpose_columns(b: Any, y: Any, place: Any, step: Any, count: Any, start: Any, end: Any, factor: Any) -> None:
        """b[d, c] = factor y[place + c step + start + d], 0 from c = `count` and from start + d = `end` on."""
        for first in range(cuda.threadIdx.x, column_cells, threads * column_loads):
            for i in range(column_loads):
                n = first + i * threads
                c, d = n // together % columns, n // (together * columns) * together + n % together
                number = zero
                if c < count and start + d < end:
                    number = y[U(place + c * step + start + d)] * factor
                b[U(d * column_pitch + c)] = number

    @cuda.jit(device=True, forceinline=True)
    def load_columns(z: Any, y: Any, place: Any, step: Any, count: Any, start: Any, end: Any) -> None:
        """z[c, d] = y[place + c step + start + d], with the same zeros."""
        for first in range(cuda.threadIdx.x, plain_cells, threads * plain_loads):
            for i in range(plain_loads):
                n = first + i * threads
                c, d = n // width, n % width
                number = zero
                if c < count and start + d < end:
                    number = y[U(place + c * step + start + d)]
                z[U(n)] = number

    @cuda.jit(device=True, forceinline=True)
    def multiply(
        s: Any,
        a: Any,
        b: Any,
        x: Any,
        places: Any,
        y: Any,
        place: Any,
        step: Any,
        count: Any,
        end: Any,
        factor: Any,
        column_factor: Any,
        loaded: Any,
    ) -> None:
        """s = (factor X) (column_factor Y)^T for rows X and columns Y of width `end`; the rows may be in `a` already.

        All threads must have done with `a` and `b` before.
        """
        row, column = cuda.threadIdx.x // across * own_rows, cuda.threadIdx.x % across * own_columns
        left, right = cuda.local.array(own_rows, T), cuda.local.array(own_columns, T)
        for i in range(own_rows * own_columns):
            s[i] = zero
        for start in range(0, end, depth):
            if start > 0:
                cuda.syncthreads()
            if not loaded:
                transpose_rows(a, x, places, start, end, factor)
            transpose_columns(b, y, place, step, count, start, end, column_factor)
            cuda.syncthreads()
            for d in range(depth):
                for i in range(own_rows):
                    left[i] = a[U(d * row_pitch + row + i)]
                for j in range(own_columns):
                    right[j] = b[U(d * column_pitch + column + j)]
                for i in range(own_rows):
                    for j in range(own_columns):
                        s[i * own_columns + j] += left[i] * right[j]

    @cuda.jit(device=True, forceinline=True)
    def put(w: Any, s: Any) -> None:
        """w[c, r] = s[r, c]"""
        row, column = cuda.threadIdx.x // across * own_rows, cuda.threadIdx.x % across * own_columns
        for j in range(own_columns):
            for i in range(own_rows):
                w[U((column + j) * row_pitch + row + i)] = s[i * own_columns + j]

    @cuda.jit(device=True, forceinline=True)
    def column_of(i: Any) -> Any:
        """Those of a thread are in groups that it reads at once, side by side with those of its neighbours."""
        return i // side * (side * across) + cuda.threadIdx.x % across * side + i % side

    @cuda.jit(device=True, forceinline=True)
    def accumulate(o: Any, w: Any, z: Any) -> None:
        """o[r, d] += sum_c w[c, r] z[c, d]"""
        row = cuda.threadIdx.x // across * own_rows
        left, right = cuda.local.array(own_rows, T), cuda.local.array(own_width, T)
        for c in range(columns):
            for i in range(own_rows):
                left[i] = w[U(c * row_pitch + row + i)]
            for j in range(own_width):
                right[j] = z[U(c * width + column_of(j))]
            for i in range(own_rows):
                for j in range(own_width):
                    o[i * own_width + j] += left[i] * right[j]

    @cuda.jit(device=True, forceinline=True)
    def block_of(sizes: Any) -> Any:
        total = sizes.H // sizes.K * sizes.T
        tiles = (total + rows - 1) // rows
        first = (tiles - 1 - cuda.blockIdx.x % tiles) * rows  # those with the most keys before them come first
        line = cuda.blockIdx.x // tiles
        return first, total, line % sizes.K, line // sizes.K

    @cuda.jit(device=True, forceinline=True)
    def find_rows(
        places: Any, heads: Any, queries: Any, at: Any, first: Any, total: Any, b: Any, kh: Any, sizes: Any
    ) -> None:
        for r in range(cuda.threadIdx.x, rows, threads):
            n = min(first + r, total - 1)  # a tile is full, if need be of its last row
            h, t = kh * (sizes.H // sizes.K) + n // sizes.T, n % sizes.T
            heads[U(r)], queries[U(r)] = h, t
            places[U(r)] = b * at.batch + h * at.head + t * at.step

    @cuda.jit(device=True, forceinline=True)
    def span_together(firsts: Any, ends: Any) -> Any:
        low, high = firsts[U(0)], ends[U(0)]
        inner_low, inner_high = low, high
        for r in range(1, rows):
            first, end = firsts[U(r)], ends[U(r)]
            if first < end:
                low, high = min(low, first), max(high, end)
            inner_low, inner_high = max(inner_low, first), min(inner_high, end)
        return low, high, inner_low, inner_high

    return Products(
        transpose_rows, load_columns, multiply, put, accumulate, column_of, block_of, find_rows, span_together
    )
