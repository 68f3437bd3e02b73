"""The training loop, and all that lets it be interrupted and resumed bit for bit."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any, Protocol

import numpy as np

from minitransformer.checkpoint import RunFolder, pack_arrays, unpack_arrays
from minitransformer.checks import shown
from minitransformer.errors import CheckpointError, ConfigError, DeviceError, DTypeError, GradientError, NonFiniteError
from minitransformer.files import LogFile, is_there, json_bytes, read_json, sealed, sha256
from minitransformer.kernels.gpu.arrays import resolve_device
from minitransformer.models.base import Model, read_weights
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas
from minitransformer.training.callbacks import Callback, Progress, TrainResult
from minitransformer.training.config import TrainConfig
from minitransformer.training.failure import LOWER_RATE, evaluation_failure
from minitransformer.training.step import Batch, StepResult, TrainStep, evaluate, make_optimizer

# What a resumed run may change: the length of the run and how it is carried out.
_MAY_CHANGE = {"out_dir", "max_steps", "threads", "progress", "save_interval", "device"}

_READ_EVERY = 10  # steps on a GPU, which goes on meanwhile


class TrainData(Protocol):
    """Batches as a pure function of (seed, step): resuming needs no replay. See `data.TokenDataset`."""

    def batch(self, seed: int, step: int, batch_size: int) -> Batch: ...

    def sequential(self, batch_size: int) -> Iterator[Batch]: ...


class Trainer:
    """Train `model` on batches of `train_data`, judged by its loss on `eval_data`.

    A batch is a dict of arrays whose first axis is the row; it is passed to the model by keyword, and
    `model(...).loss` must be the mean over `model.num_targets(...)` targets.
    """

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        train_data: TrainData,
        eval_data: TrainData | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        for name, value, kind in (("model", model, Model), ("config", config, TrainConfig)):
            if not isinstance(value, kind):
                raise DTypeError("Trainer", f"{name} is {shown(value)}, expected a {kind.__name__}", "Make one first")
        if not isinstance(callbacks, (list, tuple)):
            raise DTypeError("Trainer", f"callbacks is {shown(callbacks)}, expected a list", "Pass [callback]")
        device = resolve_device("Trainer", config.device)
        if config.check_grads_every is not None and device != "cpu":
            problem = "check_grads_every takes complex steps, which are for the CPU"
            raise ConfigError("Trainer", problem, "Train with device='cpu', or leave it out")
        elsewhere = {p.device for p in model.parameters()} - {"cpu", device}
        if elsewhere:
            problem = f"the model is on {', '.join(map(repr, sorted(elsewhere)))}, the config says {config.device!r}"
            raise DeviceError("Trainer", problem, "Say device=... in the config, or move the model: model.to(...)")
        model.to(device)
        self.model, self.config = model, config
        self.train_data, self.eval_data = train_data, eval_data
        self.callbacks = [*([Progress()] if config.progress else []), *callbacks]
        self.optimizer = make_optimizer(model, config)
        self.model.name_call_sites()
        self._best = math.inf
        self._bad_evaluations = 0
        self._run: RunFolder | None = None

    def train(self, resume: bool = False) -> TrainResult:
        """Train until `max_steps`, from the start or, with `resume`, from the last checkpoint of `out_dir`.

        A run that was stopped before its first checkpoint is resumed from the start, with the weights it had.
        Ctrl-C finishes the step, saves and returns; a second one stops at once. Raises `NonFiniteError` at
        the first loss, gradient or parameter to save that is not finite (the last checkpoint is kept),
        `CheckpointError` for a folder that already holds a run, or holds none to resume, `ConfigError` for a
        changed config.
        """
        config = self.config
        first = self._resume() if resume else self._create()
        self.model.train()
        threads = config.threads or get_num_threads()
        result, val_loss, step = StepResult(math.nan, math.nan, 0), None, first
        reason, stopped = "failed", "early stopping" if self._stale() else None
        with single_threaded_blas(), Workers(threads) as workers, _interrupts() as interrupted:
            train_step = TrainStep(self.model, self.optimizer, config, workers)
            for callback in self.callbacks:
                callback.on_start(self, first)
            try:
                if self._run is not None and not self._run.has_checkpoint():
                    self._save(0, best=False)  # so that there is something to resume at any moment
                unread: list[tuple[StepResult, dict[str, float]]] = []
                for index in range(first, first if stopped else config.max_steps):
                    gradient_error = self._check_gradient(train_step, index)
                    if not unread:
                        started = time.perf_counter()
                    taken = train_step(self._batches(index), index)
                    unread.append((taken, {"lr": self.optimizer.lr, **gradient_error}))
                    step = index + 1
                    last = step == config.max_steps
                    judged = self.eval_data is not None and (step % config.eval_interval == 0 or last)
                    stops = judged or last or step % config.save_interval == 0 or interrupted.is_set()
                    if train_step.on_gpu and not stops and len(unread) < _READ_EVERY:
                        continue
                    results = train_step.read([taken for taken, _ in unread], step)
                    seconds = (time.perf_counter() - started) / len(unread)
                    records = self._records(results, [known for _, known in unread], step)
                    result, unread = results[-1], []
                    better = False
                    if judged:
                        val_loss = self._evaluate(workers, step)
                        records[-1]["val_loss"] = val_loss
                        better = val_loss < self._best
                        self._best = min(val_loss, self._best)
                        self._bad_evaluations = 0 if better else self._bad_evaluations + 1
                    for record, of_step in zip(records, results, strict=True):
                        self._log(record, of_step.targets, seconds)
                    if self._stale():
                        stopped = "early stopping"
                    elif interrupted.is_set() and not last:
                        stopped = "interrupted"
                    if better or last or step % config.save_interval == 0 or stopped:
                        self._save(step, better)
                    if stopped:
                        break
                reason = stopped or "finished"
            finally:
                ended = TrainResult(step, result.loss, val_loss, None if math.isinf(self._best) else self._best, reason)
                for callback in self.callbacks:
                    callback.on_end(self, ended)
        return ended

    @staticmethod
    def _records(results: Sequence[StepResult], known: Sequence[dict[str, float]], step: int) -> list[dict[str, Any]]:
        """What is logged of the steps up to `step`."""
        first = step - len(results) + 1
        return [
            {"step": number, "loss": result.loss, "lr": more["lr"], "grad_norm": result.grad_norm, **more}
            for number, (result, more) in enumerate(zip(results, known, strict=True), start=first)
        ]

    def _check_gradient(self, train_step: TrainStep, index: int) -> dict[str, float]:
        """`grad_error` for the record of a step at which the gradient is to be checked."""
        every = self.config.check_grads_every
        if every is None or index % every:
            return {}
        try:
            return {"grad_error": train_step.gradient_error(self._batches(index), index)}
        except GradientError:  # not finite: the step itself is about to say so, and where it began
            return {}

    def _stale(self) -> bool:
        """Whether the validation loss has not improved for as long as the config allows."""
        return self._bad_evaluations >= (self.config.early_stopping_patience or math.inf)

    def _batches(self, step: int) -> list[Batch]:
        """The batches of one step, each with a number of its own."""
        config = self.config
        first = step * config.grad_accumulation_steps
        return [
            self.train_data.batch(config.seed, first + i, config.batch_size)
            for i in range(config.grad_accumulation_steps)
        ]

    def _evaluate(self, workers: Workers, step: int) -> float:
        data = self.eval_data
        assert data is not None

        def batches() -> Iterator[Batch]:
            return islice(data.sequential(self.config.batch_size), self.config.eval_batches)

        loss = evaluate(self.model, batches(), workers)
        if not math.isfinite(loss):
            problem = f"the validation loss is {loss} after step {step}"
            raise evaluation_failure(problem, self.model, batches(), step, self.config.out_dir)
        return loss

    def _log(self, record: dict[str, Any], targets: int, seconds: float) -> None:
        timing = {"step": record["step"], "seconds": seconds, "tokens_per_second": targets / seconds}
        if self._run is not None:
            LogFile(self._run.path / "metrics.jsonl").append(record)
            LogFile(self._run.path / "timings.jsonl").append(timing)
        for callback in self.callbacks:
            callback.on_step(self, record, timing)

    def _description(self) -> dict[str, Any]:
        """What run.json says of this run: all that `resume` needs to build it again."""
        description = {
            "model_type": type(self.model).__name__,
            "model": asdict(self.model.config),
            "train": asdict(self.config),
            "data": getattr(self.train_data, "source", None),
        }
        # As it will be read back, since `resume` compares: tuples become lists.
        return json.loads(json_bytes("the description of the run", description))

    def _create(self) -> int:
        if self.config.out_dir is not None:
            # The digest tells a run that is started over, from weights it did not save, whether these are the same.
            self._run = RunFolder.create(self.config.out_dir, {**self._description(), "start": self._digest()})
        return 0

    def _digest(self) -> str:
        return sha256(self.model.files()["model.safetensors"])

    def _save(self, step: int, best: bool) -> None:
        if self._run is None:
            return
        for name, parameter in self.model.named_parameters():
            if not np.isfinite(parameter.data).all():
                raise NonFiniteError("train", f"the parameter {name} is not finite after step {step}", LOWER_RATE)
        arrays, numbers = self.optimizer.state()
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                problem = f"the optimizer's {name} is not finite after step {step}"
                raise NonFiniteError("train", problem, LOWER_RATE)
        state = {
            "step": step,
            "optimizer": numbers,
            "best_val_loss": None if math.isinf(self._best) else self._best,
            "bad_evaluations": self._bad_evaluations,
        }
        files = {
            **self.model.files(),
            "optimizer.safetensors": pack_arrays(arrays, {}),
            "trainer.json": json_bytes("the state of the trainer", state, indent=2),
        }
        tokenizer = getattr(self.train_data, "tokenizer", None)
        if tokenizer is not None:
            files["tokenizer.json"] = sealed("the tokenizer", tokenizer.to_json())
        LogFile(self._run.path / "metrics.jsonl").sync()
        self._run.save(step, files, best=best)
        for callback in self.callbacks:
            callback.on_save(self, step)

    def _resume(self) -> int:
        """Restore weights, optimizer and counters from the last checkpoint; returns its step.

        That is 0 for a run stopped before its first checkpoint, which starts over.
        """
        if self.config.out_dir is None:
            raise ConfigError("resume", "the config has no out_dir, expected the folder of a run", "Set out_dir")
        self._run = RunFolder.open(self.config.out_dir)
        self._check_same(self._run.description)
        if not self._run.has_checkpoint():
            if self._run.description.get("start") != self._digest():
                problem = f"{self._run.path} has no checkpoint yet, and the model is not the one it was started with"
                raise ConfigError("resume", problem, "Make the model from the same seed, or start another run")
            self._cut_back(0)
            return 0
        checkpoint = self._run.load("last")
        weights, dtype, _ = read_weights(checkpoint.folder / "model.safetensors")
        if dtype != self.optimizer.flat.data.dtype:
            raise ConfigError(
                "resume",
                f"the run was saved in {dtype}, the model is {self.optimizer.flat.data.dtype}",
                "Convert it",
            )
        self.model.load_state_dict(weights)
        state = read_json(checkpoint.folder / "trainer.json", "the state of the trainer")
        arrays, _ = unpack_arrays(checkpoint.folder / "optimizer.safetensors")
        numbers, best, bad = state.get("optimizer"), state.get("best_val_loss"), state.get("bad_evaluations")
        if not isinstance(numbers, dict) or not isinstance(best, (float, type(None))) or not isinstance(bad, int):
            problem = f"{checkpoint.folder / 'trainer.json'} is not the state of a trainer: {state}"
            raise CheckpointError("resume", problem, "Resume it with the version that wrote it")
        if self._run.has_best() and not is_there(self._run.path / "best.json"):
            self._run.load("best")  # which says so: the next save would remove what it named
        self.optimizer.load_state(arrays, numbers)
        self._best = math.inf if best is None else best
        self._bad_evaluations = bad
        self._cut_back(checkpoint.step)
        return checkpoint.step

    def _cut_back(self, step: int) -> None:
        assert self._run is not None
        for name in ("metrics.jsonl", "timings.jsonl"):
            LogFile(self._run.path / name).cut_back(step)

    def _check_same(self, saved: dict[str, Any]) -> None:
        """`ConfigError` if model, data or a setting that decides the numbers differs from the saved run."""
        own = self._description()
        for part in ("model_type", "model", "data"):
            if saved.get(part) != own[part]:
                raise ConfigError(
                    "resume",
                    f"the {part.replace('_', ' ')} is not that of the run: saved {saved.get(part)}, now {own[part]}",
                    "Resume with what the run was started with",
                )
        settings = saved.get("train") or {}
        changed = [
            f"{name} (saved {settings.get(name)!r}, now {value!r})"
            for name, value in own["train"].items()
            if name not in _MAY_CHANGE and settings.get(name) != value
        ]
        if changed:
            raise ConfigError(
                "resume",
                f"the settings are not those of the run: {', '.join(changed)}",
                "Resume with the same ones",
            )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts as usual. Only the main thread gets signals."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
