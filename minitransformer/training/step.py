"""One training step: the batch in shards, their gradients added in order, one update.

Each shard runs forward and backward on one worker with one BLAS thread and writes nothing shared, so
there is one barrier a step. Shards are cut and added in index order: their number fixes the bits of the
result, the number of threads does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minitransformer import random
from minitransformer.autograd import grad, no_grad
from minitransformer.errors import NonFiniteError
from minitransformer.kernels import serve
from minitransformer.memory import keep_freed_memory
from minitransformer.models.base import Model
from minitransformer.optim import SGD, Adam, AdamW, Optimizer
from minitransformer.threads import Workers
from minitransformer.training.config import TrainConfig

Batch = dict[str, np.ndarray]
LOWER_RATE = "The last checkpoint is kept. Start again with a lower learning rate or a longer warm-up"


class StepResult(NamedTuple):
    """`loss` is the mean over all targets of the step, `grad_norm` that of the gradient before clipping."""

    loss: float
    grad_norm: float


def make_optimizer(model: Model, config: TrainConfig) -> Optimizer:
    """The optimizer that `config` names, over all parameters of `model`."""
    params, lr, decay = model.parameters(), config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return SGD(params, lr, momentum=config.betas[0], weight_decay=decay)
    return (AdamW if config.optimizer == "adamw" else Adam)(params, lr, config.betas, weight_decay=decay)


def cut(batch: Batch, shards: int) -> list[tuple[int, Batch]]:
    """(first row, rows) of up to `shards` slices of nearly equal size; more shards than rows leave none empty."""
    rows = len(next(iter(batch.values())))
    edges = [rows * i // shards for i in range(shards + 1)]
    return [
        (first, {name: array[first:last] for name, array in batch.items()})
        for first, last in pairwise(edges)
        if last > first
    ]


class TrainStep:
    """Gradient, clipping and update for one model and optimizer; `Trainer` and `bench` both call it."""

    def __init__(self, model: Model, optimizer: Optimizer, config: TrainConfig, workers: Workers) -> None:
        self.model, self.optimizer, self.config, self.workers = model, optimizer, config, workers
        self.schedule = config.learning_rate_schedule()
        keep_freed_memory()
        self.gradient = np.empty_like(optimizer.flat.data)
        self._views = optimizer.flat.views(self.gradient)
        self._kwargs = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}

    def __call__(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Update the parameters once from `batches` (as many as are accumulated) at `step`, from 0.

        Raises `NonFiniteError`, and updates nothing, if the loss or the gradient is not finite.
        """
        config = self.config
        loss = self._accumulate(batches, step)
        if not np.isfinite(loss):
            raise NonFiniteError("train", f"the loss is {loss} at step {step + 1}", LOWER_RATE)
        data = self.optimizer.flat.data
        kernel = serve("optimizer", data)
        if config.l1:
            kernel.add_l1(self.gradient, data, config.l1, self.optimizer.flat.num_decayed)
        norm = kernel.clip_(self.gradient, config.grad_clip or np.inf)
        if not np.isfinite(norm):
            raise NonFiniteError(
                "train", f"the gradient of {self._first_bad()} is not finite at step {step + 1}", LOWER_RATE
            )
        self.optimizer.lr = self.schedule(step)
        self.optimizer.step(self.gradient)
        return StepResult(float(loss), float(norm))

    def _accumulate(self, batches: Sequence[Batch], step: int) -> float:
        """Fill `gradient` with that of the mean loss over all targets of all batches; returns that loss."""
        total = sum(self.model.num_targets(**batch) for batch in batches)
        tasks, first = [], 0
        for batch in batches:
            for row, shard in cut(batch, self.config.shards):
                tasks.append(partial(self._shard, shard, first + row, step, total))
            first += len(next(iter(batch.values())))
        loss = 0.0
        for index, (share, gradients) in enumerate(self.workers.run(tasks)):
            loss += share
            for view, g in zip(self._views, gradients, strict=True):
                if index == 0:
                    np.copyto(view, g)
                else:
                    np.add(view, g, out=view)
            del gradients
        return loss

    def _shard(self, shard: Batch, first_row: int, step: int, total: int) -> tuple[float, list[np.ndarray]]:
        """This shard's part of the mean loss and of its gradient."""
        weight = self.model.num_targets(**shard) / max(total, 1)
        with random.scope(self.config.seed, step, first_row):
            loss = self.model(**shard, **self._kwargs).loss
            return loss.item() * weight, grad(loss, self.optimizer.flat.params, gradient=weight)

    def _first_bad(self) -> str:
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, view in zip(self.optimizer.flat.params, self._views, strict=True):
            if not np.isfinite(view).all():
                return names[id(parameter)]
        return "the whole model (its norm overflows)"


def evaluate(model: Model, batches: Iterable[Batch], workers: Workers) -> float:
    """Mean loss over all targets of `batches`, in eval mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with no_grad():

            def one(batch: Batch) -> tuple[float, int]:
                count = model.num_targets(**batch)
                return model(**batch).loss.item() * count, count

            total, targets = 0.0, 0
            for loss, count in workers.run(partial(one, batch) for batch in batches):
                total, targets = total + loss, targets + count
    finally:
        model.train(was_training)
    return total / max(targets, 1)
