"""Scaled dot-product attention as one op, and its weights as another.

The entrance checks everything once and turns it into a `Problem`; kernels trust it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import as_array, as_host, register
from minitransformer.checks import check_choice, check_count, check_flag, check_number, is_integer, shown
from minitransformer.errors import ConfigError, DTypeError, MaskError, RangeError, ShapeError
from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.kernels.gpu.arrays import contiguous, is_array
from minitransformer.masks import Mask
from minitransformer.ops.activation import check_float
from minitransformer.ops.arithmetic import sum_to
from minitransformer.ops.dropout import check_rate

_MOST = 2**48  # positions: far more than memory, and their sums fit 64 bits


class Attention(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    out: np.ndarray
    lse: np.ndarray
    problem: Problem
    kernel: ModuleType


class Weights(NamedTuple):
    weights: np.ndarray
    q: np.ndarray
    k: np.ndarray
    bias: np.ndarray | None
    problem: Problem
    kernel: ModuleType


def _as_scores(bias: np.ndarray | None, q: np.ndarray) -> np.ndarray | None:
    """A float64 mask beside float32 queries must not turn the result into float64."""
    if bias is None or bias.dtype.kind != "f":
        return bias
    return bias.astype(q.real.dtype, copy=False)


def attention_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None, *, problem: Problem
) -> tuple[tuple[np.ndarray, np.ndarray], Attention]:
    """(out, lse): see `kernels/attention/reference.py` for the formula, `make_problem` for `problem`."""
    problem.check(*check_qkv("attention", q, k, v, enable_gqa=True))
    q, k, v = (contiguous(x) for x in (q, k, v))
    bias = _as_scores(bias, q)
    kernel = kernels.serve("attention", q, k, v, *(() if bias is None else (bias,)))
    out, lse = kernel.forward(q, k, v, bias, None, problem)
    return (out, lse), Attention(q, k, v, bias, out, lse, problem, kernel)


def attention_backward(douts: tuple[np.ndarray, np.ndarray], saved: Attention) -> tuple[np.ndarray | None, ...]:
    dout, dlse = (contiguous(x) for x in douts)
    arrays = dout, dlse, saved.q, saved.k, saved.v, saved.bias, saved.out, saved.lse
    g = saved.kernel.backward(*arrays, None, None, None, saved.problem)
    return g.dq, g.dk, g.dv, None if saved.bias is None else sum_to(g.dbias, saved.bias.shape)


def attention_weights_forward(
    q: np.ndarray, k: np.ndarray, lse: np.ndarray, bias: np.ndarray | None = None, *, problem: Problem
) -> tuple[np.ndarray, Weights]:
    """The softmax weights (B, H, T, S) before dropout, rebuilt from attention's log-sum-exp.

    Asking for them changes no number of the attention call: rows sum to 1, or to 0 if they are empty.
    """
    problem.check(*check_qkv("attention_weights", q, k, k, enable_gqa=True))
    q, k, bias = contiguous(q), contiguous(k), _as_scores(bias, q)
    kernel = kernels.serve("attention", q, k, lse, *(() if bias is None else (bias,)))
    weights = kernel.weights_forward(q, k, bias, lse, problem)
    return weights, Weights(weights, q, k, bias, problem, kernel)


def attention_weights_backward(dout: np.ndarray, saved: Weights) -> tuple[np.ndarray | None, ...]:
    dq, dk, dbias, dlse = saved.kernel.weights_backward(
        dout, saved.weights, saved.q, saved.k, saved.bias, saved.problem
    )
    return dq, dk, dlse, None if saved.bias is None else sum_to(dbias, saved.bias.shape)


register("attention", attention_forward, attention_backward, many=True)
register("attention_weights", attention_weights_forward, attention_weights_backward)


def check_qkv(op: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, enable_gqa: bool) -> tuple[int, int, int, int]:
    """(B, H, T, S), after checking that q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv) fit."""
    check_float(op, query=q, key=k, value=v)
    shapes = f"(query {q.shape}, key {k.shape}, value {v.shape})"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShapeError(op, f"expected 4 axes (batch, heads, length, width) {shapes}", "Split the heads first")
    if q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0]:
        raise ShapeError(op, f"the batch sizes differ {shapes}", "Give query, key and value one batch size")
    if k.shape[3] != q.shape[3]:
        raise ShapeError(
            op,
            f"key has head width {k.shape[3]}, query has {q.shape[3]} {shapes}",
            "Project both to the same width",
        )
    if q.shape[3] == 0 or q.shape[1] == 0:
        raise ShapeError(op, f"there are no heads, or heads of width 0 {shapes}", "Use at least one of width 1")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError(op, f"key and value differ in heads or length {shapes}", "Give one value per key")
    if q.shape[1] != k.shape[1]:
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ShapeError(
                op,
                f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly {shapes}",
                "The number of key heads must divide the number of query heads",
            )
        if not check_flag(op, "enable_gqa", enable_gqa):
            raise ShapeError(
                op,
                f"query has {q.shape[1]} heads, key {k.shape[1]} {shapes}",
                "Pass enable_gqa=True to share key heads",
            )
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


def split_mask(op: str, mask: Any, B: int, H: int, T: int, S: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(bool mask, additive float bias) from what the caller gave; the other one is None."""
    if mask is None:
        return None, None
    if isinstance(mask, Mask):
        return mask.dense(B, H, T, S), None
    mask = as_array(op, mask)
    if not is_array(mask) or mask.dtype.kind not in "bfc":
        raise MaskError(
            op,
            f"attn_mask has dtype {getattr(mask, 'dtype', type(mask).__name__)}, expected bool (True = may attend) "
            "or float (added to the scores)",
            "Write attn_mask != 0 if 1 means 'may attend', attn_mask == 0 if it means 'blocked'",
        )
    try:
        np.broadcast_to(mask, (B, H, T, S))
    except ValueError:
        raise MaskError(
            op,
            f"attn_mask has shape {mask.shape}, expected one that broadcasts to (B, H, T, S) = {(B, H, T, S)}",
            "Add axes: mask[:, None, None, :] for a mask over keys of shape (B, S)",
        ) from None
    if mask.dtype.kind == "b":
        return mask, None
    if mask.size and np.isin(mask, (0, 1)).all() and (mask == 1).any():
        raise MaskError(
            op,
            "attn_mask is float and holds only 0 and 1, which would be added to the scores",
            "Pass a bool mask: attn_mask != 0 if 1 means 'may attend'",
        )
    return None, mask


