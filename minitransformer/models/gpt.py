"""GPT: a decoder-only language model, GPT-2 by default, with the choices of its successors as options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor, is_grad_enabled
from minitransformer.checks import check_size, shown
from minitransformer.errors import ConfigError, DTypeError, RangeError
from minitransformer.generate import generate
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.gpu.arrays import like
from minitransformer.models.base import Model, ModelOutput, check_memory
from minitransformer.models.gpt_block import GPTBlock, norm_of
from minitransformer.models.gpt_config import GPTConfig
from minitransformer.models.gpt_step import Steps, can_step
from minitransformer.models.inputs import real_tokens, token_ids
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.embedding import Embedding
from minitransformer.nn.kv_cache import KVCache
from minitransformer.nn.linear import Linear
from minitransformer.nn.linear_attention import StateCache
from minitransformer.ops.attention import make_problem
from minitransformer.ops.loss import check_targets

INIT_STD = 0.02  # of all weights; residual projections are scaled down by the number of residual sums


class GPT(Model):
    """The language model of Radford et al. 2019: p(token | tokens before it).

    Weights start normal with deviation 0.02, residual projections with 0.02 / sqrt(2 n_layer), biases at 0;
    `mt.manual_seed` decides the numbers.
    """

    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        if not isinstance(config, GPTConfig):
            raise DTypeError("GPT", f"config is {shown(config)}, expected a GPTConfig", "Pass mt.GPTConfig(...)")
        sinusoids = 8 * config.block_size * config.n_embd if config.positions == "sinusoidal" else 0
        fix = "Make vocab_size, block_size, n_layer or n_embd smaller"
        check_memory("GPT", config.num_parameters, fix, sinusoids)
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = Embedding(config.block_size, config.n_embd)
        self.dropout = Dropout(config.dropout)
        self.blocks = [GPTBlock(config) for _ in range(config.n_layer)]
        self.norm = norm_of(config)
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
        cache: KVCache | StateCache | None = None,
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
        ids = token_ids("GPT", "input_ids", input_ids)
        B, T = ids.shape
        if cache is not None:
            self._check_cache(cache)
        if labels is not None and targets is not None:
            raise DTypeError("GPT", "got both labels and targets", "labels are shifted inside, targets are already")
        past = 0 if cache is None else cache.length
        self.check_length(past + T)
        logits = self._logits(ids, real_tokens("GPT", attention_mask, B, past + T), cache)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(
                logits, token_ids("GPT", "targets", targets, (B, T)), label_smoothing=label_smoothing
            )
        elif labels is not None:
            given = token_ids("GPT", "labels", labels, (B, T))
            check_targets("GPT", "label", given, self.config.vocab_size)  # at their positions before the shift
            loss = F.cross_entropy(logits[:, :-1], given[:, 1:], label_smoothing=label_smoothing)
        return ModelOutput(loss=loss, logits=logits, cache=cache)

    def check_length(self, T: int) -> None:
        """`RangeError` if the model cannot tell the positions of T tokens apart."""
        if self.config.block_size < T and not self.config.slides:
            raise RangeError(
                "GPT",
                f"the sequence is too long: {T} tokens, expected at most block_size {self.config.block_size} "
                f"with positions={self.config.positions!r}",
                "Shorten it, or make a model with a larger block_size",
            )

    @property
    def reach(self) -> int:
        """How many tokens before its own one sees at most."""
        config = self.config
        return (config.block_size if config.window is None else min(config.window, config.block_size)) - 1

    def seen(self, real: np.ndarray | None, total: int, stored: int) -> tuple[tuple[int, int] | None, F.Sparse | None]:
        """`window_size` and `sparse` of attention to the last `stored` of `total` tokens; `real` marks no padding."""
        config, beyond = self.config, total > self.config.block_size
        window = (self.reach, 0) if config.attention == "window" or (beyond and config.forgets) else None
        if config.attention not in ("global_window", "strided"):
            return window, None
        first = np.zeros(1, np.int64) if real is None else real.argmax(axis=1)  # padding has no positions
        origin = first - (total - stored)
        if config.stride is None:
            assert config.n_global is not None
            return window, F.Sparse(range(config.n_global), left=self.reach, origin=origin)
        return window, F.Sparse(range(config.stride - 1, 2**48, config.stride), block=config.stride, origin=origin)

    def _logits(self, ids: np.ndarray, real: np.ndarray | None, cache: KVCache | StateCache | None) -> Tensor:
        config = self.config
        T = ids.shape[1]
        past = 0 if cache is None else cache.length
        stored = T  # keys that the queries meet
        if isinstance(cache, KVCache):
            cache.reserve(T, self.reach if config.forgets else None)
            stored += cache.stored
        if real is None:
            positions = np.arange(past, past + T)  # (T,)
            key_mask = None
        else:
            positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)[:, past:]  # (B, T)
            key_mask = real[:, None, None, past + T - stored :]  # (B, 1, 1, S)
        window, sparse = self.seen(real, past + T, stored)
        attention = {
            "attn_mask": key_mask,
            "is_causal": True,
            "causal_align": "lower_right",
            "window_size": window,
            "sparse": sparse,
            "alibi_slopes": self._alibi,
            "rope_positions": positions if config.positions == "rope" else None,
            "cache": cache,
        }
        x = self.wte(ids)  # (B, T, C)
        if config.positions == "learned":
            x = x + self.wpe(positions)
        elif config.positions == "sinusoidal":
            x = x + like(x.data, self._sinusoids[positions].astype(x.dtype))
        x = self.dropout(x)
        problem = None
        if cache is None or (past == 0 and not is_grad_enabled()):
            problem = self._problem(x, attention)
        if config.attention == "linear":
            attention = {name: attention[name] for name in ("attn_mask", "rope_positions", "cache")}
        for layer, block in enumerate(self.blocks):
            x = block(x, problem, **attention, cache_layer=layer)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x)
        return F.linear(x, self.wte.weight) if config.tie_weights else self.head(x)  # (B, T, V)

    def _problem(self, x: Tensor, attention: dict[str, Any]) -> Problem:
        """What `attention` asks for, checked for all layers at once."""
        B, T, C = x.shape
        H = self.config.n_head
        K = self.config.n_kv_head or H
        # The problem depends on the shapes alone, and these arrays have no memory behind them.
        q, k = (np.broadcast_to(np.empty((), x.dtype), (B, heads, T, C // H)) for heads in (H, K))
        asked = ("is_causal", "causal_align", "window_size", "sparse", "alibi_slopes")
        options = {name: attention[name] for name in asked}
        return make_problem("attention", q, k, k, attention["attn_mask"], enable_gqa=True, **options)

    def num_targets(self, **batch: Any) -> int:
        """How many tokens of `targets`, or of `labels` from the second on, are not -100."""
        for name, first in (("targets", 0), ("labels", 1)):
            if batch.get(name) is not None:
                return int((token_ids("GPT", name, batch[name])[:, first:] != -100).sum())
        raise ConfigError("GPT", "the batch has neither targets nor labels", "Give one of them")

    def make_cache(self, batch_size: int, length: int | None = None) -> KVCache | StateCache:
        """A cache for sequences of up to `length` tokens (default block_size).

        Models that forget need no more than twice block_size for any length, and linear attention needs none at all.
        """
        config = self.config
        capacity = config.block_size if length is None else length
        check_size("make_cache", batch_size=batch_size, length=capacity)
        heads, width = config.n_kv_head or config.n_head, config.n_embd // config.n_head
        dtype, device = self.wte.weight.dtype, self.wte.weight.device
        if config.attention == "linear":
            return StateCache(config.n_layer, batch_size, heads, width, dtype, device)
        if config.forgets:
            capacity = min(capacity, 2 * config.block_size)
        return KVCache(config.n_layer, batch_size, heads, capacity, width, dtype, device)

    def steps(self, cache: KVCache | StateCache) -> Steps | None:
        """A faster way to feed one token a row than calling the model; None where only the model itself will do."""
        self._check_cache(cache)
        own = type(self).forward is GPT.forward and type(self)._logits is GPT._logits and "forward" not in vars(self)
        if not own or isinstance(cache, StateCache) or not can_step(self, cache.keys.shape[1]):
            return None
        return Steps(self, cache)

    def _check_cache(self, cache: Any) -> None:
        kind = StateCache if self.config.attention == "linear" else KVCache
        if not isinstance(cache, kind):
            problem = f"cache is {shown(cache)}, expected a {kind.__name__}"
            raise DTypeError("GPT", problem, "Make it with model.make_cache(batch_size)")

    def generate(self, input_ids: Any, *, max_new_tokens: int, **options: Any) -> np.ndarray:
        """Continue each row of `input_ids` (B, T): see `minitransformer.generate.generate`."""
        return generate(self, input_ids, max_new_tokens=max_new_tokens, **options)
