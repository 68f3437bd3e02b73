"""Drawing a token from its logits."""

from __future__ import annotations

import numpy as np

from minitransformer import random


def penalise(logits: np.ndarray, ids: np.ndarray, real: np.ndarray, penalty: float) -> None:
    """Make the tokens of a row less likely in its `logits` (B, V), in place."""
    rows, columns = np.nonzero(real)
    seen = np.zeros(logits.shape, bool)
    seen[rows, ids[rows, columns]] = True
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)


def sample(
    logits: np.ndarray,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    step: int,
) -> np.ndarray:
    """One token per row (B,), by inverting the distribution function at a uniform number."""
    B, V = logits.shape
    order = np.argsort(-logits, axis=-1, kind="stable")  # likeliest first; ties by id
    ranked = np.take_along_axis(logits, order, axis=-1)
    with np.errstate(over="ignore"):  # towards temperature 0 all but the likeliest reach -inf
        p = np.exp((ranked - ranked[:, :1]) / float(temperature))
    p /= p.sum(axis=-1, keepdims=True)
    keep = np.ones((B, V), bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        kept = np.where(keep, p, 0)
        kept /= kept.sum(axis=-1, keepdims=True)
        keep &= np.cumsum(kept, axis=-1) - kept < float(top_p)  # the first is always kept
    if min_p is not None:
        keep &= p >= float(min_p) * p[:, :1]
    cumulative = np.cumsum(np.where(keep, p, 0), axis=-1)
    words = random.uniform_words((B,), random.DrawKey(seed, step, random.site_id("generate"), 0))
    uniform = (words + 0.5) / 2**32
    rank = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=-1)
    return np.take_along_axis(order, np.minimum(rank, V - 1)[:, None], axis=-1)[:, 0]
