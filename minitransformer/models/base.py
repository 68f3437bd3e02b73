"""What all models share: their output, and folders that hold config, weights and tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minitransformer.autograd import Tensor
from minitransformer.checkpoint import pack_arrays, unpack_arrays
from minitransformer.checks import check_size
from minitransformer.errors import AllocationError, CheckpointError, ConfigError, nearest
from minitransformer.files import json_bytes, make_folders, refusals_of_the_system, write_bytes
from minitransformer.memory import total_memory
from minitransformer.nn.kv_cache import DecoderCache, KVCache
from minitransformer.nn.linear_attention import StateCache
from minitransformer.nn.module import Module

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns; fields that were not asked for are None."""

    loss: Tensor | None = None  # one number: the mean over valid targets
    logits: Tensor | None = None  # (B, T, V), or as the model says
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # (B, T, C): the embeddings, then what each layer made of them
    cache: KVCache | DecoderCache | StateCache | None = None
    pooler_output: Tensor | None = None  # (B, C), one vector for each row


class Config:
    """Base of config dataclasses: a field that does not exist is a `ConfigError` with the nearest name."""

    def __new__(cls: type[C], /, *args: Any, **fields: Any) -> C:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in fields:
            if name not in known:
                raise ConfigError(cls.__name__, f"has no field {name!r}", nearest(name, known))
        return super().__new__(cls)

    def keep_size(self, name: str, most: int = 2**31 - 1) -> None:
        """Keep the field `name`, a positive integer up to `most`, as Python's: one of NumPy has no JSON."""
        op, value = type(self).__name__, getattr(self, name)
        check_size(op, **{name: value})
        if value > most:
            raise ConfigError(op, f"{name} is {value}, expected at most {most}", "Pass a smaller number")
        object.__setattr__(self, name, int(value))


def check_memory(op: str, num_parameters: int, fix: str, size_of_tables: int = 0) -> None:
    """`AllocationError` for a model whose float32 parameters, with tables of so many bytes, exceed the memory."""
    size, there = 4 * num_parameters + size_of_tables, total_memory()
    if there is not None and size > there:
        problem = f"{num_parameters:,} parameters need {size / 1e9:,.1f} GB, there are {there / 1e9:,.1f} GB"
        raise AllocationError(op, problem, fix)


class Model(Module):
    """A module made from one frozen config dataclass, which is all it takes to build it again."""

    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Model:
        """The model of a config, with fresh weights."""
        return cls(config)  # type: ignore[call-arg]

    def num_targets(self, **batch: Any) -> int:
        """How many targets the loss of `self(**batch)` is a mean over."""
        raise NotImplementedError(f"{type(self).__name__} has no num_targets")

    def files(self) -> dict[str, bytes]:
        """model.safetensors, which holds the config too, and config.json, as they are saved."""
        config = {"model_type": type(self).__name__, **dataclasses.asdict(self.config)}
        return {
            "model.safetensors": pack_arrays(self.state_dict(), {"config": config}),
            "config.json": json_bytes("the config", config, indent=2),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json into `folder`, each atomically.

        The tokenizer goes beside them with `tokenizer.save(folder)`.
        """
        with refusals_of_the_system(Path(folder)):
            make_folders(Path(folder))
        for name, data in self.files().items():
            write_bytes(Path(folder) / name, data)


def read_weights(path: Path) -> tuple[dict[str, np.ndarray], np.dtype, dict[str, Any]]:
    """The parameters in a safetensors file, their one dtype, and the config of their model.

    Raises `CheckpointError` if they cannot be a model's.
    """
    arrays, metadata = unpack_arrays(path)
    dtypes = {array.dtype for array in arrays.values()}
    config = metadata.get("config")
    if len(dtypes) != 1 or not dtypes <= {np.dtype(np.float32), np.dtype(np.float64)}:
        problem = f"{path} holds dtypes {sorted(map(str, dtypes))}, expected all float32 or all float64"
        raise CheckpointError("read_weights", problem, "Load weights that minitransformer saved")
    if not isinstance(config, dict):
        problem = f"{path} does not say which model its weights are of, expected the config in its metadata"
        raise CheckpointError("read_weights", problem, "Load weights that minitransformer saved")
    return arrays, dtypes.pop(), config
