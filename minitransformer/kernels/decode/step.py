"""What a decoding step asks for beside its arrays, and whether it all fits together."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_ as _is
from typing import Any, NamedTuple

import numpy as np

from minitransformer.errors import ConfigError, RangeError, ShapeError


class BlockWeights(NamedTuple):
    """The parameters of a block; linear ones as in `linear`, (out, in). Biases may be None, all else may not.

    C is the width, F that of the feed-forward network, K D the rows of keys, and of values, in `qkv`.
    """

    norm1: np.ndarray  # (C,)
    norm1_bias: np.ndarray | None
    qkv: np.ndarray  # (C + 2 K D, C): rows of the queries, keys and values
    qkv_bias: np.ndarray | None
    proj: np.ndarray  # (C, C), of the heads side by side
    proj_bias: np.ndarray | None
    norm2: np.ndarray  # (C,)
    norm2_bias: np.ndarray | None
    up: np.ndarray  # (F, C); (2 F, C) with swiglu, gate first
    up_bias: np.ndarray | None
    down: np.ndarray  # (C, F)
    down_bias: np.ndarray | None


def block_shapes(H: int, K: int, D: int, F: int, activation: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of `BlockWeights` for H heads of width D, K key heads and a feed-forward width of F."""
    C, rows = H * D, (H + 2 * K) * D
    up = 2 * F if activation == "swiglu" else F
    return (C,), (C,), (rows, C), (rows,), (C, C), (C,), (C,), (C,), (up, C), (up,), (C, F), (C,)


class Blocks:
    """The weights of a model's blocks for `step_blocks`, of one shape and dtype, checked once for many steps.

    A step reads the arrays as they then are. Those that are not contiguous or of another dtype are copied, so
    whoever keeps a `Blocks` asks `hold` before every step.
    """

    def __init__(
        self,
        weights: Sequence[BlockWeights],
        dtype: np.dtype,
        *,
        num_heads: int,
        num_kv_heads: int,
        norm: str = "layer",  # or "rms"
        eps: float = 1e-5,
        activation: str = "gelu_tanh",  # or "relu", "swiglu"
    ) -> None:
        """`ShapeError` or `ConfigError` for what does not fit together."""
        if norm not in ("layer", "rms") or activation not in ("gelu_tanh", "relu", "swiglu"):
            problem = f"norm is {norm!r} and activation {activation!r}, which are unknown here"
            raise ConfigError("step_blocks", problem, "Use those of Blocks")
        if not weights:
            raise ShapeError("step_blocks", "there are no blocks", "Pass the weights of at least one")
        self.H, self.K, self.norm, self.eps, self.activation = num_heads, num_kv_heads, norm, float(eps), activation
        C, self.F = weights[0].norm1.shape[-1], weights[0].down.shape[-1]
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads or C % num_heads or C == 0:
            problem = f"{num_heads} heads of a width of {C} cannot share {num_kv_heads} key heads evenly"
            raise ShapeError("step_blocks", problem, "Change the number of heads")
        self.D = C // num_heads
        expected = block_shapes(num_heads, num_kv_heads, self.D, self.F, activation)
        ready = []
        for block in weights:
            for name, array, shape in zip(BlockWeights._fields, block, expected, strict=True):
                if array is None and name.endswith("bias"):
                    continue
                if array is None or array.shape != shape:
                    problem = f"{name} has shape {None if array is None else array.shape}, expected {shape}"
                    raise ShapeError("step_blocks", problem, "Pass the weights of this model")
            own: Any = (None if w is None else np.require(w, dtype, ["C", "A", "W"]) for w in block)
            ready.append(BlockWeights(*own))
        self.weights, self.dtype = tuple(ready), np.dtype(dtype)
        self._given = [array for block in weights for array in block]
        arrays = [array for block in ready for array in block]
        self._whole = all(a is b for a, b in zip(arrays, self._given, strict=True))
        self.anchor, self.table = _places(arrays, len(ready))

    def __reduce__(self) -> Any:
        """A copy has other arrays in other places."""
        settings = self.H, self.K, self.norm, self.eps, self.activation
        return _make_blocks, (self.weights, self.dtype, *settings)

    def hold(self, arrays: Sequence[np.ndarray | None]) -> bool:
        """Whether these are the very arrays that a step would read."""
        return self._whole and len(arrays) == len(self._given) and all(map(_is, arrays, self._given))


def _make_blocks(weights: Any, dtype: np.dtype, H: int, K: int, norm: str, eps: float, activation: str) -> Blocks:
    return Blocks(weights, dtype, num_heads=H, num_kv_heads=K, norm=norm, eps=eps, activation=activation)


NOWHERE = -1  # in the table, for an array that there is not


def _places(arrays: Sequence[np.ndarray | None], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The array at the lowest address, flat, and how many numbers behind it each begins, in `rows` rows.

    A kernel gets to all arrays from one: as many arguments as arrays would take as long as the arithmetic.
    """
    addresses = [None if a is None else a.__array_interface__["data"][0] for a in arrays]
    anchor = min((a for a in arrays if a is not None), key=lambda a: a.__array_interface__["data"][0])
    origin = anchor.__array_interface__["data"][0]
    table = [NOWHERE if a is None else (a - origin) // anchor.itemsize for a in addresses]
    return anchor.reshape(-1), np.array(table, np.int64).reshape(rows, -1)


class Step(NamedTuple):
    """What changes from step to step: the new token of each row is at slot `stored`."""

    stored: int
    reach: int | None = None  # how many keys before its own a token sees, None for all
    visible: np.ndarray | None = None  # (B, stored + 1) bool: keys that are not padding
    slopes: np.ndarray | None = None  # (H,) float64, of ALiBi
    rotation: tuple[np.ndarray, np.ndarray] | None = None  # cosines and sines (B, D / 2)


def check(x: np.ndarray, blocks: Blocks, keys: np.ndarray, values: np.ndarray, step: Step) -> None:
    """`ShapeError` or `RangeError` if anything would be read or written out of place."""
    B = len(x) if x.ndim else 0
    S, D = step.stored + 1, blocks.D
    capacity = keys.shape[3] if keys.ndim == 5 else 0
    pairs = [
        (x, (B, blocks.H * D)),
        (keys, (len(blocks.weights), B, blocks.K, capacity, D)),
        (values, keys.shape),
        (step.visible, (B, S)),
        (step.slopes, (blocks.H,)),
    ]
    pairs += [(part, (B, D // 2)) for part in step.rotation or ()]
    for array, shape in pairs:
        if array is not None and array.shape != shape:
            problem = f"got an array of shape {array.shape}, expected {shape}"
            raise ShapeError("step_blocks", problem, "Pass what Blocks and Step say")
    if not 0 <= step.stored < capacity:
        raise RangeError("step_blocks", f"slot {step.stored} is not in a cache of {capacity}", "Make the cache larger")
    if step.rotation is not None and D % 2:
        raise ShapeError("step_blocks", f"heads of width {D} cannot be rotated in pairs", "Use an even width")
