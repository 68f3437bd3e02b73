"""What a decoder keeps of the tokens it has read, and of the memory it attends to."""

from __future__ import annotations

import numpy as np

from minitransformer.autograd import Tensor, as_array, as_host, cast, check_arrays, check_dtype
from minitransformer.checks import allocate, check_count, check_size, shown
from minitransformer.errors import DTypeError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import check_device, like, move


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
        device: str = "cpu",
    ) -> None:
        check_device("KVCache", device)
        check_size("KVCache", n_layer=n_layer, batch_size=batch_size, num_kv_heads=num_kv_heads)
        check_size("KVCache", capacity=capacity, head_width=head_width)
        shape = (batch_size, num_kv_heads, capacity, head_width)
        dtype = check_dtype("KVCache", dtype)

        def make() -> np.ndarray:
            return move(np.zeros((2, n_layer, *shape), dtype), device)

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
        checked_layer("KVCache.append", layer, len(self.keys))
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

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows of the batch (B,), some perhaps twice and others not at all: a step of beam search."""
        rows = like(self.keys, checked_rows("KVCache.select", rows, self.keys.shape[1]))
        for array in (self.keys, self.values):
            array[..., : self.stored, :] = array[:, rows, :, : self.stored]

    def advance(self, T: int) -> None:
        """Count T tokens as seen, after all layers have stored them."""
        if check_count("KVCache.advance", "T", T) > self.capacity - self.stored:
            problem = f"{T} more tokens do not fit, {self.stored} of {self.capacity} slots are filled"
            raise RangeError("KVCache", problem, "Call reserve first")
        self.stored += T
        self.length += T


class MemoryCache:
    """Keys and values (B, K, S, D) of an encoder's output for each layer that attends to it, made once.

    Inference only: what is stored has no gradient.
    """

    def __init__(self, n_layer: int) -> None:
        check_size("MemoryCache", n_layer=n_layer)
        self._pairs: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Those of `layer`, None before they were made."""
        return self._pairs[checked_layer("MemoryCache", layer, len(self._pairs))]

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        arrays = as_array("MemoryCache.keep", k), as_array("MemoryCache.keep", v)
        check_arrays("MemoryCache.keep", k=arrays[0], v=arrays[1])
        self._pairs[checked_layer("MemoryCache", layer, len(self._pairs))] = Tensor(arrays[0]), Tensor(arrays[1])


class DecoderCache:
    """The cache of a decoder with attention to an encoder: `own` of its tokens, `memory` of the encoder's."""

    def __init__(self, own: KVCache) -> None:
        if not isinstance(own, KVCache):
            raise DTypeError("DecoderCache", f"own is {shown(own)}, expected a KVCache", "Make it with make_cache")
        self.own, self.memory = own, MemoryCache(len(own.keys))

    @property
    def length(self) -> int:
        """How many tokens of the decoder were read."""
        return self.own.length

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows (B,) of the decoder's tokens; each must have the memory of the row it replaces."""
        self.own.select(rows)


def checked_rows(op: str, rows: np.ndarray, B: int) -> np.ndarray:
    """`rows` (B,) as integers from 0 to B - 1."""
    rows = as_host(op, rows)
    if rows.dtype.kind not in "iu" or rows.shape != (B,):
        problem = f"rows have shape {rows.shape} and dtype {rows.dtype}, expected ({B},) integers"
        raise ShapeError(op, problem, "Give one row of the cache for each of its rows")
    if B and not 0 <= rows.min() <= rows.max() < B:
        problem = f"rows are {shown(rows.tolist())}, expected 0 to {B - 1}"
        raise RangeError(op, problem, "Count the rows of the cache from 0")
    return rows


def checked_layer(op: str, layer: int, n_layer: int) -> int:
    if check_count(op, "layer", layer) >= n_layer:
        problem = f"layer is {shown(layer)}, expected 0 to {n_layer - 1}"
        raise RangeError(op, problem, "Make the cache for as many layers as the model has")
    return layer
