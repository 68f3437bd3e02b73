"""What models are given, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.autograd import as_host
from minitransformer.errors import DTypeError, ShapeError


def token_ids(op: str, name: str, ids: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers of `shape`, or else (B, T) with T >= 1; the embedding checks the range of token ids."""
    array = as_host(op, ids)
    if array.dtype.kind not in "iu":
        raise DTypeError(op, f"{name} have dtype {array.dtype}, expected integers", "Encode text with a tokenizer")
    if array.shape != shape if shape is not None else array.ndim != 2:
        fix = "Add a batch axis: ids[None]" if array.ndim == 1 else "Give one id per position"
        if shape is not None and len(shape) == 1:
            fix = "Give one per row"
        raise ShapeError(op, f"{name} have shape {array.shape}, expected {shape or '(batch, length)'}", fix)
    if array.ndim == 2 and array.shape[1] == 0:
        raise ShapeError(op, f"{name} hold no tokens, shape {array.shape}", "Pass at least one token per row")
    return array


def real_tokens(op: str, mask: Any, B: int, S: int) -> np.ndarray | None:
    """Bool (B, S), True = real token."""
    if mask is None:
        return None
    array = as_host(op, mask)
    if array.dtype.kind not in "biu" or array.shape != (B, S) or not np.isin(array, (0, 1)).all():
        raise ShapeError(
            op,
            f"attention_mask has shape {array.shape} and dtype {array.dtype}, expected ({B}, {S}) with 1 for real "
            "tokens and 0 for padding",
            "Count the tokens in the cache too, and use bools or integers 0 and 1",
        )
    return array.astype(bool)
