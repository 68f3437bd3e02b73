"""The command line where the system is hostile: odd files, closed streams, missing folders, no permission."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from children import ENVIRONMENT, command, commands

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX: special files, permissions and descriptors")

TRAIN = [
    "--max-steps",
    "2",
    "--n-layer",
    "1",
    "--n-embd",
    "8",
    "--n-head",
    "1",
    "--block-size",
    "8",
    "--threads",
    "1",
    "--progress",
    "false",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be\n" * 20, encoding="utf-8")
    yield tmp_path
    for path in [tmp_path, *tmp_path.rglob("*")]:  # so that pytest can remove it
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("trained")
    (where / "text.txt").write_text("to be, or not to be\n" * 20, encoding="utf-8")
    ended = command("train", "--data", "text.txt", *TRAIN, "--out-dir", "run", cwd=where)
    assert ended.returncode == 0, ended.stderr
    return where / "run"


@pytest.fixture
def run(trained: Path, folder: Path) -> str:
    """A finished run of 2 steps."""
    shutil.copytree(trained, folder / "run")
    return "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def says(status: int, out: str, err: str) -> str:
    """The error of a command that was refused: one line in the form of all errors, and nothing on stdout."""
    assert (status, out) == (2, ""), err
    *information, line = err.splitlines()
    assert not any("Traceback" in text or text.startswith("minitransformer: ") for text in information), err
    assert len(line.split(": ", 2)) == 3, line
    assert line[-1] in ".?!"
    return line.removeprefix("minitransformer: ")


def all_refused(errors: dict[tuple[str, ...], str], **options: Any) -> None:
    """Each of these commands, by how its error begins; no file is changed either."""
    before = contents(Path.cwd())
    for ended, error in zip(commands(*errors, **options), errors.values(), strict=True):
        assert says(ended.returncode, ended.stdout or "", ended.stderr).startswith(error), ended
    assert contents(Path.cwd()) == before


def refused(*argv: str, error: str, **options: Any) -> None:
    all_refused({argv: error}, **options)


# --- files that are no texts -----------------------------------------------------------------------------


def test_what_is_no_file_is_not_read(folder: Path) -> None:
    """A pipe would hang, and a device never ends."""
    os.mkfifo("pipe")
    for name, target in {"device": "/dev/zero", "to a pipe": "pipe"}.items():
        Path(name).symlink_to(target)
    Path("folder").mkdir()
    os.mkfifo("folder/pipe.txt")
    Path("folder/device.txt").symlink_to("/dev/zero")
    Path("folder/itself").symlink_to(".")
    Path("folder/loop.txt").symlink_to("loop.txt")
    odd = ("pipe", "device", "to a pipe", "/dev/zero", "/dev/null", "/dev/stdin")
    errors = {path: f"corpus '{path}': is neither a file nor a folder. " for path in odd}
    errors["folder"] = "corpus 'folder': the folder holds no .txt, "
    all_refused({("train", "--data", path): error for path, error in errors.items()})
    shutil.copy("text.txt", "folder")
    assert command("train", "--data", "folder", *TRAIN).returncode == 0


def test_a_pipe_in_the_place_of_a_file_of_a_run(run: str) -> None:
    names = ("run.json", "last.json", "model.safetensors", "tokenizer.json", "manifest.json")
    for name in names:
        shutil.copytree(run, name)
        file = next(path for path in Path(name).rglob(name))
        file.unlink()
        os.mkfifo(file)
    all_refused({("resume", name, "--max-steps", "3"): "" for name in names})


# --- streams ---------------------------------------------------------------------------------------------


def closed(*numbers: int) -> Any:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams(run: str, numbers: tuple[int, ...]) -> None:
    """The work is done, nothing meant for one stream comes out of another or in a file."""
    before = contents(Path(run))
    training = ("train", "--data", "text.txt", *TRAIN, "--out-dir", "other")
    evaluated, trained, refused = commands(("eval", run), training, ("nonsense",), preexec_fn=closed(*numbers))
    assert evaluated.returncode == 0
    assert evaluated.stdout.startswith("loss ") is (1 not in numbers)
    assert evaluated.stderr.startswith("run/checkpoints/") is (2 not in numbers)
    assert contents(Path(run)) == before
    assert trained.returncode == 0
    assert contents(Path("other")).keys() == before.keys()
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [("--version", ""), ("--version", "1"), ("train --help", ""), ("eval run", "1"), ("generate run", "")],
)
def test_full_stdout(run: str, argv: str, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        refused(
            *argv.split(),
            error="output: cannot be written: No space left on device. ",
            stdout=full,
            env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_full_stderr(run: str) -> None:
    with Path("/dev/full").open("w") as full:
        refused, generated = commands(("nonsense",), ("generate", run), stderr=full)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert generated.returncode == 0
    assert generated.stdout


# --- surroundings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", ["train --data text.txt", "train --data TEXT", "generate run", "eval run", "resume run"]
)
def test_a_working_folder_that_is_gone(folder: Path, argv: str) -> None:
    (folder / "gone").mkdir()

    def leave() -> None:
        os.chdir(folder / "gone")
        Path.cwd().rmdir()

    words = argv.replace("TEXT", str(folder / "text.txt")).split()
    ended = command(*words, preexec_fn=leave)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("minitransformer: ")
    assert "Traceback" not in ended.stderr
    assert sorted(contents(folder)) == ["text.txt"]


def test_an_empty_environment() -> None:
    """No HOME, no PATH, no locale."""
    ended = command("train", "--data", "text.txt", *TRAIN, env={"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]})
    assert ended.returncode == 0, ended.stderr


def test_a_temporary_folder_that_is_not_there() -> None:
    assert command("train", "--data", "text.txt", *TRAIN, env=ENVIRONMENT | {"TMPDIR": "/nowhere"}).returncode == 0


# --- locales ---------------------------------------------------------------------------------------------


def test_a_locale_without_letters() -> None:
    """Text files are UTF-8 whatever the locale; what stdout cannot show is escaped; a name can be any bytes."""
    Path("bäume.txt").write_text("Fünf süße Bäume, 春眠不覚暁\n" * 20, encoding="utf-8")
    ascii_only = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    options: dict[str, Any] = {"env": ENVIRONMENT | ascii_only}
    ended = command("train", "--data", "bäume.txt", *TRAIN, "--out-dir", "übung", **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()
    refused("generate", "übung", "--prompt", "Bäume", error="encode: U+DCC3 at position 1 is a lone ", **options)
    assert command("generate", "übung", "--prompt", "Bäume", env=ENVIRONMENT).stdout.startswith("Bäume")


def test_bytes_that_are_no_utf8(run: str) -> None:
    refused("generate", run, "--prompt", os.fsdecode(b"to \xff"), error="encode: U+DCFF at position 3 is a lone ")
    refused("train", "--data", os.fsdecode(b"\xff.txt"), error="corpus: '\\udcff.txt' is neither ")
    shutil.copy("text.txt", os.fsdecode(b"\xff.txt"))
    refused("train", "--data", os.fsdecode(b"\xff.txt"), *TRAIN, "--out-dir", "text.txt/x", error="files: text.txt/x ")


# --- permissions -----------------------------------------------------------------------------------------


def bound_by_permissions() -> None:
    """Take from root, for good, what lets it pass over the permissions of its own files."""
    if os.geteuid() == 0:
        bounding_set_drop, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (override, search):
            if libc.prctl(bounding_set_drop, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")


# Each command with the mode of one path changed for as long as it runs.
FORBIDDEN = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from contextvars import copy_context
from io import StringIO
from pathlib import Path
from minitransformer.cli import main

said = []
for path, mode, argv in json.load(sys.stdin):
    rights = Path(path).stat().st_mode
    Path(path).chmod(mode)
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = copy_context().run(main, argv)
    Path(path).chmod(rights)
    said.append([status, out.getvalue(), err.getvalue()])
json.dump(said, sys.stdout)
"""


