"""What the command line refuses: one line on stderr, nothing on stdout, status 2, and no file changed."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path

import pytest

from minitransformer.cli import main, verbs
from minitransformer.errors import CheckpointError
from minitransformer.models import BERTConfig, BERTForMaskedLM

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
        return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(verbs._SAMPLE, "max_new_tokens", 3)
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
        "--window 3": "GPTConfig: attention is 'full' with window 3. Set attention='window' or 'global_window' and "
        "window=N together.",
        "--positions gauss": "GPTConfig: positions is 'gauss', expected one of "
        "('learned', 'sinusoidal', 'rope', 'alibi', None). Pass one of them.",
        "--max-steps -1": "TrainConfig: max_steps is -1, expected a whole number of at least 0. Change max_steps.",
        "--batch-size 0": "TrainConfig: batch_size is 0, expected a whole number of at least 1. Change batch_size.",
        "--learning-rate fast": f"train: argument --learning-rate: expected a number, got 'fast'. {SEE}",
        "--learning-rate nan": "TrainConfig: learning_rate is nan, expected a number of at least 0. "
        "Change learning_rate.",
        "--learning-rate -1": "TrainConfig: learning_rate is -1.0, expected a number of at least 0. "
        "Change learning_rate.",
        "--attention window --window 0": "GPTConfig: window is 0, expected a positive integer. Pass such a number.",
        "--learning-rate 1e-9": "TrainConfig: min_learning_rate 0.0001 is above learning_rate 1e-09. "
        "Lower min_learning_rate too.",
        "--betas 1": "TrainConfig: betas is (1.0,), expected two numbers. Pass (0.9, 0.99).",
        "--betas a,b": f"train: argument --betas: expected numbers such as 0.9,0.99, got 'a,b'. {SEE}",
        "--seed -1": "TrainConfig: seed is -1, expected an integer from 0 to 2**64 - 1. Pass such a seed.",
        "--seed 1e3": f"train: argument --seed: expected a whole number, got '1e3'. {SEE}",
        "--threads 0": "TrainConfig: threads is 0, expected a whole number of at least 1. Change threads.",
        "--device tpu": "TrainConfig: device is 'tpu', expected one of ('auto', 'cpu', 'cuda', 'simulator'). "
        "Pass one of them.",
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
    Path("utf16.txt").write_text("to be", encoding="utf-16")
    Path("loop").symlink_to("loop")
    Path("dangling.txt").symlink_to("nowhere")
    for data, message in {
        "utf16.txt": "corpus file 'utf16.txt': is not UTF-8: byte 0xFF at offset 0 (invalid start byte). Convert it ",
        "loop": "corpus 'loop': cannot be read: Too many levels of symbolic links. ",
        "dangling.txt": f"corpus: 'dangling.txt' {NEITHER} ",
        300 * "x": f"corpus '{300 * 'x'}': cannot be read: File name too long. ",
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


def test_nothing_is_overwritten(refused: Refused, run: str) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    fix = "Use `minitransformer resume run`, or name another folder."
    assert refused(TRAIN + "--out-dir run") == f"run: run already holds a run. {fix}"
    other = "run: mine is a folder with other files in it, expected nothing. Name another folder."
    assert refused(TRAIN + "--out-dir mine") == other
    assert refused(TRAIN + "--out-dir text.txt") == "run: text.txt is a file, expected nothing. Name another folder."
    assert refused(TRAIN + "--out-dir text.txt/run").startswith("files: text.txt/run could not be written (")


def test_refused_places(refused: Refused) -> None:
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    for place in ("dangling", "dangling/run", "text.txt/run", "/dev/null/run"):
        assert refused(f"{TRAIN} --out-dir {place}").startswith(f"files: {place} could not be written (")
    assert "File name too long" in refused(f"{TRAIN} --out-dir {300 * 'x'}")
    for place in ("loop", "loop/run"):
        assert refused(f"{TRAIN} --out-dir {place}").startswith("files: ")


def test_sizes_beyond_all_measure(refused: Refused) -> None:
    for flags, message in {
        f"--shards {10**12}": f"TrainConfig: shards is {10**12}, expected a whole number of at most 2147483647. ",
        f"--max-steps {10**30}": f"TrainConfig: max_steps is {10**30}, expected a whole number of at most 2147483647. ",
        f"--eval-batches {10**21}": f"TrainConfig: eval_batches is {10**21}, expected a whole number of at most ",
        "--grad-accumulation-steps 20000": "TrainConfig: grad_accumulation_steps is 20000, expected a whole number of "
        "at most 10000. ",
        f"--threads {10**30}": f"TrainConfig: threads is {10**30}, expected a whole number of at most 2147483647. ",
    }.items():
        assert refused(TRAIN + flags).startswith(message)


def test_more_shards_and_threads_than_can_ever_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    """No list of a billion shards is made, and no thread that has nothing to do."""
    printed = []
    for nth, flags in enumerate(("--shards 12", "--shards 1000000000 --threads 100000")):
        assert copy_context().run(main, shlex.split(f"{TRAIN} --out-dir run-{nth} {flags}")) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert Path("run-0/metrics.jsonl").read_bytes() == Path("run-1/metrics.jsonl").read_bytes()


def test_too_large_for_memory(refused: Refused) -> None:
    message = refused(TRAIN + "--n-head 1 --n-embd 1000000000000000")
    assert message == "GPTConfig: n_embd is 1000000000000000, expected at most 2147483647. Pass a smaller number."
    message = refused(TRAIN + "--n-head 1 --n-embd 2000000000")
    assert message.startswith("GPT: 48,000,000,064,000,000,000 parameters need 192,000,000,256.0 GB, there are ")
    assert message.endswith(" GB. Make vocab_size, block_size, n_layer or n_embd smaller.")


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
        "--top-p nan": "generate: top_p is nan, expected a number above 0 and at most 1. ",
        "--top-k 0": "generate: top_k is 0, expected an integer of at least 1. ",
        "--temperature nan": "generate: temperature is nan, expected a positive number. ",
        "--temperature inf": "generate: temperature is inf, expected a positive number. ",
        "--min-p 2": "generate: min_p is 2.0, expected a number from 0 to 1. ",
        "--repetition-penalty 0": "generate: repetition_penalty is 0.0, expected a positive number. ",
        "--prompt 'to \udcff'": "encode: U+DCFF at position 3 is a lone surrogate, no character. ",
        "--prompt 'to \0'": "encode: character '\\x00' (U+0000) at position 3 is not among the 9 characters ",
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
    for entry in Path("run").iterdir():
        if entry.name != "run.json":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    message = "run: run was stopped before its first checkpoint. Use `minitransformer resume run` to start it again."
    for verb in ("generate", "eval"):
        assert refused(f"{verb} run") == message


def test_pointers_lost(refused: Refused, run: str) -> None:
    Path("run/last.json").unlink()
    assert refused("resume run --max-steps 9").endswith(
        "last.json. Use `cp run/best.json run/last.json` to take the best one (step 3), which is intact."
    )
    Path("run/best.json").unlink()
    fix = "Restore one of them from a copy; `minitransformer generate run/checkpoints/step-00000003` shows whether "
    message = "run: last.json and best.json of run are missing, and there are checkpoints, such as step-00000003. "
    assert refused("resume run --max-steps 9") == message + fix + "that model is worth it."


def test_a_model_without_tokenizer_or_text(refused: Refused, run: str) -> None:
    checkpoint = next(Path("run/checkpoints").iterdir())
    checkpoint = checkpoint.rename("model")
    assert refused("eval model").startswith("run: model holds no training run")
    Path("model/tokenizer.json").unlink()
    message = "tokenizer: model holds a model and no tokenizer.json. Put it there with tokenizer.save(folder)."
    assert refused("generate model") == message


def test_a_model_that_continues_no_text(refused: Refused) -> None:
    config = BERTConfig(5, 4, 1, 2, 6)
    BERTForMaskedLM(config).save_pretrained("model")
    for verb in ("generate", "eval"):
        message = "model: model holds a BERTForMaskedLM, expected a GPT. Use it in Python: mt.from_pretrained(folder)."
        assert refused(f"{verb} model") == message


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
