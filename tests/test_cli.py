"""The command line as a user meets it: every verb, in this process and at a real terminal."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

import minitransformer as mt
from minitransformer.cli import main, verbs

ROOT = Path(mt.__file__).parent.parent
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n"
TINY = shlex.split("--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --batch-size 4 --threads 1")


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(verbs._SAMPLE, "max_new_tokens", 3)
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
    assert sorted(path.name for path in Path("runs").iterdir()) == ["poem.txt-1", "poem.txt-2"]
    assert {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("kind", ["window --window 5", "global_window --window 5", "strided", "linear"])
def test_kinds_of_attention(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--out-dir", "run", "--attention", *kind.split()) == 0
    capsys.readouterr()
    assert cli("generate", "run", "--prompt", "春眠", "--max-new-tokens", "30", "--seed", "1") == 0
    assert len(sample(capsys.readouterr().out)) == 32


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
    *_, line = err.splitlines()
    assert re.match(r"minitransformer: train: the loss is nan at step 2: \w+ in \S+ makes (nan|infinity) from fi", line)
    file = re.search(r"See it with `minitransformer inspect (\S+)`\. The last checkpoint is kept\.", line)
    assert file is not None
    assert main(["inspect", file[1]]) == 0


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
    assert err.startswith("run: from step 6 to 12, on ")
    assert err.splitlines()[1].startswith("step 7/12: ")
    assert re.match("finished after step 12, best val loss .*; saved in run; a sample:", err.splitlines()[-2])


def test_second_interrupt_names_the_way_back(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mt.Trainer, "train", stop)
    assert cli("resume", run, "--max-steps", "9") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\nstopped at once; from the last checkpoint, go on with: minitransformer resume run\n")


# --- generate --------------------------------------------------------------------------------------------


def test_generate(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*argv: str, path: str = run) -> str:
        assert cli("generate", path, "--max-new-tokens", "9", *argv) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return sample(out)

    assert text("--prompt", "春眠").startswith("春眠")
    assert text("--prompt", "春眠") == text("--prompt", "春眠", "--seed", "0")
    assert text("--prompt", "春眠") != text("--prompt", "春眠", "--seed", "1")
    assert text("--prompt", "春", "--temperature", "0") == text("--prompt", "春", "--top-k", "1")
    assert text("--max-new-tokens", "0", "--prompt", "花落") == "花落"
    assert text()[0] == "\n"
    (best,) = Path(run, "checkpoints").iterdir()
    assert text("--prompt", "春眠", path=str(best)) == text("--prompt", "春眠", "--top-p", "1")


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


# --- a real process --------------------------------------------------------------------------------------


def command(*argv: str) -> Sequence[str]:
    return [sys.executable, "-m", "minitransformer", *argv]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_at_a_terminal_interrupted_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl
    import pty
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    settings = ["--schedule", "constant", "--warmup-steps", "0"]  # so that more steps do not change the first
    whole = ["--data", "poem.txt", *TINY, *settings, "--max-steps", "3000", "--out-dir", "stopped"]
    process = subprocess.Popen(command("train", *whole), stdin=child, stdout=child, stderr=child, env=ENVIRONMENT)
    os.close(child)
    shown, asked = b"", False
    with os.fdopen(parent, "rb", buffering=0) as screen:
        try:
            while more := screen.read(4096):
                shown += more
                if b", loss" in shown and not asked:
                    process.send_signal(signal.SIGINT)
                    asked = True
        except OSError:  # Linux ends a terminal with EIO
            pass
    assert process.wait() == 130
    lines = shown.decode().replace("\r", "\n").split("\n")
    bars = [line for line in lines if re.search(r"\d+/3000 [\d:]+, loss \d", line)]
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
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command(verb, run), stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT, check=False)
    assert ended.returncode == 2
    last = ended.stderr.decode().splitlines()[-1]
    assert last == "minitransformer: output: cannot be written: No space left on device. Check where it goes."
