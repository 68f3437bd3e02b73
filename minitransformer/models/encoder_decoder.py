"""What models with an encoder and a decoder share: the decoder, its loss, and generation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor, no_grad
from minitransformer.checks import check_count, check_flag, check_size, is_integer
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError
from minitransformer.generate import generate
from minitransformer.kernels.gpu.arrays import like
from minitransformer.models.base import Model, ModelOutput
from minitransformer.models.inputs import real_tokens, token_ids
from minitransformer.nn.decoder_layer import DecoderLayer
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.embedding import Embedding
from minitransformer.nn.kv_cache import DecoderCache, KVCache
from minitransformer.nn.linear import Linear
from minitransformer.nn.module import Module
from minitransformer.ops.dropout import check_rate
from minitransformer.ops.loss import check_targets

IGNORED = -100


def check_decoder(config: Any) -> None:
    """Keep `dropout_rate`, `pad_id` and `tie_embeddings` of a config with a `vocab_size`, or raise `ConfigError`."""
    op = type(config).__name__
    object.__setattr__(config, "dropout_rate", check_rate(op, config.dropout_rate))
    object.__setattr__(config, "pad_id", int(check_count(op, "pad_id", config.pad_id)))
    check_flag(op, "tie_embeddings", config.tie_embeddings)
    if config.pad_id >= config.vocab_size:
        problem = f"pad_id is {config.pad_id}, expected less than vocab_size {config.vocab_size}"
        raise ConfigError(op, problem, "Keep one token of the vocabulary for padding")


class Decoder(Module):
    """Logits of the next token from the tokens before it and a memory: the right half of Vaswani et al. 2017.

    Token embeddings are multiplied by sqrt(C), sinusoids added. Without a `head` the embedding is the output matrix
    too (Press and Wolf 2017).
    """

    def __init__(
        self,
        embedding: Embedding,
        max_length: int,
        num_heads: int,
        dff: int,
        num_layers: int,
        dropout_rate: float,
        tie_embeddings: bool,
    ) -> None:
        vocab_size, C = embedding.weight.shape
        self.embedding = embedding
        self.dropout = Dropout(dropout_rate)
        self.layers = [DecoderLayer(C, num_heads, dff, dropout_rate) for _ in range(num_layers)]
        self.head = None if tie_embeddings else Linear(C, vocab_size, bias=False)
        self.table = F.sinusoidal_positions(max_length, C)  # (T, C) float64, not a parameter

    def forward(
        self,
        ids: np.ndarray,
        memory: Tensor,
        real: np.ndarray | None = None,
        memory_mask: np.ndarray | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, V) for ids (B, T) after those in the cache; `real` (B, past + T) is False for padding."""
        T = ids.shape[1]
        past = 0 if cache is None else cache.length
        if real is None:
            positions, mask = np.arange(past, past + T), None
        else:
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)[:, past:]  # (B, T)
            mask = real[:, None, None]  # (B, 1, 1, past + T)
        if cache is not None:
            cache.own.reserve(T)
        x = embed(self.embedding, ids, self.table[positions], self.dropout)
        for n, layer in enumerate(self.layers):
            x = layer(x, memory, mask, memory_mask, is_causal=True, cache=cache, cache_layer=n)
        if cache is not None:
            cache.own.advance(T)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)


def embed(embedding: Embedding, ids: np.ndarray, positions: np.ndarray, dropout: Dropout) -> Tensor:
    """Scaled embeddings plus the sinusoids of their positions: (B, T, C)."""
    x = embedding(ids)
    return dropout(x * math.sqrt(x.shape[-1]) + like(x.data, positions.astype(x.dtype)))


def scaled_embedding(vocab_size: int, d_model: int) -> Embedding:
    """Weights of deviation d_model ** -0.5: times sqrt(d_model), and as output matrix, they are of unit scale."""
    embedding = Embedding(vocab_size, d_model)
    draw = random.generator().standard_normal
    embedding.weight.data = draw((vocab_size, d_model), dtype=np.float32) / np.float32(d_model**0.5)
    return embedding