def make_problem(
    op: str,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_align: str | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    sparse: Sparse | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    key_lengths: Any = None,
    cu_seqlens: Any = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_grad: Callable[..., Any] | None = None,
    buffers: tuple[np.ndarray, ...] = (),
    dropout_p: float = 0.0,
) -> Problem:
    """Check every option of an attention call against its arrays; `dropout_key` is the caller's."""
    B, H, T, S = check_qkv(op, q, k, v, enable_gqa)
    is_causal = check_flag(op, "is_causal", is_causal)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else check_number(op, "scale", scale, least=-math.inf)
    softcap = check_number(op, "softcap", softcap)
    window = _check_window(op, window_size)
    lengths = _check_lengths(op, key_lengths, B, S)
    documents = _check_documents(op, cu_seqlens, B, T, S)
    if documents is not None and lengths is not None:
        raise ConfigError(op, "key_lengths and cu_seqlens exclude each other", "A packed batch has no padding")
    slopes = None
    if alibi_slopes is not None:
        slopes = as_host(op, alibi_slopes)
        if slopes.dtype.kind not in "iuf" or not np.isfinite(slopes).all():
            problem = f"alibi_slopes are {slopes.dtype}, expected finite real numbers"
            raise DTypeError(op, problem, "Use F.alibi_slopes(num_heads)")
        if slopes.shape != (H,):
            raise ShapeError(op, f"alibi_slopes has shape {slopes.shape}, expected ({H},)", "Give one slope per head")
        slopes = slopes.astype(np.float64)
    sparse = None if sparse is None else _check_sparse(op, sparse, B)
    positional = is_causal or window != (None, None) or slopes is not None or sparse is not None
    return Problem(
        scale=scale,
        offset=_offset(op, causal_align, lengths, T, S, positional),
        causal=is_causal,
        window=window,
        sparse=sparse,
        key_lengths=lengths,
        documents=documents,
        mask=mask,
        softcap=softcap,
        alibi_slopes=slopes,
        score_mod=score_mod,
        score_mod_grad=score_mod_grad,
        buffers=tuple(buffers),
        dropout_p=check_rate(op, dropout_p),
    )


