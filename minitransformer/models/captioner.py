"""Images to captions: the encoder of a vision transformer, and a decoder that attends to its patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitransformer.autograd import Tensor
from minitransformer.checks import shown
from minitransformer.errors import DTypeError
from minitransformer.models.base import Config, ModelOutput
from minitransformer.models.encoder_decoder import (
    Decoder,
    EncoderDecoder,
    check_decoder,
    scaled_embedding,
    without_dropout,
)
from minitransformer.models.vision import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class CaptionerConfig(Config):
    """The shape of an `ImageCaptioner`: images as in `VisionConfig`, captions as in `Transformer`.

    Images are squares of `image_size` pixels, captions at most `output_seq_len` tokens of a vocabulary in which
    `pad_id` is for padding. `dropout_rate` is the one rate of all dropouts.
    """

    vocab_size: int
    output_seq_len: int
    image_size: int
    patch_size: int
    num_channels: int = 1
    d_model: int = 128
    num_heads: int = 4
    dff: int = 512
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    dropout_rate: float = 0.0
    pad_id: int = 0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "output_seq_len", "num_decoder_layers"):
            self.keep_size(name)
        check_decoder(self)
        vision = self.vision  # checks the others
        for name, field in (("d_model", "hidden_size"), ("num_heads", "num_attention_heads")):
            object.__setattr__(self, name, getattr(vision, field))

    @property
    def vision(self) -> VisionConfig:
        """The shape of the encoder."""
        return VisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.d_model,
            num_hidden_layers=self.num_encoder_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=self.dff,
            dropout=self.dropout_rate,
        )


class ImageCaptioner(EncoderDecoder):
    """p(caption | image) = prod_t p(y_t | y_<t, image), as Vinyals et al. 2015, with a transformer on both sides.

    The encoder is that of a `VisionTransformer`, the decoder that of a `Transformer`. `mt.manual_seed` decides the
    first weights.
    """

    config: CaptionerConfig

    def __init__(self, config: CaptionerConfig) -> None:
        if not isinstance(config, CaptionerConfig):
            problem = f"config is {shown(config)}, expected a CaptionerConfig"
            raise DTypeError("ImageCaptioner", problem, "Pass mt.CaptionerConfig(...)")
        self.config = config
        self.encoder = VisionEncoder(config.vision)
        self.decoder = Decoder(
            scaled_embedding(config.vocab_size, config.d_model),
            config.output_seq_len,
            config.num_heads,
            config.dff,
            config.num_decoder_layers,
            config.dropout_rate,
            config.tie_embeddings,
        )
        self.name_call_sites()

    def forward(
        self,
        pixels: Any,
        decoder_input_ids: Any = None,
        labels: Any = None,
        *,
        decoder_attention_mask: Any = None,
        label_smoothing: float = 0.0,
    ) -> ModelOutput:
        """Logits (B, T, V) for float `pixels` (B, channels, height, width) and `decoder_input_ids` (B, T).

        `decoder_input_ids`, `decoder_attention_mask` and `labels`, all (B, T), are as in `Transformer`.
        """
        memory = self.encode(pixels)
        return self.decode(memory, None, decoder_input_ids, decoder_attention_mask, labels, label_smoothing)

    def encode(self, pixels: Any) -> Tensor:
        """The encoder's tokens (B, 1 + patches, C), which the decoder attends to."""
        return self.encoder(pixels)

    def generate(self, pixels: Any, *, max_new_tokens: int, decoder_input_ids: Any = None, **options: Any) -> Any:
        """Captions of `pixels` (B, channels, height, width): ids (B, 1 + new), the first of them `pad_id`.

        A caption may begin with other tokens, `decoder_input_ids` (B, T), left-padded with 0 in
        `decoder_attention_mask`. All other options are those of `minitransformer.generate.generate`.
        """
        memory = without_dropout(self, lambda: self.encode(pixels))
        return self.continue_with(memory, None, decoder_input_ids, max_new_tokens, options)
