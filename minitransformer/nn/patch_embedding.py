"""Patches of images as the tokens of a sequence."""

from __future__ import annotations

from typing import Any

from minitransformer.autograd import Tensor, as_array
from minitransformer.checks import check_size
from minitransformer.errors import ConfigError, DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import is_array, like
from minitransformer.nn.linear import Linear
from minitransformer.nn.module import Module


class PatchEmbedding(Module):
    """Pixels (B, channels, height, width) -> one token a patch (B, N, C): one linear layer over the patch's pixels.

    Images are squares of `image_size`, patches squares of `patch_size` P, which must divide it; so
    N = (image_size / P)^2, in rows from the top left. The same as a convolution with kernel and stride P
    (Dosovitskiy et al. 2021): `projection.weight` (C, channels P^2) is its kernel (C, channels, P, P), flattened.
    """

    def __init__(self, image_size: int, patch_size: int, in_channels: int, d_model: int) -> None:
        check_size(
            "PatchEmbedding", image_size=image_size, patch_size=patch_size, in_channels=in_channels, d_model=d_model
        )
        if image_size % patch_size:
            raise ConfigError(
                "PatchEmbedding",
                f"image_size {image_size} is not divisible by patch_size {patch_size}",
                "Choose a patch size that divides the image size, or crop or pad the images",
            )
        self.image_size, self.patch_size, self.in_channels = int(image_size), int(patch_size), int(in_channels)
        self.projection = Linear(self.in_channels * self.patch_size**2, d_model)

    def forward(self, pixels: Any) -> Tensor:
        x = self.as_pixels(pixels)
        B, P, across = x.shape[0], self.patch_size, self.image_size // self.patch_size
        x = x.reshape(B, self.in_channels, across, P, across, P)
        x = x.permute(0, 2, 4, 1, 3, 5)  # (B, across, across, channels, P, P)
        return self.projection(x.reshape(B, across * across, self.in_channels * P * P))  # (B, N, C)

    def as_pixels(self, pixels: Any) -> Tensor:
        """`pixels` as a Tensor in the dtype of the weights; `DTypeError` or `ShapeError` for what is no such image."""
        array = as_array("PatchEmbedding", pixels)
        if not is_array(array) or array.dtype.kind not in "fc":
            raise DTypeError(
                "PatchEmbedding",
                f"pixels have dtype {getattr(array, 'dtype', type(array).__name__)}, expected float32 or float64",
                "Convert bytes with pixels.astype('float32') / 255",
            )
        size = self.image_size
        if array.ndim != 4 or array.shape[1:] != (self.in_channels, size, size):
            raise ShapeError(
                "PatchEmbedding",
                f"pixels have shape {array.shape}, expected (batch, {self.in_channels}, {size}, {size})",
                "Resize the images to these sizes, with the channels before height and width",
            )
        x = pixels if isinstance(pixels, Tensor) else Tensor(like(self.projection.weight.data, array))
        # Dividing bytes gives float64, which would make float64 of all that follows.
        return x.to(self.projection.weight.dtype) if array.dtype.kind == "f" else x
