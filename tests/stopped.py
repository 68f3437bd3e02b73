"""Runs that are stopped in the middle, and what of them must be equal."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
from contextlib import redirect_stderr, redirect_stdout
from contextvars import copy_context
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tiny import dataset, fresh_gpt, train_config

import minitransformer as mt
from minitransformer.checkpoint import RunFolder
from minitransformer.cli import main, verbs
from minitransformer.files import is_there
from minitransformer.training import Callback, TrainResult

GPT = {"dropout": 0.2}


class Killed(BaseException):
    """Stands for whatever ends a process in the middle."""


class Stop(Callback):
    """Ends the run at a step: by Ctrl-C, or as a kill would, after the log line or after the checkpoint."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if record["step"] == self.step:
            if self.how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            elif self.how == "kill after the log":
                raise Killed

    def on_save(self, trainer: Any, step: int) -> None:
        if self.how == "kill after the checkpoint" and step >= self.step:
            raise Killed


def run(
    folder: Path, *callbacks: Callback, resume: bool = False, gpt: dict[str, Any] = GPT, **changes: Any
) -> TrainResult | None:
    """Train in `folder`; None if it was killed."""
    trainer = mt.Trainer(fresh_gpt(**gpt), train_config(out_dir=folder, **changes), dataset(), dataset(1), callbacks)
    try:
        return trainer.train(resume)
    except Killed:
        return None


def files(folder: Path) -> dict[str, str]:
    """The digests of what must be equal: all of the last and the best checkpoint, and the log of metrics.

    Not the bytes: where CI is set, pytest takes minutes to show in full how two files differ.
    """
    opened = RunFolder.open(folder)
    found = {"metrics.jsonl": digest((folder / "metrics.jsonl").read_bytes())}
    for which in ("last", "best"):
        for path in opened.load(which).folder.iterdir():
            found[f"{which}/{path.name}"] = digest(path.read_bytes())
    assert {"last/model.safetensors", "last/optimizer.safetensors", "best/trainer.json"} <= set(found)
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Never(Callback):
    """Ends the run before its first checkpoint."""

    def on_start(self, trainer: Any, step: int) -> None:
        raise Killed


# --- from the command line -------------------------------------------------------------------------------

SETTINGS = shlex.split(
    "--max-steps 6 --n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 4 --dropout 0.1 "
    "--eval-interval 3 --save-interval 2 --threads 1"
)


def train_arguments(text: Path, run: Path) -> list[str]:
    return ["train", "--data", str(text), "--out-dir", str(run), *SETTINGS]


def cli(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in this process, which has everything imported.

    A training ends with a sample of 3 tokens: what is compared is the longer one of `outcome`.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setitem(verbs._SAMPLE, "max_new_tokens", 3)
        return copy_context().run(main, arguments), out.getvalue(), err.getvalue()


def go_on(run: Path, text: Path) -> int:
    """Resume a run in which nothing may be damaged, or start one that was not made yet."""
    if not is_there(run / "run.json"):
        return cli(*train_arguments(text, run))[0]
    for which in ("last", "best"):
        if is_there(run / f"{which}.json"):
            RunFolder.open(run).load(which)
    return cli("resume", str(run))[0]


def outcome(run: Path) -> dict[str, str]:
    """All that must be equal, with a sample."""
    status, sample, _ = cli("generate", str(run), "--max-new-tokens", "30", "--seed", "1")
    assert status == 0
    return {**files(run), "sample": sample}