def forbidden(*cases: tuple[str, int, Sequence[str], str]) -> None:
    """Path, mode, command and how its error begins; all in one process, which gives up its privilege for good."""
    before = contents(Path.cwd())
    program = [sys.executable, "-c", FORBIDDEN]
    child = subprocess.run(
        program,
        input=json.dumps([case[:3] for case in cases]),
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        check=False,
        preexec_fn=bound_by_permissions,
    )
    assert child.returncode == 0, child.stderr
    for said, (path, *_, error) in zip(json.loads(child.stdout), cases, strict=True):
        assert says(*said).startswith(error), (path, said)
    assert contents(Path.cwd()) == before


@pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="only on Linux can root be bound by permissions"
)
def test_without_permission(run: str) -> None:
    Path("closed").mkdir()
    shutil.copy("text.txt", "closed")
    train = ("train", *TRAIN, "--data")
    within = (*train, "text.txt", "--out-dir", "closed/run")
    forbidden(
        ("text.txt", 0o000, (*train, "text.txt"), "corpus '"),
        *(
            ("closed", 0o000, (*train, place), f"corpus '{place}': cannot be read: Permission denied. ")
            for place in ("closed", "closed/text.txt")
        ),
        ("closed", 0o500, within, "files: closed/run could not be "),
        ("closed", 0o000, within, "files: "),
        (".", 0o500, (*train, "text.txt"), "files: runs/text.txt-1 could not be written (Permission denied)"),
    )
    Path("runs").mkdir()
    longer = ("resume", run, "--max-steps", "3")
    files = (
        "run/run.json",
        *(str(path) for name in ("manifest", "config") for path in Path(run).rglob(f"{name}.json")),
    )
    forbidden(
        ("runs", 0o000, (*train, "text.txt"), "files: "),
        *((file, 0o000, longer, "files: ") for file in files),
        ("run", 0o000, ("generate", run), ""),
        ("run/checkpoints", 0o000, ("generate", run), ""),
        ("run/metrics.jsonl", 0o400, longer, "files: run/metrics.jsonl could not be written"),
    )
