"""Scaled dot-product attention in NumPy: the specification. Materialises all T x S scores.

    s = mod(scale q k^T) + bias;  w = exp(s - lse), lse = log sum exp over allowed keys;  out = drop(w) v

A query with no allowed key has out = 0, lse = -inf and gradient 0. Complex-clean: maxima by real part,
no conjugation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minitransformer.kernels.attention.mods import evaluate_score, score_derivative
from minitransformer.kernels.attention.problem import Problem
from minitransformer.random import keep_mask


class Gradients(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None  # (B, H, T, S), only if there was a bias


def allowed(problem: Problem, B: int, T: int, S: int) -> np.ndarray | None:
    """Bool array broadcastable to (B, H, T, S) of who may attend to whom; None if everybody may."""
    q = (np.arange(T)[None, :, None] + problem.offset[:, None, None])[:, None]  # (B, 1, T, 1)
    k = np.arange(S)[None, None, None, :]
    left, right = problem.window
    rules: list[np.ndarray] = []
    if problem.causal:
        rules.append(k <= q)
    if left is not None:
        rules.append(k >= q - left)
    if right is not None:
        rules.append(k <= q + right)
    if problem.sparse is not None:
        rules.append(problem.sparse.allowed(q, k))
    if problem.key_lengths is not None:
        rules.append(k < problem.key_lengths[:, None, None, None])
    if problem.documents is not None:
        rules.append(problem.documents[:, None] == problem.documents[None, :])  # T = S
    if problem.mask is not None:
        rules.append(problem.mask)
    if not rules:
        return None
    out = rules[0]
    for rule in rules[1:]:
        out = out & rule
    return out


def _repeat(x: np.ndarray, groups: int) -> np.ndarray:
    """(B, K, S, D) -> (B, K groups, S, D): each key/value head serves `groups` query heads in a row."""
    return x if groups == 1 else np.repeat(x, groups, axis=1)


def _fold(x: np.ndarray, groups: int) -> np.ndarray:
    """The transpose of `_repeat`: sums over the query heads that shared a key/value head."""
    if groups == 1:
        return x
    B, H, S, D = x.shape
    return x.reshape(B, H // groups, groups, S, D).sum(axis=2)


def _raw_scores(q: np.ndarray, k: np.ndarray, problem: Problem) -> np.ndarray:
    """scale q k^T, (B, H, T, S)"""
    return np.matmul(q * q.real.dtype.type(problem.scale), k.swapaxes(-1, -2))


def _mod(raw: np.ndarray, bias: np.ndarray | None, problem: Problem) -> np.ndarray:
    """Scores after softcap, ALiBi, score_mod and bias."""
    T, S = raw.shape[-2:]
    if problem.softcap:
        raw = problem.softcap * np.tanh(raw / problem.softcap)
    if problem.alibi_slopes is not None:
        q = np.arange(T)[:, None] + problem.offset[:, None, None]  # (B, T, 1)
        distance = np.abs(q - np.arange(S))[:, None]  # (B, 1, T, S)
        raw = raw - (problem.alibi_slopes[:, None, None] * distance).astype(raw.real.dtype)
    if problem.score_mod is not None:
        raw = evaluate_score(problem.score_mod, raw, problem.buffers)
    return raw if bias is None else raw + bias


def _mod_slope(raw: np.ndarray, problem: Problem) -> np.ndarray | None:
    """d mod / d raw, None if it is 1 everywhere."""
    slope = None
    if problem.softcap:
        with np.errstate(over="ignore"):  # 1 - tanh^2, without losing its bits where tanh is nearly 1
            slope = 1 / np.cosh(raw / problem.softcap) ** 2
    if problem.score_mod is not None:
        scores = _mod(raw, None, problem._replace(score_mod=None))
        if problem.score_mod_grad is not None:
            own = evaluate_score(problem.score_mod_grad, scores, problem.buffers)
        else:
            own = score_derivative(problem.score_mod, scores, problem.buffers)
        slope = own if slope is None else slope * own
    return slope


def _dropout(problem: Problem, shape: tuple[int, ...]) -> np.ndarray:
    """0 or 1 / (1 - p) per weight, float64, the same in forward and backward."""
    assert problem.dropout_key is not None
    return keep_mask(shape, problem.dropout_p, problem.dropout_key) / (1 - problem.dropout_p)


def _weights(scores: np.ndarray, may: np.ndarray | None, lse: np.ndarray) -> np.ndarray:
    """exp(score - lse), 0 where masked and in rows where lse is -inf."""
    weights = scores - np.where(np.isneginf(lse.real), lse.dtype.type(0), lse)[..., None]
    np.exp(weights, out=weights)
    if may is not None:
        np.copyto(weights, 0, where=~may)
    return weights


def _given(target: np.ndarray | None, result: np.ndarray) -> np.ndarray:
    """`result`, in `target` if there is one."""
    if target is None:
        return result
    np.copyto(target, result)
    return target


def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray | None,
    problem: Problem,
) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, T, Dv) and lse (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv).

    Written into `out` if it is given, whose rows may then lie anywhere.
    """
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    scores = _mod(_raw_scores(q, _repeat(k, H // K), problem), bias, problem)  # (B, H, T, S)
    may = allowed(problem, B, T, S)
    if may is not None:
        np.copyto(scores, -np.inf, where=~may)
    top = scores.real.max(axis=-1, initial=-np.inf)  # (B, H, T)
    top = np.where(np.isneginf(top), top.dtype.type(0), top)  # an empty row: exp(-inf - 0) = 0
    weights = scores - top[..., None]
    np.exp(weights, out=weights)
    total = weights.sum(axis=-1)
    empty = total == 0
    total[empty] = 1
    lse = np.log(total) + top
    lse[empty] = -np.inf
    weights /= total[..., None]
    if problem.dropout_p:
        weights = weights * _dropout(problem, weights.shape).astype(weights.real.dtype)
    return _given(out, np.matmul(weights, _repeat(v, H // K))), lse


def weights_forward(
    q: np.ndarray, k: np.ndarray, bias: np.ndarray | None, lse: np.ndarray, problem: Problem
) -> np.ndarray:
    """The softmax weights (B, H, T, S) before dropout, rebuilt from the log-sum-exp."""
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    scores = _mod(_raw_scores(q, _repeat(k, H // K), problem), bias, problem)
    return _weights(scores, allowed(problem, B, T, S), lse)


def _score_gradients(
    dscores: np.ndarray,
    raw: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    bias: np.ndarray | None,
    problem: Problem,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """dq, dk, dbias from the gradient of the modified scores."""
    groups = q.shape[1] // k.shape[1]
    dbias = None if bias is None else dscores
    slope = _mod_slope(raw, problem)
    if slope is not None:
        # where the weight is 0 nothing flows, whatever the slope of an infinite score is
        dscores = np.where(dscores == 0, dscores, dscores * slope)
    scale = dscores.dtype.type(problem.scale)
    dq = np.matmul(dscores, _repeat(k, groups)) * scale
    dk = _fold(np.matmul(dscores.swapaxes(-1, -2), q) * scale, groups)
    return dq, dk, dbias


def weights_backward(
    dweights: np.ndarray,
    weights: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    bias: np.ndarray | None,
    problem: Problem,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """dq, dk, dbias, dlse: w = exp(s - lse), so ds = dw w and dlse = -sum ds."""
    dscores = dweights * weights
    raw = _raw_scores(q, _repeat(k, q.shape[1] // k.shape[1]), problem)
    return *_score_gradients(dscores, raw, q, k, bias, problem), -dscores.sum(axis=-1)


def backward(
    dout: np.ndarray,
    dlse: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray,
    lse: np.ndarray,
    dq: np.ndarray | None,
    dk: np.ndarray | None,
    dv: np.ndarray | None,
    problem: Problem,
) -> Gradients:
    """The gradients, written into dq, dk and dv where they are given.

    With weights w (rebuilt from lse), dropout factors m and delta = <dout, out>:

    dv = (w m)^T dout;  dw = m (dout v^T);  ds = w (dw - delta + dlse)
    """
    B, H, T, _ = q.shape
    K, S = k.shape[1:3]
    groups = H // K
    raw = _raw_scores(q, _repeat(k, groups), problem)
    weights = _weights(_mod(raw, bias, problem), allowed(problem, B, T, S), lse)
    dweights = np.matmul(dout, _repeat(v, groups).swapaxes(-1, -2))  # (B, H, T, S)
    kept = weights
    if problem.dropout_p:
        factors = _dropout(problem, weights.shape).astype(weights.dtype)
        kept = weights * factors
        dweights *= factors
    dv = _given(dv, _fold(np.matmul(kept.swapaxes(-1, -2), dout), groups))
    delta = np.einsum("bhtd,bhtd->bht", dout, out) - dlse
    dscores = weights * (dweights - delta[..., None])
    more_dq, more_dk, dbias = _score_gradients(dscores, raw, q, k, bias, problem)
    return Gradients(_given(dq, more_dq), _given(dk, more_dk), dv, dbias)
