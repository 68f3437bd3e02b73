"""The logits of the next token, from the cache as long as positions allow."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from minitransformer.kernels.gpu.arrays import to_host


class Stepper:
    """A model in the middle of `total` tokens of B rows."""

    def __init__(self, model: Any, B: int, total: int, use_cache: bool) -> None:
        config = model.config
        self.model, self.block_size, self.slides = model, config.block_size, config.slides
        self.warned = False
        capacity = total if self.slides else min(total, self.block_size)
        self.cache = model.make_cache(B, capacity) if use_cache and B else None
        make_steps = getattr(model, "steps", None)
        self.steps = None if self.cache is None or make_steps is None else make_steps(self.cache)

    def logits(self, ids: np.ndarray, real: np.ndarray | None) -> np.ndarray:
        """(B, V), on the host, for the token after `ids` (B, T); `real` marks what is not padding."""
        T = ids.shape[1]
        if self.block_size < T and not self.slides:
            if not self.warned:
                warnings.warn(
                    f"generate: past block_size {self.block_size} the last {self.block_size} tokens are read again "
                    "for every new one, because their positions are absolute",
                    stacklevel=4,
                )
            self.cache, self.warned = None, True
            ids, real = ids[:, -self.block_size :], None if real is None else real[:, -self.block_size :]
        if self.cache is None:
            return to_host(self.model(ids, attention_mask=real).logits.data[:, -1])
        if self.steps is not None and self.cache.length == T - 1:
            return self.steps(ids[:, -1], real)
        out = None
        while self.cache.length < T:  # one token, or the prompt in pieces of at most block_size
            end = min(T, self.cache.length + self.block_size)
            piece = ids[:, self.cache.length : end]
            out = self.model(piece, attention_mask=None if real is None else real[:, :end], cache=self.cache)
        assert out is not None
        return to_host(out.logits.data[:, -1])

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows (B,), each a continuation of what the row it names has read."""
        if self.cache is not None:
            self.cache.select(rows)
