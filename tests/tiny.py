"""Tiny GPTs and data for the tests of models, generation and training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.data.batches import TokenDataset
from minitransformer.training import TrainResult

V, BLOCK = 20, 8
SHAPE = {"vocab_size": V, "block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 16}

# Every option of the config, each once alone.
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "layers": {"n_layer": 3},
    "one head": {"n_head": 1},
    "shared heads": {"n_head": 4, "n_kv_head": 2},
    "n_inner": {"n_inner": 5},
    "dropout": {"dropout": 0.3},
    "no bias": {"bias": False},
    "sinusoidal": {"positions": "sinusoidal"},
    "rope": {"positions": "rope"},
    "alibi": {"positions": "alibi"},
    "no positions": {"positions": None},
    "rms": {"norm": "rms"},
    "relu": {"ffn": "relu"},
    "swiglu": {"ffn": "swiglu"},
    "window": {"attention": "window", "window": 3},
    "global window": {"attention": "global_window", "window": 2, "n_global": 2},
    "strided": {"attention": "strided", "stride": 3},
    "linear": {"attention": "linear"},
    "untied": {"tie_weights": False},
}


@st.composite
def options(draw: st.DrawFn, ffn: tuple[str, ...] = ("gelu", "relu", "swiglu")) -> dict[str, Any]:
    """Options of GPTConfig beside the sizes of SHAPE, in any combination."""
    n_head = draw(st.sampled_from([1, 2, 4]))
    kind = draw(st.sampled_from(["full", "window", "global_window", "strided", "linear"]))
    few = st.integers(1, BLOCK + 2)
    positions = ["learned", "sinusoidal", "rope", None, *(["alibi"] if kind != "linear" else [])]
    return {
        "n_layer": draw(st.integers(1, 2)),
        "n_head": n_head,
        "n_kv_head": draw(st.sampled_from([None, *(k for k in (1, 2, 4) if n_head % k == 0)])),
        "n_inner": draw(st.sampled_from([None, 3])),
        "bias": draw(st.booleans()),
        "positions": draw(st.sampled_from(positions)),
        "norm": draw(st.sampled_from(["layer", "rms"])),
        "ffn": draw(st.sampled_from(ffn)),
        "attention": kind,
        "window": draw(few) if "window" in kind else None,
        "n_global": draw(few) if kind == "global_window" else None,
        "stride": draw(few) if kind == "strided" else None,
        "tie_weights": draw(st.booleans()),
    }


def gpt(dtype: str = "float64", seed: int = 0, **changes: Any) -> mt.GPT:
    """A GPT in eval mode whose weights are large enough for every part to matter, norms and biases too."""
    model = mt.GPT(mt.GPTConfig(**{**SHAPE, **changes}))
    model.to(dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = rng.normal(0 if parameter.ndim == 2 else 0.7, 0.4, parameter.shape)
    model.eval()
    return model


def token_ids(B: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (B, T))


def dataset(seed: int = 0, size: int = 120) -> TokenDataset:
    """Tokens that can be learnt: each mostly the one before and 3."""
    rng = np.random.default_rng(seed)
    tokens = np.cumsum(np.where(rng.random(size) < 0.9, 3, 7)) % V
    return TokenDataset(tokens, BLOCK, source={"made by": "tests", "seed": seed})


def train_config(**changes: Any) -> mt.TrainConfig:
    """12 steps of 6 rows, quiet."""
    defaults: dict[str, Any] = {
        "max_steps": 12,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "min_learning_rate": 1e-3,
        "warmup_steps": 2,
        "eval_interval": 4,
        "eval_batches": 2,
        "save_interval": 5,
        "shards": 3,
        "threads": 1,
        "progress": False,
    }
    return mt.TrainConfig(**{**defaults, **changes})


def fresh_gpt(**changes: Any) -> mt.GPT:
    """A GPT as users make one, float32, always the same start."""
    mt.manual_seed(1)
    return mt.GPT(mt.GPTConfig(**{**SHAPE, **changes}))


class Given:
    """A model that can step, with logits (B, V) that depend only on how many tokens there are."""

    def __init__(self, logits: Callable[[int], Any]) -> None:
        self.config = SimpleNamespace(block_size=1000, slides=True)
        self.training = True
        self._logits = logits

    def make_cache(self, batch_size: int, length: int) -> None:
        return None

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.training = False

    def __call__(self, ids: np.ndarray, attention_mask: Any = None, cache: Any = None) -> Any:
        logits = np.broadcast_to(self._logits(ids.shape[1]), (len(ids), len(self._logits(ids.shape[1])[0])))
        return SimpleNamespace(logits=SimpleNamespace(data=np.array(logits, float)[:, None]))


class Listener:
    """A streamer that keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[np.ndarray] = []
        self.ended = 0

    def put(self, ids: np.ndarray) -> None:
        assert not self.ended
        self.received.append(ids)

    def end(self) -> None:
        self.ended += 1


def trained(callbacks: Sequence[Any] = (), *, judged: bool = True, **settings: Any) -> tuple[mt.Trainer, TrainResult]:
    """A trainer and the result of its training."""
    trainer = mt.Trainer(fresh_gpt(), train_config(**settings), dataset(), dataset(1) if judged else None, callbacks)
    return trainer, trainer.train()


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]
