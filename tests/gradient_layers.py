"""Lines of the gradient table for the layers of encoder and decoder by hand: each option once alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from checker import Case, case

from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.decode.step import block_shapes
from minitransformer.ops.decoder_layer import DecoderOptions
from minitransformer.ops.encoder_layer import EncoderOptions
from minitransformer.random import DrawKey

RNG = np.random.default_rng(8)
KEY = DrawKey(seed=5, step=3, site=17, first_row=2)
DROPOUT = (0.4, KEY)


def problem(D: int, **options: Any) -> Problem:
    return Problem(scale=D**-0.5, offset=np.zeros(1, np.int64), **options)


def weights(shapes: tuple[tuple[int, ...], ...], biased: bool) -> list[np.ndarray | None]:
    return [None if i % 2 and not biased else RNG.standard_normal(shape) for i, shape in enumerate(shapes)]


def encoder(
    B: int = 2,
    T: int = 3,
    H: int = 2,
    D: int = 2,
    F: int = 3,
    bias: bool = True,
    attention: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    shapes = block_shapes(H, H, D, F, options.get("activation", "relu"))
    x = RNG.standard_normal((B, T, H * D))
    asked = EncoderOptions(H, problem(D, **attention or {}), **options)
    return case(x, *weights(shapes, bias), empty=B * T == 0, options=asked)


def decoder(
    B: int = 2,
    T: int = 3,
    S: int = 4,
    H: int = 2,
    D: int = 2,
    F: int = 3,
    bias: bool = True,
    attention: dict[str, Any] | None = None,
    cross: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    shapes = block_shapes(H, H, D, F, options.get("activation", "relu"))
    x, memory = (RNG.standard_normal((B, n, H * D)) for n in (T, S))
    asked = DecoderOptions(H, problem(D, **attention or {}), problem(D, **cross or {}), **options)
    return case(x, memory, *weights((*shapes[:6], *shapes), bias), empty=B * T == 0, options=asked)


def encoder_cases() -> list[Case]:
    return [
        encoder(),
        encoder(norm_first=True),
        encoder(bias=False),
        encoder(bias=False, norm_first=True),
        *(encoder(activation=name) for name in ("gelu", "gelu_tanh", "silu", "swiglu")),
        *(encoder(activation=name, bias=False) for name in ("gelu_tanh", "swiglu")),
        encoder(eps=0.1),
        encoder(attention={"causal": True}),
        encoder(attention={"mask": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], bool)}),
        encoder(attention={"dropout_p": 0.4, "dropout_key": KEY}),
        encoder(dropout1=DROPOUT),
        encoder(dropout2=DROPOUT, bias=False),
        encoder(hidden_dropout=DROPOUT),
        encoder(hidden_dropout=DROPOUT, activation="gelu_tanh"),
        encoder(norm_first=True, dropout1=DROPOUT, hidden_dropout=DROPOUT, dropout2=(0.3, KEY._replace(site=3))),
        encoder(B=1, T=1, H=1, D=1, F=1),
        encoder(T=0),
        encoder(B=0, norm_first=True),
    ]


def decoder_cases() -> list[Case]:
    return [
        decoder(),
        decoder(norm_first=True),
        decoder(bias=False),
        decoder(bias=False, norm_first=True, activation="swiglu"),
        decoder(eps=0.1),
        decoder(attention={"causal": True}),
        decoder(attention={"mask": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], bool)}),
        decoder(cross={"mask": RNG.random((2, 1, 1, 4)) < 0.5}),
        decoder(cross={"mask": np.zeros((3, 4), bool)}),
        decoder(cross={"dropout_p": 0.4, "dropout_key": KEY}),
        decoder(dropout1=DROPOUT, dropout3=(0.3, KEY._replace(site=3))),
        decoder(dropout2=DROPOUT, hidden_dropout=DROPOUT, activation="gelu"),
        decoder(norm_first=True, dropout1=DROPOUT, dropout2=(0.3, KEY._replace(site=3)), dropout3=DROPOUT),
        decoder(S=1),
        decoder(B=1, T=1, S=2, H=1, D=1, F=1),
        decoder(S=0),
        decoder(S=0, norm_first=True),
        decoder(T=0),
        decoder(B=0),
    ]
