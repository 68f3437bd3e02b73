"""Attention in NumPy by its formulas, one method a step, so that a wrong one is a subclass of a few lines."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


class Plain:
    """`forward` and `backward` are a pair for `adapters.numpy_function`, with every option."""

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        attn_mask: Array | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        causal_align: str | None = None,
        window_size: tuple[int | None, int | None] = (None, None),
        softcap: float = 0.0,
        alibi_slopes: Array | None = None,
        key_lengths: Array | None = None,
        cu_seqlens: Array | None = None,
        rope_positions: tuple[Array, Array] | None = None,
        dropout_p: float | None = None,
        seed: int = 0,
        threads: int = 1,
        need_weights: bool = False,
        need_lse: bool = False,
    ) -> tuple[Any, tuple[Any, ...]]:
        (B, H, T, D), S = q.shape, k.shape[2]
        scale = q.dtype.type(D**-0.5 if scale is None else scale)
        turns = [None, None] if rope_positions is None else self.turns(rope_positions, D)
        q, k = (x if turn is None else self.turned(x, turn) for x, turn in zip((q, k), turns, strict=True))
        heads = self.heads(H, k.shape[1])
        lengths = np.full(B, S) if key_lengths is None else key_lengths
        own = self.own(T, lengths[:, None, None, None], causal_align)  # (B, 1, T, 1)
        may = np.broadcast_to(self.inside(S, lengths), (B, H, T, S)).copy()
        if is_causal and not (need_weights and self.asking_drops_the_mask):
            may &= self.causal(own, np.arange(S))
        left, right = window_size
        if left is not None:
            may &= np.arange(S) >= own - left
        if right is not None:
            may &= np.arange(S) <= own + right
        if cu_seqlens is not None:
            document = self.document(cu_seqlens, S)
            may &= document[:, None] == document
        raw = scale * (q @ k[:, heads].swapaxes(2, 3))
        scores, slope = raw, np.ones_like(raw)
        if softcap:
            scores, slope = self.capped(raw, softcap), 1 - np.tanh(raw / softcap) ** 2
        if alibi_slopes is not None:
            scores = scores - (alibi_slopes[:, None, None] * abs(own - np.arange(S))).astype(q.dtype)
        scores = self.positioned(scores)
        if attn_mask is not None:
            if attn_mask.dtype == bool:
                may &= self.mask(attn_mask)
            else:
                may &= attn_mask > -np.inf
                scores = scores + self.bias(np.where(attn_mask > -np.inf, attn_mask, 0), scale)
        weights, lse = self.softmax(scores, may)
        factors = self.factors(weights.shape, dropout_p, seed).astype(q.dtype)
        out = self.output(weights * factors, self.values(v)[:, heads], threads)
        results = [out, *([weights] if need_weights else []), *([lse] if need_lse else [])]
        saved = (q, k, v, heads, scale, slope, weights, factors, turns)
        return (tuple(results) if len(results) > 1 else out), saved

    def backward(self, dout: Array, saved: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        q, k, v, heads, scale, slope, weights, factors, turns = saved
        factors = self.factors_again(factors)
        dw = factors * (dout @ v[:, heads].swapaxes(2, 3))
        draw = scale * slope * weights * (dw - (weights * dw).sum(-1, keepdims=True))
        dq, dk = draw @ k[:, heads], draw.swapaxes(2, 3) @ q
        dv = (weights * factors).swapaxes(2, 3) @ dout
        dk, dv = (self.shared(x, heads, k.shape[1]) for x in (dk, dv))
        back = [None if turn is None else turn.conj() for turn in turns]
        dq, dk = (x if turn is None else self.turned(x, turn) for x, turn in zip((dq, dk), back, strict=True))
        return dq, dk, dv

    # --- the steps ----------------------------------------------------------------------------------------

    asking_drops_the_mask = False

    def turns(self, positions: tuple[Array, Array], D: int) -> list[Array]:
        frequencies = 100.0 ** (-np.arange(D // 2) / (D // 2))
        return [np.exp(1j * at[:, None] * frequencies) for at in positions]

    def turned(self, x: Array, turn: Array) -> Array:
        half = x.shape[3] // 2
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], 3).astype(x.dtype)

    def heads(self, H: int, K: int) -> Array:
        return np.arange(H) // (H // K)

    def inside(self, S: int, lengths: Array) -> Array:
        return (np.arange(S) < lengths[:, None])[:, None, None]

    def own(self, T: int, lengths: Array, align: str | None) -> Array:
        return np.arange(T)[:, None] + (lengths - T if align == "lower_right" else 0 * lengths)

    def causal(self, own: Array, keys: Array) -> Array:
        return keys <= own

    def document(self, ends: Array, S: int) -> Array:
        return np.searchsorted(ends[1:], np.arange(S), side="right")

    def capped(self, raw: Array, c: float) -> Array:
        return c * np.tanh(raw / c)

    def positioned(self, scores: Array) -> Array:
        return scores

    def mask(self, mask: Array) -> Array:
        return mask

    def bias(self, bias: Array, scale: Any) -> Array:
        return bias

    def softmax(self, scores: Array, may: Array) -> tuple[Array, Array]:
        top = np.max(scores, axis=-1, keepdims=True, where=may, initial=-np.inf)
        top = np.where(np.isneginf(top), 0, top)
        powers = np.exp(np.where(may, scores - top, -np.inf))
        total = powers.sum(-1, keepdims=True)
        lse = np.where(total > 0, np.log(np.where(total > 0, total, 1)) + top, -np.inf)
        return powers / np.where(total > 0, total, 1), lse[..., 0].astype(scores.dtype)

    def factors(self, shape: tuple[int, ...], p: float | None, seed: int) -> Array:
        return (np.random.default_rng(seed).random(shape) >= (p or 0)) / (1 - (p or 0))

    def factors_again(self, factors: Array) -> Array:
        return factors

    def values(self, v: Array) -> Array:
        return v

    def output(self, weights: Array, v: Array, threads: int) -> Array:
        return weights @ v

    def shared(self, x: Array, heads: Array, K: int) -> Array:
        return np.stack([x[:, heads == kv].sum(1) for kv in range(K)], 1)
