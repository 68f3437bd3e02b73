"""The encoder-decoder against PyTorch's stacked modules with the same weights, in float64: loss and all gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.bench.torch_models import TorchTransformer

pytestmark = pytest.mark.peers


@given(
    shape=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    heads=st.sampled_from([1, 2, 4]),
    S=st.integers(1, 6),
    T=st.integers(1, 6),
    seed=st.integers(0, 99),
    padded=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_loss_and_gradients(
    torch: Any, shape: tuple[int, int], heads: int, S: int, T: int, seed: int, padded: bool
) -> None:
    mt.manual_seed(seed)
    model = mt.Transformer(13, 16, heads, 20, 6, 6, 0.0, num_encoder_layers=shape[0], num_decoder_layers=shape[1])
    model.to("float64")
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = parameter.numpy() + 0.1 * rng.standard_normal(parameter.shape)
    twin = TorchTransformer(model)
    batch = {"input_ids": rng.integers(1, 13, (3, S)), "labels": rng.integers(1, 13, (3, T))}
    if padded:
        batch["input_ids"][0, (S + 1) // 2 :] = 0
        batch["labels"][1, (T + 1) // 2 :] = 0
    loss = model(**batch).loss
    loss.backward()
    other = twin.loss(batch)
    other.backward()
    np.testing.assert_allclose(loss.item(), other.item(), rtol=0, atol=1e-10)
    theirs = dict(twin.module.named_parameters())
    for name, parameter in model.named_parameters():
        found, expected = parameter.grad, theirs[twin.names[name]].grad.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10, err_msg=name)
