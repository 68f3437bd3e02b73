"""Encoders and decoders out of PyTorch's own modules, with the weights of models here, trained by fused AdamW.

The peers of `bench step --model` and of parity tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from minitransformer.errors import require
from minitransformer.models import BERTForMaskedLM, Transformer
from minitransformer.training import TrainConfig
from minitransformer.training.step import Batch

ATTENTION = {
    "qkv.weight": "in_proj_weight",
    "qkv.bias": "in_proj_bias",
    "out.weight": "out_proj.weight",
    "out.bias": "out_proj.bias",
}
FEED_FORWARD = {"ffn.up": "linear1", "ffn.down": "linear2"}


def layer_names(cross: bool) -> dict[str, str]:
    """PyTorch's name of each parameter of an encoder layer, or of a decoder layer if `cross`."""
    attentions = {"attn": "self_attn", **({"cross_attn": "multihead_attn"} if cross else {})}
    names = {f"{a}.{x}": f"{b}.{y}" for a, b in attentions.items() for x, y in ATTENTION.items()}
    same = {f"norm{i}": f"norm{i}" for i in range(1, 4 if cross else 3)}
    for ours, theirs in {**FEED_FORWARD, **same}.items():
        names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    return names


class TorchTransformer:
    """`Transformer` with tied embeddings, out of nn.TransformerEncoder and nn.TransformerDecoder."""

    def __init__(self, model: Transformer) -> None:
        self._torch = torch = require("torch", extra="peers", purpose="the PyTorch twin")
        config = model.config
        options = {"dim_feedforward": config.dff, "dropout": config.dropout_rate, "batch_first": True}
        encoder = torch.nn.TransformerEncoderLayer(config.d_model, config.num_heads, **options)
        decoder = torch.nn.TransformerDecoderLayer(config.d_model, config.num_heads, **options)
        self._encoder = torch.nn.TransformerEncoder(encoder, config.num_encoder_layers, enable_nested_tensor=False)
        self._decoder = torch.nn.TransformerDecoder(decoder, config.num_decoder_layers)
        self._embedding = torch.nn.Embedding(config.vocab_size, config.d_model)
        self.module = torch.nn.ModuleDict(
            {"embedding": self._embedding, "encoder": self._encoder, "decoder": self._decoder}
        )
        self.module.to(getattr(torch, str(model.embedding.weight.dtype)))
        self.names = {"embedding.weight": "embedding.weight"}
        for ours, theirs, count, cross in (
            ("encoder", "encoder.layers", config.num_encoder_layers, False),
            ("decoder.layers", "decoder.layers", config.num_decoder_layers, True),
        ):
            for n in range(count):
                self.names |= {f"{ours}.{n}.{a}": f"{theirs}.{n}.{b}" for a, b in layer_names(cross).items()}
        load(self.module, self.names, model.state_dict())
        dtype, self._pad, self._scale = self._embedding.weight.dtype, config.pad_id, math.sqrt(config.d_model)
        self._tables = [torch.tensor(table, dtype=dtype) for table in (model.table, model.decoder.table)]

    def loss(self, batch: Batch) -> Any:
        """Mean loss over the labels of `input_ids` (B, S) and `labels` (B, T) that are not padding."""
        torch = self._torch
        ids, labels = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["labels"])
        begun = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=self._pad)
        blocked = ids == self._pad
        blocked = blocked if blocked.any() else None
        T = labels.shape[1]
        causal = torch.nn.Transformer.generate_square_subsequent_mask(T, dtype=self._embedding.weight.dtype)
        memory = self._encoder(self._embed(ids, 0), src_key_padding_mask=blocked)
        x = self._decoder(
            self._embed(begun, 1), memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=blocked
        )
        logits = x @ self._embedding.weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self._pad)

    def _embed(self, ids: Any, table: int) -> Any:
        return self._embedding(ids) * self._scale + self._tables[table][: ids.shape[1]]


class TorchBERT:
    """`BERTForMaskedLM` out of nn.TransformerEncoder."""

    def __init__(self, model: BERTForMaskedLM) -> None:
        self._torch = torch = require("torch", extra="peers", purpose="the PyTorch twin")
        config, nn = model.config, torch.nn
        C, V, eps = config.hidden_size, config.vocab_size, config.layer_norm_eps
        layer = nn.TransformerEncoderLayer(
            C,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            config.hidden_act,
            eps,
            batch_first=True,
        )
        self._layers = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        parts = {
            "word": nn.Embedding(V, C),
            "position": nn.Embedding(config.max_position_embeddings, C),
            "token_type": nn.Embedding(config.type_vocab_size, C),
            "first_norm": nn.LayerNorm(C, eps),
            "layers": self._layers,
            "dense": nn.Linear(C, C),
            "norm": nn.LayerNorm(C, eps),
        }
        self.module = nn.ModuleDict(parts)
        self.module.register_parameter("bias", nn.Parameter(torch.zeros(V)))
        dtype = model.bias.dtype
        self.module.to(getattr(torch, str(dtype)))
        embeddings = {"norm": "first_norm", **{name: name for name in ("word", "position", "token_type")}}
        self.names = {"bias": "bias"}
        for ours, theirs in embeddings.items():
            for part in ("weight", "bias") if ours == "norm" else ("weight",):
                self.names[f"encoder.embeddings.{ours}.{part}"] = f"{theirs}.{part}"
        for name in ("dense", "norm"):
            self.names |= {f"{name}.{part}": f"{name}.{part}" for part in ("weight", "bias")}
        for n in range(config.num_hidden_layers):
            for ours, theirs in layer_names(cross=False).items():
                self.names[f"encoder.layers.{n}.{ours}"] = f"layers.layers.{n}.{theirs}"
        load(self.module, self.names, model.state_dict())

    def loss(self, batch: Batch) -> Any:
        """Mean loss over the masked tokens: `input_ids` and `labels` (B, T), -100 where nothing is asked."""
        torch, m = self._torch, self.module
        ids, labels = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["labels"])
        x = m["word"](ids) + m["position"].weight[: ids.shape[1]] + m["token_type"].weight[0]
        x = self._layers(m["first_norm"](x))
        x = m["norm"](torch.nn.functional.gelu(m["dense"](x)))
        logits = x @ m["word"].weight.T + m.bias
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


TWINS: dict[str, Any] = {"transformer": TorchTransformer, "bert": TorchBERT}


def load(module: Any, names: Mapping[str, str], weights: Mapping[str, np.ndarray]) -> None:
    """Write the weights here, by PyTorch's `names`, into its module."""
    torch = require("torch", extra="peers", purpose="the PyTorch twin")
    module.load_state_dict({names[name]: torch.tensor(array) for name, array in weights.items()})


class ModuleTrainer:
    """AdamW, clipping and schedule as `TrainStep` has them, for a model with `module` and `loss(batch)`."""

    def __init__(self, model: Any, train: TrainConfig) -> None:
        self._torch = torch = require("torch", extra="peers", purpose="the PyTorch twin")
        self._model, self._train, self._schedule = model, train, train.learning_rate_schedule()
        self._parameters = list(model.module.parameters())
        groups = [
            {"params": [p for p in self._parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)

    def __call__(self, batches: list[Batch], step: int) -> Any:
        self._optimizer.zero_grad()
        loss = self._model.loss(batches[0])
        loss.backward()
        if self._train.grad_clip:
            self._torch.nn.utils.clip_grad_norm_(self._parameters, self._train.grad_clip, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule(step)
        self._optimizer.step()
        return loss.detach()
