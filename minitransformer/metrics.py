"""Numbers that say how good a model is, from its losses."""

from __future__ import annotations

import math

from minitransformer.checks import check_count, check_number


def perplexity(loss: float) -> float:
    """exp(loss) for a mean loss in nats per token: the number of equally likely choices; inf if it overflows.

    Raises `ConfigError` for what is no finite number: the perplexity of a NaN says nothing.
    """
    loss = check_number("perplexity", "loss", loss, least=-math.inf)
    return math.exp(loss) if loss < 709 else math.inf


def bits_per_byte(loss: float, tokens: int, bytes: int) -> float:
    """Bits that `tokens` targets at mean `loss` (nats per token) cost per byte of the text they spell.

    Unlike perplexity it does not depend on the tokenizer. Raises `ConfigError` for a loss that is no finite
    number and for counts that are none.
    """
    op = "bits_per_byte"
    loss = check_number(op, "loss", loss, least=-math.inf)
    tokens, bytes = check_count(op, "tokens", tokens), check_count(op, "bytes", bytes)
    return tokens / bytes * loss / math.log(2) if bytes else 0.0
