"""The key/value cache of a decoder, allocated once."""

from __future__ import annotations

import numpy as np

from minitransformer.autograd import Tensor
from minitransformer.errors import RangeError, ShapeError
from minitransformer.nn.linear import check_size


class KVCache:
    """Keys and values of every token seen so far, per layer.

    `keys[i]`, `values[i]` are (B, K, capacity, D) arrays; slots [0, stored) are filled and hold the
    tokens at positions [length - stored, length). Layers write behind the filled slots; only the model
    moves on, once a forward pass, by `reserve` before and `advance` after it. Inference only: what is
    stored has no gradient.
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_width: int,
        dtype: np.dtype,
    ) -> None:
        check_size("KVCache", n_layer=n_layer, batch_size=batch_size, num_kv_heads=num_kv_heads)
        check_size("KVCache", capacity=capacity, head_width=head_width)
        shape = (batch_size, num_kv_heads, capacity, head_width)
        self.keys = [np.zeros(shape, dtype) for _ in range(n_layer)]
        self.values = [np.zeros(shape, dtype) for _ in range(n_layer)]
        self.capacity = capacity
        self.length = 0
        self.stored = 0

    def reserve(self, T: int, reach: int | None = None) -> None:
        """Make room for T more tokens, of which each looks back on at most `reach` earlier ones.

        With a `reach`, tokens nobody can see any more are dropped from the front.
        """
        if self.stored + T <= self.capacity:
            return
        keep = self.stored if reach is None else min(self.stored, reach)
        if keep + T > self.capacity:
            raise RangeError(
                "KVCache",
                f"{T} more tokens do not fit, {self.stored} of {self.capacity} slots are filled",
                "Make the cache with a larger capacity, or feed fewer tokens at once",
            )
        start = self.stored - keep
        for array in (*self.keys, *self.values):
            array[:, :, :keep] = array[:, :, start : self.stored].copy()
        self.stored = keep

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) behind what `layer` holds; returns all its keys and values, as views."""
        shape = self.keys[layer].shape
        end = self.stored + k.shape[2]
        if k.shape[:2] != shape[:2] or k.shape[3] != shape[3] or end > self.capacity:
            raise ShapeError(
                "KVCache",
                f"keys of shape {k.shape} do not fit behind {self.stored} tokens of a cache {shape}",
                "Make the cache with model.make_cache(batch_size) for this batch size",
            )
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store[:, :, self.stored : end] = new._data
        return Tensor(self.keys[layer][:, :, :end]), Tensor(self.values[layer][:, :, :end])

    def advance(self, T: int) -> None:
        """Count T tokens as seen, after all layers have stored them."""
        self.stored += T
        self.length += T
