"""Vision transformer: an image as a sequence of patches, classified by a token that is put before them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor, as_host
from minitransformer.checks import check_choice, shown
from minitransformer.errors import ConfigError, DTypeError, ShapeError
from minitransformer.models.base import Config, Model, ModelOutput, check_memory
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.encoder_layer import EncoderLayer
from minitransformer.nn.linear import Linear, parameter
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm
from minitransformer.nn.patch_embedding import PatchEmbedding
from minitransformer.ops.dropout import check_rate
from minitransformer.ops.loss import check_targets

INIT_STD = 0.02  # of the class token and the positions


@dataclass(frozen=True)
class VisionConfig(Config):
    """The shape of a vision transformer, in Hugging Face's names; the defaults are ViT-B/16's for ImageNet.

    Images are squares of `image_size` pixels, patches squares of `patch_size`, which divides it. `hidden_act` is
    "gelu" (by erf), "gelu_tanh", "relu" or "silu". `dropout` is the one rate of embeddings, attention weights,
    feed-forward and residual branches.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    dropout: float = 0.0
    num_labels: int = 1000

    def __post_init__(self) -> None:
        for name in [field.name for field in fields(self) if field.name not in ("hidden_act", "dropout")]:
            self.keep_size(name, 10_000 if name == "num_hidden_layers" else 2**31 - 1)  # no model has more layers
        check_choice("VisionConfig", "hidden_act", self.hidden_act, ("gelu", "gelu_tanh", "relu", "silu"))
        object.__setattr__(self, "dropout", check_rate("VisionConfig", self.dropout))
        if self.image_size % self.patch_size:
            raise ConfigError(
                "VisionConfig",
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
                "Choose a patch size that divides the image size, or crop or pad the images",
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "VisionConfig",
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}",
                "Choose a number of heads that divides the width",
            )

    @property
    def num_patches(self) -> int:
        """N, how many patches an image has."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters of the model hold."""
        C, inner = self.hidden_size, self.intermediate_size
        projection = (self.num_channels * self.patch_size**2 + 1) * C
        tokens = C + (1 + self.num_patches) * C  # class token, positions
        layer = 4 * (C + 1) * C + (C + 1) * inner + (inner + 1) * C + 4 * C  # attention, feed-forward, two norms
        return projection + tokens + self.num_hidden_layers * layer + 2 * C + (C + 1) * self.num_labels


class VisionEncoder(Module):
    """Pixels as tokens that have attended to each other: everything of a vision transformer but its head."""

    def __init__(self, config: VisionConfig) -> None:
        C, draw = config.hidden_size, random.generator().standard_normal

        def normal(name: str, *shape: int) -> Any:
            return parameter("VisionEncoder", name, shape, lambda: INIT_STD * draw(shape, dtype=np.float32))

        self.patches = PatchEmbedding(config.image_size, config.patch_size, config.num_channels, C)
        self.class_token = normal("class token", C)
        self.positions = normal("table of positions", 1 + config.num_patches, C)
        self.dropout = Dropout(config.dropout)
        shape = C, config.num_attention_heads, config.intermediate_size, config.dropout
        self.layers = [
            EncoderLayer(*shape, norm_first=True, activation=config.hidden_act) for _ in range(config.num_hidden_layers)
        ]
        self.norm = LayerNorm(C)

    def forward(self, pixels: Any) -> Tensor:
        """The normalised tokens (B, 1 + N, C) of `pixels`, the class token first."""
        return self.norm(self.states(pixels)[-1])

    def states(self, pixels: Any) -> tuple[Tensor, ...]:
        """What enters the first layer and what leaves each, (B, 1 + N, C), before the last norm."""
        x = self.patches(pixels)  # (B, N, C)
        token = F.expand(self.class_token, (x.shape[0], 1, x.shape[2]))
        states = [self.dropout(F.concat([token, x], dim=1) + self.positions)]  # (B, 1 + N, C)
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class VisionTransformer(Model):
    """The image classifier of Dosovitskiy et al. 2021, with the norm before each sublayer.

    Weights start as those of their layers, which at the paper's widths is a deviation of about 0.02; the class
    token and the positions start normal with 0.02. `mt.manual_seed` decides the numbers.
    """

    config: VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        if not isinstance(config, VisionConfig):
            problem = f"config is {shown(config)}, expected a VisionConfig"
            raise DTypeError("VisionTransformer", problem, "Pass mt.VisionConfig(...)")
        fix = "Make hidden_size or num_hidden_layers smaller"
        check_memory("VisionTransformer", config.num_parameters, fix)
        self.config = config
        self.encoder = VisionEncoder(config)
        self.head = Linear(config.hidden_size, config.num_labels)
        self.name_call_sites()

    def forward(self, pixels: Any, labels: Any = None, *, label_smoothing: float = 0.0) -> ModelOutput:
        """Logits (B, num_labels) for float `pixels` (B, num_channels, image_size, image_size).

        With integer `labels` (B,) also the mean loss over those that are not -100. `hidden_states` are what enters
        the first layer and what leaves each, all (B, 1 + N, C). Pixels are taken in the dtype of the weights.
        Raises `DTypeError`, `ShapeError` or, for a label that is no class, `RangeError`.
        """
        x = self.encoder.patches.as_pixels(pixels)
        given = None if labels is None else self._labels(labels, x.shape[0])
        states = self.encoder.states(x)
        logits = self.head(self.encoder.norm(states[-1][:, 0]))  # (B, num_labels)
        loss = None if given is None else F.cross_entropy(logits, given, label_smoothing=label_smoothing)
        return ModelOutput(loss=loss, logits=logits, hidden_states=states)

    def encode(self, pixels: Any) -> Tensor:
        """The normalised tokens (B, 1 + N, C) of `pixels`, the class token first: what a decoder may attend to."""
        return self.encoder(pixels)

    def num_targets(self, **batch: Any) -> int:
        """How many of the batch's `labels` are not -100."""
        if batch.get("labels") is None:
            raise ConfigError("VisionTransformer", "the batch has no labels", "Give one class per image")
        return int((self._labels(batch["labels"]) != -100).sum())

    def _labels(self, labels: Any, B: int | None = None) -> np.ndarray:
        """`labels` as an integer array (B,) of classes and -100."""
        op = "VisionTransformer"
        array = as_host(op, labels)
        if array.dtype.kind not in "iu":
            raise DTypeError(op, f"labels have dtype {array.dtype}, expected integers", "Number the classes from 0")
        if array.ndim != 1 or B not in (None, len(array)):
            expected = "(batch,)" if B is None else f"({B},)"
            raise ShapeError(op, f"labels have shape {array.shape}, expected {expected}", "Give one class per image")
        check_targets(op, "label", array, self.config.num_labels, fix="Number the classes from 0, or raise num_labels")
        return array
