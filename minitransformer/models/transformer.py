"""The Transformer of "Attention is all you need": sequences to sequences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer.autograd import Tensor
from minitransformer.errors import ConfigError, RangeError
from minitransformer.models.base import Config, ModelOutput
from minitransformer.models.encoder_decoder import (
    Decoder,
    EncoderDecoder,
    check_decoder,
    embed,
    scaled_embedding,
    without_dropout,
)
from minitransformer.models.inputs import real_tokens, token_ids
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.encoder_layer import EncoderLayer


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The arguments of `Transformer`, which is made from them and not from this."""

    vocab_size: int
    d_model: int
    num_heads: int
    dff: int
    input_seq_len: int
    output_seq_len: int
    dropout_rate: float
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    pad_id: int = 0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "num_heads", "dff", "input_seq_len", "output_seq_len")
        for name in (*sizes, "num_encoder_layers", "num_decoder_layers"):
            self.keep_size(name)
        check_decoder(self)
        if self.d_model % self.num_heads:
            problem = f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}"
            raise ConfigError("TransformerConfig", problem, "Choose a number of heads that divides the width")


class Transformer(EncoderDecoder):
    """p(y | x) = prod_t p(y_t | y_<t, x), after Vaswani et al. 2017: post-norm, ReLU, sinusoidal positions.

    `input_seq_len` and `output_seq_len` are the longest source and target. `pad_id` fills sources behind their end:
    where `attention_mask` is not given, tokens of that id are not attended to. It is also what a target begins
    with, as in T5 (Raffel et al. 2020), and as a label it counts for nothing, as -100. With `tie_embeddings` encoder,
    decoder and output share one matrix, else each has its own. `mt.manual_seed` decides the first weights.
    """

    config: TransformerConfig

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_heads: int,
        dff: int,
        input_seq_len: int,
        output_seq_len: int,
        dropout_rate: float,
        *,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        pad_id: int = 0,
        tie_embeddings: bool = True,
    ) -> None:
        self.config = config = TransformerConfig(
            vocab_size,
            d_model,
            num_heads,
            dff,
            input_seq_len,
            output_seq_len,
            dropout_rate,
            num_encoder_layers,
            num_decoder_layers,
            pad_id,
            tie_embeddings,
        )
        C, rate = config.d_model, config.dropout_rate
        self.embedding = scaled_embedding(config.vocab_size, C)
        self.dropout = Dropout(rate)
        self.encoder = [EncoderLayer(C, config.num_heads, config.dff, rate) for _ in range(config.num_encoder_layers)]
        self.decoder = Decoder(
            self.embedding if config.tie_embeddings else scaled_embedding(config.vocab_size, C),
            config.output_seq_len,
            config.num_heads,
            config.dff,
            config.num_decoder_layers,
            rate,
            config.tie_embeddings,
        )
        self.table = F.sinusoidal_positions(config.input_seq_len, C)  # (S, C) float64, not a parameter
        self.name_call_sites()

    @classmethod
    def from_config(cls, config: TransformerConfig) -> Transformer:
        return cls(**asdict(config))

    def forward(
        self,
        input_ids: Any,
        decoder_input_ids: Any = None,
        attention_mask: Any = None,
        decoder_attention_mask: Any = None,
        labels: Any = None,
        *,
        label_smoothing: float = 0.0,
    ) -> ModelOutput:
        """Logits (B, T, V) for integer `input_ids` (B, S) and `decoder_input_ids` (B, T), and the mean loss of labels.

        `labels` (B, T) are the tokens that follow each decoder input (teacher forcing); alone they are enough: the
        decoder is then given `pad_id` and all of them but the last. -100 and `pad_id` are ignored. The masks, (B, S)
        and (B, T), are 1 for real tokens.

        Raises RangeError for ids outside the vocabulary, for what is too long and for a source of padding alone.
        """
        memory, memory_mask = self._encode(input_ids, attention_mask)
        return self.decode(memory, memory_mask, decoder_input_ids, decoder_attention_mask, labels, label_smoothing)

    def encode(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        """The encoder's output (B, S, C), which the decoder attends to."""
        return self._encode(input_ids, attention_mask)[0]

    def _encode(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, np.ndarray | None]:
        ids = token_ids("Transformer", "input_ids", input_ids)
        B, S = ids.shape
        if len(self.table) < S:
            problem = f"input_ids hold {S} tokens, expected at most input_seq_len {len(self.table)}"
            raise RangeError("Transformer", problem, "Shorten them, or make a model with a larger input_seq_len")
        real = real_tokens("Transformer", attention_mask, B, S)
        if real is None:
            real = ids != self.config.pad_id
        empty = np.flatnonzero(~real.any(axis=1))
        if empty.size:
            problem = f"row {empty[0]} of input_ids holds only padding, expected at least one token"
            raise RangeError("Transformer", problem, "Leave it out of the batch, or give it an end token")
        mask = None if real.all() else real[:, None, None]  # (B, 1, 1, S)
        x = embed(self.embedding, ids, self.table[:S], self.dropout)  # (B, S, C)
        for layer in self.encoder:
            x = layer(x, mask)
        return x, mask

    def generate(
        self,
        input_ids: Any,
        *,
        max_new_tokens: int,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """Answer each row of `input_ids` (B, S): ids (B, 1 + new), of which the first is `pad_id`.

        A target may begin with other tokens, `decoder_input_ids` (B, T), left-padded with 0 in
        `decoder_attention_mask`. All other options are those of `minitransformer.generate.generate`. The source is
        encoded once.
        """
        memory, memory_mask = without_dropout(self, lambda: self._encode(input_ids, attention_mask))
        return self.continue_with(memory, memory_mask, decoder_input_ids, max_new_tokens, options)
