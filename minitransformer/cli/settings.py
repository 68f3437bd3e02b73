"""The settings of a training as text: how each is read from a flag, and how its default is shown."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from minitransformer.models import GPTConfig
from minitransformer.training import TrainConfig

# nanoGPT's shape for a CPU; the other defaults are those of GPTConfig and TrainConfig.
_SHAPE = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}


class Setting(NamedTuple):
    """A field of `config`, read by `parse` from the text of `flag`."""

    config: type
    flag: str
    parse: Callable[[str], Any]
    default: Any

    @property
    def shown(self) -> str:
        """The default as `parse` reads it."""
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return str(self.default).lower() if isinstance(self.default, bool | None) else str(self.default)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.9,0.99, got {text!r}") from None


def _parser_of(hint: Any) -> Callable[[str], Any]:
    """The function that reads a field of this type from text."""
    if get_origin(hint) is tuple:
        return _numbers
    kinds = get_args(hint) or (hint,)
    parsers: dict[Any, Callable[[str], Any]] = {int: whole, float: number, bool: _bool, str: str}
    parse = parsers[kinds[0]]
    return parse if len(kinds) == 1 else lambda text: None if text == "none" else parse(text)


def _settings(config: type) -> dict[str, Setting]:
    hints = get_type_hints(config)
    return {
        field.name: Setting(
            config,
            "--" + field.name.replace("_", "-"),
            _parser_of(hints[field.name]),
            _SHAPE.get(field.name, field.default),
        )
        for field in dataclasses.fields(config)
    }


# By field. The text decides vocab_size, and the flags of seed and threads are those of every verb.
SETTINGS = {
    name: setting
    for name, setting in {**_settings(GPTConfig), **_settings(TrainConfig)}.items()
    if name not in ("vocab_size", "seed", "threads")
}
SETTINGS["out_dir"] = SETTINGS["out_dir"]._replace(parse=str)  # a folder may be called "none"
