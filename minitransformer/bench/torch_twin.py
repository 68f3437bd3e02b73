"""The same GPT in PyTorch, trained and decoded, written for speed: the peer of benchmarks and parity tests.

Weights keep our names and layouts, so `state_dict()` of a model here is all it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from minitransformer.errors import ConfigError, require
from minitransformer.models import GPTConfig
from minitransformer.training import TrainConfig
from minitransformer.training.step import Batch, cut


class Twin:
    """GPT-2 with fused attention, trained by fused AdamW in the dtype of `weights`.

    Calls go to torch's functions directly, without modules in between. A loss comes back as a tensor:
    asking for its value would make the step wait. With `compiled`, the loss goes through `torch.compile`.

    Raises `MissingExtraError` without torch, `ConfigError` for a model or a training that it cannot repeat.
    """

    def __init__(
        self, model: GPTConfig, weights: Mapping[str, np.ndarray], train: TrainConfig, *, compiled: bool = False
    ) -> None:
        self._torch = torch = require("torch", extra="peers", purpose="the PyTorch twin")
        plain = GPTConfig(model.vocab_size, model.block_size, model.n_layer, model.n_head, model.n_embd)
        if model != plain:
            raise ConfigError("Twin", f"got {model}, expected GPT-2's choices: {plain}", "Change the model")
        if train.optimizer != "adamw" or train.l1 or train.label_smoothing:
            raise ConfigError("Twin", f"got {train}, expected AdamW without l1 or label smoothing", "Change the config")
        self._model, self._train = model, train
        self._schedule = train.learning_rate_schedule()
        self._device = torch_device(train.device)
        self.parameters = {
            name: torch.nn.Parameter(torch.tensor(array, device=self._device)) for name, array in weights.items()
        }
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)
        self._loss = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of

    def __call__(self, batches: Sequence[Batch], step: int) -> Any:
        """Update the parameters once from `batches` at `step`, from 0; the mean loss over all their targets."""
        loss = self._accumulate(batches, sum(map(_num_targets, batches)))
        self._update(step)
        return loss

    def _accumulate(self, batches: Sequence[Batch], targets: int) -> Any:
        """Make the gradient that of the sum over the targets of `batches`, divided by `targets`; that loss."""
        self._optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss = self.loss(batch) * (_num_targets(batch) / targets)
            loss.backward()
            total = total + loss.detach()
        return total

    def _update(self, step: int) -> None:
        if self._train.grad_clip:
            # foreach is the faster way on a CPU too, but only the default elsewhere
            self._torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._train.grad_clip, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule(step)
        self._optimizer.step()

    def loss(self, batch: Batch) -> Any:
        """Mean loss over the targets of one batch, a tensor that can go backward."""
        return self._loss(self._there(batch["input_ids"]), self._there(batch["targets"]))

    def logits(self, input_ids: np.ndarray) -> Any:
        """(B, T, V) for int64 ids (B, T)."""
        return self._logits(self._there(input_ids))

    def _there(self, ids: np.ndarray) -> Any:
        return self._torch.from_numpy(ids).to(self._device)

    def _loss_of(self, input_ids: Any, targets: Any) -> Any:
        logits = self._logits(input_ids)  # (B, T, V)
        return self._torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _logits(self, input_ids: Any) -> Any:
        F, w = self._torch.nn.functional, self.parameters
        B, T = input_ids.shape
        H, C = self._model.n_head, self._model.n_embd
        x = F.embedding(input_ids, w["wte.weight"]) + w["wpe.weight"][:T]  # (B, T, C)
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


class HalfTwin(Twin):
    """One of two processes that each take half of every batch and add up their gradients over gloo.

    One message for the whole gradient, in one buffer. `rendezvous` is a file that both can reach and that
    does not exist yet. The loss that comes back is this half's part of the mean.

    Raises `ConfigError` if the processes cannot reach each other.
    """

    def __init__(
        self, model: GPTConfig, weights: Mapping[str, np.ndarray], train: TrainConfig, *, rank: int, rendezvous: str
    ) -> None:
        super().__init__(model, weights, train)
        self._rank = rank
        distributed = self._torch.distributed
        try:
            distributed.init_process_group(
                "gloo", f"file://{rendezvous}", timedelta(seconds=60), world_size=2, rank=rank
            )
        except (RuntimeError, AttributeError) as error:  # AttributeError: a torch that was built without it
            problem = f"two processes cannot be joined over gloo ({one_line(error)})"
            raise ConfigError("torch.distributed", problem, "Leave out --torch-processes") from error

    def __call__(self, batches: Sequence[Batch], step: int) -> Any:
        halves = [cut(batch, 2)[self._rank][1] for batch in batches]
        loss = self._accumulate(halves, sum(map(_num_targets, batches)))
        parameters = list(self.parameters.values())
        gradient = self._torch.cat([p.grad.flatten() for p in parameters])
        self._torch.distributed.all_reduce(gradient)
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        self._update(step)
        return loss


def torch_device(device: str) -> str:
    """Where torch computes while we compute on `device`; the CPU stands in for what only we have."""
    return "cuda" if device == "cuda" else "cpu"


class Decoder:
    """The twin's greedy decoding: keys and values in a cache that is allocated once, no gradients."""

    def __init__(self, model: GPTConfig, weights: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self._torch = torch = require("torch", extra="peers", purpose="the PyTorch twin")
        self._model, self._device = model, torch_device(device)
        w = {name: torch.tensor(array, device=self._device) for name, array in weights.items()}
        self._wte, self._wpe = w["wte.weight"], w["wpe.weight"]
        self._norm = (w["norm.weight"], w["norm.bias"])
        parts = ("norm1", "attn.qkv", "attn.out", "norm2", "ffn.up", "ffn.down")
        self._blocks = [
            [(w[f"blocks.{layer}.{part}.weight"], w[f"blocks.{layer}.{part}.bias"]) for part in parts]
            for layer in range(model.n_layer)
        ]

    def generate(self, input_ids: np.ndarray, max_new_tokens: int) -> np.ndarray:
        """Continue each row of int64 ids (B, T) by the likeliest tokens: (B, T + max_new_tokens)."""
        torch, model = self._torch, self._model
        B, T = input_ids.shape
        with torch.inference_mode():
            ids = torch.empty(B, T + max_new_tokens, dtype=torch.int64, device=self._device)
            ids[:, :T] = torch.from_numpy(input_ids)
            head = model.n_embd // model.n_head
            cache = torch.empty(model.n_layer, 2, B, model.n_head, T + max_new_tokens, head, device=self._device)
            first = 0
            for end in range(T, T + max_new_tokens):
                ids[:, end] = self._logits(ids[:, first:end], cache, first).argmax(dim=-1)
                first = end
            return np.asarray(ids.cpu().numpy())

    def _logits(self, ids: Any, cache: Any, past: int) -> Any:
        """(B, V) for the token after `ids` (B, T), which follow the `past` tokens in the cache."""
        F = self._torch.nn.functional
        B, T = ids.shape
        H, C = self._model.n_head, self._model.n_embd
        x = F.embedding(ids, self._wte) + self._wpe[past : past + T]  # (B, T, C)
        for layer, (norm1, qkv, out, norm2, up, down) in enumerate(self._blocks):
            y = F.linear(F.layer_norm(x, (C,), *norm1), *qkv)  # (B, T, 3 C)
            q, k, v = y.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            keys, values = cache[layer]
            keys[:, :, past : past + T] = k
            values[:, :, past : past + T] = v
            seen = past + T
            heads = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], is_causal=T > 1)
            x = x + F.linear(heads.transpose(1, 2).reshape(B, T, C), *out)
            hidden = F.gelu(F.linear(F.layer_norm(x, (C,), *norm2), *up), approximate="tanh")  # (B, T, F)
            x = x + F.linear(hidden, *down)
        return F.linear(F.layer_norm(x[:, -1], (C,), *self._norm), self._wte)


def one_line(error: BaseException) -> str:
    """The first line of what torch says: it likes to say more."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _num_targets(batch: Batch) -> int:
    return int((batch["targets"] != -100).sum())
