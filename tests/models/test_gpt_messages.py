"""GPT: a config or call that makes no sense is refused with one exact message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import SHAPE, gpt

import minitransformer as mt
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

SIZE = "expected a positive integer. Pass such a number."
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{name: ({name: 0}, f"{name} is 0, {SIZE}") for name in [*SHAPE, "n_kv_head", "n_inner"]},
    "float size": ({"n_layer": 2.0}, f"n_layer is 2.0, {SIZE}"),
    "bool size": ({"n_head": True}, f"n_head is True, {SIZE}"),
    "no size": ({"vocab_size": None}, f"vocab_size is None, {SIZE}"),
    "window": ({"attention": "window", "window": 0}, f"window is 0, {SIZE}"),
    "dropout": ({"dropout": 1}, "the dropout rate is 1, expected a number in [0, 1). 0 turns dropout off."),
    "bias": ({"bias": 1}, "bias is 1, expected a bool. Pass a bool."),
    "tie": ({"tie_weights": "no"}, "tie_weights is 'no', expected a bool. Pass a bool."),
    "norm": ({"norm": "batch"}, "norm is 'batch', expected one of ('layer', 'rms'). Pass one of them."),
    "ffn": ({"ffn": "tanh"}, "ffn is 'tanh', expected one of ('gelu', 'relu', 'swiglu'). Pass one of them."),
    "attention": (
        {"attention": "none"},
        "attention is 'none', expected one of ('full', 'window', 'global_window', 'strided', 'linear'). "
        "Pass one of them.",
    ),
    "positions": (
        {"positions": "rotary"},
        "positions is 'rotary', expected one of ('learned', 'sinusoidal', 'rope', 'alibi', None). Pass one of them.",
    ),
    "heads": (
        {"n_head": 3},
        "n_embd 16 is not divisible by n_head 3. Choose a number of heads that divides the width.",
    ),
    "key heads": (
        {"n_head": 4, "n_kv_head": 3},
        "n_head 4 is not divisible by n_kv_head 3. Choose a number of key heads that divides n_head.",
    ),
    "rope": (
        {"n_embd": 6, "positions": "rope"},
        "rope needs an even head width, n_embd / n_head is 3. Change n_embd or n_head.",
    ),
    "window alone": (
        {"window": 4},
        "attention is 'full' with window 4. Set attention='window' or 'global_window' and window=N together.",
    ),
    "no window": (
        {"attention": "window"},
        "attention is 'window' with window None. Set attention='window' or 'global_window' and window=N together.",
    ),
    "n_global alone": (
        {"attention": "window", "window": 4, "n_global": 2},
        "attention is 'window' with n_global 2. Set attention='global_window' and n_global=N together.",
    ),
    "stride alone": (
        {"stride": 3},
        "attention is 'full' with stride 3. Set attention='strided' and stride=N together.",
    ),
    "linear scores": (
        {"attention": "linear", "positions": "alibi"},
        "alibi changes scores, and linear attention has none. Choose other positions.",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        mt.GPTConfig(**{**SHAPE, **bad})
    assert str(error.value) == f"GPTConfig: {message}"


IDS = np.array([[1, 2, 3]])
BAD_CALLS: dict[str, tuple[type[Exception], tuple[Any, ...], dict[str, Any], str]] = {
    "id": (
        RangeError,
        (np.array([[1, 2], [3, 25]]),),
        {},
        "embedding: the id at position (1, 1) is 25, expected 0 to 19 (vocabulary size 20). "
        "Use the tokenizer that the model was made with, or a larger vocab_size.",
    ),
    "negative id": (
        RangeError,
        ([[-1]],),
        {},
        "embedding: the id at position (0, 0) is -1, expected 0 to 19 (vocabulary size 20). "
        "Use the tokenizer that the model was made with, or a larger vocab_size.",
    ),
    "long": (
        RangeError,
        (np.zeros((1, 9), int),),
        {},
        "GPT: the sequence is too long: 9 tokens, expected at most block_size 8 with positions='learned'. "
        "Shorten it, or make a model with a larger block_size.",
    ),
    "1-D": (
        ShapeError,
        (IDS[0],),
        {},
        "GPT: input_ids have shape (3,), expected (batch, length). Add a batch axis: ids[None].",
    ),
    "3-D": (
        ShapeError,
        (IDS[None],),
        {},
        "GPT: input_ids have shape (1, 1, 3), expected (batch, length). Give one id per position.",
    ),
    "empty": (
        ShapeError,
        (IDS[:, :0],),
        {},
        "GPT: input_ids hold no tokens, shape (1, 0). Pass at least one token per row.",
    ),
    "float": (
        DTypeError,
        (IDS * 1.0,),
        {},
        "GPT: input_ids have dtype float64, expected integers. Encode text with a tokenizer.",
    ),
    "both": (
        DTypeError,
        (IDS,),
        {"labels": IDS, "targets": IDS},
        "GPT: got both labels and targets. labels are shifted inside, targets are already.",
    ),
    "labels": (
        ShapeError,
        (IDS,),
        {"labels": IDS[:, :2]},
        "GPT: labels have shape (1, 2), expected (1, 3). Give one id per position.",
    ),
    "targets": (
        DTypeError,
        (IDS,),
        {"targets": IDS * 1.0},
        "GPT: targets have dtype float64, expected integers. Encode text with a tokenizer.",
    ),
    "target": (
        RangeError,
        (IDS,),
        {"targets": [[1, 20, -1]]},
        "cross_entropy: the target at position (0, 1) is 20, expected 0 to 19 or ignore_index -100. "
        "Use the tokenizer that the model was made with.",
    ),
}
MASK = (
    "GPT: attention_mask has shape {} and dtype {}, expected (1, 3) with 1 for real tokens and 0 for padding. "
    "Count the tokens in the cache too, and use bools or integers 0 and 1."
)
BAD_CALLS |= {
    f"mask {name}": (ShapeError, (IDS,), {"attention_mask": mask}, MASK.format(mask.shape, mask.dtype))
    for name, mask in {
        "shape": np.ones((1, 2), int),
        "values": np.array([[0, 1, 2]]),
        "dtype": np.ones((1, 3)),
    }.items()
}


@pytest.mark.parametrize(("kind", "args", "kwargs", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_refused(
    kind: type[Exception], args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(kind) as error:
        gpt()(*args, **kwargs)
    assert str(error.value) == message


def test_too_long_counts_the_tokens_in_the_cache() -> None:
    model = gpt(positions="sinusoidal")
    cache = model.make_cache(1)
    model(IDS, cache=cache)
    with pytest.raises(RangeError, match=r"too long: 9 tokens, expected at most block_size 8 with positions='sinu"):
        model(np.zeros((1, 6), int), cache=cache)
    assert (cache.length, cache.stored) == (3, 3)


def test_a_cache_for_another_batch_size_is_refused() -> None:
    model = gpt()
    with pytest.raises(ShapeError, match=r"model.make_cache\(batch_size\) for this batch size"):
        model(IDS, cache=model.make_cache(2))


def test_a_full_cache_is_told_apart() -> None:
    model = gpt()
    cache = model.make_cache(1, 4)
    model(IDS, cache=cache)
    with pytest.raises(RangeError, match=r"^KVCache: 2 more tokens do not fit, 3 of 4 slots are filled. Make the"):
        model(IDS[:, :2], cache=cache)
