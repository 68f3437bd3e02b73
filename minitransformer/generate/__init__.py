"""Generation: token by token from any model that can step, by sampling or by beam search.

A model can step if `model(ids, attention_mask=..., cache=...)` returns logits for the tokens it is given
after those in the cache, and if it has `config.block_size`, `config.slides` and `make_cache`. If it has
`steps(cache)` as GPT does, single tokens go that way.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from minitransformer import random
from minitransformer.autograd import no_grad
from minitransformer.checks import check_flag, shown
from minitransformer.errors import ConfigError, NonFiniteError
from minitransformer.generate.beams import Beams
from minitransformer.generate.sampling import penalise, sample
from minitransformer.generate.settings import check_prompt, check_settings
from minitransformer.generate.stepper import Stepper

__all__ = ["Streamer", "generate"]


class Streamer(Protocol):
    """Receives tokens as they are made; those of a beam search when it has ended."""

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
    num_beams: int = 1,
    length_penalty: float = 1.0,
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

    `num_beams` > 1 searches for the continuation with the highest log p / n ** `length_penalty`, n its number
    of new tokens: see `beams.Beams`.

    Past block_size, models with learned or sinusoidal positions re-read the last block_size tokens for
    every new one (a warning says so once); others slide. Raises ConfigError for settings out of range,
    NonFiniteError for NaN logits.
    """
    check_flag("generate", "do_sample", do_sample)
    check_flag("generate", "use_cache", use_cache)
    check_settings(
        do_sample,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
        eos_token_id=eos_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    ids, real = check_prompt(input_ids, attention_mask)
    seed = int(random.generator().integers(2**63)) if seed is None else random.check_seed("generate", seed)
    rows, T = ids.shape
    search = None
    if num_beams > 1:
        search = Beams(rows, num_beams, max_new_tokens, length_penalty, eos_token_id)
        ids, real = (np.repeat(x, num_beams, axis=0) for x in (ids, real))
    B = len(ids)
    prompt_length, padded = T, not real.all()
    done = np.zeros(B, bool)
    was_training = model.training
    model.eval()
    try:
        stepper = Stepper(model, B, T + max_new_tokens, use_cache)
        with no_grad():
            for step in range(max_new_tokens):
                logits = stepper.logits(ids[:, :T], real[:, :T] if padded else None).astype(np.float64)  # (B, V)
                _check_logits(logits, eos_token_id, num_beams)
                if repetition_penalty != 1:
                    penalise(logits, ids[:, :T], real[:, :T], repetition_penalty)
                if search is not None:
                    came_from, new, done = search.step(logits, ids[:, prompt_length:T])
                    ids, real = ids[came_from], real[came_from]
                    stepper.select(came_from)
                elif do_sample:
                    new = sample(logits, temperature, top_k, top_p, min_p, seed, step)
                else:
                    new = logits.argmax(axis=-1)
                if eos_token_id is not None and search is None:
                    new = np.where(done, eos_token_id, new)
                    done |= new == eos_token_id
                if ids.shape[1] == T:  # room for as many again
                    ids = np.concatenate([ids, np.empty_like(ids)], axis=1)
                    real = np.concatenate([real, np.ones_like(real)], axis=1)
                ids[:, T] = new
                T += 1
                if streamer is not None and search is None:
                    streamer.put(new)
                if done.all() and B:
                    break
    finally:
        model.train(was_training)
    out = ids[:, :T].copy()
    if search is not None:
        found = search.best(out[:, prompt_length:])
        out = np.concatenate([out[::num_beams, :prompt_length], found], axis=1)
        if streamer is not None:
            for new in found.T:
                streamer.put(new)
    if streamer is not None:
        streamer.end()
    return out


def _check_logits(logits: np.ndarray, eos_token_id: int | None, num_beams: int) -> None:
    V = logits.shape[1]
    if eos_token_id is not None and eos_token_id >= V:
        problem = f"eos_token_id is {shown(eos_token_id)}, expected less than the {V} tokens"
        raise ConfigError("generate", problem, "Use the tokenizer that the model was made with, or None")
    if num_beams > V:
        problem = f"num_beams is {shown(num_beams)}, expected at most the {V} tokens of the vocabulary"
        raise ConfigError("generate", problem, "Pass fewer beams")
    if np.isnan(logits).any():
        raise NonFiniteError("generate", "the logits are NaN", "Load an earlier checkpoint")
