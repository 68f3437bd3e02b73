"""Rows of tokens with what is known of each: examples to classify, questions with their answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.autograd import as_array
from minitransformer.checks import allocate, shown
from minitransformer.data.batches import Batch, step_generator, whole
from minitransformer.errors import DataError, DTypeError, ShapeError


class RowDataset:
    """Rows of token ids (N, T) with further arrays (N, ...) that the model is called with for each row.

    `RowDataset(ids, attention_mask=mask, labels=labels)` gives batches with these names. All are integers or bools,
    kept and not copied. `source` says in JSON where they come from: a run keeps it, and refuses to resume on other
    data. Raises `ShapeError`, `DTypeError` or `DataError` (no tokens) for arrays that cannot serve.
    """

    def __init__(self, input_ids: Any, *, source: dict[str, Any] | None = None, **arrays: Any) -> None:
        op = "RowDataset"
        if source is not None and not isinstance(source, dict):
            raise DTypeError(op, f"source is {shown(source)}, expected a dict", "Leave it out")
        self.source = source
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        for name, given in {"input_ids": input_ids, **arrays}.items():
            array = np.asarray(as_array(op, given))
            if array.dtype.kind not in "biu":
                problem = f"{name} have dtype {array.dtype}, expected integers"
                raise DTypeError(op, problem, "Encode text with a tokenizer, and number the classes")
            self.arrays[name] = array
        ids = self.arrays["input_ids"]
        if ids.ndim != 2:
            raise ShapeError(op, f"input_ids have shape {ids.shape}, expected (rows, length)", "Pad all to one length")
        if not ids.size:
            raise DataError(op, f"input_ids hold no tokens, shape {ids.shape}", "Give at least one row")
        for name, array in self.arrays.items():
            if array.shape[:1] != ids.shape[:1]:
                problem = f"{name} have shape {array.shape}, expected {len(ids)} rows as input_ids have"
                raise ShapeError(op, problem, "Give one entry for each row")
        self.block_size = ids.shape[1]

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """`batch_size` rows drawn uniformly, one perhaps twice: a pure function of its arguments."""
        random = step_generator(seed, step)
        B = whole("batch", "batch_size", batch_size, 1)

        def draw() -> Batch:
            return self._rows(random.integers(len(self.arrays["input_ids"]), size=B))

        return allocate("batch", "a batch", (2, B, self.block_size), np.int64, draw)  # as they are, and as int64

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """All rows in order, for evaluation; the last batch may have fewer."""
        B = whole("sequential", "batch_size", batch_size, 1)
        for first in range(0, len(self.arrays["input_ids"]), B):
            yield self._rows(slice(first, first + B))

    def _rows(self, which: Any) -> Batch:
        return {name: array[which].astype(np.int64) for name, array in self.arrays.items()}
