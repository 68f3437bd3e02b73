"""What happens around the loop: progress on the screen, and hooks for your own code."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import Any, Protocol, TextIO

from minitransformer.models.base import Model
from minitransformer.optim import Optimizer
from minitransformer.training.config import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: after how many `steps`, and why.

    `reason` is "finished", "interrupted", "early stopping", or, for callbacks only, "failed": `train` then
    raises the error.
    """

    steps: int
    loss: float
    val_loss: float | None
    best_val_loss: float | None
    reason: str


class Training(Protocol):
    """What a callback may look at: a `Trainer`."""

    model: Model
    config: TrainConfig
    optimizer: Optimizer


class Callback:
    """Override what you need; the methods are called on the main thread, in the order of the callbacks."""

    def on_start(self, trainer: Training, step: int) -> None:
        """Training begins or continues after `step` steps."""

    def on_step(self, trainer: Training, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """A step is done; `record` and `timing` are the lines of metrics.jsonl and timings.jsonl."""

    def on_save(self, trainer: Training, step: int) -> None:
        """A checkpoint of `step` is complete on disk."""

    def on_end(self, trainer: Training, result: TrainResult) -> None:
        """Training is over."""


class Progress(Callback):
    """A tqdm bar on a terminal, plain lines elsewhere: twenty in a run, and one per evaluation."""

    def __init__(self) -> None:
        self.stream: TextIO = sys.stderr
        self._bar: Any = None
        self._validation = ""

    def on_start(self, trainer: Training, step: int) -> None:
        self.stream = sys.stderr  # as it is now: a test or a notebook may have replaced it
        self._started, self._first, self._total = time.perf_counter(), step, trainer.config.max_steps
        if self.stream.isatty():
            from tqdm import tqdm

            size = get_terminal_size()  # 80 x 24 where a terminal does not tell, and tqdm would stay silent
            self._bar = tqdm(
                total=self._total,
                initial=step,
                file=self.stream,
                ncols=size.columns,
                nrows=size.lines,
                bar_format="{percentage:3.0f}%|{bar:4}| {n}/{total} {remaining}{postfix}",
            )

    def on_step(self, trainer: Training, record: dict[str, Any], timing: dict[str, Any]) -> None:
        step = record["step"]
        pace = timing["tokens_per_second"]
        if self._bar is not None:  # everything within 80 columns
            if "val_loss" in record:
                self._validation = f" val {record['val_loss']:.3f}"
            self._bar.set_postfix_str(
                f"loss {record['loss']:.3f}{self._validation} lr {record['lr']:.1e} "
                f"norm {record['grad_norm']:.2g} {pace / 1000:.1f}k tok/s",
                refresh=False,
            )
            self._bar.update()
        elif step % max(1, self._total // 20) == 0 or step == self._total or "val_loss" in record:
            left = int((time.perf_counter() - self._started) / (step - self._first) * (self._total - step))
            validation = f", val loss {record['val_loss']:.4f}" if "val_loss" in record else ""
            print(
                f"step {step}/{self._total}: loss {record['loss']:.4f}{validation}, lr {record['lr']:.2e}, "
                f"grad norm {record['grad_norm']:.3g}, {pace:,.0f} tokens/s, {left // 60}:{left % 60:02d} left",
                file=self.stream,
                flush=True,
            )

    def on_end(self, trainer: Training, result: TrainResult) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
