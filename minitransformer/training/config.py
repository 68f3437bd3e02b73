"""Everything a training run is decided by, beside the model and the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minitransformer.checks import check_choice, check_flag, is_number, path_of, shown
from minitransformer.errors import ConfigError
from minitransformer.kernels.gpu.arrays import DEVICES
from minitransformer.models.base import Config
from minitransformer.optim import schedules
from minitransformer.random import check_seed

_CHOICES = {
    "schedule": ("cosine", "linear", "constant", "noam", "warmup_stable_decay"),
    "optimizer": ("adamw", "adam", "sgd"),
}
_MOST = {"grad_accumulation_steps": 10_000}  # all batches of a step are in memory; other counts end at 2**31 - 1


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of `Trainer`; the defaults are nanoGPT's recipe for a CPU.

    `schedule` is "cosine", "linear", "constant", "noam" or "warmup_stable_decay", `optimizer` "adamw", "adam" or
    "sgd". Every `eval_interval` steps, and at the end, the validation loss is taken over `eval_batches` batches;
    every `save_interval` steps, and whenever that loss is the best so far, a checkpoint is saved.

    Batches, dropout and so the trained bits are a function of `seed` and `shards`, not of `threads`.
    `out_dir` is any path, kept as a string; None saves nothing. Intervals count steps. `betas` are those of
    Adam; SGD takes the first as its momentum. `weight_decay` and `l1` act on weights with two or more
    dimensions. `threads=None` takes `mt.set_num_threads`, or all cores. Raises `ConfigError` for values that
    make no sense.
    """

    out_dir: str | None = None
    max_steps: int = 2000
    batch_size: int = 12
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "cosine"
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    l1: float = 0.0
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 is no limit
    grad_accumulation_steps: int = 1
    label_smoothing: float = 0.0
    eval_interval: int = 250
    save_interval: int = 250
    early_stopping_patience: int | None = None  # evaluations without a better loss
    seed: int = 0
    shards: int = 2  # more pay on more cores and wider models: see docs/benchmarks.md
    threads: int | None = None
    device: str = "cpu"
    check_grads_every: int | None = None  # steps; metrics.jsonl then has `grad_error`, as in gradients.gradient_error
    eval_batches: int = 100  # of batch_size rows, from the start of the validation data
    progress: bool = True

    def __post_init__(self) -> None:
        if self.out_dir is not None:
            object.__setattr__(self, "out_dir", path_of("TrainConfig", "out_dir", self.out_dir))
        check_flag("TrainConfig", "progress", self.progress)
        for name in (
            "batch_size",
            "grad_accumulation_steps",
            "eval_interval",
            "eval_batches",
            "save_interval",
        ):
            self._whole(name, 1)
        for name, least in (("max_steps", 0), ("warmup_steps", 0), ("shards", 1)):
            self._whole(name, least)
        object.__setattr__(self, "seed", check_seed("TrainConfig", self.seed))
        for name in ("early_stopping_patience", "threads", "check_grads_every"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        for name in (
            "learning_rate",
            "min_learning_rate",
            "weight_decay",
            "l1",
            "grad_clip",
            "label_smoothing",
        ):
            self._number(name, getattr(self, name))
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ConfigError("TrainConfig", f"betas is {shown(self.betas)}, expected two numbers", "Pass (0.9, 0.99)")
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            self._number("betas", beta, below=1)
        self._number("label_smoothing", self.label_smoothing, below=1)
        for name, choices in _CHOICES.items():
            check_choice("TrainConfig", name, getattr(self, name), choices)
        if self.schedule != "constant" and self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                "TrainConfig",
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}",
                "Lower min_learning_rate too",
            )
        check_choice("TrainConfig", "device", self.device, ("auto", *DEVICES))

    def _whole(self, name: str, least: int) -> None:
        value, most = getattr(self, name), _MOST.get(name, 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            limit = f"most {most}" if isinstance(value, int) and value > most else f"least {least}"
            raise ConfigError(
                "TrainConfig",
                f"{name} is {value!r}, expected a whole number of at {limit}",
                f"Change {name}",
            )

    def _number(self, name: str, value: Any, below: float = math.inf) -> None:
        if not isinstance(value, (int, float)) or not is_number(value, 0, below):
            limit = "" if below == math.inf else f" and below {below}"
            raise ConfigError(
                "TrainConfig",
                f"{name} is {shown(value)}, expected a number of at least 0{limit}",
                f"Change {name}",
            )

    def learning_rate_schedule(self) -> schedules.Schedule:
        """The learning rate as a function of the step, from 0.

        The warm-up is cut to `max_steps` where it is longer. "noam" rises to `learning_rate` and falls with
        the inverse square root of the step; "warmup_stable_decay" falls over the last fifth.
        """
        peak, least, total = self.learning_rate, self.min_learning_rate, self.max_steps
        warmup = min(self.warmup_steps, total)
        if self.schedule == "constant":
            return schedules.constant(peak, warmup)
        if self.schedule == "noam":
            warmup = max(warmup, 1)
            return schedules.noam(1, warmup, factor=peak * math.sqrt(warmup))
        if self.schedule == "warmup_stable_decay":
            return schedules.warmup_stable_decay(peak, least, warmup, total, min(total // 5, total - warmup))
        return {"linear": schedules.linear, "cosine": schedules.cosine}[self.schedule](peak, least, warmup, total)
