"""Models: one architecture a file, each with a frozen dataclass config."""

from __future__ import annotations

from pathlib import Path

from minitransformer.checkpoint import RunFolder
from minitransformer.errors import CheckpointError, nearest
from minitransformer.files import read_json
from minitransformer.models.base import Model, ModelOutput, read_weights
from minitransformer.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "Model", "ModelOutput", "from_pretrained", "pretrained_folder"]

_MODELS = {"GPT": (GPT, GPTConfig)}


def pretrained_folder(path: str | Path) -> Path:
    """The folder with config.json for `path`: itself, or the best (else the last) checkpoint of a run."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError("from_pretrained", f"there is no folder {path}", "Check the path, as with: ls runs")
    if not (path / "run.json").exists():
        return path
    run = RunFolder.open(path)
    return run.load("best" if (path / "best.json").exists() else "last").folder


def from_pretrained(folder: str | Path) -> Model:
    """The model that `save_pretrained` wrote, or the best checkpoint of a training run, in eval mode.

    Raises `CheckpointError` for a folder without a model or with a damaged one, `ConfigError` for a config
    that this version does not know.
    """
    place = pretrained_folder(folder)
    if not (place / "config.json").exists():
        raise CheckpointError(
            "from_pretrained",
            f"{place} holds no model, looked for config.json",
            "Pass the folder of a training run or of save_pretrained",
        )
    config = read_json(place / "config.json", "the config of the model")
    kind = config.pop("model_type", None)
    if kind not in _MODELS:
        raise CheckpointError("from_pretrained", f"unknown model_type {kind!r}", nearest(str(kind), _MODELS))
    model_type, config_type = _MODELS[kind]
    arrays, dtype = read_weights(place / "model.safetensors")
    model = model_type(config_type(**config))
    model.to(dtype)
    model.load_state_dict(arrays)
    model.eval()
    return model
