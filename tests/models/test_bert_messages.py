"""BERT: a config or call that makes no sense is refused with one exact message, before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_bert import KINDS, SHAPE, bert

import minitransformer as mt
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{name: ({name: 0}, f"{name} is 0, expected a positive integer. Pass such a number.") for name in SHAPE},
    "layers": (
        {"num_hidden_layers": 10_001},
        "num_hidden_layers is 10001, expected at most 10000. Pass a smaller number.",
    ),
    "width": (
        {"hidden_size": 2**31},
        "hidden_size is 2147483648, expected at most 2147483647. Pass a smaller number.",
    ),
    "heads": (
        {"num_attention_heads": 3},
        "hidden_size 8 is not divisible by num_attention_heads 3. Choose a number of heads that divides the width.",
    ),
    "activation": (
        {"hidden_act": "gelu_new"},
        "hidden_act is 'gelu_new', expected one of ('gelu', 'relu', 'silu'). Pass one of them.",
    ),
    "dropout": (
        {"hidden_dropout_prob": 1.0},
        "the dropout rate is 1.0, expected a number in [0, 1). 0 turns dropout off.",
    ),
    "deviation": (
        {"initializer_range": -1},
        "initializer_range is -1, expected a number from 0, finite. Change initializer_range.",
    ),
    "eps": ({"layer_norm_eps": "0"}, "layer_norm_eps is '0', expected a number from 0, finite. Change layer_norm_eps."),
    "pad": (
        {"pad_token_id": 13},
        "pad_token_id is 13, expected at most 12 with vocab_size 13. Count it in vocab_size, or name an id below.",
    ),
    "negative pad": ({"pad_token_id": -1}, "pad_token_id is -1, expected an integer from 0. Change pad_token_id."),
    "field": ({"attention_probs_dropout_prob": 0.1}, None),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(bad: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        mt.BERTConfig(**{**SHAPE, **bad})
    if message is None:
        message = "has no field 'attention_probs_dropout_prob'. Did you mean 'hidden_dropout_prob'?"
    assert str(error.value) == f"BERTConfig: {message}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_config_is_refused(kind: str) -> None:
    name = KINDS[kind].__name__
    with pytest.raises(DTypeError) as error:
        KINDS[kind](mt.GPTConfig())  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{name}: config is GPTConfig(vocab_size=50257, ")
    assert str(error.value).endswith(", expected a BERTConfig. Pass mt.BERTConfig(...).")


IDS = np.array([[1, 2, 3], [4, 5, 6]])
MASK = (
    "BERT: attention_mask has shape {} and dtype {}, expected (2, 3) with 1 for real tokens and 0 for padding. "
    "Count the tokens in the cache too, and use bools or integers 0 and 1."
)
BAD_CALLS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "id": (
        RangeError,
        {"input_ids": [[1, 13]]},
        "embedding: the id at position (0, 1) is 13, expected 0 to 12 (vocabulary size 13). "
        "Use the tokenizer that the model was made with, or a larger vocab_size.",
    ),
    "long": (
        RangeError,
        {"input_ids": np.zeros((1, 10), int)},
        "BERT: the sequence is too long: 10 tokens, expected at most max_position_embeddings 9. "
        "Shorten it, or make a model with more positions.",
    ),
    "1-D": (
        ShapeError,
        {"input_ids": IDS[0]},
        "BERT: input_ids have shape (3,), expected (batch, length). Add a batch axis: ids[None].",
    ),
    "empty": (
        ShapeError,
        {"input_ids": IDS[:, :0]},
        "BERT: input_ids hold no tokens, shape (2, 0). Pass at least one token per row.",
    ),
    "float": (
        DTypeError,
        {"input_ids": IDS * 1.0},
        "BERT: input_ids have dtype float64, expected integers. Encode text with a tokenizer.",
    ),
    "type": (
        RangeError,
        {"token_type_ids": [[0, 1, 0], [0, 0, 2]]},
        "BERT: the token type at position (1, 2) is 2, expected 0 to 1. "
        "Number the segments from 0, or make a model with a larger type_vocab_size.",
    ),
    "negative type": (
        RangeError,
        {"token_type_ids": -IDS},
        "BERT: the token type at position (0, 0) is -1, expected 0 to 1. "
        "Number the segments from 0, or make a model with a larger type_vocab_size.",
    ),
    "types": (
        ShapeError,
        {"token_type_ids": IDS[:1]},
        "BERT: token_type_ids have shape (1, 3), expected (2, 3). Give one id per position.",
    ),
    **{
        f"mask {name}": (ShapeError, {"attention_mask": mask}, MASK.format(mask.shape, mask.dtype))
        for name, mask in {"shape": np.ones((2, 2), int), "values": IDS, "dtype": np.ones((2, 3))}.items()
    },
}
BAD_TARGETS: dict[str, tuple[str, type[Exception], dict[str, Any], str]] = {
    "masked shape": (
        "masked",
        ShapeError,
        {"labels": IDS[:, :2]},
        "BERTForMaskedLM: labels have shape (2, 2), expected (2, 3). Give one id per position.",
    ),
    "masked id": (
        "masked",
        RangeError,
        {"labels": [[-100, 0, 1], [2, 13, 3]]},
        "BERTForMaskedLM: the label at position (1, 1) is 13, expected 0 to 12 or ignore_index -100. "
        "Use the tokenizer of the model.",
    ),
    "classes shape": (
        "classes",
        ShapeError,
        {"labels": [[0], [1]]},
        "BERTForSequenceClassification: labels have shape (2, 1), expected (2,). Give one per row.",
    ),
    "class": (
        "classes",
        RangeError,
        {"labels": [-100, 3]},
        "BERTForSequenceClassification: the label at position (1,) is 3, expected 0 to 2 or ignore_index -100. "
        "Make the model with a larger num_labels.",
    ),
    "float class": (
        "classes",
        DTypeError,
        {"labels": [0.0, 1.0]},
        "BERTForSequenceClassification: labels have dtype float64, expected integers. Encode text with a tokenizer.",
    ),
    "one end": (
        "answers",
        ConfigError,
        {"start_positions": [0, 1]},
        "BERTForQuestionAnswering: got one of start_positions and end_positions, expected both or neither. Add it.",
    ),
    "end": (
        "answers",
        RangeError,
        {"start_positions": [0, 2], "end_positions": [3, 0]},
        "BERTForQuestionAnswering: the end position at position (0,) is 3, expected 0 to 2 or ignore_index -100. "
        "Count the tokens of the row from 0.",
    ),
}


@pytest.mark.parametrize(("kind", "call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_refused(kind: type[Exception], call: dict[str, Any], message: str) -> None:
    with pytest.raises(kind) as error:
        bert()(**{"input_ids": IDS, **call})
    assert str(error.value) == message


@pytest.mark.parametrize(("head", "kind", "call", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_wrong_targets_are_refused_before_anything_is_computed(
    head: str, kind: type[Exception], call: dict[str, Any], message: str
) -> None:
    model = bert(head)
    model.encoder = None  # nothing is asked of it
    with pytest.raises(kind) as error:
        model(IDS, **call)
    assert str(error.value) == message


def test_a_batch_without_targets_has_no_number_of_them() -> None:
    for head, names in (("masked", "('labels',)"), ("answers", "('start_positions', 'end_positions')")):
        model = bert(head)
        with pytest.raises(ConfigError) as error:
            model.num_targets(input_ids=IDS, start_positions=[1, 2])
        assert str(error.value) == f"{type(model).__name__}: the batch has not all of {names}. Give them."
