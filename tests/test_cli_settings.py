"""Every setting is a flag, every flag is explained, and what is told arrives."""

from __future__ import annotations

import dataclasses
import re
import shlex
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.bench import step, time_to_loss
from minitransformer.bench.recipe import RECIPE
from minitransformer.cli import main, verbs
from minitransformer.cli.parser import parser
from minitransformer.cli.settings import SETTINGS

BENCHES = ("step", "time-to-loss", "attention", "gemm", "decode", "memory", "scaling", "startup", "gradcheck")
VERBS = ["train", "resume", "generate", "eval", "bench", *(f"bench {what}" for what in BENCHES), "doctor"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abcdefghijklmnopqrstu\n" * 40, encoding="utf-8")


def cli(*argv: str) -> int:
    return copy_context().run(main, argv)


# --- settings --------------------------------------------------------------------------------------------


def test_every_field_is_a_flag() -> None:
    fields = {field.name for cls in (mt.GPTConfig, mt.TrainConfig) for field in dataclasses.fields(cls)}
    namespace = parser().parse_args(["train", "--seed", "3"])
    assert fields - {"vocab_size"} == set(SETTINGS) | {"seed", "threads"}
    assert {"seed", "threads"} <= set(vars(namespace))
    assert len({setting.flag for setting in SETTINGS.values()}) == len(SETTINGS)


@given(st.sampled_from(sorted(SETTINGS.keys() - {"out_dir"})))
def test_defaults_come_back_from_their_text(name: str) -> None:
    setting = SETTINGS[name]
    value = getattr(parser().parse_args(["train", setting.flag, setting.shown]), name)
    assert value == setting.default
    assert type(value) is type(setting.default)


class Caught(Exception):
    pass


def configs(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[mt.GPTConfig, mt.TrainConfig]:
    """The configs that `train` would train with."""

    def catch(trainer: mt.Trainer, *_: Any, **__: Any) -> None:
        raise Caught(trainer.model.config, trainer.config)

    monkeypatch.setattr(verbs, "_finish", catch)
    with pytest.raises(Caught) as caught:
        cli("train", "--data", "text.txt", *argv)
    return caught.value.args


def test_defaults_are_those_of_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train = configs(monkeypatch)
    assert model == mt.GPTConfig(vocab_size=22, block_size=64, n_layer=4, n_head=4, n_embd=128)
    assert train == mt.TrainConfig(out_dir=str(Path("runs/text.txt-1")))


def test_every_flag_reaches_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.GPTConfig(22, 8, 2, 4, 24, 2, 5, 0.25, False, None, "rms", "swiglu", "window", 3, False)
    train = mt.TrainConfig(
        "none",
        7,
        5,
        0.5,
        0.25,
        3,
        "linear",
        "sgd",
        (0.5, 0.75),
        0.125,
        0.5,
        2.0,
        3,
        0.5,
        11,
        12,
        13,
        14,
        15,
        16,
        "cpu",
        17,
    )
    train = dataclasses.replace(train, progress=False)
    argv = []
    for name, value in {**dataclasses.asdict(model), **dataclasses.asdict(train)}.items():
        if name != "vocab_size":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            argv += ["--" + name.replace("_", "-"), text.lower() if isinstance(value, bool | None) else text]
    assert configs(monkeypatch, *argv) == (model, train)


# --- help ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_has_an_example_that_runs(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli(*verb.split(), "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80
    (example,) = re.findall("^example: minitransformer (.*)$", out, re.MULTILINE)
    assert example.startswith(verb)
    parser().parse_args(shlex.split(example))
    if verb == "train":
        assert all(setting.flag + " " in out for setting in SETTINGS.values())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli("--version")
    assert capsys.readouterr().out == f"minitransformer {mt.__version__}\n"


# --- bench -----------------------------------------------------------------------------------------------


def test_bench_passes_on_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(step, "run", lambda *args, **options: calls.append((*args, options)))
    monkeypatch.setattr(time_to_loss, "run", lambda *args, **options: calls.append((*args, options)))
    assert cli("bench", "step", "--json", "step.json") == 0
    assert cli("bench", "time-to-loss", "--max-steps", "5", "--seed", "3") == 0
    seeded = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, seed=3))
    assert calls == [
        (RECIPE, {"json_path": Path("step.json")}),
        (seeded, {"steps": 5, "json_path": None}),
    ]
