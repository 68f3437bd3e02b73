"""BERT: an encoder whose tokens see each other in both directions (Devlin et al. 2019)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer import random
from minitransformer.autograd import Tensor
from minitransformer.checks import shown
from minitransformer.errors import DTypeError, RangeError
from minitransformer.models.base import Model, ModelOutput
from minitransformer.models.bert_config import BERTConfig
from minitransformer.models.inputs import real_tokens, token_ids
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.embedding import Embedding
from minitransformer.nn.encoder_layer import EncoderLayer
from minitransformer.nn.linear import Linear
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm


class BERTEmbeddings(Module):
    """dropout(norm(word + position + token type)), three learned tables of width C."""

    def __init__(self, config: BERTConfig) -> None:
        C = config.hidden_size
        self.word = Embedding(config.vocab_size, C)
        self.position = Embedding(config.max_position_embeddings, C)
        self.token_type = Embedding(config.type_vocab_size, C)
        self.norm = LayerNorm(C, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, ids: np.ndarray, types: np.ndarray) -> Tensor:
        """(B, T, C) for ids (B, T) and types (B, T), or (1,) if all tokens are of one."""
        positions = np.arange(ids.shape[1])
        return self.dropout(self.norm(self.word(ids) + self.position(positions) + self.token_type(types)))


class BERTEncoder(Module):
    """Embeddings and layers: what all BERT models share, and what fine-tuning takes over."""

    def __init__(self, config: BERTConfig) -> None:
        self.config = config
        self.embeddings = BERTEmbeddings(config)
        self.layers = [
            EncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.hidden_dropout_prob,
                activation=config.hidden_act,
                layer_norm_eps=config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        ]

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Tensor, ...]:
        """The states (B, T, C) of all tokens: the embeddings, then what each layer made of them."""
        ids = token_ids("BERT", "input_ids", input_ids)
        B, T = ids.shape
        most = self.config.max_position_embeddings
        if most < T:
            raise RangeError(
                "BERT",
                f"the sequence is too long: {T} tokens, expected at most max_position_embeddings {most}",
                "Shorten it, or make a model with more positions",
            )
        types = np.zeros(1, np.int64)
        if token_type_ids is not None:
            types = token_ids("BERT", "token_type_ids", token_type_ids, (B, T))
            _check_types(types, self.config.type_vocab_size)
        real = real_tokens("BERT", attention_mask, B, T)
        mask = None if real is None else real[:, None, None, :]  # (B, 1, 1, S)
        states = [self.embeddings(ids, types)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)


class Pooler(Module):
    """tanh(W x_0 + b): the first token's state stands for its row, (B, T, C) -> (B, C)."""

    def __init__(self, C: int) -> None:
        self.dense = Linear(C, C)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense(states[:, 0]).tanh()


class EncoderModel(Model):
    """Base of `BERT` and of the models with a head: an encoder, and how weights start."""

    config: BERTConfig

    def __init__(self, config: BERTConfig) -> None:
        op = type(self).__name__
        if not isinstance(config, BERTConfig):
            raise DTypeError(op, f"config is {shown(config)}, expected a BERTConfig", "Pass mt.BERTConfig(...)")
        self.config = config
        self.encoder = BERTEncoder(config)

    def initialise(self) -> None:
        """Matrices normal with deviation `initializer_range`, biases and the row of `pad_token_id` 0, norms 1."""
        draw = random.generator().standard_normal
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.data = np.float32(self.config.initializer_range) * draw(parameter.shape, dtype=np.float32)
            elif name.endswith("bias"):
                parameter.data = np.zeros_like(parameter.data)
        word = self.encoder.embeddings.word.weight
        word.data[self.config.pad_token_id] = 0
        self.name_call_sites()


class BERT(EncoderModel):
    """The encoder with a pooler, without a loss: states of tokens, and one vector for each row.

    Weights start normal with deviation `initializer_range`, biases at 0; `mt.manual_seed` decides the numbers.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config.hidden_size)
        self.initialise()

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> ModelOutput:
        """`hidden_states`, L + 1 of shape (B, T, C), and `pooler_output` (B, C) for integer `input_ids` (B, T).

        `attention_mask` (B, T) is 1 for real tokens and 0 for padding, which no token then attends to; without it all
        are real. `token_type_ids` (B, T) number the segments from 0; without them all are of the first. Positions
        count from the start of the row, so padding belongs at its end.

        Raises RangeError for ids, types and lengths out of range, ShapeError or DTypeError for what is no such
        array.
        """
        states = self.encoder(input_ids, attention_mask, token_type_ids)
        return ModelOutput(hidden_states=states, pooler_output=self.pooler(states[-1]))


def _check_types(types: np.ndarray, count: int) -> None:
    outside = np.argwhere((types < 0) | (types >= count))
    if len(outside):
        place = tuple(int(i) for i in outside[0])
        raise RangeError(
            "BERT",
            f"the token type at position {place} is {int(types[place])}, expected 0 to {count - 1}",
            "Number the segments from 0, or make a model with a larger type_vocab_size",
        )