def _offset(op: str, align: str | None, lengths: np.ndarray | None, T: int, S: int, positional: bool) -> np.ndarray:
    """The key position of query 0, one for all rows (1,) or one per row (B,)."""
    check_choice(op, "causal_align", align, ("lower_right", "upper_left", None))
    if positional and align is None and (T != S or lengths is not None):
        rows = "" if lengths is None else " and rows of different lengths"
        raise MaskError(
            op,
            f"positions of {T} queries and {S} keys{rows} can be compared from either corner",
            "Pass causal_align='lower_right' (a cache: the last query sees the last key) or 'upper_left' "
            "(torch's is_causal: the first query sees the first key)",
        )
    if align != "lower_right":
        return np.zeros(1, np.int64)
    return np.full(1, S - T, np.int64) if lengths is None else lengths - T


def _check_window(op: str, window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise ConfigError(
            op, f"window_size is {shown(window)}, expected a pair (left, right)", "Pass (left, 0) for causal"
        )
    for reach in window:
        if reach is not None and not (is_integer(reach) and reach >= 0):
            raise ConfigError(
                op,
                f"window_size is {shown(window)}, expected two non-negative integers, None for no limit",
                "(w - 1, 0) lets each query see itself and the w - 1 keys before it",
            )
    left, right = (None if reach is None or reach >= 2**62 else int(reach) for reach in window)  # more is no limit
    return left, right


def _check_sparse(op: str, sparse: Any, B: int) -> Sparse:
    if not isinstance(sparse, Sparse):
        raise DTypeError(op, f"sparse is {shown(sparse)}, expected a Sparse", "Pass F.Sparse(range(4), left=255)")
    far, left, block, origin = sparse
    if not isinstance(far, range) or far.start < 0 or far.step < 1 or far.stop > _MOST:
        problem = f"far is {shown(far)}, expected a range that ascends from 0 or more, to 2**48 at most"
        raise ConfigError(op, problem, "Pass range(n) for the first n keys, range(s - 1, S, s) for the last of every s")
    left, block = min(check_count(op, "left", left), _MOST), min(check_count(op, "block", block, least=1), _MOST)
    origin = _integers(op, "origin", origin)
    if origin.shape not in ((1,), (B,)):
        raise ShapeError(op, f"origin has shape {origin.shape}, expected (1,) or ({B},)", "Give one key per row")
    if ((origin < -_MOST) | (origin > _MOST)).any():
        raise RangeError(op, f"origin is {origin.tolist()}, expected at most 2**48", "Count keys from 0")
    return Sparse(far, left, block, origin)


def _integers(op: str, name: str, values: Any) -> np.ndarray:
    array = as_host(op, values)
    if array.dtype.kind not in "iu":
        raise DTypeError(op, f"{name} has dtype {array.dtype}, expected integers", "Pass an integer array")
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise RangeError(op, f"{name} holds {array.max()}, expected at most 2**63 - 1", "Count positions")
    return array.astype(np.int64)


def _check_lengths(op: str, key_lengths: Any, B: int, S: int) -> np.ndarray | None:
    if key_lengths is None:
        return None
    lengths = _integers(op, "key_lengths", key_lengths)
    if lengths.shape != (B,):
        raise ShapeError(op, f"key_lengths has shape {lengths.shape}, expected ({B},)", "Give one length per row")
    if lengths.size and (lengths.min() < 0 or lengths.max() > S):
        raise RangeError(op, f"key_lengths are {lengths.tolist()}, expected 0 to {S}", "Count the keys of each row")
    return lengths


def _check_documents(op: str, cu_seqlens: Any, B: int, T: int, S: int) -> np.ndarray | None:
    """(S,) document numbers from cumulative lengths."""
    if cu_seqlens is None:
        return None
    ends = _integers(op, "cu_seqlens", cu_seqlens)
    if B != 1 or T != S:
        raise ShapeError(
            op,
            f"cu_seqlens packs one row of self-attention, got B={B}, T={T}, S={S}",
            "Concatenate the documents",
        )
    if ends.ndim != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != S or (np.diff(ends) < 0).any():
        raise RangeError(
            op,
            f"cu_seqlens is {ends.tolist()}, expected ascending numbers from 0 to {S}",
            "Pass the cumulative lengths: np.cumsum([0, *lengths])",
        )
    return np.repeat(np.arange(len(ends) - 1), np.diff(ends))
