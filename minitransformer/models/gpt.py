"""GPT: a decoder-only language model, GPT-2 by default, with the choices of its successors as options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor, as_array
from minitransformer.checks import check_choice, check_flag, check_size, shown
from minitransformer.errors import AllocationError, ConfigError, DTypeError, RangeError, ShapeError
from minitransformer.generate import generate
from minitransformer.memory import total_memory
from minitransformer.models.base import Config, Model, ModelOutput
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.embedding import Embedding
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.kv_cache import KVCache
from minitransformer.nn.linear import Linear
from minitransformer.nn.module import Module
from minitransformer.nn.norm import LayerNorm, RMSNorm
from minitransformer.ops.dropout import check_rate
from minitransformer.ops.loss import check_targets

_CHOICES = {
    "positions": ("learned", "sinusoidal", "rope", "alibi", None),
    "norm": ("layer", "rms"),
    "ffn": ("gelu", "relu", "swiglu"),
    "attention": ("full", "window"),
}
_MOST = {"n_layer": 10_000}  # no model has more; the other sizes end at 2**31 - 1
INIT_STD = 0.02  # of all weights; residual projections are scaled down by the number of residual sums


@dataclass(frozen=True)
class GPTConfig(Config):
    """The shape of a GPT; the defaults are GPT-2's smallest.

    `positions` is "learned", "sinusoidal", "rope", "alibi" or None, `norm` "layer" or "rms", `ffn` "gelu" (the
    tanh form), "relu" or "swiglu", `attention` "full" or "window". `block_size` is the longest sequence with
    learned or sinusoidal positions, and how far back a token sees with the others. `tie_weights` uses the token
    embedding as output matrix; `bias` is for all linear layers and layer norms.

    `n_inner` is the feed-forward width: 4 n_embd, or 8/3 n_embd up to a multiple of 8 for "swiglu", which
    has three matrices instead of two. `n_kv_head` < n_head shares keys and values. With
    attention="window" each token sees itself and the `window - 1` before it.
    """

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None
    n_inner: int | None = None
    dropout: float = 0.0
    bias: bool = True
    positions: str | None = "learned"
    norm: str = "layer"
    ffn: str = "gelu"
    attention: str = "full"
    window: int | None = None
    tie_weights: bool = True

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        for name in (*sizes, "n_kv_head", "n_inner", "window"):
            if name in sizes or getattr(self, name) is not None:
                value, most = getattr(self, name), _MOST.get(name, 2**31 - 1)
                check_size("GPTConfig", **{name: value})
                if value > most:
                    problem = f"{name} is {value}, expected at most {most}"
                    raise ConfigError("GPTConfig", problem, "Pass a smaller number")
                object.__setattr__(self, name, int(value))  # a NumPy integer has no JSON
        object.__setattr__(self, "dropout", check_rate("GPTConfig", self.dropout))
        for name in ("bias", "tie_weights"):
            check_flag("GPTConfig", name, getattr(self, name))
        for name, choices in _CHOICES.items():
            check_choice("GPTConfig", name, getattr(self, name), choices)
        if self.n_embd % self.n_head:
            raise ConfigError(
                "GPTConfig",
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}",
                "Choose a number of heads that divides the width",
            )
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ConfigError(
                "GPTConfig",
                f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}",
                "Choose a number of key heads that divides n_head",
            )
        if self.positions == "rope" and (self.n_embd // self.n_head) % 2:
            raise ConfigError(
                "GPTConfig",
                f"rope needs an even head width, n_embd / n_head is {self.n_embd // self.n_head}",
                "Change n_embd or n_head",
            )
        if (self.attention == "window") != (self.window is not None):
            raise ConfigError(
                "GPTConfig",
                f"attention is {self.attention!r} with window {self.window}",
                "Set attention='window' and window=N together",
            )

    @property
    def inner_width(self) -> int:
        """The feed-forward width F."""
        if self.n_inner is not None:
            return self.n_inner
        return 8 * math.ceil(self.n_embd / 3) if self.ffn == "swiglu" else 4 * self.n_embd

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters of the model hold."""
        C, F, V = self.n_embd, self.inner_width, self.vocab_size
        rows = 2 * C // self.n_head * (self.n_kv_head or self.n_head) + C  # of keys and values, and queries
        up = 2 * F if self.ffn == "swiglu" else F
        block = (rows + C + up) * C + F * C + self.bias * (rows + C + up + C)
        norm = C if self.norm == "rms" or not self.bias else 2 * C
        tables = V * (1 if self.tie_weights else 2) + (self.block_size if self.positions == "learned" else 0)
        return self.n_layer * (block + 2 * norm) + norm + tables * C

    @property
    def slides(self) -> bool:
        """Whether sequences may be longer than block_size, each token looking back on the last block_size."""
        return self.positions in ("rope", "alibi", None)


