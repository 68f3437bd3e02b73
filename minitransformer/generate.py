"""Generation: sampling token by token from any model that can step.

A model can step if `model(ids, attention_mask=..., cache=...)` returns logits for the tokens it is given
after those in the cache, and if it has `config.block_size`, `config.slides` and `make_cache`. If it has
`steps(cache)` as GPT does, single tokens go that way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np

from minitransformer import random
from minitransformer.autograd import as_array, no_grad
from minitransformer.checks import check_flag, is_number, shown
from minitransformer.errors import ConfigError, DTypeError, NonFiniteError, RangeError, ShapeError


class Streamer(Protocol):
    """Receives tokens as they are made."""

    def put(self, ids: np.ndarray) -> None:
        """The new token of every row, (B,)."""

    def end(self) -> None:
        """No more tokens come."""


def generate(
    model: Any,
    input_ids: Any,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    attention_mask: Any = None,
    use_cache: bool = True,
    streamer: Streamer | None = None,
    seed: int | None = None,
) -> np.ndarray:
    """Continue each row of integer `input_ids` (B, T) by up to `max_new_tokens`: (B, T + new) int64.

    Greedy, or with `do_sample` drawn from softmax(logits / temperature) restricted to the `top_k` most
    likely tokens, to the fewest whose probability reaches `top_p` (Holtzman et al. 2019), and to those
    with at least `min_p` times the probability of the likeliest. `repetition_penalty` > 1 divides positive
    (multiplies negative) logits of tokens that have occurred (Keskar et al. 2019). After `eos_token_id` a
    row is filled with it, and generation ends when every row has ended. Rows of different length are padded
    on the left, with 0 in `attention_mask` (B, T). `seed` makes the draws a function of (seed, step, row).

    Past block_size, models with learned or sinusoidal positions re-read the last block_size tokens for
    every new one (a warning says so once); others slide. Raises ConfigError for settings out of range,
    NonFiniteError for NaN logits.
    """
    check_flag("generate", "do_sample", do_sample)
    check_flag("generate", "use_cache", use_cache)
    _check_settings(
        do_sample,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=eos_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    ids, real = _check_prompt(input_ids, attention_mask)
    B, T = ids.shape
    padded = not real.all()
    seed = int(random.generator().integers(2**63)) if seed is None else random.check_seed("generate", seed)
    done = np.zeros(B, bool)
    was_training = model.training
    model.eval()
    try:
        stepper = _Stepper(model, B, T + max_new_tokens, use_cache)
        with no_grad():
            for step in range(max_new_tokens):
                logits = stepper.logits(ids[:, :T], real[:, :T] if padded else None).astype(np.float64)  # (B, V)
                if eos_token_id is not None and eos_token_id >= logits.shape[1]:
                    problem = f"eos_token_id is {shown(eos_token_id)}, expected less than the {logits.shape[1]} tokens"
                    raise ConfigError("generate", problem, "Use the tokenizer that the model was made with, or None")
                if np.isnan(logits).any():
                    raise NonFiniteError("generate", "the logits are NaN", "Load an earlier checkpoint")
                if repetition_penalty != 1:
                    _penalise(logits, ids[:, :T], real[:, :T], repetition_penalty)
                if do_sample:
                    new = _sample(logits, temperature, top_k, top_p, min_p, seed, step)
                else:
                    new = logits.argmax(axis=-1)
                if eos_token_id is not None:
                    new = np.where(done, eos_token_id, new)
                    done |= new == eos_token_id
                if ids.shape[1] == T:  # room for as many again
                    ids = np.concatenate([ids, np.empty_like(ids)], axis=1)
                    real = np.concatenate([real, np.ones_like(real)], axis=1)
                ids[:, T] = new
                T += 1
                if streamer is not None:
                    streamer.put(new)
                if done.all() and B:
                    break
    finally:
        model.train(was_training)
    if streamer is not None:
        streamer.end()
    return ids[:, :T].copy()


class _Stepper:
    """Logits of the next token, from the cache as long as positions allow."""

    def __init__(self, model: Any, B: int, total: int, use_cache: bool) -> None:
        config = model.config
        self.model, self.block_size, self.slides = model, config.block_size, config.slides
        self.warned = False
        capacity = total if self.slides else min(total, self.block_size)
        self.cache = model.make_cache(B, capacity) if use_cache and B else None
        make_steps = getattr(model, "steps", None)
        self.steps = None if self.cache is None or make_steps is None else make_steps(self.cache)

    def logits(self, ids: np.ndarray, real: np.ndarray | None) -> np.ndarray:
        """(B, V) for the token after `ids` (B, T); `real` marks what is not padding, None if nothing is."""
        T = ids.shape[1]
        if self.block_size < T and not self.slides:
            if not self.warned:
                warnings.warn(
                    f"generate: past block_size {self.block_size} the last {self.block_size} tokens are read again "
                    "for every new one, because their positions are absolute",
                    stacklevel=4,
                )
            self.cache, self.warned = None, True
            ids, real = ids[:, -self.block_size :], None if real is None else real[:, -self.block_size :]
        if self.cache is None:
            return self.model(ids, attention_mask=real).logits.data[:, -1]
        if self.steps is not None and self.cache.length == T - 1:
            return self.steps(ids[:, -1], real)
        out = None
        while self.cache.length < T:  # one token, or the prompt in pieces of at most block_size
            end = min(T, self.cache.length + self.block_size)
            piece = ids[:, self.cache.length : end]
            out = self.model(piece, attention_mask=None if real is None else real[:, :end], cache=self.cache)
        assert out is not None
        return out.logits.data[:, -1]


_POSITIVE = (Real, lambda x: is_number(x, 0) and float(x) > 0, "a positive number")
_OFF = "None turns it off"
_SAMPLING: dict[str, tuple[type, Callable[[Any], bool], str, str]] = {
    "temperature": (*_POSITIVE, "do_sample=False takes the likeliest token"),
    "top_k": (Integral, lambda k: k >= 1, "an integer of at least 1", _OFF),
    "top_p": (Real, lambda p: 0 < p <= 1, "a number above 0 and at most 1", _OFF),
    "min_p": (Real, lambda p: 0 <= p <= 1, "a number from 0 to 1", _OFF),
}
_SETTINGS = {
    "max_new_tokens": (Integral, lambda n: 0 <= n < 2**62, "an integer of at least 0", "Pass such a number"),
    "repetition_penalty": (*_POSITIVE, "1 turns it off"),
    "eos_token_id": (Integral, lambda i: i >= 0, "a token id", _OFF),
    **_SAMPLING,
}


def _check_settings(do_sample: bool, **settings: Any) -> None:
    for name, value in settings.items():
        kind, fine, expected, way_out = _SETTINGS[name]
        if value is None and way_out == _OFF:
            continue
        if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, kind) or not fine(value):
            raise ConfigError("generate", f"{name} is {shown(value)}, expected {expected}", way_out)
        if not do_sample and name in _SAMPLING and value != 1:
            raise ConfigError("generate", f"{name} is {shown(value)} but nothing is sampled", "Pass do_sample=True")


def _check_prompt(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids (B, T) as int64, and which of them are real tokens, bool (B, T)."""
    ids = np.asarray(as_array("generate", input_ids))
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
    mask = np.asarray(as_array("generate", attention_mask))
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise ShapeError(
            "generate",
            f"attention_mask has shape {mask.shape}, expected {ids.shape} with 1 for real tokens, 0 for padding",
            "Pad prompts on the left and mark the padding with 0",
        )
    if not (mask[:, -1] != 0).all():
        raise ConfigError("generate", "a row ends with padding", "Pad prompts on the left")
    return ids.astype(np.int64), mask != 0


def _penalise(logits: np.ndarray, ids: np.ndarray, real: np.ndarray, penalty: float) -> None:
    rows, columns = np.nonzero(real)
    seen = np.zeros(logits.shape, bool)
    seen[rows, ids[rows, columns]] = True
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)


def _sample(
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
