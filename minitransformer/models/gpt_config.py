"""The shape of a GPT."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minitransformer.checks import check_choice, check_flag
from minitransformer.errors import ConfigError
from minitransformer.models.base import Config
from minitransformer.ops.dropout import check_rate

ATTENTION = ("full", "window", "global_window", "strided", "linear")
_CHOICES = {
    "positions": ("learned", "sinusoidal", "rope", "alibi", None),
    "norm": ("layer", "rms"),
    "ffn": ("gelu", "relu", "swiglu"),
    "attention": ATTENTION,
}
# Settings of single kinds of attention.
OF_ATTENTION = {"window": ("window", "global_window"), "n_global": ("global_window",), "stride": ("strided",)}
_SINKS = 4  # first tokens that every other one sees, as in Xiao et al. 2023
_MOST = {"n_layer": 10_000}  # no model has more; the other sizes end at 2**31 - 1


@dataclass(frozen=True)
class GPTConfig(Config):
    """The shape of a GPT; the defaults are GPT-2's smallest.

    `positions` is "learned", "sinusoidal", "rope", "alibi" or None, `norm` "layer" or "rms", `ffn` "gelu" (the
    tanh form), "relu" or "swiglu", `attention` one of those below. `block_size` is the longest sequence with
    learned or sinusoidal positions, and how far back a token sees with the others. `tie_weights` uses the token
    embedding as output matrix; `bias` is for all linear layers and layer norms.

    `n_inner` is the feed-forward width: 4 n_embd, or 8/3 n_embd up to a multiple of 8 for "swiglu", which
    has three matrices instead of two. `n_kv_head` < n_head shares keys and values.

    What a token sees of itself and those before it, by `attention`:

    - "full": all of them
    - "window": the last `window`
    - "global_window": those, and the first `n_global` of the sequence, 4 unless given (Beltagy et al. 2020)
    - "strided": those of its own block of `stride`, and the last of each block before, with blocks of about
      sqrt(block_size) unless given (Child et al. 2019)
    - "linear": all of them, by `F.linear_attention`, with a state instead of a cache (Katharopoulos et al. 2020);
      not with positions="alibi", as there are no scores
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
    n_global: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        for name in (*sizes, "n_kv_head", "n_inner", *OF_ATTENTION):
            if name in sizes or getattr(self, name) is not None:
                self.keep_size(name, _MOST.get(name, 2**31 - 1))
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
        for name, default in (("n_global", _SINKS), ("stride", round(math.sqrt(self.block_size)))):
            if self.attention in OF_ATTENTION[name] and getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, kinds in OF_ATTENTION.items():
            if (self.attention in kinds) != (getattr(self, name) is not None):
                raise ConfigError(
                    "GPTConfig",
                    f"attention is {self.attention!r} with {name} {getattr(self, name)}",
                    f"Set attention={' or '.join(map(repr, kinds))} and {name}=N together",
                )
        if self.attention == "linear" and self.positions == "alibi":
            problem = "alibi changes scores, and linear attention has none"
            raise ConfigError("GPTConfig", problem, "Choose other positions")

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

    @property
    def forgets(self) -> bool:
        """Whether a sequence can be so long that nobody will ever see its first tokens again."""
        return self.slides and self.attention not in ("global_window", "linear")
