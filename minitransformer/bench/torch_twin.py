"""The same GPT and the same training step in PyTorch, written for speed: the peer of benchmarks and parity tests.

Weights keep our names and layouts, so `state_dict()` of a model here is all it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minitransformer.errors import ConfigError, require
from minitransformer.models import GPTConfig
from minitransformer.training import TrainConfig
from minitransformer.training.step import Batch


class Twin:
    """GPT-2 with fused attention, trained by fused AdamW in the dtype of `weights`.

    Calls go to torch's functions directly, without modules in between. A loss comes back as a tensor:
    asking for its value would make the step wait.

    Raises `MissingExtraError` without torch, `ConfigError` for a model or a training that it cannot repeat.
    """

    def __init__(self, model: GPTConfig, weights: Mapping[str, np.ndarray], train: TrainConfig) -> None:
        self._torch = torch = require("torch", extra="peers", purpose="the PyTorch twin")
        plain = GPTConfig(model.vocab_size, model.block_size, model.n_layer, model.n_head, model.n_embd)
        if model != plain:
            raise ConfigError("Twin", f"got {model}, expected GPT-2's choices: {plain}", "Change the model")
        if train.optimizer != "adamw" or train.l1 or train.label_smoothing:
            raise ConfigError("Twin", f"got {train}, expected AdamW without l1 or label smoothing", "Change the config")
        self._model, self._train = model, train
        self._schedule = train.learning_rate_schedule()
        self.parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in weights.items()}
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)

    def __call__(self, batches: Sequence[Batch], step: int) -> Any:
        """Update the parameters once from `batches` at `step`, from 0; the mean loss over all their targets."""
        self._optimizer.zero_grad()
        counts = [_num_targets(batch) for batch in batches]
        total = 0.0
        for batch, count in zip(batches, counts, strict=True):
            loss = self.loss(batch) * (count / sum(counts))
            loss.backward()
            total = total + loss.detach()
        if self._train.grad_clip:
            # foreach is the faster way on a CPU too, but only the default elsewhere
            self._torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._train.grad_clip, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule(step)
        self._optimizer.step()
        return total

    def loss(self, batch: Batch) -> Any:
        """Mean loss over the targets of one batch, a tensor that can go backward."""
        logits = self.logits(batch["input_ids"])  # (B, T, V)
        targets = self._torch.from_numpy(batch["targets"])  # (B, T)
        return self._torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def logits(self, input_ids: np.ndarray) -> Any:
        """(B, T, V) for int64 ids (B, T)."""
        F, w = self._torch.nn.functional, self.parameters
        B, T = input_ids.shape
        H, C = self._model.n_head, self._model.n_embd
        x = F.embedding(self._torch.from_numpy(input_ids), w["wte.weight"]) + w["wpe.weight"][:T]  # (B, T, C)
        for layer in range(self._model.n_layer):
            b = f"blocks.{layer}"
            y = F.layer_norm(x, (C,), w[f"{b}.norm1.weight"], w[f"{b}.norm1.bias"])
            qkv = F.linear(y, w[f"{b}.attn.qkv.weight"], w[f"{b}.attn.qkv.bias"])  # (B, T, 3 C)
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))  # (B, H, T, D)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            merged = heads.transpose(1, 2).reshape(B, T, C)
            x = x + F.linear(merged, w[f"{b}.attn.out.weight"], w[f"{b}.attn.out.bias"])
            y = F.layer_norm(x, (C,), w[f"{b}.norm2.weight"], w[f"{b}.norm2.bias"])
            up = F.linear(y, w[f"{b}.ffn.up.weight"], w[f"{b}.ffn.up.bias"])  # (B, T, F)
            hidden = F.gelu(up, approximate="tanh")
            x = x + F.linear(hidden, w[f"{b}.ffn.down.weight"], w[f"{b}.ffn.down.bias"])
        x = F.layer_norm(x, (C,), w["norm.weight"], w["norm.bias"])
        return F.linear(x, w["wte.weight"])

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over all targets of `batches`, without gradients."""
        total, targets = 0.0, 0
        with self._torch.inference_mode():
            for batch in batches:
                count = _num_targets(batch)
                total, targets = total + self.loss(batch).item() * count, targets + count
        return total / max(targets, 1)


def _num_targets(batch: Batch) -> int:
    return int((batch["targets"] != -100).sum())
