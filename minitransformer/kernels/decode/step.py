"""What a decoding step asks for beside its arrays, and whether it all fits together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
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


class HeadWeights(NamedTuple):
    """The parameters between the last block and the logits of V tokens. The norm is of the blocks' kind."""

    norm: np.ndarray  # (C,)
    norm_bias: np.ndarray | None
    head: np.ndarray  # (V, C)


def block_shapes(H: int, K: int, D: int, F: int, activation: str) -> tuple[tuple[int, ...], ...]:
    """The shapes of `BlockWeights` for H heads of width D, K key heads and a feed-forward width of F."""
    C, rows = H * D, (H + 2 * K) * D
    up = 2 * F if activation == "swiglu" else F
    return (C,), (C,), (rows, C), (rows,), (C, C), (C,), (C,), (C,), (up, C), (up,), (C, F), (C,)


class Weights:
    """The weights of a model for `next_logits`, its blocks of one shape, all of one dtype: checked once for many steps.

    Arrays that are contiguous and of that dtype are read as they are at each step, others are copied now.
    """

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        head: HeadWeights,
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
            raise ConfigError("next_logits", problem, "Use those of Weights")
        if not blocks:
            raise ShapeError("next_logits", "there are no blocks", "Pass the weights of at least one")
        self.H, self.K, self.norm, self.eps, self.activation = num_heads, num_kv_heads, norm, float(eps), activation
        C, self.F, self.V = blocks[0].norm1.shape[-1], blocks[0].down.shape[-1], len(head.head)
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads or C % num_heads or C == 0:
            problem = f"{num_heads} heads of a width of {C} cannot share {num_kv_heads} key heads evenly"
            raise ShapeError("next_logits", problem, "Change the number of heads")
        self.D, self.dtype = C // num_heads, np.dtype(dtype)
        expected = block_shapes(num_heads, num_kv_heads, self.D, self.F, activation)
        self.blocks = tuple(BlockWeights(*self._ready(block, expected)) for block in blocks)
        self.head = HeadWeights(*self._ready(head, ((C,), (C,), (self.V, C))))
        arrays = [array for group in (*self.blocks, self.head) for array in group]
        self.anchor, places = _places(arrays)
        last = len(HeadWeights._fields)
        self.table, self.ends = places[:-last].reshape(len(blocks), -1), places[-last:]

    def _ready(self, weights: Any, shapes: Sequence[tuple[int, ...]]) -> Iterator[Any]:
        """The arrays as the kernel wants them."""
        for name, array, shape in zip(weights._fields, weights, shapes, strict=True):
            if array is None and name.endswith("bias"):
                yield None
            elif array is None or array.shape != shape:
                problem = f"{name} has shape {None if array is None else array.shape}, expected {shape}"
                raise ShapeError("next_logits", problem, "Pass the weights of this model")
            elif array.flags.carray and array.dtype == self.dtype:
                yield array
            else:
                yield np.require(array, self.dtype, ["C", "A", "W"])

    def __reduce__(self) -> Any:
        """A copy has other arrays in other places."""
        settings = self.H, self.K, self.norm, self.eps, self.activation
        return _make_weights, (self.blocks, self.head, self.dtype, *settings)


def _make_weights(
    blocks: Any, head: HeadWeights, dtype: np.dtype, H: int, K: int, norm: str, eps: float, activation: str
) -> Weights:
    return Weights(blocks, head, dtype, num_heads=H, num_kv_heads=K, norm=norm, eps=eps, activation=activation)


NOWHERE = -1  # in the table, for an array that there is not


def _places(arrays: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """The array at the lowest address, flat, and how many numbers behind it each begins.

    A kernel gets to all arrays from one: as many arguments as arrays would take as long as the arithmetic.
    """
    addresses = [None if a is None else a.__array_interface__["data"][0] for a in arrays]
    origin, anchor = min(((p, a) for p, a in zip(addresses, arrays, strict=True) if a is not None), key=itemgetter(0))
    places = [NOWHERE if p is None else (p - origin) // anchor.itemsize for p in addresses]
    return anchor.reshape(-1), np.array(places, np.int64)


class Step(NamedTuple):
    """What changes from step to step: the new token of each row is at slot `stored`."""

    stored: int
    reach: int | None = None  # how many keys before its own a token sees, None for all
    visible: np.ndarray | None = None  # (B, stored + 1) bool: keys that are not padding
    slopes: np.ndarray | None = None  # (H,) float64, of ALiBi
    rotation: tuple[np.ndarray, np.ndarray] | None = None  # cosines and sines (B, D / 2)


def check(x: np.ndarray, weights: Weights, keys: np.ndarray, values: np.ndarray, step: Step) -> None:
    """`ShapeError` or `RangeError` if anything would be read or written out of place."""
    B = len(x) if x.ndim else 0
    S, D = step.stored + 1, weights.D
    capacity = keys.shape[3] if keys.ndim == 5 else 0
    pairs = [
        (x, (B, weights.H * D)),
        (keys, (len(weights.blocks), B, weights.K, capacity, D)),
        (values, keys.shape),
        (step.visible, (B, S)),
        (step.slopes, (weights.H,)),
    ]
    pairs += [(part, (B, D // 2)) for part in step.rotation or ()]
    for array, shape in pairs:
        if array is not None and array.shape != shape:
            problem = f"got an array of shape {array.shape}, expected {shape}"
            raise ShapeError("next_logits", problem, "Pass what Weights and Step say")
    if not 0 <= step.stored < capacity:
        raise RangeError("next_logits", f"slot {step.stored} is not in a cache of {capacity}", "Make the cache larger")
    if step.rotation is not None and D % 2:
        raise ShapeError("next_logits", f"heads of width {D} cannot be rotated in pairs", "Use an even width")
