"""What an attention call asks for beside its arrays: checked once, then read by every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minitransformer.random import DrawKey


class Problem(NamedTuple):
    """The static part of softmax(mod(scale q k^T)) v, with mask and score functions.

    Query t of row b stands at key position t + offset[b]: causal, window and ALiBi compare positions.
    All conditions combine by "and".
    """

    scale: float
    offset: np.ndarray  # (B,) or, one for all rows, (1,) int64
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)  # reach to the left and right, own position included
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
