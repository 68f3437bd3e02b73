"""What a decoding step asks for beside its arrays, and whether it all fits together."""

from __future__ import annotations

from typing import NamedTuple

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


class Step(NamedTuple):
    """The static part: the new token of each row is at slot `stored`."""

    num_heads: int
    stored: int
    norm: str = "layer"  # or "rms"
    eps: float = 1e-5
    activation: str = "gelu_tanh"  # or "relu", "swiglu"
    reach: int | None = None  # how many keys before its own a token sees, None for all
    visible: np.ndarray | None = None  # (B, stored + 1) bool: keys that are not padding
    slopes: np.ndarray | None = None  # (H,) float64, of ALiBi
    rotation: tuple[np.ndarray, np.ndarray] | None = None  # cosines and sines (B, D / 2)


def check(
    x: np.ndarray, weights: BlockWeights, keys: np.ndarray, values: np.ndarray, step: Step
) -> tuple[int, int, int]:
    """(H, K, D), or `ShapeError`, `RangeError` or `ConfigError` if anything would be read or written out of place."""
    H = step.num_heads
    if step.norm not in ("layer", "rms") or step.activation not in ("gelu_tanh", "relu", "swiglu"):
        problem = f"norm is {step.norm!r} and activation {step.activation!r}, which are unknown here"
        raise ConfigError("block_step", problem, "Use those of Step")
    if x.ndim != 2 or keys.ndim != 4 or H < 1 or x.shape[1] % H or x.shape[1] == 0:
        problem = f"x has shape {x.shape}, keys {keys.shape}, expected (B, C) and (B, K, capacity, D) for {H} heads"
        raise ShapeError("block_step", problem, "Pass rows and a cache of this model")
    B, C = x.shape
    K, capacity, D = keys.shape[1], keys.shape[2], C // H
    expected = block_shapes(H, K, D, weights.down.shape[-1], step.activation)
    pairs = [*zip(weights, expected, strict=True), (keys, (B, K, capacity, D)), (values, keys.shape)]
    S = step.stored + 1
    pairs += [(step.visible, (B, S)), (step.slopes, (H,))]
    pairs += [(part, (B, D // 2)) for part in step.rotation or ()]
    for array, shape in pairs:
        if array is not None and array.shape != shape:
            raise ShapeError(
                "block_step", f"got an array of shape {array.shape}, expected {shape}", "Pass what Weights and Step say"
            )
    if K < 1 or H % K:
        raise ShapeError("block_step", f"{H} heads cannot share {K} key heads evenly", "Change the cache")
    if not 0 <= step.stored < capacity:
        raise RangeError("block_step", f"slot {step.stored} is not in a cache of {capacity}", "Make the cache larger")
    if step.rotation is not None and D % 2:
        raise ShapeError("block_step", f"heads of width {D} cannot be rotated in pairs", "Use an even width")
    return H, K, D
