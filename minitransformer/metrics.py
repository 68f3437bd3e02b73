"""Numbers that say how good a model is, from its losses."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss) for a mean loss in nats per token: the number of equally likely choices; inf if it overflows."""
    return math.exp(loss) if loss < 709 else math.inf


def bits_per_byte(loss: float, tokens: int, bytes: int) -> float:
    """Bits that `tokens` targets at mean `loss` (nats per token) cost per byte of the text they spell.

    Unlike perplexity it does not depend on the tokenizer.
    """
    return loss * tokens / (math.log(2) * bytes) if bytes else 0.0
