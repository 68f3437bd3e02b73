"""Flags of the benchmarks arrive, wrong ones are refused before anything is measured, pictures are drawn."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from small_bench import make_quick, small_recipe

from minitransformer.bench import (
    attention,
    decode,
    efficiency,
    recipe,
    report,
    scaling,
    startup,
    step,
)
from minitransformer.bench.harness import OURS
from minitransformer.bench.recipe import Recipe
from minitransformer.cli import main
from minitransformer.cli.parser import parser
from minitransformer.errors import ConfigError, MiniTransformerError, MissingExtraError

MEASURES = ("step", "attention", "gemm", "decode", "efficiency", "memory", "scaling", "startup")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture
def small(tmp_path: Path) -> Recipe:
    return small_recipe(tmp_path)


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "memory"])
def test_no_rounds(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^bench {name}: rounds is 0, expected an integer from 1. Change rounds."):
        import_module(f"minitransformer.bench.{name}").run(rounds=0)


@pytest.mark.parametrize("name", MEASURES)
def test_flags_are_the_options_of_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option is a flag, and the default that the help names is the one that holds."""
    with pytest.raises(SystemExit):
        parser().parse_args(["bench", name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    options = dict(inspect.signature(import_module(f"minitransformer.bench.{name}").run).parameters)
    for python_only in ("recipe", "recipes", "lengths", "cases"):
        options.pop(python_only, None)
    for option, parameter in options.items():
        flag = "--" + option.removesuffix("_path").replace("_", "-")
        assert f"{flag} " in shown
        found = re.search(rf"{flag} X [^-]*?\(default: (\d+)\)", shown)
        assert found is None or int(found[1]) == parameter.default
        assert found or not isinstance(parameter.default, int) or isinstance(parameter.default, bool)


def test_flags_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    for module in (step, attention, decode, scaling, startup):
        monkeypatch.setattr(module, "run", lambda *args, **options: calls.append((*args, options)))
    for command in (
        "step --n-layer 6 --batch-size 16 --shards 3 --seed 5 --steps 2 --rounds 4 --torch-compile --torch-processes",
        "attention --backend cpu",
        "decode --batch-size 4",
        "scaling --n-embd 384 --block-size 256",
        "startup --plot start.png",
    ):
        assert main(["bench", *command.split()]) == 0
    base = recipe.RECIPE
    assert calls == [
        (
            replace(base, n_layer=6, train=replace(base.train, batch_size=16, shards=3, seed=5)),
            {"steps": 2, "rounds": 4, "torch_compile": True, "torch_processes": True},
        ),
        ({"backend": "cpu"},),
        (base, {"batch_size": 4}),
        (replace(base, n_embd=384, block_size=256), {}),
        ({"plot_path": Path("start.png")},),
    ]


@pytest.mark.parametrize("name", MEASURES)
def test_a_picture_that_cannot_be_drawn_is_refused_first(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = import_module(f"minitransformer.bench.{name}").run
    with pytest.raises(
        ConfigError, match=f"^bench {name}: the plot would go to 'a.gif', expected a name that ends in "
    ):
        run(plot_path="a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=rf"^bench {name} --plot: needs .*minitransformer\[plot\]") as caught:
        run(plot_path=tmp_path / "a.png")
    assert isinstance(caught.value, MiniTransformerError)


Call = tuple[str, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is drawn, by a matplotlib that only notes it."""
    calls: list[Call] = []

    class Note:
        def __init__(self, **options: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def note(*args: Any, **options: Any) -> Any:
                calls.append((name, args, options))
                if name == "savefig":
                    args[0].write(b"a picture")
                return self

            return note

    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    module = types.ModuleType("matplotlib.figure")
    module.Figure = Note  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return calls


def test_picture(small: Recipe, drawn: list[Call], tmp_path: Path) -> None:
    path = tmp_path / "step.svg"
    figures = step.run(small, rounds=1, steps=1, plot_path=path)
    assert path.read_bytes() == b"a picture"
    bars = [(options["label"], args[1]) for name, args, options in drawn if name == "barh"]
    assert bars == [(side, figures["sides"][side]["median"]) for side in (OURS, step.GEMM)]
    said = {name: args for name, args, _ in drawn if name.startswith(("set_", "sup"))}
    assert said["set_title"] == ("bench step",)
    assert said["set_xlabel"] == ("ms",)
    assert said["supxlabel"] == (report.describe(figures["machine"]),)
    assert drawn[-1][2]["format"] == "svg"


def test_curves(drawn: list[Call], tmp_path: Path) -> None:
    figures = efficiency.run(rounds=1, lengths=(20, 40), plot_path=tmp_path / "efficiency.png")
    assert (tmp_path / "efficiency.png").read_bytes() == b"a picture"
    curves = [(options["label"], *args) for name, args, options in drawn if name == "loglog"]
    kinds = figures["kinds"]
    times = [(kind, [20, 40], [of["ms"]["20"]["median"], of["ms"]["40"]["median"]]) for kind, of in kinds.items()]
    assert curves[: len(kinds)] == times
    memory = [("", [20, 40], [of["bytes"]["20"] / 2**20, of["bytes"]["40"] / 2**20]) for of in kinds.values()]
    assert curves[len(kinds) :] == memory
    assert [args for name, args, _ in drawn if name == "set_title"] == [("ms of processor",), ("MiB allocated",)]


def test_a_batch_that_two_cannot_share(small: Recipe) -> None:
    one = replace(small, train=replace(small.train, batch_size=1))
    with pytest.raises(ConfigError, match="two processes cannot share a batch of 1 row"):
        step.run(one, torch_processes=True)
