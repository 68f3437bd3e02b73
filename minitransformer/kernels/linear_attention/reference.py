"""Linear attention in NumPy: the specification, `formulas.py` over sums of outer products."""

from __future__ import annotations

import numpy as np

from minitransformer.kernels.linear_attention import formulas

CHUNK = 32  # tokens whose sums of k v^T are in memory at a time


def forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, feature_map: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, T, E) and its denominators (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    return formulas.forward(q, k, v, causal, feature_map, _weighted_sums)


def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    den: np.ndarray,
    causal: bool,
    feature_map: str | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk, dv."""
    return formulas.backward(dout, q, k, v, out, den, causal, feature_map, _weighted_sums)


def _weighted_sums(x: np.ndarray, y: np.ndarray, z: np.ndarray, causal: bool) -> np.ndarray:
    """sum_s (x_t . y_s) z_s, s over all rows of y and z, or s <= t: x (..., T, X), y (..., S, X), z (..., S, Z)."""
    if not causal:
        return np.matmul(x, np.matmul(y.swapaxes(-1, -2), z))
    heads = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    out = np.empty((*heads, x.shape[-2], z.shape[-1]), np.result_type(x, y, z))
    state = np.zeros((1, x.shape[-1], z.shape[-1]), out.dtype)  # of the chunks before
    for t in range(0, x.shape[-2], CHUNK):
        part = np.s_[..., t : t + CHUNK, :]
        states = state + np.cumsum(y[part][..., :, None] * z[part][..., None, :], axis=-3)  # (..., CHUNK, X, Z)
        out[part] = np.matmul(x[part][..., None, :], states)[..., 0, :]
        state = states[..., -1:, :, :]
    return out
