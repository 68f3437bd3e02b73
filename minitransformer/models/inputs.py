"""What models are given, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.autograd import as_array
from minitransformer.errors import DTypeError, ShapeError


def token_ids(op: str, name: str, ids: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Token ids as an integer array (B, T) with T >= 1; the embedding checks their range."""
    array = np.asarray(as_array(op, ids))
    if array.dtype.kind not in "iu":
        raise DTypeError(op, f"{name} have dtype {array.dtype}, expected integers", "Encode text with a tokenizer")
    if array.ndim != 2 or (shape is not None and array.shape != shape):
        raise ShapeError(
            op,
            f"{name} have shape {array.shape}, expected {shape or '(batch, length)'}",
            "Add a batch axis: ids[None]" if array.ndim == 1 else "Give one id per position",
        )
    if array.shape[1] == 0:
        raise ShapeError(op, f"{name} hold no tokens, shape {array.shape}", "Pass at least one token per row")
    return array


def real_tokens(op: str, mask: Any, B: int, S: int) -> np.ndarray | None:
    """Bool (B, S), True = real token."""
    if mask is None:
        return None
    array = np.asarray(as_array(op, mask))
    if array.dtype.kind not in "biu" or array.shape != (B, S) or not np.isin(array, (0, 1)).all():
        raise ShapeError(
            op,
            f"attention_mask has shape {array.shape} and dtype {array.dtype}, expected ({B}, {S}) with 1 for real "
            "tokens and 0 for padding",
            "Count the tokens in the cache too, and use bools or integers 0 and 1",
        )
    return array.astype(bool)
