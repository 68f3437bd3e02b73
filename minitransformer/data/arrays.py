"""Batches of rows of arrays, such as images with their labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from minitransformer.autograd import as_host
from minitransformer.checks import allocate
from minitransformer.data.batches import step_generator, whole
from minitransformer.errors import DataError, ShapeError

Batch = dict[str, npt.NDArray[Any]]


class ArrayDataset:
    """Arrays whose first axis is the row, under the names by which a model takes them.

    `ArrayDataset(pixels=images, labels=classes)` gives batches for `mt.VisionTransformer`. The arrays are kept, not
    copied. Raises `DTypeError` for what is no array, `ShapeError` for numbers of rows that differ, `DataError` for
    none at all.
    """

    def __init__(self, **arrays: Any) -> None:
        self.arrays = {name: as_host("ArrayDataset", array) for name, array in arrays.items()}
        rows = {array.shape[:1] for array in self.arrays.values()}
        if len(rows) > 1 or () in rows:
            found = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
            problem = f"the shapes are {found}, expected the same number of rows first"
            raise ShapeError("ArrayDataset", problem, "Give every array one row for each example")
        if not rows or (0,) in rows:
            raise DataError("ArrayDataset", "there are no rows", "Pass arrays that hold some, as pixels=images")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def source(self) -> dict[str, Any]:
        """What the arrays are, in JSON: a run keeps it, and refuses to resume on others."""
        return {
            name: {"shape": list(a.shape), "dtype": str(a.dtype), "crc32": crc32(np.ascontiguousarray(a).tobytes())}
            for name, a in self.arrays.items()
        }

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """`batch_size` rows drawn uniformly, the same ones of every array: a pure function of its arguments."""
        random = step_generator(seed, step)
        B = whole("batch", "batch_size", batch_size, 1)

        def draw() -> Batch:
            return self._rows(random.integers(len(self), size=B))

        row = 8 + sum(array[0].nbytes for array in self.arrays.values())  # with its number
        return allocate("batch", "a batch", (B, row), np.uint8, draw)

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """All rows once, in order; the last batch may have fewer."""
        B = whole("sequential", "batch_size", batch_size, 1)
        for first in range(0, len(self), B):
            yield self._rows(np.arange(first, min(first + B, len(self))))

    def _rows(self, rows: npt.NDArray[np.int64]) -> Batch:
        return {name: array[rows] for name, array in self.arrays.items()}
