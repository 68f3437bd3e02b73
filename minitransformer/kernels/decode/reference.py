"""One token through a GPT, in NumPy: the specification. Each block is

    x += attention(norm1(x), keys, values) Wo^T + bo;   x += act(norm2(x) Wu^T + bu) Wd^T + bd

and after them logits = norm(x) W^T,
as `ops/gpt_block.py` for sequences of one token whose predecessors are in a cache; no dropout, no backward.
"""

from __future__ import annotations

import numpy as np

from minitransformer.kernels.decode.step import BlockWeights, Step, Weights, check


def next_logits(x: np.ndarray, weights: Weights, keys: np.ndarray, values: np.ndarray, step: Step) -> np.ndarray:
    """Logits (B, V) of the embedded tokens x (B, C), which are moved through the blocks in place.

    Their keys and values go to slot `step.stored`. `keys` and `values` are (layers, B, K, capacity, D), of which
    the first `stored` slots are filled. Raises `ShapeError` for what does not fit together.
    """
    check(x, weights, keys, values, step)
    for block, own_keys, own_values in zip(weights.blocks, keys, values, strict=True):
        _move(x, weights, block, own_keys, own_values, step)
    return _norm(x, weights.head.norm, weights.head.norm_bias, weights) @ weights.head.head.T


def _move(
    x: np.ndarray, weights: Weights, block: BlockWeights, keys: np.ndarray, values: np.ndarray, step: Step
) -> None:
    H, K, D = weights.H, weights.K, weights.D
    B, C = x.shape
    S = step.stored + 1
    packed = _linear(_norm(x, block.norm1, block.norm1_bias, weights), block.qkv, block.qkv_bias)
    heads = packed.reshape(B, H + 2 * K, D)
    if step.rotation is not None:
        cos, sin = (part[:, None] for part in step.rotation)
        first, second = heads[:, : H + K, : D // 2], heads[:, : H + K, D // 2 :]
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        heads = np.concatenate([turned, heads[:, H + K :]], axis=1)
    keys[:, :, step.stored], values[:, :, step.stored] = heads[:, H : H + K], heads[:, H + K :]
    q = heads[:, :H].reshape(B, K, H // K, D)
    scores = D**-0.5 * np.einsum("bkgd,bksd->bkgs", q, keys[:, :, :S])
    distance = step.stored - np.arange(S)
    if step.slopes is not None:
        scores = scores - step.slopes.reshape(K, H // K, 1) * distance
    may = np.ones((B, S), bool) if step.visible is None else step.visible
    if step.reach is not None:
        may = may & (distance <= step.reach)
    scores = np.where(may[:, None, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total == 0, 1, total)  # a row without keys has output 0
    merged = np.einsum("bkgs,bksd->bkgd", p, values[:, :, :S]).reshape(B, C)
    x += _linear(merged, block.proj, block.proj_bias)
    inner = _linear(_norm(x, block.norm2, block.norm2_bias, weights), block.up, block.up_bias)
    x += _linear(_activate(inner, weights.activation), block.down, block.down_bias)


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return x @ weight.T if bias is None else x @ weight.T + bias


def _norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, weights: Weights) -> np.ndarray:
    centred = x if weights.norm == "rms" else x - x.mean(axis=-1, keepdims=True)
    out = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + weights.eps) * weight
    return out if bias is None else out + bias


def _activate(x: np.ndarray, activation: str) -> np.ndarray:
    if activation == "relu":
        return np.where(x <= 0, 0, x)
    if activation == "swiglu":
        gate, up = np.split(x, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
