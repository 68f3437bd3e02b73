"""Models: one architecture a file, each with a frozen dataclass config."""

from __future__ import annotations

from pathlib import Path

from minitransformer.checkpoint import RunFolder
from minitransformer.errors import CheckpointError, nearest
from minitransformer.files import is_there, json_bytes, parse_json, read_bytes
from minitransformer.models.base import Model, ModelOutput, read_weights
from minitransformer.models.gpt import GPT, GPTConfig
from minitransformer.models.transformer import Transformer, TransformerConfig

__all__ = ["GPT", "GPTConfig", "Model", "ModelOutput", "Transformer", "from_pretrained", "pretrained_folder"]

_MODELS: dict[str, tuple[type[Model], type]] = {
    "GPT": (GPT, GPTConfig),
    "Transformer": (Transformer, TransformerConfig),
}


def pretrained_folder(path: str | Path) -> Path:
    """The folder with config.json for `path`: itself, or the best (else the last) checkpoint of a run."""
    path = Path(path)
    if not is_there(path):
        raise CheckpointError("from_pretrained", f"there is no folder {path}", "Check the path, as with: ls runs")
    if not is_there(path / "run.json"):
        return path
    run = RunFolder.open(path)
    return run.load("best" if run.has_checkpoint() and run.has_best() else "last").folder


def from_pretrained(folder: str | Path) -> Model:
    """The model that `save_pretrained` wrote, or the best checkpoint of a training run, in eval mode.

    Raises `CheckpointError` for a folder without a model, with a damaged one, or with a config.json that is not
    that of the weights; `ConfigError` for a config that this version does not know.
    """
    place = pretrained_folder(folder)
    if not is_there(place / "config.json"):
        raise CheckpointError(
            "from_pretrained",
            f"{place} holds no model, looked for config.json",
            "Pass the folder of a training run or of save_pretrained",
        )
    file, what = place / "config.json", "the config of the model"
    data = read_bytes(file, what)
    written = parse_json(data, file, what)
    arrays, dtype, config = read_weights(place / "model.safetensors")
    if data != json_bytes(what, config, indent=2):
        names = [name for name in {**config, **written} if written.get(name) != config.get(name)]
        differences = ", ".join(f"{n} is {written.get(n)!r} and was {config.get(n)!r}" for n in names)
        raise CheckpointError(
            "from_pretrained",
            f"{file} is not the config that the weights were saved with: {differences or 'it was reformatted'}",
            "Restore it from a copy, or save the model again",
        )
    kind = config.pop("model_type", None)
    if kind not in _MODELS:
        raise CheckpointError("from_pretrained", f"unknown model_type {kind!r}", nearest(str(kind), _MODELS))
    model_type, config_type = _MODELS[kind]
    model = model_type.from_config(config_type(**config))
    model.to(dtype)
    model.load_state_dict(arrays)
    model.eval()
    return model