class EncoderDecoder(Model):
    """A model with `decoder`, `encode` and, in its config, `pad_id`: p(y | x) = prod p(y_t | y_<t, x)."""

    decoder: Decoder

    def decode(
        self,
        memory: Tensor,
        memory_mask: np.ndarray | None,
        decoder_input_ids: Any,
        decoder_attention_mask: Any,
        labels: Any,
        label_smoothing: float,
        cache: DecoderCache | None = None,
    ) -> ModelOutput:
        """Logits and, if there are labels, the loss: see `forward`."""
        op, pad = type(self).__name__, self.config.pad_id
        wanted = None
        if labels is not None:
            wanted = token_ids(op, "labels", labels)
            check_targets(op, "label", wanted, self.decoder.embedding.weight.shape[0])
            wanted = np.where(wanted == pad, IGNORED, wanted)
        if decoder_input_ids is None:
            if wanted is None:
                raise DTypeError(op, "got no decoder_input_ids", "Pass them, or labels to make them of")
            ids = np.full_like(wanted, pad)
            ids[:, 1:] = np.where(wanted[:, :-1] == IGNORED, pad, wanted[:, :-1])
        else:
            ids = token_ids(op, "decoder_input_ids", decoder_input_ids)
        B, T = ids.shape
        past = 0 if cache is None else cache.length
        self._check_decoder("labels" if decoder_input_ids is None else "decoder_input_ids", ids, past, memory, wanted)
        real = real_tokens(op, decoder_attention_mask, B, past + T)
        logits = self.decoder(ids, memory, real, memory_mask, cache)  # (B, T, V)
        loss = None
        if wanted is not None:
            loss = F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)
        return ModelOutput(loss=loss, logits=logits, cache=cache)

    def _check_decoder(self, name: str, ids: np.ndarray, past: int, memory: Tensor, wanted: np.ndarray | None) -> None:
        op, (B, T), most = type(self).__name__, ids.shape, len(self.decoder.table)
        if memory.shape[0] != B:
            problem = f"{name} have {B} rows, expected {memory.shape[0]}, one for each row of the source"
            raise ShapeError(op, problem, "Give source and target one batch size")
        if past + T > most:
            problem = f"{name} hold {past + T} tokens, expected at most output_seq_len {most}"
            raise RangeError(op, problem, "Shorten them, or make a model with a larger output_seq_len")
        if wanted is None:
            return
        if wanted.shape != ids.shape:
            problem = f"labels have shape {wanted.shape}, expected {ids.shape} as decoder_input_ids"
            raise ShapeError(op, problem, "Give the next token of each position, -100 for none")
        given = wanted != IGNORED
        if (wanted == ids)[given].all() and ((ids[:, 1:] != ids[:, :-1]) & given[:, 1:] & given[:, :-1]).any():
            problem = "labels are the decoder_input_ids themselves, expected the token that follows each"
            raise ConfigError(op, problem, "Leave out decoder_input_ids, then they are made of the labels")

    def num_targets(self, **batch: Any) -> int:
        """How many tokens of `labels` are neither -100 nor padding."""
        if batch.get("labels") is None:
            raise ConfigError(type(self).__name__, "the batch has no labels", "Give them")
        labels = token_ids(type(self).__name__, "labels", batch["labels"])
        return int(((labels != IGNORED) & (labels != self.config.pad_id)).sum())

    def make_cache(self, batch_size: int, length: int | None = None) -> DecoderCache:
        """A cache for a decoder that reads up to `length` tokens (default: as many as it can)."""
        length = len(self.decoder.table) if length is None else length
        check_size("make_cache", batch_size=batch_size, length=length)
        attn, weight = self.decoder.layers[0].attn, self.decoder.embedding.weight
        layers = len(self.decoder.layers)
        own = KVCache(layers, batch_size, attn.num_kv_heads, length, attn.head_width, weight.dtype, weight.device)
        return DecoderCache(own)

    def continue_with(
        self,
        memory: Tensor,
        memory_mask: np.ndarray | None,
        decoder_input_ids: Any,
        max_new_tokens: int,
        options: dict[str, Any],
    ) -> np.ndarray:
        """Generate from a memory: `decoder_input_ids` (B, T), by default `pad_id` once a row, and what follows them."""
        op, B, most = type(self).__name__, memory.shape[0], len(self.decoder.table)
        if "attention_mask" in options:
            raise DTypeError(op, "attention_mask is that of the source", "Pass decoder_attention_mask for the prompt")
        if "decoder_attention_mask" in options:
            options["attention_mask"] = options.pop("decoder_attention_mask")
        if decoder_input_ids is None:
            decoder_input_ids = np.full((B, 1), self.config.pad_id, np.int64)
        ids = token_ids(op, "decoder_input_ids", decoder_input_ids)
        if len(ids) != B:
            problem = f"decoder_input_ids have {len(ids)} rows, expected {B}, one for each row of the source"
            raise ShapeError(op, problem, "Give source and target one batch size")
        if is_integer(max_new_tokens) and ids.shape[1] + max_new_tokens > most:
            asked = f"{ids.shape[1]} tokens and max_new_tokens {int(max_new_tokens)}"
            problem = f"{asked} are too many, expected at most output_seq_len {most} together"
            raise RangeError(op, problem, "Ask for fewer, or make a model with a larger output_seq_len")
        return generate(Continuing(self, memory, memory_mask), ids, max_new_tokens=max_new_tokens, **options)


class Continuing:
    """A model at a source that it has read, as `generate` asks for: rows of it may be several of one source."""

    def __init__(self, model: EncoderDecoder, memory: Tensor, memory_mask: np.ndarray | None) -> None:
        self.model, self.memory, self.memory_mask = model, memory, memory_mask
        self.config = SimpleNamespace(block_size=len(model.decoder.table), slides=False)
        self.train, self.eval, self.make_cache = model.train, model.eval, model.make_cache

    @property
    def training(self) -> bool:
        return self.model.training

    def __call__(
        self, ids: np.ndarray, attention_mask: np.ndarray | None = None, cache: DecoderCache | None = None
    ) -> ModelOutput:
        times = len(ids) // max(self.memory.shape[0], 1)  # beams of each source
        if times > 1:
            self.memory = Tensor(np.repeat(self.memory.data, times, axis=0))
            if self.memory_mask is not None:
                self.memory_mask = np.repeat(self.memory_mask, times, axis=0)
        return self.model.decode(self.memory, self.memory_mask, ids, attention_mask, None, 0.0, cache)


def without_dropout(model: EncoderDecoder, encode: Any) -> Any:
    """What `encode()` returns of a model in eval mode, without gradients."""
    was_training = model.training
    model.eval()
    try:
        with no_grad():
            return encode()
    finally:
        model.train(was_training)
