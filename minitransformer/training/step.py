"""One training step: the batch in shards, their gradients added in order, one update.

Each shard runs forward and backward on one worker with one BLAS thread and writes nothing shared, so
there is one barrier a step. Shards are cut and added in index order: their number fixes the bits of the
result, the number of threads does not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from minitransformer import random
from minitransformer.autograd import Tensor, grad, no_grad
from minitransformer.diagnose import first_bad_op, range_text
from minitransformer.errors import NonFiniteError
from minitransformer.gradients import gradient_error
from minitransformer.kernels import serve
from minitransformer.kernels.gpu.arrays import on_device, to_host
from minitransformer.memory import keep_freed_memory
from minitransformer.models.base import Model
from minitransformer.optim import SGD, Adam, AdamW, Optimizer
from minitransformer.threads import Workers, split
from minitransformer.training.config import TrainConfig
from minitransformer.training.failure import LOWER_RATE, failure

Batch = dict[str, np.ndarray]


class StepResult(NamedTuple):
    """`loss` is the mean over all targets of the step, `grad_norm` that of the gradient before clipping.

    On a GPU both are arrays there until `TrainStep.read` makes numbers of them.
    """

    loss: Any
    grad_norm: Any
    targets: int


class Shard(NamedTuple):
    """Rows of a step's batches, from `first_row` on; `weight` is their share of all its targets."""

    first_row: int
    rows: Batch
    weight: float


def make_optimizer(model: Model, config: TrainConfig) -> Optimizer:
    """The optimizer that `config` names, over all parameters of `model`."""
    params, lr, decay = model.parameters(), config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return SGD(params, lr, momentum=config.betas[0], weight_decay=decay)
    return (AdamW if config.optimizer == "adamw" else Adam)(params, lr, config.betas, weight_decay=decay)


