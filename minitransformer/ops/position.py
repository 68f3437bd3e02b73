"""Positions: rotary embedding as an op, sinusoids and ALiBi slopes as tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minitransformer.autograd import register
from minitransformer.checks import allocate, check_choice, check_number, check_size
from minitransformer.errors import ConfigError, DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import is_array, like, to_host
from minitransformer.ops.activation import check_float


class Rotation(NamedTuple):
    cos: np.ndarray  # broadcastable to (..., T, D/2)
    sin: np.ndarray
    layout: str


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str) -> np.ndarray:
    """Each pair (x1, x2) turned by its angle: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    first, second = (np.s_[..., :half], np.s_[..., half:]) if layout == "half" else (np.s_[..., ::2], np.s_[..., 1::2])
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[second] * cos + x[first] * sin
    return out


def angles(positions: np.ndarray, D: int, dtype: np.dtype, base: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of `positions` (T,) or (B, T) for heads of width D: (T, D/2) or (B, 1, T, D/2)."""
    frequencies = float(base) ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    turned = positions[..., None] * frequencies
    if positions.ndim == 2:
        turned = turned[:, None]
    return np.cos(turned).astype(dtype), np.sin(turned).astype(dtype)


def rope_forward(
    x: np.ndarray, positions: np.ndarray, *, base: float = 10000.0, layout: str = "half"
) -> tuple[np.ndarray, Rotation]:
    """Rotary position embedding (Su et al. 2021): pair i of D/2 turns by position * base^(-2i/D).

    x (B, H, T, D) with even D; integer positions (T,) or (B, T). "half" pairs element i with i + D/2
    (Llama's files in Hugging Face format), "interleaved" pairs 2i with 2i + 1 (the paper).
    """
    check_float("apply_rope", x=x)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ShapeError("apply_rope", f"x has shape {x.shape}, expected (B, H, T, D) with even D", "Split heads first")
    check_choice("apply_rope", "layout", layout, ("half", "interleaved"))
    if check_number("apply_rope", "base", base) == 0:
        raise ConfigError("apply_rope", "base is 0, expected a positive number", "Keep the default, 10000")
    if not is_array(positions) or positions.dtype.kind not in "iu":
        raise DTypeError("apply_rope", "positions are not integers", "Pass np.arange(T)")
    B, _, T, D = x.shape
    if positions.shape not in ((T,), (B, T)):
        raise ShapeError(
            "apply_rope",
            f"positions have shape {positions.shape}, expected ({T},) or ({B}, {T}) for x {x.shape}",
            "Give one position per token",
        )
    # Angles in float64: float32 loses a radian at position 10^7.
    cos, sin = (like(x, part) for part in angles(to_host(positions), D, x.real.dtype, base))
    return _rotate(x, cos, sin, layout), Rotation(cos, sin, layout)


def rope_backward(dout: np.ndarray, saved: Rotation) -> tuple[np.ndarray]:
    """The transpose of a rotation turns the other way."""
    return (_rotate(dout, saved.cos, -saved.sin, saved.layout),)


def sinusoidal_positions(length: int, d_model: int) -> np.ndarray:
    """The (length, d_model) table of "Attention is all you need", float64.

    Column 2i is sin(t / 10000^(2i/d_model)), column 2i + 1 the cosine of the same angle.
    """
    check_size("sinusoidal_positions", length=length, d_model=d_model)

    def make() -> np.ndarray:
        angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, d_model, 2) / d_model)
        table = np.empty((length, d_model))
        table[:, ::2] = np.sin(angles)
        table[:, 1::2] = np.cos(angles)[:, : d_model // 2]
        return table

    return allocate("sinusoidal_positions", "a table", (length, d_model), np.float64, make)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The (H,) slopes of ALiBi (Press et al. 2021), float64: 2^(-8 h / H) for h = 1..H.

    For H no power of two, the slopes of the next smaller power P, then those of 2P at odd places.
    """
    check_size("alibi_slopes", num_heads=num_heads)

    def make() -> np.ndarray:
        power = 2 ** (int(num_heads).bit_length() - 1)
        slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
        between = 2.0 ** (-4 / power * np.arange(1, 2 * power, 2))
        return np.concatenate([slopes, between[: num_heads - power]])

    return allocate("alibi_slopes", "slopes", (num_heads,), np.float64, make)


register("rope", rope_forward, rope_backward)
