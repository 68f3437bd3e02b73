"""The key/value cache of a decoder, allocated once."""

from __future__ import annotations

import numpy as np

from minitransformer.autograd import Tensor, as_array, cast, check_arrays, check_dtype
from minitransformer.checks import allocate, check_count, check_size, shown
from minitransformer.errors import RangeError, ShapeError


class KVCache:
    """Keys and values of every token seen so far, per layer.

    `keys`, `values` are (n_layer, B, K, capacity, D) arrays; slots [0, stored) are filled and hold the
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
        dtype = check_dtype("KVCache", dtype)

        def make() -> np.ndarray:
            return np.zeros((2, n_layer, *shape), dtype)

        self.keys, self.values = allocate("KVCache", "keys and values", (2, n_layer, *shape), dtype, make)
        self.capacity = capacity
        self.length = 0
        self.stored = 0

    def reserve(self, T: int, reach: int | None = None) -> None:
        """Make room for T more tokens, of which each looks back on at most `reach` earlier ones.

        With a `reach`, tokens nobody can see any more are dropped from the front.
        """
        check_count("KVCache.reserve", "T", T)
        if self.stored + T <= self.capacity:
            return
        if reach is not None:
            check_count("KVCache.reserve", "reach", reach)
        keep = self.stored if reach is None else min(self.stored, reach)
        if keep + T > self.capacity:
            raise RangeError(
                "KVCache",
                f"{T} more tokens do not fit, {self.stored} of {self.capacity} slots are filled",
                "Make the cache with a larger capacity, or feed fewer tokens at once",
            )
        start = self.stored - keep
        for array in (self.keys, self.values):
            array[..., :keep, :] = array[..., start : self.stored, :].copy()
        self.stored = keep

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) behind what `layer` holds; returns all its keys and values, as views."""
        if check_count("KVCache.append", "layer", layer) >= len(self.keys):
            problem = f"layer is {shown(layer)}, expected 0 to {len(self.keys) - 1}"
            raise RangeError("KVCache.append", problem, "Make the cache for as many layers as the model has")
        new_k, new_v = as_array("KVCache.append", k), as_array("KVCache.append", v)
        check_arrays("KVCache.append", k=new_k, v=new_v)
        shape = self.keys[layer].shape
        if new_k.ndim != 4 or new_k.shape != new_v.shape:
            problem = f"k and v have shapes {new_k.shape} and {new_v.shape}, expected one (B, K, T, D)"
            raise ShapeError("KVCache", problem, "Split the heads first")
        end = self.stored + new_k.shape[2]
        if new_k.shape[:2] != shape[:2] or new_k.shape[3] != shape[3] or end > self.capacity:
            raise ShapeError(
                "KVCache",
                f"keys of shape {new_k.shape} do not fit behind {self.stored} tokens of a cache {shape}",
                "Make the cache with model.make_cache(batch_size) for this batch size",
            )
        for store, new in ((self.keys[layer], new_k), (self.values[layer], new_v)):
            store[:, :, self.stored : end] = cast("KVCache.append", new, store.dtype)
        return Tensor(self.keys[layer][:, :, :end]), Tensor(self.values[layer][:, :, :end])

    def advance(self, T: int) -> None:
        """Count T tokens as seen, after all layers have stored them."""
        if check_count("KVCache.advance", "T", T) > self.capacity - self.stored:
            problem = f"{T} more tokens do not fit, {self.stored} of {self.capacity} slots are filled"
            raise RangeError("KVCache", problem, "Call reserve first")
        self.stored += T
        self.length += T
