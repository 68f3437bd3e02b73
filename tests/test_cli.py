"""The command line as a user meets it: every verb, in this process and at a real terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.bench import step, time_to_loss
from minitransformer.bench.recipe import RECIPE
from minitransformer.cli import main, verbs
from minitransformer.cli.parser import parser
from minitransformer.cli.settings import SETTINGS

ROOT = Path(mt.__file__).parent.parent
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n"
TINY = shlex.split("--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --batch-size 4 --threads 1")
VERBS = ["train", "resume", "generate", "eval", "bench", "bench step", "bench time-to-loss"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("poem.txt").write_text(POEM * 40, encoding="utf-8")
    return tmp_path


def cli(*argv: str) -> int:
    return copy_context().run(main, argv)


def train(*argv: str) -> int:
    return cli("train", "--data", "poem.txt", "--max-steps", "6", *TINY, *argv)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A finished run of 6 steps."""
    assert train("--out-dir", "run") == 0
    capsys.readouterr()
    return "run"


def sample(out: str) -> str:
    """What `generate` printed, after a check that it is made of the poem's characters."""
    assert out.endswith("\n")
    assert set(out) <= set(POEM)
    return out.removesuffix("\n")


# --- train -----------------------------------------------------------------------------------------------


def test_train_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    tokens = "900 tokens to train, 100 to validate, vocabulary 22; 3,920 parameters"
    assert lines[0] == f"{Path('poem.txt').resolve()}: {tokens}; run {Path('runs/poem.txt-1')}"
    assert [line.split(":")[0] for line in lines[1:-2]] == [f"step {n}/6" for n in range(1, 7)]
    assert re.fullmatch(
        r"finished after step 6, best val loss 3\.\d{4}; saved in runs.poem.txt-1; a sample:", lines[-2]
    )
    assert lines[-1].startswith("more: minitransformer generate runs")
    assert len(sample(out)) == 1 + 300
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert train() == 0
    assert sorted(os.listdir("runs")) == ["poem.txt-1", "poem.txt-2"]
    assert {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_chinese(tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--max-steps", "300", "--learning-rate", "0.02", "--positions", "rope", "--eval-interval", "1000"]
    assert train(*settings, "--tokenizer", tokenizer, "--out-dir", "run", "--warmup-steps", "20") == 0
    capsys.readouterr()
    assert cli("generate", "run", "--prompt", "春眠不觉晓", "--temperature", "0", "--max-new-tokens", "60") == 0
    assert capsys.readouterr().out.startswith("春眠不觉晓，处处闻啼鸟。夜来")


def test_text_without_a_new_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("poem.txt").write_text("ab" * 300, encoding="utf-8")
    assert train("--out-dir", "run") == 0
    assert capsys.readouterr().out[0] == "a"
    assert cli("generate", "run", "--max-new-tokens", "5") == 0
    assert len(capsys.readouterr().out) == 1 + 5 + len("\n")


def test_numbers_that_are_not_finite_are_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--learning-rate", "1e30") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("minitransformer: train: the loss is nan at step 2. The last checkpoint is")


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
        cli("train", "--data", "poem.txt", *argv)
    return caught.value.args


def test_defaults_are_those_of_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train = configs(monkeypatch)
    assert model == mt.GPTConfig(vocab_size=22, block_size=64, n_layer=4, n_head=4, n_embd=128)
    assert train == mt.TrainConfig(out_dir=str(Path("runs/poem.txt-1")))


def test_every_flag_reaches_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mt.GPTConfig(22, 8, 2, 4, 24, 2, 5, 0.25, False, None, "rms", "swiglu", "window", 3, False)
    train = mt.TrainConfig(
        "none", 7, 5, 0.5, 0.25, 3, "linear", "sgd", (0.5, 0.75), 0.125, 0.5, 2.0, 3, 0.5, 11, 12, 13, 14, 15, 16, 17
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


# --- resume ----------------------------------------------------------------------------------------------


def weights(run: str, step: int) -> bytes:
    return Path(run, "checkpoints", f"step-{step:08d}", "model.safetensors").read_bytes()


def test_resume(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("resume", run) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "run is finished after step 6; to train longer: minitransformer resume run --max-steps 12\n",
    )
    assert cli("resume", run, "--max-steps", "12", "--threads", "2") == 0
    out, err = capsys.readouterr()
    assert len(sample(out)) == 1 + 300
    assert err.splitlines()[0].startswith("step 7/12: ")
    assert re.match("finished after step 12, best val loss .*; saved in run; a sample:", err.splitlines()[-2])


def test_second_interrupt_names_the_way_back(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mt.Trainer, "train", stop)
    assert cli("resume", run, "--max-steps", "9") == 130
    assert capsys.readouterr() == (
        "",
        "\nstopped at once; from the last checkpoint, go on with: minitransformer resume run\n",
    )


# --- generate --------------------------------------------------------------------------------------------


def test_generate(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*argv: str) -> str:
        assert cli("generate", run, "--max-new-tokens", "9", *argv) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return sample(out)

    assert text("--prompt", "春眠").startswith("春眠")
    assert text("--prompt", "春眠") == text("--prompt", "春眠") != text("--prompt", "春眠", "--seed", "1")
    assert text("--prompt", "春", "--temperature", "0") == text("--prompt", "春", "--top-k", "1")
    assert text("--max-new-tokens", "0", "--prompt", "花落") == "花落"
    assert text()[0] == "\n"
    best = next(Path(run, "checkpoints").iterdir())
    assert text("--prompt", "春眠") == text("--prompt", "春眠", "--top-p", "1")
    run = str(best)
    assert text("--prompt", "春眠").startswith("春眠")


def test_generate_streams(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", written.append)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli("generate", run, "--prompt", "春", "--max-new-tokens", "3") == 0
    assert [len(text) for text in written if text] == [2, 1, 1, 1]


def test_stdout_that_knows_ascii_only(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli("generate", run, "--prompt", "春", "--max-new-tokens", "2") == 0
    assert re.fullmatch(rb"\\u6625(\\u[0-9a-f]{4}|\n){2}\r?\n", stream.buffer.getvalue())  # type: ignore[attr-defined]
    assert stream.errors == "strict"


# --- eval ------------------------------------------------------------------------------------------------


def figures(out: str) -> list[float]:
    found = re.fullmatch(r"loss +(\S+) nats per token\nperplexity +(\S+)\nbits per byte +(\S+)\n", out)
    assert found, out
    return [float(text) for text in found.groups()]


def test_eval(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("eval", run) == 0
    out, err = capsys.readouterr()
    loss, perplexity, bits = figures(out)
    assert err == f"{Path(run, 'checkpoints', 'step-00000006')} on its validation text: 99 tokens\n"
    metrics = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert loss == pytest.approx(metrics[-1]["val_loss"], abs=1e-4)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    bytes_ = len((POEM * 40)[-99:].encode())
    assert bits == pytest.approx(loss * 99 / bytes_ / math.log(2), abs=1e-3)
    assert cli("eval", run, "--data", "poem.txt") == 0
    assert capsys.readouterr().err.endswith(" on poem.txt: 999 tokens\n")


def test_eval_of_less_than_a_block(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.txt").write_text("春眠", encoding="utf-8")
    assert cli("eval", run, "--data", "two.txt") == 0
    loss = figures(capsys.readouterr().out)[0]
    model = mt.from_pretrained(run)
    ids = mt.data.load_tokenizer(next(Path(run, "checkpoints").iterdir())).encode("春眠")
    with mt.no_grad():
        expected = model(ids[None, :1], targets=ids[None, 1:]).loss.item()
    assert loss == pytest.approx(expected, abs=1e-4)


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


# --- a real process --------------------------------------------------------------------------------------


def command(*argv: str) -> Sequence[str]:
    return [sys.executable, "-m", "minitransformer", *argv]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_at_a_terminal_interrupted_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    import pty

    parent, child = pty.openpty()
    settings = ["--schedule", "constant", "--warmup-steps", "0"]  # so that more steps do not change the first
    whole = ["--data", "poem.txt", *TINY, *settings, "--max-steps", "100000", "--out-dir", "stopped"]
    process = subprocess.Popen(command("train", *whole), stdin=child, stdout=child, stderr=child, env=ENVIRONMENT)
    os.close(child)
    shown = b""
    with os.fdopen(parent, "rb", buffering=0) as screen:
        while b"loss" not in shown:
            shown += screen.read(4096)
        process.send_signal(signal.SIGINT)
        try:
            while more := screen.read(4096):
                shown += more
        except OSError:  # Linux ends a terminal with EIO
            pass
    assert process.wait() == 130
    lines = shown.decode().replace("\r", "\n").split("\n")
    bars = [line for line in lines if re.search(r"\d+/100000 \[.*step/s, loss \d", line)]
    assert bars
    (said,) = [line for line in lines if line.startswith("interrupted after step")]
    steps = int(re.findall(r"\d+", said)[0])
    assert said == f"interrupted after step {steps}, saved; go on with: minitransformer resume stopped"

    length = ["--max-steps", str(steps + 3)]
    assert cli("resume", "stopped", *length) == 0
    out = capsys.readouterr().out
    assert train(*settings, *length, "--out-dir", "whole") == 0
    assert sample(capsys.readouterr().out) == sample(out)
    assert weights("stopped", steps + 3) == weights("whole", steps + 3)


def test_reader_that_has_gone(run: str) -> None:
    process = subprocess.Popen(
        command("generate", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stream:
        said = stream.read()
    assert process.wait() == 130
    assert said == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_full_disk_behind_stdout(run: str, verb: str) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command(verb, run), stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    assert ended.returncode == 2
    last = ended.stderr.decode().splitlines()[-1]
    assert last == "minitransformer: output: cannot be written: No space left on device. Check where it goes."
