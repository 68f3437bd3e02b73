"""Linear attention as one op: weights phi(q) . phi(k) in place of a softmax, so that nothing grows with T x S."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import register
from minitransformer.checks import check_choice, check_flag
from minitransformer.errors import ShapeError
from minitransformer.kernels.gpu.arrays import contiguous
from minitransformer.ops.attention import check_qkv


class LinearAttention(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    den: np.ndarray  # (B, H, T), the sum of each query's weights
    is_causal: bool
    feature_map: str | None
    kernel: ModuleType


def elu_plus_one(x: np.ndarray) -> np.ndarray:
    """The feature map of kernels, for what is not a kernel's: x + 1 above 0, exp(x) below."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def linear_attention_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, is_causal: bool = False, feature_map: str | None = "elu"
) -> tuple[np.ndarray, LinearAttention]:
    """(B, H, T, Dv): see `kernels/linear_attention/reference.py` for the formula."""
    op = "linear_attention"
    _, _, T, S = check_qkv(op, q, k, v, enable_gqa=True)
    is_causal = check_flag(op, "is_causal", is_causal)
    check_choice(op, "feature_map", feature_map, ("elu", None))
    if is_causal and T != S:
        raise ShapeError(
            op,
            f"is_causal lets query t see the keys up to t, but there are {T} queries and {S} keys "
            f"(query {q.shape}, key {k.shape})",
            "Pass as many keys as queries, or leave is_causal out if every query may see all of them",
        )
    q, k, v = (contiguous(x) for x in (q, k, v))
    kernel = kernels.serve("linear_attention", q, k, v)
    out, den = kernel.forward(q, k, v, is_causal, feature_map)
    return out, LinearAttention(q, k, v, out, den, is_causal, feature_map, kernel)


def linear_attention_backward(dout: np.ndarray, saved: LinearAttention) -> tuple[np.ndarray, ...]:
    q, k, v, out, den, is_causal, feature_map, kernel = saved
    gradients: tuple[np.ndarray, ...] = kernel.backward(dout, q, k, v, out, den, is_causal, feature_map)
    return gradients


register("linear_attention", linear_attention_forward, linear_attention_backward)
