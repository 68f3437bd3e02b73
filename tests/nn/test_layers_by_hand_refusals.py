"""What the layers of encoder and decoder by hand refuse, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minitransformer import nn
from minitransformer.autograd import OPS
from minitransformer.errors import ConfigError, DTypeError, MaskError, ShapeError
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.decode.step import block_shapes
from minitransformer.ops.decoder_layer import DecoderOptions
from minitransformer.ops.encoder_layer import EncoderOptions

PROBLEM = Problem(0.5, np.zeros(1, np.int64))


def wrong(decodes: bool, position: int = 0, array: Any = ()) -> list[Any]:
    """The inputs of a layer of width 4 with one head; the one at `position` is replaced by `array`, if given."""
    shapes = block_shapes(1, 1, 4, 3, "relu")
    given = [(1, 2, 4), (1, 3, 4), *shapes[:6], *shapes] if decodes else [(1, 2, 4), *shapes]
    inputs: list[Any] = [np.ones(shape) for shape in given]
    if not isinstance(array, tuple):
        inputs[position] = array
    return inputs


@pytest.mark.parametrize(
    ("decodes", "position", "array", "error", "message"),
    [
        (False, 0, np.ones((2, 4)), ShapeError, r"encoder_layer: x has shape \(2, 4\), expected \(B, T, C\)"),
        (False, 0, np.ones((1, 2, 4), int), DTypeError, "encoder_layer: x has dtype int64"),
        (False, 3, np.ones((4, 4)), ShapeError, r"encoder_layer: qkv has shape \(4, 4\), expected \(12, 4\)"),
        (False, 1, None, DTypeError, "encoder_layer: norm1 has dtype NoneType"),
        (True, 0, np.ones((1, 2, 3)), ShapeError, r"decoder_layer: norm1 has shape \(4,\), expected \(3,\)"),
        (
            True,
            1,
            np.ones((1, 3, 5)),
            ShapeError,
            r"memory has shape \(1, 3, 5\), expected \(1, S, 4\) for x \(1, 2, 4\)",
        ),
        (True, 1, np.ones((2, 3, 4)), ShapeError, r"memory has shape \(2, 3, 4\), expected \(1, S, 4\)"),
        (True, 1, np.ones((3, 4)), ShapeError, r"memory has shape \(3, 4\), expected \(1, S, 4\)"),
        (True, 1, np.ones((1, 3, 4), int), DTypeError, "decoder_layer: memory has dtype int64"),
        (True, 10, np.ones((4, 4)), ShapeError, r"decoder_layer: cross_qkv has shape \(4, 4\), expected \(12, 4\)"),
        (True, 18, np.ones((4, 5)), ShapeError, r"decoder_layer: up has shape \(3, 4\), expected \(5, 4\)"),
    ],
)
def test_refused_arrays(decodes: bool, position: int, array: Any, error: type[Exception], message: str) -> None:
    options = DecoderOptions(1, PROBLEM, PROBLEM) if decodes else EncoderOptions(1, PROBLEM)
    with pytest.raises(error, match=message):
        OPS["decoder_layer" if decodes else "encoder_layer"](*wrong(decodes, position, array), options=options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (EncoderOptions(3, PROBLEM), ShapeError, r"expected \(B, T, C\) with C divisible by 3 heads"),
        (EncoderOptions(1, PROBLEM, activation="elu"), ConfigError, "encoder_layer: activation is 'elu'"),
        (
            EncoderOptions(1, PROBLEM._replace(mask=np.ones((3, 3), bool))),
            ShapeError,
            r"mask has shape \(3, 3\), expected \(1, 1, 2, 2\)",
        ),
        (DecoderOptions(3, PROBLEM, PROBLEM), ShapeError, r"expected \(B, T, C\) with C divisible by 3 heads"),
        (DecoderOptions(1, PROBLEM, PROBLEM, activation="elu"), ConfigError, "decoder_layer: activation is 'elu'"),
        (
            DecoderOptions(1, PROBLEM._replace(mask=np.ones((2, 3), bool)), PROBLEM),
            ShapeError,
            r"mask has shape \(2, 3\), expected \(1, 1, 2, 2\)",
        ),
        (
            DecoderOptions(1, PROBLEM, PROBLEM._replace(mask=np.ones((2, 2), bool))),
            ShapeError,
            r"mask has shape \(2, 2\), expected \(1, 1, 2, 3\)",
        ),
    ],
)
def test_refused_options(options: Any, error: type[Exception], message: str) -> None:
    decodes = isinstance(options, DecoderOptions)
    with pytest.raises(error, match=message):
        OPS["decoder_layer" if decodes else "encoder_layer"](*wrong(decodes), options=options)


@pytest.mark.parametrize(("name", "kind"), [("encoder_layer", "EncoderOptions"), ("decoder_layer", "DecoderOptions")])
def test_options_of_another_kind_are_refused(name: str, kind: str) -> None:
    with pytest.raises(DTypeError, match=f"{name}: options is a NoneType, expected {kind}"):
        OPS[name](*wrong(name == "decoder_layer"), options=None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: nn.EncoderLayer(8, 2, 4)(np.ones((2, 3, 7))),
            ShapeError,
            r"EncoderLayer: x has shape \(2, 3, 7\), expected \(batch, length, 8\)",
        ),
        (lambda: nn.EncoderLayer(8, 2, 4)(np.ones((2, 3, 8), int)), DTypeError, "EncoderLayer: x has dtype int64"),
        (
            lambda: nn.EncoderLayer(8, 2, 4)(np.ones((2, 3, 8)), np.ones((2, 3), bool)),
            MaskError,
            r"attn_mask has shape \(2, 3\), expected one that broadcasts to \(B, H, T, S\) = \(2, 2, 3, 3\)",
        ),
        (
            lambda: nn.EncoderLayer(8, 2, 4)(np.ones((2, 3, 8)), np.ones((3, 3), int)),
            MaskError,
            "attn_mask has dtype int64, expected bool",
        ),
        (
            lambda: nn.DecoderLayer(8, 2, 4)(np.ones((2, 8)), np.ones((2, 3, 8))),
            ShapeError,
            r"DecoderLayer: x has shape \(2, 8\), expected \(batch, length, 8\)",
        ),
        (
            lambda: nn.DecoderLayer(8, 2, 4)(np.ones((2, 3, 8)), np.ones((2, 3, 7))),
            ShapeError,
            r"DecoderLayer: memory has shape \(2, 3, 7\), expected \(batch, length, 8\)",
        ),
        (
            lambda: nn.DecoderLayer(8, 2, 4)(np.ones((2, 3, 8)), np.ones((1, 3, 8))),
            ShapeError,
            r"memory has shape \(1, 3, 8\), expected \(2, S, 8\)",
        ),
        (
            lambda: nn.DecoderLayer(8, 2, 4)(np.ones((2, 3, 8)), np.ones((2, 3, 8)), is_causal=1),
            ConfigError,
            "attention: is_causal is 1, expected a bool",
        ),
    ],
)
def test_refused_calls(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
