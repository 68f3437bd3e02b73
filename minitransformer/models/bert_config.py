"""The shape of a BERT."""

from __future__ import annotations

from dataclasses import dataclass

from minitransformer.checks import check_choice, check_count, check_number
from minitransformer.errors import ConfigError
from minitransformer.models.base import Config
from minitransformer.ops.dropout import check_rate

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)
_ACTIVATIONS = ("gelu", "relu", "silu")


@dataclass(frozen=True)
class BERTConfig(Config):
    """The shape of a BERT, under the names of Hugging Face; the defaults are BERT-base's.

    `hidden_act` is "gelu" (by erf), "relu" or "silu". `hidden_dropout_prob` is the one rate of all dropout: of the
    embeddings, of attention's weights, of every sublayer's output and, as nn.EncoderLayer has it, of the
    feed-forward's hidden units. `pad_token_id` is what rows are filled up with, whose embedding starts at 0; which
    tokens are padding is said by `attention_mask` alone. `num_labels` counts the classes of a classifier.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_labels: int = 2

    def __post_init__(self) -> None:
        op = "BERTConfig"
        for name in _SIZES:
            self.keep_size(name, 10_000 if name == "num_hidden_layers" else 2**31 - 1)  # no model has more layers
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                op,
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}",
                "Choose a number of heads that divides the width",
            )
        check_choice(op, "hidden_act", self.hidden_act, _ACTIVATIONS)
        object.__setattr__(self, "hidden_dropout_prob", check_rate(op, self.hidden_dropout_prob))
        for name in ("initializer_range", "layer_norm_eps"):
            object.__setattr__(self, name, check_number(op, name, getattr(self, name)))
        pad = check_count(op, "pad_token_id", self.pad_token_id)
        if pad >= self.vocab_size:
            problem = f"pad_token_id is {pad}, expected at most {self.vocab_size - 1} with vocab_size {self.vocab_size}"
            raise ConfigError(op, problem, "Count it in vocab_size, or name an id below")
        object.__setattr__(self, "pad_token_id", pad)
