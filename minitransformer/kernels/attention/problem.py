"""What an attention call asks for beside its arrays: checked once, then trusted by every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minitransformer.errors import ConfigError, RangeError, ShapeError
from minitransformer.random import DrawKey


class Sparse(NamedTuple):
    """Which of the keys before its near ones a query sees: those of `far`, and no other.

    The near keys of the query at position p begin at p // block * block - left; what comes after that is left to the
    other rules. Positions are counted from the key `origin` on, one for all rows (1,) or one per row (B,).
    """

    far: range  # from 0 on, ascending; it may go on behind the last key
    left: int = 0
    block: int = 1
    origin: np.ndarray = np.zeros(1, np.int64)

    def allowed(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Bool (B or 1, 1, T, S) for queries at the keys q (B or 1, 1, T, 1), and k (1, 1, 1, S)."""
        origin = self.origin[:, None, None, None]
        p, k = q - origin, k - origin
        far = (k >= self.far.start) & (k < self.far.stop) & ((k - self.far.start) % self.far.step == 0)
        return far | (k >= p // self.block * self.block - self.left)


class Problem(NamedTuple):
    """The static part of softmax(mod(scale q k^T)) v, with mask and score functions.

    Query t of row b stands at key position t + offset[b]: causal, window and ALiBi compare positions.
    All conditions combine by "and".
    """

    scale: float
    offset: np.ndarray  # (B,) or, one for all rows, (1,) int64
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)  # reach to the left and right, own position included
    sparse: Sparse | None = None
    key_lengths: np.ndarray | None = None  # (B,) int64: keys from there on are padding
    documents: np.ndarray | None = None  # (S,) int64: only keys of the same document
    mask: np.ndarray | None = None  # bool, broadcastable to (B, H, T, S)
    softcap: float = 0.0  # c: scores become c tanh(score / c); 0 is off
    alibi_slopes: np.ndarray | None = None  # (H,) float64
    score_mod: Callable[..., Any] | None = None
    score_mod_grad: Callable[..., Any] | None = None
    buffers: tuple[np.ndarray, ...] = ()
    dropout_p: float = 0.0
    dropout_key: DrawKey | None = None

    def check(self, B: int, H: int, T: int, S: int) -> None:
        """Raise `ShapeError`, `RangeError` or `ConfigError` unless this fits q (B, H, T, D) and k (B, K, S, D)."""
        pairs = [(name, getattr(self, name)) for name in ("offset", "key_lengths", "documents", "alibi_slopes")]
        origin = None if self.sparse is None else self.sparse.origin
        for (name, array), expected in zip([*pairs, ("origin", origin)], ((B,), (B,), (S,), (H,), (B,)), strict=True):
            one_for_all = name in ("offset", "origin") and array is not None and array.shape == (1,)
            if array is not None and array.shape != expected and not one_for_all:
                raise ShapeError(
                    "attention",
                    f"{name} has shape {array.shape}, expected {expected} for (B, H, T, S) = {(B, H, T, S)}",
                    "Make the problem with make_problem, for these arrays",
                )
        if self.mask is not None:
            sizes = zip(self.mask.shape[::-1], (S, T, H, B), strict=False)
            if self.mask.ndim > 4 or any(n not in (1, full) for n, full in sizes):
                problem = f"mask has shape {self.mask.shape}, expected {(B, H, T, S)}"
                raise ShapeError("attention", problem, "Broadcast it to that")
        if self.documents is not None and T != S:
            raise ShapeError("attention", f"documents pack {S} tokens, there are {T} queries", "Give as many")
        lengths = self.key_lengths
        if lengths is not None and lengths.size and (lengths.min() < 0 or lengths.max() > S):
            raise RangeError("attention", f"key_lengths are {lengths.tolist()}, expected 0 to {S}", "Count the keys")
        if self.dropout_p and self.dropout_key is None:
            raise ConfigError("attention", "dropout has no key", "Give dropout_key")
