"""BERT with a head and a loss: masked tokens, classes of rows, spans that answer a question."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import numpy as np

from minitransformer import functional as F
from minitransformer.autograd import Tensor, as_host
from minitransformer.errors import ConfigError, DTypeError, nearest
from minitransformer.models.base import ModelOutput
from minitransformer.models.bert import EncoderModel, Pooler
from minitransformer.models.bert_config import BERTConfig
from minitransformer.models.inputs import token_ids
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.linear import Linear, parameter
from minitransformer.nn.norm import LayerNorm
from minitransformer.ops.loss import check_targets

H = TypeVar("H", bound="HeadModel")

_FREE = ("hidden_dropout_prob", "initializer_range", "num_labels")  # what fine-tuning may choose anew


class HeadModel(EncoderModel):
    """Base of the models with a head. Their forward takes what `BERT` takes, and targets; -100 is ignored."""

    targets: ClassVar[tuple[str, ...]] = ("labels",)

    @classmethod
    def from_encoder(cls: type[H], source: EncoderModel, **changes: Any) -> H:
        """A new model with the encoder of `source`, any BERT model, as `mt.from_pretrained` gives it.

        The pooler comes along where both have one; the rest of the head starts anew. The config is that of `source` but
        for `changes`: `num_labels`, `hidden_dropout_prob` and `initializer_range` may differ. The weights are copies.
        Raises `DTypeError` for another kind of model, `ConfigError` for another change.
        """
        op = f"{cls.__name__}.from_encoder"
        if not isinstance(source, EncoderModel):
            problem = f"source is a {type(source).__name__}, expected a BERT model"
            raise DTypeError(op, problem, "Pass what mt.from_pretrained(folder) gives for one")
        for name in changes:
            if name not in _FREE:
                raise ConfigError(op, f"cannot change {name}, expected one of {_FREE}", nearest(name, _FREE))
        model = cls(dataclasses.replace(source.config, **changes))
        model.to(source.encoder.embeddings.word.weight.dtype)
        for part in ("encoder", "pooler"):
            if hasattr(source, part) and hasattr(model, part):
                getattr(model, part).load_state_dict(getattr(source, part).state_dict())
        return model

    def num_targets(self, **batch: Any) -> int:
        """How many of the targets are not -100."""
        op = type(self).__name__
        if any(batch.get(name) is None for name in self.targets):
            raise ConfigError(op, f"the batch has not all of {self.targets}", "Give them")
        return sum(int((as_host(op, batch[name]) != -100).sum()) for name in self.targets)


class BERTForMaskedLM(HeadModel):
    """Which token stands at each position: what BERT is pretrained on, with masked tokens for input.

    The head is a dense layer, `hidden_act` and layer norm; the output matrix is the word embedding, with a bias of
    its own.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        C, V = config.hidden_size, config.vocab_size
        self.dense = Linear(C, C)
        self.norm = LayerNorm(C, config.layer_norm_eps)
        self.bias = parameter("BERTForMaskedLM", "bias", (V,), lambda: np.zeros(V, np.float32))
        self.initialise()

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        labels: Any = None,
        *,
        label_smoothing: float = 0.0,
    ) -> ModelOutput:
        """`logits` (B, T, V), and the loss where `labels` (B, T) hold the tokens to be found and -100 elsewhere.

        Arguments, `hidden_states` and errors as of `BERT`; labels of another shape or outside the vocabulary are
        refused before anything is computed.
        """
        op = "BERTForMaskedLM"
        if labels is not None:
            shape = token_ids(op, "input_ids", input_ids).shape
            labels = _checked(op, "labels", labels, shape, self.config.vocab_size, "Use the tokenizer of the model")
        states = self.encoder(input_ids, attention_mask, token_type_ids)
        x = self.norm(getattr(F, self.config.hidden_act)(self.dense(states[-1])))  # (B, T, C)
        logits = F.linear(x, self.encoder.embeddings.word.weight, self.bias)  # (B, T, V)
        return ModelOutput(_loss(logits, labels, label_smoothing), logits, hidden_states=states)


class BERTForSequenceClassification(HeadModel):
    """Which of `num_labels` classes a row belongs to: a linear layer on the pooled first token, after dropout."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.initialise()

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        labels: Any = None,
        *,
        label_smoothing: float = 0.0,
    ) -> ModelOutput:
        """`logits` (B, num_labels), and the loss for `labels` (B,), of which -100 is ignored.

        Arguments, `hidden_states` and errors as of `BERT`; labels of another shape or outside 0 to num_labels - 1 are
        refused before anything is computed.
        """
        op = "BERTForSequenceClassification"
        if labels is not None:
            rows = token_ids(op, "input_ids", input_ids).shape[:1]
            fix = "Make the model with a larger num_labels"
            labels = _checked(op, "labels", labels, rows, self.config.num_labels, fix)
        states = self.encoder(input_ids, attention_mask, token_type_ids)
        logits = self.classifier(self.dropout(self.pooler(states[-1])))  # (B, num_labels)
        return ModelOutput(_loss(logits, labels, label_smoothing), logits, hidden_states=states)


class BERTForQuestionAnswering(HeadModel):
    """Where the answer to a question begins and ends in the text behind it: two numbers for each token."""

    targets = ("start_positions", "end_positions")

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.spans = Linear(config.hidden_size, 2)
        self.initialise()

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        *,
        label_smoothing: float = 0.0,
    ) -> ModelOutput:
        """`logits` (B, T, 2), [..., 0] of the start and [..., 1] of the end, and the loss if both are given.

        `start_positions` and `end_positions` (B,) count from 0 in the whole row; -100 is ignored. The loss is the mean
        over starts and ends, each a choice among all T tokens, padding too, as Hugging Face has it.

        Arguments, `hidden_states` and errors as of `BERT`; one of the two alone, and positions outside 0 to T - 1, are
        refused before anything is computed.
        """
        op = "BERTForQuestionAnswering"
        if (start_positions is None) != (end_positions is None):
            raise ConfigError(op, "got one of start_positions and end_positions, expected both or neither", "Add it")
        ends = None
        if start_positions is not None:
            B, T = token_ids(op, "input_ids", input_ids).shape
            given = zip(self.targets, (start_positions, end_positions), strict=True)
            fix = "Count the tokens of the row from 0"
            ends = np.stack([_checked(op, name, values, (B,), T, fix) for name, values in given], axis=1)  # (B, 2)
        states = self.encoder(input_ids, attention_mask, token_type_ids)
        logits = self.spans(states[-1])  # (B, T, 2)
        return ModelOutput(_loss(logits.transpose(1, 2), ends, label_smoothing), logits, hidden_states=states)


def _checked(op: str, name: str, values: Any, shape: tuple[int, ...], classes: int, fix: str) -> np.ndarray:
    """`values`, integers of `shape` from 0 to `classes` - 1 or -100, as int64."""
    targets = token_ids(op, name, values, shape)
    check_targets(op, name[:-1].replace("_", " "), targets, classes, fix=fix)
    return targets.astype(np.int64)


def _loss(logits: Tensor, targets: np.ndarray | None, label_smoothing: float) -> Tensor | None:
    """The mean over targets that are not -100; None without targets."""
    return None if targets is None else F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
