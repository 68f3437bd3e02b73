"""Linear attention on the GPU: `formulas.py` in the array's own library, all chunks of a causal sum at once.

Scratch memory is linear in T. What is not a number reaches the tokens before it in its chunk, which multiply it by 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.linear_attention import formulas

__all__ = ["backward", "forward"]

CHUNK = 64  # tokens: their products are CHUNK numbers a token, the states between chunks D E / CHUNK


@entrance("BHTD", "BKSD", "BKSE")
def forward(q: Any, k: Any, v: Any, causal: bool, feature_map: str | None) -> tuple[Any, Any]:
    """out (B, H, T, E) and its denominators (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    return formulas.forward(q, k, v, causal, feature_map, _weighted_sums)


@entrance("BHTE", "BHTD", "BKSD", "BKSE", "BHTE", "BHT")
def backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, den: Any, causal: bool, feature_map: str | None
) -> tuple[Any, Any, Any]:
    """dq, dk, dv."""
    return formulas.backward(dout, q, k, v, out, den, causal, feature_map, _weighted_sums)


def _weighted_sums(x: Any, y: Any, z: Any, causal: bool) -> Any:
    """out = x state, the state being y^T z of all tokens; causal, [x | tril(x y^T)] [state; z] in every chunk."""
    if not causal:
        return np.matmul(x, np.matmul(y.swapaxes(-1, -2), z))
    T = x.shape[-2]
    x, y, z = (_in_chunks(a) for a in (x, y, z))  # (..., T / CHUNK, CHUNK, width)
    states = np.cumsum(np.matmul(y.swapaxes(-1, -2), z), axis=-3)  # behind each chunk
    out = np.matmul(np.tril(np.matmul(x, y.swapaxes(-1, -2))), z)
    out[..., 1:, :, :] += np.matmul(x[..., 1:, :, :], states[..., :-1, :, :])
    return out.reshape(*out.shape[:-3], out.shape[-3] * CHUNK, out.shape[-1])[..., :T, :]


def _in_chunks(x: Any) -> Any:
    """(..., T, width) -> (..., T / CHUNK, CHUNK, width), the last one filled with zeros."""
    *heads, T, width = x.shape
    count = -(-T // CHUNK)
    chunks = np.zeros_like(x, shape=(*heads, count * CHUNK, width))
    chunks[..., :T, :] = x
    return chunks.reshape(*heads, count, CHUNK, width)