def _norm(config: GPTConfig) -> Module:
    return RMSNorm(config.n_embd) if config.norm == "rms" else LayerNorm(config.n_embd, bias=config.bias)


class GPTBlock(Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.norm1 = _norm(config)
        self.attn = MultiHeadAttention(C, config.n_head, config.n_kv_head, config.dropout, config.bias)
        self.dropout1 = Dropout(config.dropout)
        self.norm2 = _norm(config)
        activation = "gelu_tanh" if config.ffn == "gelu" else config.ffn
        self.ffn = FeedForward(C, config.inner_width, activation=activation, bias=config.bias)
        self.dropout2 = Dropout(config.dropout)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.dropout1(self.attn(self.norm1(x), **attention))
        return x + self.dropout2(self.ffn(self.norm2(x)))


class GPT(Model):
    """The language model of Radford et al. 2019: p(token | tokens before it).

    Weights start normal with deviation 0.02, residual projections with 0.02 / sqrt(2 n_layer), biases at 0;
    `mt.manual_seed` decides the numbers.
    """

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        if not isinstance(config, GPTConfig):
            raise DTypeError("GPT", f"config is {shown(config)}, expected a GPTConfig", "Pass mt.GPTConfig(...)")
        size, there = 4 * config.num_parameters, total_memory()
        if config.positions == "sinusoidal":
            size += 8 * config.block_size * config.n_embd
        if there is not None and size > there:
            problem = f"{config.num_parameters:,} parameters need {size / 1e9:,.1f} GB, there are {there / 1e9:,.1f} GB"
            raise AllocationError("GPT", problem, "Make vocab_size, block_size, n_layer or n_embd smaller")
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = [GPTBlock(config) for _ in range(config.n_layer)]
        self.norm = _norm(config)
        if not config.tie_weights:
            self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.positions == "sinusoidal":
            self._sinusoids = F.sinusoidal_positions(config.block_size, config.n_embd)  # (block_size, C)
        self._alibi = F.alibi_slopes(config.n_head) if config.positions == "alibi" else None
        self._initialise()
        self.name_call_sites()

    def _initialise(self) -> None:
        draw = random.generator().standard_normal
        residual = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual if name.endswith(("attn.out.weight", "ffn.down.weight")) else INIT_STD
                parameter.data = std * draw(parameter.shape, dtype=np.float32)
            elif name.endswith(".bias"):
                parameter.data = np.zeros_like(parameter.data)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        targets: Any = None,
        cache: KVCache | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> ModelOutput:
        """Logits (B, T, V) for integer `input_ids` (B, T), and the mean loss if there is something to predict.

        `labels` (B, T) are the tokens themselves and are shifted inside (as Hugging Face); `targets` (B, T)
        are shifted already (as nanoGPT); -100 is ignored; both at once is an error. `attention_mask`
        (B, S) is 1 for real tokens, S counting those in the cache too; positions count real tokens only.
        With `cache`, `input_ids` continue what it holds, and it is moved on.

        Raises RangeError for ids outside the vocabulary and for too long sequences, each by name.
        """
        ids = _ids("input_ids", input_ids)
        B, T = ids.shape
        if cache is not None and not isinstance(cache, KVCache):
            problem = f"cache is {shown(cache)}, expected a KVCache"
            raise DTypeError("GPT", problem, "Make it with model.make_cache(batch_size)")
        if labels is not None and targets is not None:
            raise DTypeError("GPT", "got both labels and targets", "labels are shifted inside, targets are already")
        past = 0 if cache is None else cache.length
        if past + T > self.config.block_size and not self.config.slides:
            raise RangeError(
                "GPT",
                f"the sequence is too long: {past + T} tokens, expected at most block_size {self.config.block_size} "
                f"with positions={self.config.positions!r}",
                "Shorten it, or make a model with a larger block_size",
            )
        logits = self._logits(ids, _attention_mask(attention_mask, B, past + T), cache)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits, _ids("targets", targets, (B, T)), label_smoothing=label_smoothing)
        elif labels is not None:
            given = _ids("labels", labels, (B, T))
            check_targets("GPT", "label", given, self.config.vocab_size)  # at their positions before the shift
            loss = F.cross_entropy(logits[:, :-1], given[:, 1:], label_smoothing=label_smoothing)
        return ModelOutput(loss=loss, logits=logits, cache=cache)

    def _logits(self, ids: np.ndarray, real: np.ndarray | None, cache: KVCache | None) -> Tensor:
        config = self.config
        T = ids.shape[1]
        past = 0 if cache is None else cache.length
        reach = config.block_size - 1 if config.window is None else min(config.window, config.block_size) - 1
        if cache is not None:
            cache.reserve(T, reach if config.slides else None)
        stored = T if cache is None else cache.stored + T  # keys that the queries meet
        if real is None:
            positions = np.arange(past, past + T)  # (T,)
            key_mask = None
        else:
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)[:, past:]  # (B, T)
            key_mask = real[:, None, None, past + T - stored :]  # (B, 1, 1, S)
        limited = config.window is not None or past + T > config.block_size
        attention = {
            "attn_mask": key_mask,
            "is_causal": True,
            "causal_align": "lower_right",
            "window_size": (reach, 0) if limited else None,
            "alibi_slopes": self._alibi,
            "rope_positions": positions if config.positions == "rope" else None,
            "cache": cache,
        }
        x = self.wte(ids)  # (B, T, C)
        if config.positions == "learned":
            x = x + self.wpe(positions)
        elif config.positions == "sinusoidal":
            x = x + self._sinusoids[positions].astype(x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, **attention, cache_layer=layer)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x)
        return F.linear(x, self.wte.weight) if config.tie_weights else self.head(x)  # (B, T, V)

    def num_targets(self, **batch: Any) -> int:
        """How many tokens of `targets`, or of `labels` from the second on, are not -100."""
        for name, first in (("targets", 0), ("labels", 1)):
            if batch.get(name) is not None:
                return int((_ids(name, batch[name])[:, first:] != -100).sum())
        raise ConfigError("GPT", "the batch has neither targets nor labels", "Give one of them")

    def make_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """A cache for sequences of up to `length` tokens (default block_size).

        Models that slide need no more than twice block_size for any length.
        """
        config = self.config
        capacity = config.block_size if length is None else length
        check_size("make_cache", batch_size=batch_size, length=capacity)
        if config.slides:
            capacity = min(capacity, 2 * config.block_size)
        heads = config.n_kv_head or config.n_head
        dtype = self.wte.weight.dtype
        return KVCache(config.n_layer, batch_size, heads, capacity, config.n_embd // config.n_head, dtype)

    def generate(self, input_ids: Any, *, max_new_tokens: int, **options: Any) -> np.ndarray:
        """Continue each row of `input_ids` (B, T): see `minitransformer.generate.generate`."""
        return generate(self, input_ids, max_new_tokens=max_new_tokens, **options)


def _ids(name: str, ids: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Token ids as an integer array (B, T) with T >= 1; the embedding checks their range."""
    array = np.asarray(as_array("GPT", ids))
    if array.dtype.kind not in "iu":
        raise DTypeError("GPT", f"{name} have dtype {array.dtype}, expected integers", "Encode text with a tokenizer")
    if array.ndim != 2 or (shape is not None and array.shape != shape):
        raise ShapeError(
            "GPT",
            f"{name} have shape {array.shape}, expected {shape or '(batch, length)'}",
            "Add a batch axis: ids[None]" if array.ndim == 1 else "Give one id per position",
        )
    if array.shape[1] == 0:
        raise ShapeError("GPT", f"{name} hold no tokens, shape {array.shape}", "Pass at least one token per row")
    return array


def _attention_mask(mask: Any, B: int, S: int) -> np.ndarray | None:
    """Bool (B, S), True = real token."""
    if mask is None:
        return None
    array = np.asarray(as_array("GPT", mask))
    if array.dtype.kind not in "biu" or array.shape != (B, S) or not np.isin(array, (0, 1)).all():
        raise ShapeError(
            "GPT",
            f"attention_mask has shape {array.shape} and dtype {array.dtype}, expected ({B}, {S}) with 1 for real "
            "tokens and 0 for padding",
            "Count the tokens in the cache too, and use bools or integers 0 and 1",
        )
    return array.astype(bool)
