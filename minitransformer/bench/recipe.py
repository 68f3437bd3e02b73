"""What is measured: one training recipe, from which every process builds the same bits, and both sides of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, SupportsFloat

from minitransformer import random
from minitransformer.bench.peer import Peer
from minitransformer.checks import check_choice
from minitransformer.data import MaskedTokens, TokenDataset, corpus, prepare
from minitransformer.kernels.gpu.arrays import resolve_device
from minitransformer.models import GPT, BERTConfig, BERTForMaskedLM, GPTConfig, Model, Transformer
from minitransformer.threads import Workers, get_num_threads
from minitransformer.training import TrainConfig, TrainStep, make_optimizer
from minitransformer.training.step import Batch

MODELS = ("gpt", "transformer", "bert")


@dataclass(frozen=True)
class Recipe:
    """A model of this shape on the characters of `corpus`, trained as `train` says; the defaults are nanoGPT's.

    `model` is "gpt" for GPT-2; "transformer": half of the layers read a window, the others write the next tokens; or
    "bert": all fill gaps in a window.
    `train.threads` is not read here: both sides use `threads.get_num_threads()`.
    """

    corpus: str = "python-docs"
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 64
    train: TrainConfig = field(default_factory=TrainConfig)
    model: str = "gpt"

    def __post_init__(self) -> None:
        check_choice("Recipe", "model", self.model, MODELS)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` described."""
        return Recipe(**{**fields, "train": TrainConfig(**fields["train"])})

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {**asdict(self), "train": {**asdict(self.train), "betas": list(self.train.betas)}}

    def build(self) -> tuple[Any, TokenDataset, TokenDataset]:
        """The untrained model, the training and the validation data; the seed decides every number."""
        train, validation = prepare(corpus(self.corpus), "char", self.block_size)
        assert train.tokenizer is not None
        random.manual_seed(self.train.seed)
        return self._model(train.tokenizer.vocab_size), train, validation

    def _model(self, V: int) -> Model:
        if self.model == "gpt":
            return GPT(GPTConfig(V, self.block_size, self.n_layer, self.n_head, self.n_embd))
        C, T, half = self.n_embd, self.block_size, self.n_layer // 2
        if self.model == "bert":
            config = BERTConfig(V + 1, C, self.n_layer, self.n_head, 4 * C, hidden_dropout_prob=0.0)
            return BERTForMaskedLM(replace(config, max_position_embeddings=T))
        sizes = V + 1, C, self.n_head, 4 * C, T, T
        return Transformer(*sizes, 0.0, num_encoder_layers=half, num_decoder_layers=half)

    def batches(self, data: TokenDataset, step: int) -> list[Batch]:
        """The batches that `Trainer` takes for step `step`, from 0."""
        first = step * self.train.grad_accumulation_steps
        numbers = range(first, first + self.train.grad_accumulation_steps)
        drawn: Any = data
        if self.model == "bert":
            assert data.tokenizer is not None
            V = data.tokenizer.vocab_size
            drawn = MaskedTokens(data, vocab_size=V + 1, mask_token_id=V)
        batches = [drawn.batch(self.train.seed, number, self.train.batch_size) for number in numbers]
        if self.model == "transformer":  # 0 is padding
            return [{"input_ids": batch["input_ids"] + 1, "labels": batch["targets"] + 1} for batch in batches]
        return batches

    def validation_batches(self, data: TokenDataset) -> Iterator[Batch]:
        """The batches on which `Trainer` evaluates."""
        return islice(data.sequential(self.train.batch_size), self.train.eval_batches)


RECIPE = Recipe()


def on_its_device(op: str, recipe: Recipe) -> Recipe:
    """`recipe` with "auto" decided; `DeviceError` or `MissingExtraError` if its device cannot be used."""
    return replace(recipe, train=replace(recipe.train, device=resolve_device(op, recipe.train.device)))


class Block(NamedTuple):
    """Some consecutive steps: the seconds each took, and the loss before each."""

    seconds: list[float]
    losses: list[float]


def time_steps(
    step: Callable[[list[Batch], int], SupportsFloat], recipe: Recipe, data: TokenDataset, first: int, count: int
) -> Block:
    """Time `count` calls of `step(batches, index)` from index `first`; batches are drawn before the clock starts.

    What `step` returns becomes a float after the last step, so that nobody waits for a loss in between.
    """
    drawn = [recipe.batches(data, index) for index in range(first, first + count)]
    seconds: list[float] = []
    losses: list[SupportsFloat] = []
    for index, batches in enumerate(drawn, start=first):
        started = time.perf_counter()
        losses.append(step(batches, index))
        seconds.append(time.perf_counter() - started)
    if recipe.train.device != "cpu":  # calls return before the work is done
        started = time.perf_counter()
        float(losses[-1])
        waited = time.perf_counter() - started
        seconds = [(sum(seconds) + waited) / count] * count
    return Block(seconds, [float(loss) for loss in losses])


class Ours:
    """This package's training step, called as `Trainer` calls it; hold `single_threaded_blas()` around it."""

    def __init__(self, recipe: Recipe, workers: Workers) -> None:
        self._recipe = recipe
        self.model, self._data, _ = recipe.build()
        self.model.to(recipe.train.device)
        self._step = TrainStep(self.model, make_optimizer(self.model, recipe.train), recipe.train, workers)

    def steps(self, first: int, count: int) -> Block:
        return time_steps(lambda b, index: self._step(b, index).loss, self._recipe, self._data, first, count)


class Theirs:
    """PyTorch's training step, taken in the process of `peer`; with `compiled`, through `torch.compile`.

    Raises `ConfigError` for what torch cannot compile there.
    """

    def __init__(self, peer: Peer, recipe: Recipe, *, compiled: bool = False) -> None:
        options = {"recipe": recipe.to_dict(), "threads": get_num_threads(), "compiled": compiled}
        self._peer = peer.make("train", **options)

    def steps(self, first: int, count: int) -> Block:
        return Block(*self._peer.call("steps", first=first, count=count))

    def evaluate(self) -> float:
        """The validation loss."""
        loss: float = self._peer.call("evaluate")
        return loss