def cut(batch: Batch, shards: int) -> list[tuple[int, Batch]]:
    """(first row, rows) of `shards` slices of nearly equal size, of one row each where shards are more than rows."""
    rows = len(next(iter(batch.values())))
    shards = max(min(shards, rows), 1)
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
        self.gradient = np.zeros_like(optimizer.flat.data)  # of the last step, in the order of the flat buffer
        self._views = optimizer.flat.views(self.gradient)
        self.on_gpu = on_device(optimizer.flat.data)
        self._kwargs = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}

    def __call__(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Update the parameters once from `batches` (as many as are accumulated) at `step`, from 0.

        Raises `NonFiniteError`, and updates nothing, if the loss or the gradient is not finite. A GPU does not wait
        to be asked: there `read` raises it, when further steps may have been made.
        """
        config = self.config
        loss = self._accumulate(batches, step)
        if not self.on_gpu and not np.isfinite(loss):
            raise self._failure(f"the loss is {loss} at step {step + 1}", batches, step)
        data = self.optimizer.flat.data
        kernel = serve("optimizer", data)
        if config.l1:
            kernel.add_l1(self.gradient, data, config.l1, self.optimizer.flat.num_decayed)
        norm = kernel.clip_(self.gradient, config.grad_clip or np.inf)
        if not self.on_gpu and not np.isfinite(norm):
            name = self._first_bad(self.gradient) or "the whole model (its norm overflows)"
            raise self._failure(f"the gradient of {name} is not finite at step {step + 1}", batches, step)
        self.optimizer.lr = self.schedule(step)
        self.optimizer.step(self.gradient)
        if self.on_gpu:
            return StepResult(loss, norm, self._targets(batches))
        # One pass tells, unless the square overflows by itself.
        if not np.isfinite(kernel.squared_norm(data)) and (spoilt := self._first_bad(data)):
            raise NonFiniteError("train", f"the update of step {step + 1} {self._update(spoilt)}", LOWER_RATE)
        return StepResult(float(loss), float(norm), self._targets(batches))

    def read(self, results: Sequence[StepResult], last_step: int) -> list[StepResult]:
        """Those of consecutive steps up to `last_step`, counted from 1, as numbers; waits for the GPU, once.

        Raises `NonFiniteError` for the first that is not finite.
        """
        if not self.on_gpu:
            return list(results)
        numbers = to_host(np.stack([np.stack([r.loss.astype(np.float64), r.grad_norm]) for r in results]))
        first = last_step - len(results) + 1
        for step, (loss, norm) in enumerate(numbers, start=first):
            if not np.isfinite(loss) or not np.isfinite(norm):
                what = f"the loss is {loss}" if not np.isfinite(loss) else f"the norm of the gradient is {norm}"
                fix = f"{LOWER_RATE}, or resume on the CPU, which names the op"
                raise NonFiniteError("train", f"{what} at step {step}", fix)
        return [StepResult(float(x), float(n), r.targets) for (x, n), r in zip(numbers, results, strict=True)]

    def _accumulate(self, batches: Sequence[Batch], step: int) -> Any:
        """Fill `gradient` with that of the mean loss over all targets of all batches; returns that loss."""
        shards = self._shards(batches)
        if self.on_gpu:
            return self._accumulate_on_gpu(shards, step)
        loss, total = 0.0, None
        for share, gradients in self.workers.run(partial(self._run, s, step) for s in shards):
            loss += share
            if total is None:
                total = gradients
            else:
                _add(total, gradients, self._views)
                total = self._views
            del gradients
        if total is not None and total is not self._views:
            _add(total, None, self._views)
        return loss

    def _accumulate_on_gpu(self, shards: Sequence[Shard], step: int) -> Any:
        """`_accumulate` from this thread alone, which leaves the loss where it is."""
        loss: Any = 0.0
        for number, shard in enumerate(shards):
            share, gradients = self._run(shard, step)
            loss = loss + share
            flat = np.concatenate([g.reshape(-1) for g in gradients])
            if number:
                self.gradient += flat
            else:
                self.gradient[...] = flat
        return loss

    def gradient_error(self, batches: Sequence[Batch], step: int) -> float:
        """How far the gradient of the first shard is from the complex step, at the live weights: see `gradients`."""
        shard = self._shards(batches)[0]

        def compute() -> Tensor:
            with random.scope(self.config.seed, step, shard.first_row):
                return self._loss(shard)

        return gradient_error(compute, self.optimizer.flat.params, seed=step)

    def _targets(self, batches: Sequence[Batch]) -> int:
        return sum(self.model.num_targets(**batch) for batch in batches)

    def _shards(self, batches: Sequence[Batch]) -> list[Shard]:
        targets = self._targets(batches)
        shards, first = [], 0
        for batch in batches:
            for row, rows in cut(batch, 1 if self.on_gpu else self.config.shards):
                shards.append(Shard(first + row, rows, self.model.num_targets(**rows) / max(targets, 1)))
            first += len(next(iter(batch.values())))
        return shards

    def _run(self, shard: Shard, step: int) -> tuple[Any, list[np.ndarray]]:
        """This shard's part of the mean loss and of its gradient."""
        with random.scope(self.config.seed, step, shard.first_row):
            loss = self._loss(shard)
            gradients = grad(loss, self.optimizer.flat.params, gradient=shard.weight)
        return (loss.data if self.on_gpu else loss.item()) * shard.weight, gradients

    def _loss(self, shard: Shard) -> Tensor:
        return self.model(**shard.rows, **self._kwargs).loss

    def _failure(self, problem: str, batches: Sequence[Batch], step: int) -> NonFiniteError:
        """The error for a step that went wrong: the step again, shard by shard, watching every op.

        The same bits come out, so it need not be watched the first time.
        """
        for shard in self._shards(batches):
            with random.scope(self.config.seed, step, shard.first_row):
                bad = first_bad_op(partial(self._loss, shard), self.optimizer.flat.params, shard.weight)
            if bad is not None:
                return failure(problem, bad, step + 1, shard.first_row, shard.rows, self.config.out_dir)
        return NonFiniteError(
            "train", f"{problem}, and no single op makes it so: finite parts overflow in their sum", LOWER_RATE
        )

    def _update(self, name: str) -> str:
        """What the optimizer did to the parameter `name`, and the ranges of what it did it with."""
        flat, optimizer = self.optimizer.flat, self.optimizer
        index = next(i for i, p in enumerate(flat.params) if p is dict(self.model.named_parameters())[name])
        arrays = {"parameter": flat.data, "gradient": self.gradient, **optimizer.state()[0]}
        ranges = "; ".join(f"{what}: {range_text(flat.views(array)[index])}" for what, array in arrays.items())
        return f"makes the parameter {name} not finite ({type(optimizer).__name__}, rate {optimizer.lr:.4g}; {ranges})"

    def _first_bad(self, buffer: np.ndarray) -> str | None:
        """The name of the first parameter whose part of `buffer` is not finite."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, view in zip(self.optimizer.flat.params, self.optimizer.flat.views(buffer), strict=True):
            if not np.isfinite(view).all():
                return names[id(parameter)]
        return None


def _add(left: Sequence[np.ndarray], right: Sequence[np.ndarray] | None, out: Sequence[np.ndarray]) -> None:
    """out = left + right array by array, or `left` alone, on all threads: memory is what that waits for."""
    ends = list(accumulate(a.size for a in out))

    def add(first: int, last: int) -> None:
        for i in range(bisect_right(ends, first), bisect_right(ends, last)):
            if right is None:
                out[i][...] = left[i]
            else:
                np.add(left[i], right[i], out=out[i])

    split(ends[-1], add)


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
