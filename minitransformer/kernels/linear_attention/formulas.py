"""The formulas of linear attention (Katharopoulos et al. 2020) over one sum, which each side makes in its way.

    out_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s),  s over all keys, or s <= t if causal

A query whose denominator is 0 has out = 0 and gradient 0. Complex-clean: comparisons by the real part, no conjugation.
Written for arrays of NumPy and of a device alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# (x, y, z, causal) -> sum_s (x_t . y_s) z_s, s over all rows of y and z, or s <= t: x (..., T, X), y (..., S, X) and
# z (..., S, Z), heads that may have to be repeated before them.
Sum = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], np.ndarray]


def forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, feature_map: str | None, weighted_sums: Sum
) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, T, E) and its denominators (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    x, y, z = _in_groups(_phi(q, feature_map), k), _phi(k, feature_map)[:, :, None], _with_ones(v)[:, :, None]
    sums = weighted_sums(x, y, z, causal).reshape(*q.shape[:3], v.shape[3] + 1)
    den = sums[..., -1]
    return _divided(sums[..., :-1], den), den.copy()


def backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    den: np.ndarray,
    causal: bool,
    feature_map: str | None,
    weighted_sums: Sum,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dq, dk, dv, each a sum of the same form as the forward's.

    With h_t = (dout_t, -<dout_t, out_t>) / den_t, the gradient of a numerator and its denominator, and u_s = (v_s, 1):

    dphi(q_t) = sum_s <h_t, u_s> phi(k_s)
    dphi(k_s) = sum_t <u_s, h_t> phi(q_t)
    du_s = sum_t <phi(k_s), phi(q_t)> h_t
    """
    inner = np.einsum("bhte,bhte->bht", dout, out)[..., None]
    h = _in_groups(_divided(np.concatenate([dout, -inner], axis=-1), den), k)  # (B, K, H / K, T, E + 1)
    x, y, z = _in_groups(_phi(q, feature_map), k), _phi(k, feature_map)[:, :, None], _with_ones(v)[:, :, None]
    dq = weighted_sums(h, z, y, causal).reshape(q.shape) * _slope(q, feature_map)
    # A key is summed over the queries from its own on: backwards in time, over those up to it.
    if causal:
        x, y, z, h = (a[..., ::-1, :] for a in (x, y, z, h))
    dk, dv = (weighted_sums(*arrays, causal).sum(axis=2) for arrays in ((z, h, x), (y, x, h[..., :-1])))
    if causal:
        dk, dv = dk[..., ::-1, :], dv[..., ::-1, :].copy()
    return dq, dk * _slope(k, feature_map), dv


def _in_groups(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    """(B, H, T, D) -> (B, K, H / K, T, D): the query heads that share each key head."""
    B, K = k.shape[:2]
    return x.reshape(B, K, x.shape[1] // K, *x.shape[2:])


def _with_ones(v: np.ndarray) -> np.ndarray:
    """A 1 at the end of each row: its weighted sum is the sum of the weights."""
    return np.concatenate([v, np.ones_like(v, shape=(*v.shape[:-1], 1))], axis=-1)


def _divided(x: np.ndarray, den: np.ndarray) -> np.ndarray:
    """Rows of x by their denominators, 0 where that is 0."""
    empty = (den.real == 0)[..., None]
    return np.where(empty, x.dtype.type(0), x / np.where(empty, den.dtype.type(1), den[..., None]))


def _phi(x: np.ndarray, feature_map: str | None) -> np.ndarray:
    """elu(x) + 1, or x as it is."""
    if feature_map is None:
        return x
    return np.where(x.real > 0, x + 1, np.exp(np.where(x.real > 0, x.dtype.type(0), x)))


def _slope(x: np.ndarray, feature_map: str | None) -> np.ndarray:
    """d phi / dx"""
    if feature_map is None:
        return np.ones_like(x)
    return np.exp(np.where(x.real > 0, x.dtype.type(0), x))
