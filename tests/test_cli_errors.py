"""What the command line refuses: one line on stderr, nothing on stdout, status 2, and no file changed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path

import pytest

from minitransformer.cli import main, verbs
from minitransformer.errors import CheckpointError

TRAIN = "train --data text.txt --max-steps 3 --n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --threads 1 "
SEE = "See `minitransformer train --help`."
NEITHER = "is neither a known corpus (python-docs, shakespeare) nor an existing file or folder."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be\n" * 20, encoding="utf-8")
    return tmp_path


Refused = Callable[[str], str]


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that is refused; returns its error line."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def run(command: str) -> str:
        capsys.readouterr()
        before = files()
        assert copy_context().run(main, shlex.split(command)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        *information, line = err.splitlines()
        assert all(text.startswith(str(folder / "text.txt")) for text in information)  # what is to be trained
        assert files() == before
        return line.removeprefix("minitransformer: ").replace(str(folder) + os.sep, "")

    return run


@pytest.fixture
def run(folder: Path) -> str:
    """A finished run of 3 steps."""
    assert copy_context().run(main, shlex.split(TRAIN + "--out-dir run")) == 0
    return "run"


def test_refused_settings(refused: Refused) -> None:
    for flags, message in {
        "--n-layer x": f"train: argument --n-layer: expected a whole number, got 'x'. {SEE}",
        "--n-layer 1e3": f"train: argument --n-layer: expected a whole number, got '1e3'. {SEE}",
        "--n-layer 0": "GPTConfig: n_layer is 0, expected a positive integer. Pass such a number.",
        "--n-layer none": f"train: argument --n-layer: expected a whole number, got 'none'. {SEE}",
        "--n-head 3": "GPTConfig: n_embd 16 is not divisible by n_head 3. "
        "Choose a number of heads that divides the width.",
        "--block-size -1": "prepare: block_size must be a whole number from 1 to 2**64 - 1, got -1. Change block_size.",
        "--dropout 1": "GPTConfig: the dropout rate is 1.0, expected a number in [0, 1). 0 turns dropout off.",
        "--bias maybe": f"train: argument --bias: expected true or false, got 'maybe'. {SEE}",
        "--window 3": "GPTConfig: attention is 'full' with window 3. Set attention='window' and window=N together.",
        "--positions gauss": "GPTConfig: positions is 'gauss', expected one of "
        "('learned', 'sinusoidal', 'rope', 'alibi', None). Pass one of them.",
        "--max-steps -1": "TrainConfig: max_steps is -1, expected a whole number of at least 0. Change max_steps.",
        "--batch-size 0": "TrainConfig: batch_size is 0, expected a whole number of at least 1. Change batch_size.",
        "--learning-rate fast": f"train: argument --learning-rate: expected a number, got 'fast'. {SEE}",
        "--learning-rate nan": "TrainConfig: learning_rate is nan, expected a number of at least 0. "
        "Change learning_rate.",
        "--learning-rate 1e-9": "TrainConfig: min_learning_rate 0.0001 is above learning_rate 1e-09. "
        "Lower min_learning_rate too.",
        "--betas 1": "TrainConfig: betas is (1.0,), expected two numbers. Pass (0.9, 0.99).",
        "--betas a,b": f"train: argument --betas: expected numbers such as 0.9,0.99, got 'a,b'. {SEE}",
        "--seed -1": "TrainConfig: seed is -1, expected an integer from 0 to 2**64 - 1. Pass such a seed.",
        "--threads 0": "TrainConfig: threads is 0, expected a whole number of at least 1. Change threads.",
        "--device cuda": "TrainConfig: device 'cuda' is not available in this version, expected 'cpu'. Use 'cpu'.",
        "--optimizer lion": "TrainConfig: optimizer is 'lion', expected one of ('adamw', 'adam', 'sgd'). "
        "Pass one of them.",
        "--tokenizer bpe": "tokenizer: there is no tokenizer of kind 'bpe'. Known: byte, char.",
        "--tokenizer chr": "tokenizer: there is no tokenizer of kind 'chr'. Did you mean 'char'?",
    }.items():
        assert refused(TRAIN + flags) == message


def test_refused_usage(refused: Refused) -> None:
    for command, message in {
        "": "usage: the following arguments are required: VERB. See `minitransformer --help`.",
        "trian": "usage: argument VERB: invalid choice: 'trian' (choose from ",
        "bench": "bench: the following arguments are required: WHAT. See `minitransformer bench --help`.",
        "generate": "generate: the following arguments are required: RUN. See `minitransformer generate --help`.",
        "train --n-lyer 2": "train: unknown argument '--n-lyer'. Did you mean --n-layer?",
        "train --max_steps=2": "train: unknown argument '--max_steps=2'. Did you mean --max-steps?",
        "train --max-step 2": "train: unknown argument '--max-step'. Did you mean --max-steps?",
        "train text.txt": "train: unknown argument 'text.txt'. To train on that text: --data text.txt.",
        "generate run --promt x": "generate: unknown argument '--promt'. Did you mean --prompt?",
        "generate run --prompt": "generate: argument --prompt: expected one argument. See ",
        "bench step --json no/where": "bench step: argument --json: expected a file in a folder that can be written "
        "to, got 'no/where'. See `minitransformer bench step --help`.",
        "bench step --json .": "bench step: argument --json: expected a file in a folder that can be written to, ",
        "bench step --threads 0": "set_num_threads: the number of threads must be an integer of at least 1, got 0. ",
        "bench time-to-loss --max-steps 0": "bench time-to-loss: steps is 0, expected an integer from 1. ",
    }.items():
        assert refused(command).startswith(message)


def test_refused_texts(refused: Refused) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_text("hi\n", encoding="utf-8")
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    Path("folder").mkdir()
    for data, message in {
        "nowhere.txt": f"corpus: 'nowhere.txt' {NEITHER} Known: python-docs, shakespeare. "
        "Or give the path of a text file or folder.",
        "pyton-docs": f"corpus: 'pyton-docs' {NEITHER} Did you mean 'python-docs'? "
        "Or give the path of a text file or folder.",
        "": f"corpus: '' {NEITHER} Known: ",
        "empty.txt": "corpus 'empty.txt': is empty. Give a file or folder with text.",
        "short.txt": "corpus 'short.txt': too short: 3 tokens for training and 0 for validation, ",
        "image.png": "corpus file 'image.png': is not UTF-8: byte 0x89 at offset 0 (invalid start byte). ",
        "folder": "corpus 'folder': the folder holds no .txt, .md, .rst, .py file. ",
    }.items():
        assert refused(f"train --data '{data}'").startswith(message)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_permissions(refused: Refused, folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o500)
    assert refused(TRAIN + "--out-dir closed/run").startswith("files: closed/run could not be written (Permission")
    (folder / "closed").chmod(0o000)
    assert refused("train --data closed").startswith("corpus 'closed': cannot be read: Permission denied.")
    (folder / "closed").chmod(0o700)


def test_nothing_is_overwritten(refused: Refused, run: str) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    fix = "Use `minitransformer resume run`, or name another folder."
    assert refused(TRAIN + "--out-dir run") == f"run: run already holds a run. {fix}"
    other = "run: mine is a folder with other files in it, expected nothing. Name another folder."
    assert refused(TRAIN + "--out-dir mine") == other
    assert refused(TRAIN + "--out-dir text.txt") == "run: text.txt is a file, expected nothing. Name another folder."
    assert refused(TRAIN + "--out-dir text.txt/run").startswith("files: text.txt/run could not be written (")


def test_too_large_for_memory(refused: Refused) -> None:
    message = refused(TRAIN + "--n-head 1 --n-embd 1000000000000000")
    assert message.startswith("memory: there is too little: Unable to allocate ")
    assert message.endswith(". Make batch_size, block_size or the model smaller.")


def test_refused_to_generate(refused: Refused, run: str) -> None:
    drawn = "restricts a draw, and at temperature 0 nothing is drawn. Leave out one of the two."
    for flags, message in {
        "--prompt ''": "generate: the prompt is empty. Give at least one character: --prompt TEXT.",
        "--prompt 'to bé'": "encode: character 'é' (U+00E9) at position 4 is not among the 9 characters ",
        "--temperature 0 --top-k 3": f"generate: --top-k {drawn}",
        "--temperature 0 --min-p 0.5": f"generate: --min-p {drawn}",
        "--temperature -1": "generate: temperature is -1.0, expected a positive number. ",
        "--max-new-tokens -3": "generate: max_new_tokens is -3, expected an integer of at least 0. ",
        "--top-p 2": "generate: top_p is 2.0, expected a number above 0 and at most 1. ",
        "--seed -1": "generate: seed is -1, expected an integer from 0 to 2**64 - 1. ",
    }.items():
        assert refused(f"generate run {flags}").startswith(message)


def test_no_run(refused: Refused) -> None:
    Path("folder").mkdir()
    for verb in ("generate", "eval"):
        assert refused(f"{verb} nowhere").startswith("from_pretrained: there is no folder nowhere. ")
        for path in ("folder", "text.txt"):
            assert refused(f"{verb} {path}").startswith(
                f"from_pretrained: {path} holds no model, looked for config.json. "
            )
    assert refused("resume folder").startswith("run: folder holds no training run, looked for folder")


def test_stopped_before_its_first_checkpoint(refused: Refused, run: str) -> None:
    Path("run/last.json").unlink()
    Path("run/best.json").unlink()
    message = "resume: run was stopped before its first checkpoint. Start another run."
    assert refused("resume run --max-steps 9") == message


def test_a_model_without_tokenizer_or_text(refused: Refused, run: str) -> None:
    checkpoint = next(Path("run/checkpoints").iterdir())
    checkpoint = checkpoint.rename("model")
    assert refused("eval model").startswith("run: model holds no training run")
    Path("model/tokenizer.json").unlink()
    message = "tokenizer: model holds a model and no tokenizer.json. Put it there with tokenizer.save(folder)."
    assert refused("generate model") == message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "manifest.json"])
def test_a_flipped_bit(refused: Refused, run: str, name: str) -> None:
    file = next(Path("run/checkpoints").iterdir()) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in ("generate run", "eval run", "resume run --max-steps 5"):
        assert refused(command).startswith(f"checkpoint: {file} is damaged: expected SHA-256 ")


def test_a_changed_text(refused: Refused, run: str) -> None:
    fix = "Restore the text that run was trained on; eval takes another one with --data PATH."
    text = Path("text.txt").read_text(encoding="utf-8")
    for changed, problem in {
        text.replace("not", "ton"): "corpus 'text.txt': has changed since the run was started",
        text + "\n": "corpus 'text.txt': has changed since the run was started",
        text + "!": "corpus 'text.txt': character '!' (U+0021) at position 400 is not among the 9 characters this "
        "tokenizer was trained on (of the piece that begins at character 0)",
        "": "corpus 'text.txt': is empty",
    }.items():
        Path("text.txt").write_text(changed, encoding="utf-8")
        for command in ("resume run --max-steps 5", "eval run"):
            assert refused(command) == f"{problem}. {fix}"
    Path("text.txt").unlink()
    assert refused("resume run --max-steps 5").endswith(f" nor an existing file or folder. {fix}")


def test_refused_to_resume(refused: Refused, run: str) -> None:
    assert refused("resume run --seed 3") == "resume: a run keeps its seed. Leave out --seed."
    assert refused("resume run --max-steps -1").startswith("TrainConfig: max_steps is -1, expected a whole number")
    later = "Name a later step, or leave it out."
    assert refused("resume run --max-steps 2") == f"resume: --max-steps is 2, and run is after step 3 already. {later}"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        main(["generate", "nowhere", "--debug"])


def test_interrupted_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "prepare", stop)
    assert main(["train", "--data", "text.txt"]) == 130
    assert capsys.readouterr() == ("", "\nminitransformer: interrupted\n")
