"""Attention functions that are wrong in one way each, by the law that they break."""

from __future__ import annotations

from typing import Any

import numpy as np
from testing.plain_attention import Array, Plain


class SeesOneKeyAhead(Plain):
    def causal(self, own: Array, keys: Array) -> Array:
        return keys <= own + 1


class LeaksBackwards(Plain):
    """Forward is right; the gradient of the values ignores the mask."""

    def backward(self, dout: Array, saved: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        dq, dk, dv = super().backward(dout, saved)
        return dq, dk, dv + dout.dtype.type(1e-9) * abs(dout).sum()


class UpperLeftForLowerRight(Plain):
    def own(self, T: int, lengths: Array, align: str | None) -> Array:
        return super().own(T, lengths, None)


class FiniteMask(Plain):
    """Masked scores are lowered by 10, which is not enough."""

    def softmax(self, scores: Array, may: Array) -> tuple[Array, Array]:
        return super().softmax(np.where(may, scores, scores - 10), np.ones_like(may))


class IgnoresLengths(Plain):
    def inside(self, S: int, lengths: Array) -> Array:
        return super().inside(S, 0 * lengths + S)


class DocumentsBeginLate(Plain):
    def document(self, ends: Array, S: int) -> Array:
        return np.searchsorted(ends[1:], np.arange(S), side="left")


class MaskOfTheFirstRow(Plain):
    def inside(self, S: int, lengths: Array) -> Array:
        return super().inside(S, 0 * lengths + lengths[0])


class LastRowOnlyGetsGradients(Plain):
    def backward(self, dout: Array, saved: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        dq, dk, dv = super().backward(dout, saved)
        dq[:-1] = 0
        return dq, dk, dv


class PrefersLaterKeys(Plain):
    def positioned(self, scores: Array) -> Array:
        return scores + np.arange(scores.shape[3], dtype=scores.dtype) / 8


class HeadsDiffer(Plain):
    def positioned(self, scores: Array) -> Array:
        return scores * (1 + np.arange(scores.shape[1], dtype=scores.dtype)[:, None, None])


class TilesHeads(Plain):
    def heads(self, H: int, K: int) -> Array:
        return np.arange(H) % K


class GroupNotSummed(Plain):
    def shared(self, x: Array, heads: Array, K: int) -> Array:
        return np.stack([x[:, heads == kv][:, 0] for kv in range(K)], 1)


class CapsWithoutScalingBack(Plain):
    def capped(self, raw: Array, c: float) -> Array:
        return np.tanh(raw / c)


class ClipsValues(Plain):
    def values(self, v: Array) -> Array:
        return np.clip(v, -1, 1)


class OneMoreInTheDenominator(Plain):
    """exp(s) / (1 + sum exp(s)): not blind to a shift, and rows do not sum to 1."""

    def softmax(self, scores: Array, may: Array) -> tuple[Array, Array]:
        weights, lse = super().softmax(scores, may)
        return weights / (1 + np.exp(-lse[..., None])), lse


class AskingDropsTheMask(Plain):
    asking_drops_the_mask = True


class MeanOfTheValues(Plain):
    """The largest negative number in the place of -inf: an empty row attends to everything."""

    def softmax(self, scores: Array, may: Array) -> tuple[Array, Array]:
        weights, lse = super().softmax(scores, may)
        return np.where(may.any(-1, keepdims=True), weights, weights.dtype.type(1 / may.shape[3])), lse


class NotANumber(Plain):
    def softmax(self, scores: Array, may: Array) -> tuple[Array, Array]:
        weights, lse = super().softmax(scores, may)
        return np.where(may.any(-1, keepdims=True), weights, weights.dtype.type(np.nan)), lse


class InvertsBoolMasks(Plain):
    """True = blocked, unless nothing would be left."""

    def mask(self, mask: Array) -> Array:
        return ~mask | mask.all()


class TurnsKeysTheOtherWay(Plain):
    def turns(self, positions: tuple[Array, Array], D: int) -> list[Array]:
        first, second = super().turns(positions, D)
        return [first, second.conj()]


class DrawsAgain(Plain):
    """Dropout in backward by another mask than in forward."""

    def factors_again(self, factors: Array) -> Array:
        return factors[:, :, ::-1, ::-1]


class DropsWithoutScaling(Plain):
    def factors(self, shape: tuple[int, ...], p: float | None, seed: int) -> Array:
        return np.sign(super().factors(shape, p, seed))


class DropsTooMuch(Plain):
    def factors(self, shape: tuple[int, ...], p: float | None, seed: int) -> Array:
        return (np.random.default_rng(seed).random(shape) >= 1.8 * (p or 0)) / (1 - (p or 0))


class DropsWhenToldNotTo(Plain):
    def factors(self, shape: tuple[int, ...], p: float | None, seed: int) -> Array:
        return super().factors(shape, 0.1 if p == 0 else p, seed)


class ThreadsAddUpOtherwise(Plain):
    def output(self, weights: Array, v: Array, threads: int) -> Array:
        return weights @ v * weights.dtype.type(1 + 1e-3 * (threads == 7))


class LogSumExpInBits(Plain):
    def softmax(self, scores: Array, may: Array) -> tuple[Array, Array]:
        weights, lse = super().softmax(scores, may)
        return weights, lse / lse.dtype.type(np.log(2))


# The law that each one breaks; it may break others too.
WRONG: list[tuple[str, type[Plain]]] = [
    ("L1", SeesOneKeyAhead),
    ("L1", LeaksBackwards),
    ("L2", UpperLeftForLowerRight),
    ("L3", FiniteMask),
    ("L4", IgnoresLengths),
    ("L5", DocumentsBeginLate),
    ("L6", MaskOfTheFirstRow),
    ("L6", LastRowOnlyGetsGradients),
    ("L7", PrefersLaterKeys),
    ("L8", HeadsDiffer),
    ("L9", TilesHeads),
    ("L9", GroupNotSummed),
    ("L10", CapsWithoutScalingBack),
    ("L11", ClipsValues),
    ("L12", OneMoreInTheDenominator),
    ("L13", OneMoreInTheDenominator),
    ("L14", AskingDropsTheMask),
    ("L15", MeanOfTheValues),
    ("L15", NotANumber),
    ("L16", InvertsBoolMasks),
    ("L17", TurnsKeysTheOtherWay),
    ("L18", DrawsAgain),
    ("L18", DropsWithoutScaling),
    ("L18", DropsTooMuch),
    ("L19", DropsWhenToldNotTo),
    ("L20", ThreadsAddUpOtherwise),
    ("L21", LogSumExpInBits),
]
