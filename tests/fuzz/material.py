"""What the fuzzer's valid calls are made of: small arrays, Tensors, models, and functions over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import data, nn, optim


class Valid(NamedTuple):
    """A call that works. `writes`: it changes its arguments on purpose."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: bool = False


Lines = dict[str, Callable[[], Valid]]  # by the public name, with words behind it where it has several calls


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Valid:
    return Valid(function, args, kwargs)


def writes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Valid:
    return Valid(function, args, kwargs, writes=True)


def real(*shape: int) -> np.ndarray:
    """Different numbers of both signs."""
    return np.sin(1.0 + np.arange(math.prod(shape))).reshape(shape).astype(np.float32)


def leaf(*shape: int) -> mt.Tensor:
    return mt.Tensor(real(*shape), requires_grad=True)


def ids(*shape: int, below: int = 5) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape) % below


def bools(*shape: int) -> np.ndarray:
    return ids(*shape, below=3) > 0


def some(iterable: Any) -> list[Any]:
    """The first items of what may be long."""
    return list(islice(iterable, 3))


def inside(context: Callable[..., Any]) -> Callable[..., None]:
    def enter(*args: Any, **kwargs: Any) -> None:
        with context(*args, **kwargs):
            pass

    return enter


def layer(make: Callable[[], nn.Module], *args: Any, **kwargs: Any) -> Valid:
    """A forward call of a layer made with the numbers of seed 0."""
    mt.manual_seed(0)
    return call(make(), *args, **kwargs)


def gpt(**changes: Any) -> mt.GPT:
    mt.manual_seed(0)
    return mt.GPT(mt.GPTConfig(**{"vocab_size": 5, "block_size": 6, "n_layer": 1, "n_head": 2, "n_embd": 4, **changes}))


def filled(array: np.ndarray) -> nn.Parameter:
    """A Parameter that has a gradient."""
    p = nn.Parameter(array)
    p.grad = real(*array.shape)
    return p


def optimizer(kind: Callable[..., Any] = optim.AdamW) -> Any:
    return kind([filled(real(2, 3)), filled(real(3))], 0.1)


def at(schedule: Callable[..., Any]) -> Callable[..., list[float]]:
    return lambda *args, **kwargs: [schedule(*args, **kwargs)(step) for step in (0, 1, 5, 9)]


def attended(**options: Any) -> Valid:
    return call(F.scaled_dot_product_attention, leaf(2, 4, 3, 4), leaf(2, 4, 3, 4), leaf(2, 4, 3, 4), **options)


def tokens() -> data.TokenDataset:
    return data.TokenDataset(ids(20), 4)


def text() -> data.Corpus:
    return data.Corpus("mine", lambda: ["some text to read, ", "and more"])


def assigned(t: Any, index: Any, value: Any) -> None:
    t[index] = value


def replaced(t: Any, name: str, value: Any) -> None:
    setattr(t, name, value)


def nested() -> mt.Tensor:
    return mt.tensor(real(2, 3))
