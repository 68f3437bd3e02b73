"""Settings, prompts and weights that generation refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import V, gpt

import minitransformer as mt
from minitransformer.errors import ConfigError, DTypeError, NonFiniteError, RangeError, ShapeError

POSITIVE, OFF = "expected a positive number", "None turns it off."
GREEDY = "do_sample=False takes the likeliest token."
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer of at least 0. Pass such a number."),
    ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5, expected an integer of at least 0. Pass such a number."),
    ({"max_new_tokens": True}, "max_new_tokens is True, expected an integer of at least 0. Pass such a number."),
    *(
        ({"temperature": t}, f"temperature is {t!r}, {POSITIVE}. {GREEDY}")
        for t in (0, -1.0, np.inf, np.nan, None, "x")
    ),
    *(({"top_k": k}, f"top_k is {k!r}, expected an integer of at least 1. {OFF}") for k in (0, 2.5, True)),
    *(({"top_p": p}, f"top_p is {p!r}, expected a number above 0 and at most 1. {OFF}") for p in (0, 1.5, "x")),
    *(({"min_p": p}, f"min_p is {p!r}, expected a number from 0 to 1. {OFF}") for p in (-0.1, 1.5, np.nan)),
    *(
        ({"repetition_penalty": x}, f"repetition_penalty is {x!r}, {POSITIVE}. 1 turns it off.")
        for x in (0, -2, None, np.inf, True)
    ),
    *(({"eos_token_id": i}, f"eos_token_id is {i!r}, expected a token id. {OFF}") for i in (-1, 1.0, "x")),
    ({"seed": -1}, "seed is -1, expected an integer from 0 to 2**64 - 1. Pass such a seed."),
    *(
        ({"do_sample": False, name: value}, f"{name} is {value!r} but nothing is sampled. Pass do_sample=True.")
        for name, value in {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.0}.items()
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=lambda x: str(x)[:40])
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        gpt().generate([[1, 2]], **{"max_new_tokens": 1, "do_sample": True, **settings})
    assert str(error.value) == f"generate: {message}"


MASK = "expected (1, 2) with 1 for real tokens, 0 for padding. Pad prompts on the left and mark the padding with 0."


@pytest.mark.parametrize(
    ("kind", "ids", "mask", "message"),
    [
        (ShapeError, [1, 2], None, "have shape (2,), expected (batch, length) with at least one token. Add a batch"),
        (ShapeError, np.zeros((2, 0), int), None, "have shape (2, 0), expected (batch, length) with at least one"),
        (DTypeError, [[1.0]], None, "input_ids have dtype float64, expected integers. Encode the prompt."),
        (ShapeError, [[1, 2]], [[1]], f"attention_mask has shape (1, 1), {MASK}"),
        (ShapeError, [[1, 2]], [[2, 1]], f"attention_mask has shape (1, 2), {MASK}"),
        (ConfigError, [[1, 2]], [[1, 0]], "a row ends with padding. Pad prompts on the left."),
        (RangeError, [[1, V]], None, "the id at position (0, 1) is 20, expected 0 to 19 (vocabulary size 20)"),
    ],
)
def test_a_wrong_prompt_is_refused(kind: type[Exception], ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(kind) as error:
        gpt().generate(np.asarray(ids), attention_mask=mask, max_new_tokens=1)
    assert message in str(error.value)


def test_nan_weights_are_refused() -> None:
    model = mt.GPT(mt.GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4))
    model.wte.weight.data = np.full((5, 4), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match=r"^generate: the logits are NaN\. Load an earlier checkpoint"):
        model.generate(np.zeros((1, 2), int), max_new_tokens=1)
