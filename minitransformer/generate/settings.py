"""What `generate` may be told, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np

from minitransformer.autograd import as_host
from minitransformer.checks import is_number, shown
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

_POSITIVE = (Real, lambda x: is_number(x, 0) and float(x) > 0, "a positive number")
_OFF = "None turns it off"
_SAMPLING: dict[str, tuple[type, Callable[[Any], bool], str, str]] = {
    "temperature": (*_POSITIVE, "do_sample=False takes the likeliest token"),
    "top_k": (Integral, lambda k: k >= 1, "an integer of at least 1", _OFF),
    "top_p": (Real, lambda p: 0 < p <= 1, "a number above 0 and at most 1", _OFF),
    "min_p": (Real, lambda p: 0 <= p <= 1, "a number from 0 to 1", _OFF),
}
_SETTINGS: dict[str, tuple[type, Callable[[Any], bool], str, str]] = {
    "max_new_tokens": (Integral, lambda n: 0 <= n < 2**62, "an integer of at least 0", "Pass such a number"),
    "repetition_penalty": (*_POSITIVE, "1 turns it off"),
    "num_beams": (Integral, lambda n: 0 < n < 2**31, "an integer of at least 1", "1 is no beam search"),
    "length_penalty": (Real, is_number, "a finite number", "0 compares sums, 1 means per token"),
    "eos_token_id": (Integral, lambda i: i >= 0, "a token id", _OFF),
    **_SAMPLING,
}


def check_settings(do_sample: bool, **settings: Any) -> None:
    for name, value in settings.items():
        kind, fine, expected, way_out = _SETTINGS[name]
        if value is None and way_out == _OFF:
            continue
        if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, kind) or not fine(value):
            raise ConfigError("generate", f"{name} is {shown(value)}, expected {expected}", way_out)
        if not do_sample and name in _SAMPLING and value != 1:
            raise ConfigError("generate", f"{name} is {shown(value)} but nothing is sampled", "Pass do_sample=True")
    if do_sample and settings["num_beams"] > 1:
        problem = f"num_beams is {shown(settings['num_beams'])} with do_sample=True, expected one of them"
        raise ConfigError("generate", problem, "A beam search draws nothing")
    if settings["num_beams"] == 1 and settings["length_penalty"] != 1:
        problem = f"length_penalty is {shown(settings['length_penalty'])} but nothing is searched"
        raise ConfigError("generate", problem, "Pass num_beams=4")


def check_prompt(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids (B, T) as int64, and which of them are real tokens, bool (B, T)."""
    ids = as_host("generate", input_ids)
    if ids.dtype.kind not in "iu":
        raise DTypeError("generate", f"input_ids have dtype {ids.dtype}, expected integers", "Encode the prompt")
    if ids.dtype == np.uint64 and ids.size and ids.max() >= 2**63:
        raise RangeError("generate", f"input_ids hold {ids.max()}, which is no token", "Encode the prompt")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ShapeError(
            "generate",
            f"input_ids have shape {ids.shape}, expected (batch, length) with at least one token",
            "Add a batch axis: ids[None]" if ids.ndim == 1 else "Begin each row with a token",
        )
    if attention_mask is None:
        return ids.astype(np.int64), np.ones(ids.shape, bool)
    mask = as_host("generate", attention_mask)
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise ShapeError(
            "generate",
            f"attention_mask has shape {mask.shape}, expected {ids.shape} with 1 for real tokens, 0 for padding",
            "Pad prompts on the left and mark the padding with 0",
        )
    if not (mask[:, -1] != 0).all():
        raise ConfigError("generate", "a row ends with padding", "Pad prompts on the left")
    return ids.astype(np.int64), mask != 0
