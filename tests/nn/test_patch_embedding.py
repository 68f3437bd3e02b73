"""Patches: a convolution with the patch as its stride, one token each, and what is no such image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import nn
from minitransformer.errors import ConfigError, DTypeError, ShapeError

sides = {"across": st.integers(1, 3), "P": st.integers(1, 3), "channels": st.integers(1, 3), "C": st.integers(1, 4)}


def images(B: int, channels: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, B, channels, size)).standard_normal((B, channels, size, size))


@given(**sides, B=st.integers(0, 3))
def test_it_is_a_convolution_with_the_patch_as_stride(across: int, P: int, channels: int, C: int, B: int) -> None:
    layer = nn.PatchEmbedding(across * P, P, channels, C).to("float64")
    pixels = images(B, channels, across * P)
    kernel, bias = layer.projection.weight.numpy().reshape(C, channels, P, P), layer.projection.bias.numpy()
    expected = np.empty((B, across * across, C))
    for b, row, column, c in np.ndindex(B, across, across, C):
        seen = pixels[b, :, row * P : (row + 1) * P, column * P : (column + 1) * P]
        expected[b, row * across + column, c] = (seen * kernel[c]).sum() + bias[c]
    out = layer(pixels).numpy()
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


@given(**sides, data=st.data())
def test_a_patch_changes_its_own_token_alone(across: int, P: int, channels: int, C: int, data: st.DataObject) -> None:
    layer, pixels = nn.PatchEmbedding(across * P, P, channels, C), images(2, channels, across * P)
    row, column = (data.draw(st.integers(0, across - 1), label=name) for name in ("row", "column"))
    other = pixels.copy()
    other[1, :, row * P : (row + 1) * P, column * P : (column + 1) * P] += 1.0
    changed = (layer(pixels).numpy() != layer(other).numpy()).any(axis=-1)
    assert [tuple(place) for place in np.argwhere(changed)] == [(1, row * across + column)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients(dtype: str) -> None:
    layer = nn.PatchEmbedding(6, 3, 2, 5).to(dtype)
    mt.gradcheck(layer, images(2, 2, 6).astype(dtype))


def test_pixels_are_taken_in_the_dtype_of_the_weights() -> None:
    """Bytes over 255 are float64; a float32 model stays one."""
    layer, pixels = nn.PatchEmbedding(4, 2, 1, 3), mt.tensor(images(2, 1, 4), requires_grad=True)
    out = layer(pixels)
    assert (out.dtype, layer(pixels.numpy()).dtype) == (np.float32, np.float32)
    assert mt.grad(out.sum(), [pixels])[0].dtype == np.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (28, 5, 1, 8),
            "image_size 28 is not divisible by patch_size 5. "
            "Choose a patch size that divides the image size, or crop or pad the images.",
        ),
        ((4, 8, 1, 8), "image_size 4 is not divisible by patch_size 8. Choose a patch size that divides the image "),
        ((0, 2, 1, 8), "image_size is 0, expected a positive integer. Pass such a number."),
        ((8, 2.0, 1, 8), "patch_size is 2.0, expected a positive integer. Pass such a number."),
        ((8, 2, -1, 8), "in_channels is -1, expected a positive integer. Pass such a number."),
        ((8, 2, 1, None), "d_model is None, expected a positive integer. Pass such a number."),
    ],
)
def test_sizes_that_make_no_sense_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        nn.PatchEmbedding(*arguments)
    assert str(error.value).startswith(f"PatchEmbedding: {message}")


@pytest.mark.parametrize(
    ("pixels", "kind", "message"),
    [
        (
            np.zeros((2, 3, 4, 4), np.uint8),
            DTypeError,
            "pixels have dtype uint8, expected float32 or float64. Convert bytes with pixels.astype('float32') / 255.",
        ),
        (None, DTypeError, "pixels have dtype NoneType, expected float32 or float64. Convert"),
        (
            np.zeros((3, 4, 4)),
            ShapeError,
            "pixels have shape (3, 4, 4), expected (batch, 3, 4, 4). "
            "Resize the images to these sizes, with the channels before height and width.",
        ),
        (np.zeros((2, 4, 4, 3)), ShapeError, "pixels have shape (2, 4, 4, 3), expected (batch, 3, 4, 4). Resize"),
        (np.zeros((2, 1, 4, 4)), ShapeError, "pixels have shape (2, 1, 4, 4), expected (batch, 3, 4, 4). Resize"),
        (np.zeros((2, 3, 8, 2)), ShapeError, "pixels have shape (2, 3, 8, 2), expected (batch, 3, 4, 4). Resize"),
    ],
)
def test_what_is_no_such_image_is_refused(pixels: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        nn.PatchEmbedding(4, 2, 3, 5)(pixels)
    assert str(error.value).startswith(f"PatchEmbedding: {message}")
