"""The vision transformer against one assembled from PyTorch's layers with the same weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_layers_torch import ENCODER, below, same_weights

import minitransformer as mt
from minitransformer import nn

pytestmark = pytest.mark.peers


def images(B: int, channels: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, channels, size, size))


@given(across=st.integers(1, 3), P=st.integers(1, 4), channels=st.integers(1, 3), C=st.integers(1, 5))
def test_patch_embedding_is_conv2d(
    torch: Any, parity: Callable[..., Any], across: int, P: int, channels: int, C: int
) -> None:
    layer = nn.PatchEmbedding(across * P, P, channels, C).to("float64")
    weight, bias = layer.projection.weight, layer.projection.bias
    kernel = torch.tensor(weight.numpy().reshape(C, channels, P, P), requires_grad=True)
    flat = kernel.reshape(C, -1)
    shift = torch.tensor(bias.numpy(), requires_grad=True)
    parity(
        layer,
        lambda x: torch.nn.functional.conv2d(x, flat.reshape(C, channels, P, P), shift, stride=P).flatten(2).mT,
        images(2, channels, across * P, 0),
        parameters={"weight": (weight, flat), "bias": (bias, shift)},
    )


def theirs(torch: Any, config: mt.VisionConfig) -> Any:
    C = config.hidden_size
    layer = torch.nn.TransformerEncoderLayer(
        C, config.num_attention_heads, config.intermediate_size, 0.0, "gelu", batch_first=True, norm_first=True
    )
    model = torch.nn.Module()
    model.projection = torch.nn.Linear(config.num_channels * config.patch_size**2, C)
    model.class_token = torch.nn.Parameter(torch.zeros(C))
    model.positions = torch.nn.Parameter(torch.zeros(1 + config.num_patches, C))
    model.encoder = torch.nn.TransformerEncoder(
        layer, config.num_hidden_layers, torch.nn.LayerNorm(C), enable_nested_tensor=False
    )
    model.head = torch.nn.Linear(C, config.num_labels)
    return model.double()


@given(
    across=st.integers(1, 3),
    P=st.integers(1, 3),
    channels=st.integers(1, 3),
    heads=st.integers(1, 3),
    layers=st.integers(1, 2),
    B=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_logits_tokens_loss_and_gradients(
    torch: Any,
    parity: Callable[..., Any],
    across: int,
    P: int,
    channels: int,
    heads: int,
    layers: int,
    B: int,
    seed: int,
) -> None:
    config = mt.VisionConfig(
        image_size=across * P,
        patch_size=P,
        num_channels=channels,
        hidden_size=4 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=7,
        num_labels=3,
    )
    own, other = mt.VisionTransformer(config), theirs(torch, config)
    names = {"encoder.class_token": "class_token", "encoder.positions": "positions"}
    names |= {name: name for name in ("head.weight", "head.bias")}
    names |= {f"encoder.patches.projection.{n}": f"projection.{n}" for n in ("weight", "bias")}
    names |= {f"encoder.norm.{n}": f"encoder.norm.{n}" for n in ("weight", "bias")}
    for i in range(layers):
        names |= below(f"encoder.layers.{i}", f"encoder.layers.{i}", ENCODER)
    parameters = same_weights(own, other, names, seed)
    labels = np.random.default_rng(seed).integers(3, size=B)
    labels[1:2] = -100

    def ours(pixels: Any) -> tuple[Any, ...]:
        out = own(pixels, labels)
        return out.logits, own.encode(pixels), out.loss

    def expected(pixels: Any) -> tuple[Any, ...]:
        functional = torch.nn.functional
        patches = functional.unfold(pixels, P, stride=P).mT  # (B, N, channels P P)
        token = other.class_token.expand(B, 1, -1)
        encoded = other.encoder(torch.cat([token, other.projection(patches)], 1) + other.positions)
        logits = other.head(encoded[:, 0])
        return logits, encoded, functional.cross_entropy(logits, torch.from_numpy(labels))

    parity(ours, expected, images(B, channels, across * P, seed), parameters=parameters, tolerance=1e-10)
