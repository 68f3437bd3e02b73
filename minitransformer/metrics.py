"""Numbers that say how good a model is, from its losses and from what it predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from minitransformer.autograd import as_host
from minitransformer.checks import check_count, check_number, shown
from minitransformer.errors import DataError, DTypeError, ShapeError


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


def accuracy(predictions: Any, targets: Any) -> float:
    """The share of integer `targets` (...) that `predictions` (...) hit; those of -100 do not count.

    The predictions of logits (..., V) are `logits.argmax(-1)`. Raises `DTypeError` for what are no integers,
    `ShapeError` for shapes that differ, `DataError` if no target counts.
    """
    given = {"predictions": predictions, "targets": targets}
    found, wanted = (as_host("accuracy", array) for array in given.values())
    for name, array in zip(given, (found, wanted), strict=True):
        if array.dtype.kind not in "iu":
            problem = f"{name} have dtype {array.dtype}, expected integers"
            raise DTypeError("accuracy", problem, "Take the likeliest classes: logits.argmax(-1)")
    if found.shape != wanted.shape:
        problem = f"predictions have shape {found.shape}, targets {wanted.shape}"
        raise ShapeError("accuracy", problem, "Give one prediction for each target")
    counted = wanted != -100
    if not counted.any():
        raise DataError("accuracy", "there is no target that counts", "Give at least one that is not -100")
    return float((found == wanted)[counted].mean())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of `predictions` that are their reference, character for character.

    Raises `DTypeError` for what are no lists of strings, `ShapeError` for lists of different length, `DataError` for
    empty ones.
    """
    for name, texts in (("predictions", predictions), ("references", references)):
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            problem = f"{name} are {shown(texts)}, expected a list of strings"
            raise DTypeError("exact_match", problem, "Decode them, and put a single one in a list")
    if len(predictions) != len(references):
        problem = f"there are {len(predictions)} predictions and {len(references)} references"
        raise ShapeError("exact_match", problem, "Give one prediction for each reference")
    if not predictions:
        raise DataError("exact_match", "there is nothing to compare", "Give at least one pair")
    return sum(a == b for a, b in zip(predictions, references, strict=True)) / len(predictions)
